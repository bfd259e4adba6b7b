"""Guards: ranks that disagree, and groups that are gone, become errors instead of hangs.

Ranks talk through the process group's key-value store, not through collectives: a store waits with
a timeout of our own, works on every backend, and says who is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch.distributed as dist

from ascend_sp.runtime._pytorch import Store, group_by_name, store_of, values_of, wait_for
from ascend_sp.runtime.errors import RankMismatchError, TopologyError
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


@dataclass(frozen=True)
class Row:
    """A line of what ranks compare."""

    compared: str
    """What has to be the same on all ranks."""
    source: str = ""
    """The user's line that it comes from, shown beside it."""

    def __str__(self) -> str:
        return self.compared + (f"  at {self.source}" if self.source else "")


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


def exchange(
    topology: Topology, word: str, timeout: float, step: Step, more: str = ""
) -> list[str]:
    """Every rank's `word`, in group order; every rank calls this.

    Args:
        topology: the group, P > 1.
        word: what the others are told.
        timeout: seconds to wait for the other ranks.
        step: what the ranks do here.
        more: what to add to the error, a sentence.

    Raises:
        RankMismatchError: ranks did not come; it names them.
    """
    store = store_for(topology)
    group = id(find_group(topology))
    n = next(_steps[step.doing, topology.group_name, group])
    keys = [f"{step.doing}/{n}/{r}" for r in range(topology.size)]
    store.set(keys[topology.rank], word)
    missing = _missing(store, keys, timeout)
    if missing:
        who = [topology.ranks[r] for r in missing]
        text = (
            f"rank {topology.ranks[topology.rank]} {step.doing} {n}, and rank(s) {who} did not "
            f"within {timeout:g} s{step.setting}. {step.missing}{more}"
        )
        announce_failure(topology, text)
        raise RankMismatchError(text)
    words = values_of(store, keys)
    if n:
        # All have come here, so nobody still reads what was said the last time.
        store.delete_key(f"{step.doing}/{n - 1}/{topology.rank}")
    return words


def agree(
    topology: Topology,
    facts: dict[str, Any],
    timeout: float,
    step: Step = COMPILE,
    rows: Callable[[], list[Row]] | None = None,
) -> None:
    """Compare `facts` with those of the other ranks; every rank calls this.

    Args:
        topology: the group; nothing happens for P = 1.
        facts: flat, JSON-like facts about what this rank does, in words a person understands.
        timeout: seconds to wait for the other ranks.
        step: what the ranks do here.
        rows: what some fact is a summary of, line by line. It is asked for when facts differ, and
            the first line that is not the same on all ranks is named.

    Raises:
        RankMismatchError: on every rank that took part, naming what differs, or who is missing.
    """
    if topology.size == 1:
        return
    own = f" This rank's inputs: {facts['inputs']}." if "inputs" in facts else ""
    words = exchange(topology, json.dumps(facts, default=str), timeout, step, own)
    differences = _differences([json.loads(w) for w in words], topology)
    if differences:
        if rows is not None:
            differences += _first_difference(topology, rows(), timeout, step)
        text = "\n".join(
            [f"the ranks of group {topology.group_name!r} {step.differing}:", *differences]
        )
        fail(topology, text + step.hint)


def fail(topology: Topology, text: str) -> NoReturn:
    """Leave word, and raise; for differences that every rank has seen.

    Raises:
        RankMismatchError: always.
    """
    announce_failure(topology, text)
    raise RankMismatchError(text)


def _missing(store: Store, keys: list[str], timeout: float) -> list[int]:
    if wait_for(store, keys, timeout):
        return []
    return [i for i, k in enumerate(keys) if not store.check([k])]


def by_value(topology: Topology, values: Sequence[str]) -> dict[str, list[int]]:
    """Each value with the global ranks that have it."""
    out: dict[str, list[int]] = defaultdict(list)
    for rank, value in zip(topology.ranks, values, strict=True):
        out[value].append(rank)
    return dict(out)


def _first_difference(topology: Topology, rows: list[Row], timeout: float, step: Step) -> list[str]:
    """The first row that is not the same on all ranks, in words; hashes travel, and that row."""
    own = replace(step, doing=f"{step.doing}, row by row,")
    hashes = [hashlib.sha256(r.compared.encode()).hexdigest()[:8] for r in rows]
    try:
        each = [json.loads(w) for w in exchange(topology, json.dumps(hashes), timeout, own)]
        columns = enumerate(itertools.zip_longest(*each))
        place = next((i for i, row in columns if any(x != row[0] for x in row)), None)
        if place is None:
            return []
        shown = str(rows[place]) if place < len(rows) else "(its program ends here)"
        words = exchange(topology, shown, timeout, own)
    except RankMismatchError:
        return []  # what differs is known; where, is not, since a rank is gone by now
    found = by_value(topology, words)
    return [
        f"  operation {place}, the first that differs, on rank(s) {r}: {w[:600]}"
        for w, r in found.items()
    ]


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
        values = by_value(topology, [json.dumps(f) for f in facts])
        where = f" behind the first {skip}" if skip else ""
        if len(values) > 1:
            out += [f"  {name}{where} on rank(s) {r}: {v[:600]}" for v, r in values.items()]
    return out


def announce_failure(topology: Topology, text: str) -> None:
    """Leave word for ranks that wait for this one in a collective."""
    try:
        store_for(topology).set(_FAILED, text)
    except Exception:  # the store may be what failed
        return


def word_of_failure(topology: Topology) -> str:
    """What a rank that failed said of it; empty if none did."""
    try:
        store = store_for(topology)
        return store.get(_FAILED).decode() if store.check([_FAILED]) else ""
    except Exception:
        return ""
