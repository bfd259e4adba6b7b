"""A run that fails: every rank says what failed, where, and which ranks are missing.

Nothing is noted while all goes well, so a run costs nothing more. A rank whose run fails leaves in
the group's store where it stopped, and looks for a moment who else did: those who did not are what
it waited for. An op that fails has nothing to do with other ranks, and its error says so.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ascend_sp.runtime import peers, stopped
from ascend_sp.runtime.errors import AscendSPError, CollectiveError, OpError
from ascend_sp.runtime.memory import is_out_of_memory
from ascend_sp.runtime.peers import At, Failure
from ascend_sp.runtime.stopped import Program, Where
from ascend_sp.runtime.topology import Topology

PATIENCE = 3.0
"""Seconds that a rank whose run failed waits for the others to say the same.

Ranks in one collective fail nearly at once: all have waited for the same time.
"""


def guarded(
    run: Callable[[list[Any]], Sequence[Any]],
    topology: Topology,
    name: str,
    program: Program,
) -> Callable[[list[Any]], Sequence[Any]]:
    """`run`, with errors that say which graph, op or collective failed, and who is missing.

    Args:
        run: the program of one rank.
        topology: its group; `run` itself is returned for P = 1.
        name: what to call the program.
        program: what is in it.
    """
    if topology.size == 1:
        return run
    numbers = itertools.count()

    def guarded_run(args: list[Any]) -> Sequence[Any]:
        known = peers.peers_of(topology)
        number = next(numbers)
        joint = known.begin() if program.calls else 0
        try:
            out = run(args)
        except AscendSPError:
            raise
        except Exception as e:
            where = stopped.where(e.__traceback__, program)
            raise _error(topology, (name, number), where, program, e) from e
        if joint:
            known.complete(joint)
        return out

    return guarded_run


def _error(
    topology: Topology, at: At, where: Where, program: Program, e: Exception
) -> AscendSPError:
    """What to raise for `e`, after the others have been told."""
    own = str(e) or type(e).__name__
    words: list[str] = []
    found = _bounded(lambda: _tell(topology, at, where, own, words))
    name, number = at
    rank = topology.ranks[topology.rank]
    head = f"{name} failed on rank {rank} of ranks {list(topology.ranks)}, in its run {number}"
    # The cause goes first, if it is another rank's.
    first = [f"{head}.", *words, f"This rank: {own}"] if words else [f"{head}: {own}"]
    unknown = "" if where.collective or where.itself else _unknown(program)
    remedy = program.memory() if is_out_of_memory(e) else ""
    text = "\n".join(line for line in (*first, where.text, remedy, unknown, found) if line)
    return OpError(text) if where.itself else CollectiveError(text)


def _unknown(program: Program) -> str:
    starts = program.starts
    if not starts:
        return "The graph has no collectives."
    return (
        f"It is not known which of its {len(starts)} collectives it was in, if any. "
        f"The first is {starts[0]}; the last {starts[-1]}."
    )


def _tell(topology: Topology, at: At, where: Where, error: str, words: list[str]) -> str:
    """Leave word that this rank's run stopped; what is known of the others.

    What they say of the cause goes to `words`.
    """
    rank = topology.ranks[topology.rank]
    others = [r for r in topology.ranks if r != rank]
    found = peers.news(topology, at)
    name, number = at
    # What shows that it waited has its cause elsewhere; else this may be the first that failed.
    waited = where.collective or (not where.itself and bool(peers.words(found)))
    word = f"rank {rank} failed in {name}, run {number}: {error}"
    word = "" if waited else "\n".join(line for line in (word, where.text) if line)
    peers.leave(topology, Failure(name, number, word, where.text))
    end = time.monotonic() + (0.5 if peers.words(found) else PATIENCE)
    while time.monotonic() < end:
        found = peers.news(topology, at)
        if len(found) == len(others) and all(f.at == at for f in found.values()):
            break
        time.sleep(0.05)
    peers.told(topology, found)
    alike = [r for r, f in found.items() if f.at == at and f.where == where.text]
    differ = {r: f for r, f in found.items() if r not in alike}
    lines = []
    for r, f in differ.items():
        if f.at != at:
            lines.append(f"Rank {r} stopped in {f.name}, run {f.number}, not in this one.")
        else:
            lines.append(f"Rank {r} stopped in the same run. {f.where or 'It is not known where.'}")
    silent = [r for r in others if r not in found]
    if silent and where.itself:
        lines.append(
            f"Rank(s) {silent} did not report a failure: they may be waiting for this rank."
        )
    elif silent:
        lines.append(
            f"Rank(s) {silent} did not report a failure: they died, are stuck, or took another "
            "path. Look at their output first."
        )
    elif not differ:
        lines.append(_all_alike(where))
    if not where.itself:
        words += peers.words(differ if where.text else found)
        if not words:
            lines.append("No rank reported a cause.")
    return "\n".join(lines)


def _all_alike(where: Where) -> str:
    if where.collective:
        return "All other ranks stopped at the same place: the network between them failed."
    if where.itself:
        return "All other ranks stopped there, too: it is an error of this op, not of the network."
    return "All other ranks stopped in the same run; an op or the network failed."


def _bounded(ask: Callable[[], str]) -> str:
    """What `ask` says; it may meet a store that is gone, or does not answer."""
    found: list[str] = []

    def main() -> None:
        try:
            found.append(ask())
        except Exception as e:  # each kind of store has its own errors
            found.append(
                f"Missing ranks cannot be named: the group's key-value store failed too: {e}. "
                "The process that held it (rank 0, or torchrun's agent) has probably died."
            )

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(PATIENCE + 2)
    return (
        found[0]
        if found
        else (
            "Missing ranks cannot be named: the group's key-value store does not answer. The "
            "process that holds it (rank 0, or torchrun's agent) has stopped or cannot be reached."
        )
    )
