"""What the ranks of a group leave for each other when they fail, and which of it is still news.

A process that catches errors lives on, so a word about one that was handled must never be given as
the cause of a later one. Each rank has one place in the group's store and numbers its failures. A
reader passes over what is older than a step that the rank has since taken together with it:

- ranks that compare something tell each other how many failures they have had: those are handled;
- ranks run the graphs that have collectives equally often, and count these runs: what stopped a
  rank is handled when a later run has come to its end here;
- what a reader has told once, or has itself failed in, it does not tell again.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ascend_sp.runtime._pytorch import Store, group_by_name, store_of
from ascend_sp.runtime.errors import TopologyError
from ascend_sp.runtime.topology import Topology

At: TypeAlias = "tuple[str, int]"
"""What a rank was about: a graph and the number of its run, or something else that all ranks do."""


@dataclass(frozen=True)
class Failure:
    """What a rank leaves in the store when it fails."""

    name: str
    number: int
    """With `name`, what it was about."""
    word: str
    """Why, in words; empty if it failed only because others did."""
    where: str = ""
    """At which collective or op, in words, if that is known."""
    count: int = 0
    """How many failures the rank has left, with this one."""
    runs: int = 0
    """How many runs with collectives it had begun."""

    @property
    def at(self) -> At:
        """What it was about."""
        return self.name, self.number


@dataclass
class Peers:
    """What this process knows of the ranks of one group."""

    steps: dict[str, Iterator[int]] = field(default_factory=lambda: defaultdict(itertools.count))
    """Numbers for what the ranks do together, by what it is."""
    failures: int = 0
    """Failures that this rank has left."""
    runs: int = 0
    """Runs of graphs with collectives that it has begun."""
    completed: int = 0
    """Which of these was the last that did not fail."""
    handled: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """For each rank of the group how many of its failures are of no interest any more."""
    ahead: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By how many runs each rank was ahead of this one when they last compared something."""
    own: list[Failure] = field(default_factory=list)
    """Failures of this rank since the last run that did not fail."""

    def greeting(self) -> str:
        """What goes with everything that this rank compares with others."""
        return json.dumps([self.failures, self.runs])

    def greeted(self, rank: int, greeting: str) -> None:
        """`rank` has taken a step together with this one, and said this."""
        failures, runs = json.loads(greeting)
        self.handled[rank] = max(self.handled[rank], failures)
        self.ahead[rank] = runs - self.runs

    def begin(self) -> int:
        """A run with collectives begins; its number among all of them."""
        self.runs += 1
        return self.runs

    def complete(self, run: int) -> None:
        """That run did not fail."""
        self.completed = max(self.completed, run)
        self.own.clear()

    def is_news(self, rank: int, failure: Failure, now: At | None) -> bool:
        """Whether `failure` of `rank` may be why this rank fails `now`."""
        if failure.count <= self.handled[rank]:
            return False
        if failure.runs - self.ahead[rank] < self.completed:
            return False  # it has come to that run since
        return failure.at == now or all(f.at != failure.at for f in self.own)


# Group names come again when groups are made anew, and so do addresses.
_peers: WeakKeyDictionary[dist.ProcessGroup, Peers] = WeakKeyDictionary()


def find_group(topology: Topology) -> dist.ProcessGroup:
    """The process group of `topology`.

    Raises:
        TopologyError: it is gone.
    """
    try:
        return group_by_name(topology.group_name)
    except Exception as e:
        raise TopologyError(
            f"process group {topology.group_name!r} (ranks {list(topology.ranks)}), which this "
            "graph was compiled for, is gone. Keep the group alive while the model is used; after "
            "a new init_process_group call torch.compiler.reset() and compile again."
        ) from e


def store_for(topology: Topology) -> Store:
    """The key-value store of the ranks of `topology`."""
    return store_of(find_group(topology), "ascend_sp")


def peers_of(topology: Topology) -> Peers:
    """What this process knows of the ranks of `topology`."""
    return _peers.setdefault(find_group(topology), Peers())


def leave(topology: Topology, failure: Failure) -> None:
    """Tell the others that this rank fails; raises if the store does."""
    peers = peers_of(topology)
    peers.failures += 1
    failure = Failure(**asdict(failure) | {"count": peers.failures, "runs": peers.runs})
    peers.own.append(failure)
    store_for(topology).set(_key(topology.rank), json.dumps(asdict(failure)))


def announce(topology: Topology, at: At, word: str) -> None:
    """Leave `word` for ranks that wait for this one, if the store still works."""
    try:
        leave(topology, Failure(*at, word))
    except Exception:  # the store may be what failed
        return


def news(topology: Topology, now: At | None = None) -> dict[int, Failure]:
    """By global rank what other ranks have left that may be why this one fails `now`.

    Raises what the store raises.
    """
    store, peers, out = store_for(topology), peers_of(topology), {}
    for r, rank in enumerate(topology.ranks):
        if r != topology.rank and store.check([_key(r)]):
            failure = Failure(**json.loads(store.get(_key(r)).decode()))
            if peers.is_news(r, failure, now):
                out[rank] = failure
    return out


def told(topology: Topology, found: dict[int, Failure]) -> None:
    """What was `found` is in an error of this rank now."""
    handled = peers_of(topology).handled
    for rank, failure in found.items():
        r = topology.ranks.index(rank)
        handled[r] = max(handled[r], failure.count)


def words(found: dict[int, Failure]) -> list[str]:
    """A line for each different word that ranks left."""
    return [
        f"Reported by another rank: {w}" for w in dict.fromkeys(f.word for f in found.values()) if w
    ]


def _key(rank: int) -> str:
    return f"failed/{rank}"
