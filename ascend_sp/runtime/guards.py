"""Guards: ranks that disagree, and groups that are gone, become errors instead of hangs.

Ranks talk through the process group's key-value store, not through collectives: a store waits with
a timeout of our own, works on every backend, and says who is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ascend_sp.runtime._pytorch import Store, values_of, wait_for
from ascend_sp.runtime.errors import RankMismatchError
from ascend_sp.runtime.peers import announce, news, peers_of, store_for, told, words
from ascend_sp.runtime.topology import Topology

UNCOMPILED = "runs uncompiled"
"""The fact of a rank that does not compile its graph, since Dynamo has given that code up."""

GAVE_UP = "-"
"""What a rank puts in the place of its word when it waits for the others no longer."""


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
    sequence: frozenset[str] = frozenset()
    """Facts that differ where ranks have sequences of their own, which a smaller degree allows."""

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
    "\nPrograms also differ if only some ranks have called the model before: models may build "
    "tables in their first call, and Dynamo remembers which sizes changed (torch.compiler.reset() "
    "clears that).",
    frozenset({"inputs", "operations", "program"}),
)
ORDER = Step(
    "has compiled its graph",
    "have compiled one program into different collectives. This is a bug in ascend_sp: please "
    "report it, with the dump folder (ASCEND_SP_DUMP_DIR)",
    "They died, or failed to compile.",
    " (option check_timeout)",
)
"""After all passes: what ranks must do together has to come out the same on all of them."""


@dataclass(frozen=True)
class Row:
    """A line of what ranks compare."""

    compared: str
    """What has to be the same on all ranks."""
    source: str = ""
    """The user's line that it comes from, shown beside it."""

    def __str__(self) -> str:
        return self.compared + (f"  at {self.source}" if self.source else "")


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
    store, peers = store_for(topology), peers_of(topology)
    n = next(peers.steps[step.doing])
    keys = [f"{step.doing}/{n}/{r}" for r in range(topology.size)]
    store.set(keys[topology.rank], f"{peers.greeting()}\n{word}")
    missing = _missing(store, keys, timeout)
    said = [] if missing else values_of(store, keys)
    gone = [r for r, w in enumerate(said) if w == GAVE_UP]
    if missing or gone:
        # Who comes later must not take it for granted that this rank goes on.
        store.set(keys[topology.rank], GAVE_UP)
        late = f"did not within {timeout:g} s{step.setting}. {step.missing}"
        early = "did so earlier and timed out: this rank came too late."
        text = (
            f"rank {topology.ranks[topology.rank]} {step.doing} {n}, and rank(s) "
            f"{[topology.ranks[r] for r in missing or gone]} {late if missing else early}{more}"
        )
        found = news(topology)
        told(topology, found)
        # Who waited here like this rank has nothing to add.
        causes = {r: f for r, f in found.items() if f.at != (step.doing, n)}
        text = "\n".join([text, *words(causes)])
        announce(topology, (step.doing, n), text)
        raise RankMismatchError(text)
    if n:
        # All have come here, so nobody still reads what was said the last time.
        store.delete_key(f"{step.doing}/{n - 1}/{topology.rank}")
    parts = [w.partition("\n") for w in said]
    for r, (greeting, _, _) in enumerate(parts):
        peers.greeted(r, greeting)
    return [text for _, _, text in parts]


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
    each = [json.loads(w) for w in words]
    _part(each, topology)
    differences = _differences(each, topology)
    if differences:
        if rows is not None:
            differences += _first_difference(topology, rows(), timeout, step)
        text = "\n".join(
            [f"the ranks of group {topology.group_name!r} {step.differing}:", *differences]
        )
        # Nobody waits for a word of it: all ranks have come here, and see the same.
        names = {name for name in facts if len({json.dumps(f.get(name)) for f in each}) > 1}
        hint = agreeing_groups(topology, words) if names <= step.sequence else ""
        raise RankMismatchError(text + (hint or step.hint))


def _part(each: list[dict[str, Any]], topology: Topology) -> None:
    """Raise if some ranks compile, and others do not any more."""
    gone = {r: f[UNCOMPILED] for r, f in zip(topology.ranks, each, strict=True) if UNCOMPILED in f}
    if not gone or len(gone) == len(each):
        return
    stay = [r for r in topology.ranks if r not in gone]
    raise RankMismatchError(
        f"the ranks of group {topology.group_name!r} part here: rank(s) {stay} compile a program "
        f"for these inputs, and rank(s) {list(gone)} would run them uncompiled, since they have "
        "compiled that code too often before. No rank runs. All ranks must meet the same sizes, "
        "and change weights, the same number of times; torch.compiler.reset() on all of them "
        "begins anew.\n" + "\n".join(f"  rank {r}: {why}" for r, why in gone.items())
    )


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


def agreeing_groups(topology: Topology, values: Sequence[str]) -> str:
    """A hint at a smaller degree, if ranks agree in groups of one size; else empty."""
    groups = list(by_value(topology, values).values())
    degree = len(groups[0])
    if degree == 1 or len(groups) == 1 or any(len(g) != degree for g in groups):
        return ""
    # A degree takes ranks that follow each other.
    in_a_row = all(g == list(range(g[0], g[0] + degree)) and g[0] % degree == 0 for g in groups)
    way = (
        f"compile with degree={degree} (ASCEND_SP_DEGREE={degree})"
        if in_a_row
        else "give each its DeviceMesh (option mesh)"
    )
    said = ", ".join(map(str, groups))
    return (
        f"\nThe ranks of each of these groups agree: {said}. If each group has a sequence of its "
        f"own, {way}."
    )


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
        where = f" after the first {skip}" if skip else ""
        if len(values) > 1:
            out += [f"  {name}{where} on rank(s) {r}: {v[:600]}" for v, r in values.items()]
    return out
