"""Guards: ranks that disagree, and groups that are gone, become errors instead of hangs.

Ranks talk through the process group's key-value store, not through collectives: a store waits with
a timeout of our own, works on every backend, and says who is missing.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ascend_sp.runtime._pytorch import Store, group_by_name, store_of, wait_for
from ascend_sp.runtime.errors import CollectiveError, RankMismatchError, TopologyError
from ascend_sp.runtime.topology import Topology

_steps: dict[tuple[str, str, int], Iterator[int]] = defaultdict(itertools.count)


@dataclass(frozen=True)
class Step:
    """Something that all ranks do together, and what to tell a user if they do not."""

    doing: str
    """What a rank does, in words; steps of one name are compared in order."""
    differing: str
    """What the ranks of the group do, if their facts differ."""
    missing: str = "They died, or took another path: all ranks must take this step."
    """Why a rank may not have come."""
    setting: str = ""
    """What the time to wait is called, where a user can set it."""
    hint: str = ""
    """A cause of differences that the facts do not name."""

    @staticmethod
    def named(doing: str) -> Step:
        """A step of which nothing more is to be said."""
        return Step(doing, f"differ where each {doing}")


COMPILE = Step(
    "compiles its graph",
    "do not compile the same program; all ranks must call the same model with the same shapes, "
    "dtypes and options",
    "They died, or still run an earlier graph because their inputs differ: all ranks must call the "
    "model with the same shapes and dtypes.",
    " (option check_timeout)",
    "\nA model that only some ranks have called before can differ too: by tables that it makes "
    "once, or by sizes that Dynamo has seen change (torch.compiler.reset() forgets those).",
)
ORDER = Step(
    "has compiled its graph",
    "have compiled one program into different collectives. This is a fault of ascend_sp: please "
    "report it, with what ASCEND_SP_DUMP_DIR writes",
    "They died, or failed to compile.",
    " (option check_timeout)",
)
"""After all passes: what ranks must do together has to come out the same on all of them."""
_FAILED = "failed"


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


def _store(topology: Topology) -> Store:
    return store_of(find_group(topology), "ascend_sp")


def agree(topology: Topology, facts: dict[str, Any], timeout: float, step: Step = COMPILE) -> None:
    """Compare `facts` with those of the other ranks; every rank calls this.

    Args:
        topology: the group; nothing happens for P = 1.
        facts: flat, JSON-like facts about what this rank does, in words a person understands.
        timeout: seconds to wait for the other ranks.
        step: what the ranks do here.

    Raises:
        RankMismatchError: on every rank that took part, naming what differs, or who is missing.
    """
    if topology.size == 1:
        return
    store = _store(topology)
    group = id(find_group(topology))
    n = next(_steps[step.doing, topology.group_name, group])
    keys = [f"{step.doing}/{n}/{r}" for r in range(topology.size)]
    store.set(keys[topology.rank], json.dumps(facts, default=str))
    text = ""
    missing = _missing(store, keys, timeout)
    if missing:
        who = [topology.ranks[r] for r in missing]
        own = f" This rank's inputs: {facts['inputs']}." if "inputs" in facts else ""
        text = (
            f"rank {topology.ranks[topology.rank]} {step.doing} {n}, and rank(s) {who} did not "
            f"within {timeout:g} s{step.setting}. {step.missing}{own}"
        )
    else:
        differences = _differences([json.loads(store.get(k)) for k in keys], topology)
        if differences:
            text = "\n".join(
                [f"the ranks of group {topology.group_name!r} {step.differing}:", *differences]
            )
            text += step.hint
    if text:
        announce_failure(topology, text)
        raise RankMismatchError(text)


def _missing(store: Store, keys: list[str], timeout: float) -> list[int]:
    if wait_for(store, keys, timeout):
        return []
    return [i for i, k in enumerate(keys) if not store.check([k])]


def _differences(each: list[dict[str, Any]], topology: Topology) -> list[str]:
    out = []
    for name in {k: None for f in each for k in f}:
        facts: list[Any] = [f.get(name) for f in each]
        skip = 0
        if all(isinstance(f, list) for f in facts):
            # Of long lists, what follows the part that is the same.
            rows = enumerate(zip(*facts, strict=False))
            shortest = min(len(f) for f in facts)
            skip = next((i for i, row in rows if any(x != row[0] for x in row)), shortest)
            facts = [f[skip : skip + 3] for f in facts]
        values: dict[str, list[int]] = defaultdict(list)
        for rank, fact in zip(topology.ranks, facts, strict=True):
            values[json.dumps(fact)].append(rank)
        where = f" behind the first {skip}" if skip else ""
        if len(values) > 1:
            out += [f"  {name}{where} on rank(s) {r}: {v[:600]}" for v, r in values.items()]
    return out


def announce_failure(topology: Topology, text: str) -> None:
    """Leave word for ranks that wait for this one in a collective."""
    try:
        _store(topology).set(_FAILED, text)
    except Exception:  # the store may be what failed
        return


def _word_of_failure(topology: Topology) -> str:
    try:
        store = _store(topology)
        return store.get(_FAILED).decode() if store.check([_FAILED]) else ""
    except Exception:
        return ""


def guarded(
    run: Callable[[list[Any]], Sequence[Any]], topology: Topology, name: str
) -> Callable[[list[Any]], Sequence[Any]]:
    """`run`, with errors that say which graph and group failed, and why if a rank left word."""
    if topology.size == 1:
        return run

    def guarded_run(args: list[Any]) -> Sequence[Any]:
        find_group(topology)
        try:
            return run(args)
        except RuntimeError as e:
            word = _word_of_failure(topology)
            raise CollectiveError(
                f"{name} failed on rank {topology.ranks[topology.rank]} of ranks "
                f"{list(topology.ranks)}: {e}\nA rank that left, or took another path, shows as "
                "a closed connection or a timeout here. "
                + (f"A rank left word: {word}" if word else "No rank left word why.")
            ) from e

    return guarded_run
