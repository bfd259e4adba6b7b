"""A rank that dies or stalls during a run: the others say where they waited, and for whom.

Nothing is noted while all goes well, so a run costs nothing more. A rank whose run fails leaves in
the group's store where it stopped, and looks for a moment who else did: those who did not are what
it waited for. Which collective that was is read off the traceback, where there is one.
"""

from __future__ import annotations

import itertools
import json
import linecache
import re
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from ascend_sp.runtime import guards
from ascend_sp.runtime._pytorch import Store
from ascend_sp.runtime.errors import AscendSPError, CollectiveError
from ascend_sp.runtime.topology import Topology

PATIENCE = 3.0
"""Seconds that a rank whose run failed waits for the others to say the same.

Ranks in one collective fail nearly at once: all have waited for the same time.
"""
Calls: TypeAlias = "Sequence[tuple[str, str]]"
"""Starts and waits of a program in order: name of the op, and which collective in words."""

_CALL = re.compile(r"_c10d_functional\.(\w+)\b")


def guarded(
    run: Callable[[list[Any]], Sequence[Any]], topology: Topology, name: str, calls: Calls = ()
) -> Callable[[list[Any]], Sequence[Any]]:
    """`run`, with errors that say which graph, collective and group failed, and who is missing.

    Args:
        run: the program of one rank.
        topology: its group; `run` itself is returned for P = 1.
        name: what to call the program.
        calls: the collectives in it, in the order in which it starts and awaits them.
    """
    if topology.size == 1:
        return run
    numbers = itertools.count()

    def guarded_run(args: list[Any]) -> Sequence[Any]:
        guards.find_group(topology)
        number = next(numbers)
        try:
            return run(args)
        except AscendSPError:
            raise
        except RuntimeError as e:
            rank = topology.ranks[topology.rank]
            where = _place(e.__traceback__, calls)
            text = str(e)
            found = _bounded(lambda: _tell(topology, name, number, where, text))
            raise CollectiveError(
                f"{name} failed on rank {rank} of ranks {list(topology.ranks)}, in its run "
                f"{number}: {text}\n{where or _unknown(calls)}\n{found}"
            ) from e

    return guarded_run


def _unknown(calls: Calls) -> str:
    starts = [text for op, text in calls if op != "wait_tensor"]
    if not starts:
        return "The graph has no collectives."
    return (
        f"Which of its {len(starts)} collectives it was in, if any, is not known here. "
        f"The first is {starts[0]}; the last {starts[-1]}."
    )


def _place(tb: TracebackType | None, calls: Calls) -> str:
    """The collective that the traceback ends in, in words; empty if it does not show one.

    Both Inductor's wrapper and FX's code are Python text with a line for each collective, in the
    program's order; so the line tells which one it is.
    """
    for frame, line in reversed(list(traceback.walk_tb(tb))):
        file, code = frame.f_code.co_filename, frame.f_globals
        here = _CALL.search(linecache.getline(file, line, code))
        if here is None:
            continue
        first = frame.f_code.co_firstlineno
        texts = [linecache.getline(file, n, code) for n in range(first, line + 1)]
        names = [m[1] for t in texts if not t.lstrip().startswith("#") for m in _CALL.finditer(t)]
        op = here[1]
        same = [text for name, text in calls if name == op.rstrip("_")]
        count = names.count(op)
        if 0 < count <= len(same):
            does = "waited for the result of" if op == "wait_tensor" else "started"
            order = [text for name, text in calls if name != "wait_tensor"]
            return (
                f"It {does} collective {order.index(same[count - 1]) + 1} of {len(order)}: "
                f"{same[count - 1]}."
            )
    return ""


def _tell(topology: Topology, name: str, number: int, where: str, error: str) -> str:
    """Leave word that this rank's run stopped; what is known of the others."""
    store = guards.store_for(topology)
    keys = {g: f"stopped/{r}" for r, g in enumerate(topology.ranks)}
    rank = topology.ranks[topology.rank]
    own = {"graph": name, "run": number, "where": where}
    store.set(keys[rank], json.dumps(own))
    word = guards.word_of_failure(topology)
    if not where and not word:
        # Nothing shows that it waited: this may be the first rank that failed.
        guards.announce_failure(topology, f"rank {rank} failed in {name}, run {number}: {error}")
    others = {g: k for g, k in keys.items() if g != rank}
    said: dict[int, dict[str, Any]] = {}
    end = time.monotonic() + (0.5 if word else PATIENCE)
    while time.monotonic() < end:
        said = {g: json.loads(text) for g, k in others.items() if (text := _get(store, k))}
        if all((s["graph"], s["run"]) == (name, number) for s in said.values()) and len(
            said
        ) == len(others):
            break
        time.sleep(0.05)
    lines = []
    for g, s in said.items():
        if (s["graph"], s["run"]) != (name, number):
            lines.append(f"Rank {g} stopped in {s['graph']}, run {s['run']}: another one.")
        elif s["where"] != where:
            lines.append(f"Rank {g} stopped in the same run. {s['where'] or 'Where is unknown.'}")
    silent = sorted(set(others) - set(said))
    if silent:
        lines.append(
            f"Rank(s) {silent} did not say that they stopped: they died, stall, or took another "
            "path. Look at their output first."
        )
    elif not lines:
        lines.append("All other ranks stopped at the same place: the network between them failed.")
    word = word or guards.word_of_failure(topology)
    lines.append(f"A rank left word: {word}" if word else "No rank left word why.")
    return "\n".join(lines)


def _get(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _bounded(ask: Callable[[], str]) -> str:
    """What `ask` says; it may meet a store that is gone, or does not answer."""
    found: list[str] = []

    def main() -> None:
        try:
            found.append(ask())
        except Exception as e:  # each kind of store has its own errors
            found.append(
                f"Who is missing is not known, since the group's key-value store failed too: {e}. "
                "The process that held it (rank 0, or torchrun's agent) has probably died."
            )

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    thread.join(PATIENCE + 2)
    return (
        found[0]
        if found
        else (
            "Who is missing is not known, since the group's key-value store does not answer. The "
            "process that holds it (rank 0, or torchrun's agent) has stopped or cannot be reached."
        )
    )
