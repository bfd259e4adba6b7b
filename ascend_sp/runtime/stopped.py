"""Where a run stopped, read off the traceback of its error.

FX's code and Inductor's are Python text with a line for each op, and an interpreter of FX holds the
node that it runs. ACL and GE graphs have neither, so there nothing is known.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TypeAlias

from torch import fx

from ascend_sp.runtime.ops import WAIT, communicates

Calls: TypeAlias = "Sequence[tuple[str, str]]"
"""Starts and waits of a program in order: name of the op, and which collective in words."""

_WAITS = WAIT._opname
_CALL = re.compile(r"_c10d_functional\.(\w+)\b")
_RESULT = re.compile(r"\s*(\w+)\b[^=]*= ")
# Inductor's comment in front of a kernel.
_SOURCES = re.compile(r"# .*Source Nodes: \[(.*?)\], Original ATen: \[(.*?)\]")
ALLOCATES = ("empty_strided", "# reuse")
AHEAD = 20
"""Lines of generated code that are looked at behind one that allocates."""


@dataclass(frozen=True)
class Op:
    """One op of a program, in words."""

    text: str
    itself: bool
    """Whether nothing but the op can have failed there; a Python function may do anything."""


@dataclass(frozen=True)
class Program:
    """What is known of the program of one rank."""

    calls: Calls = ()
    """Its collectives, in the order in which it starts and awaits them."""
    op: Callable[[str], Op | None] = lambda _: None
    """Any other op, by the name of its node."""
    memory: Callable[[], str] = str
    """What to say if there was too little memory."""

    @property
    def starts(self) -> list[str]:
        """Its collectives in words."""
        return [text for name, text in self.calls if name != _WAITS]


@dataclass(frozen=True)
class Where:
    """Where a run stopped."""

    text: str = ""
    """In words; empty if it is not known."""
    collective: bool = False
    itself: bool = False
    """Whether an op failed that has nothing to do with other ranks."""


def where(tb: TracebackType | None, program: Program) -> Where:
    """Where in `program` the traceback of an error ends."""
    # From the outside: what an op calls in turn may be compiled as well.
    for frame, line in traceback.walk_tb(tb):
        found = _of_interpreter(frame, program) or _of_code(frame, line, program)
        if found is not None:
            return found
    return Where()


def _of_interpreter(frame: FrameType, program: Program) -> Where | None:
    if frame.f_code.co_name != "run_node":
        return None
    node = frame.f_locals.get("n")
    if not isinstance(node, fx.Node) or not isinstance(frame.f_locals.get("self"), fx.Interpreter):
        return None
    if communicates(node.target):
        name = str(getattr(node.target, "_opname", ""))
        before = node.graph.find_nodes(op="call_function", target=node.target)
        return _collective(name, before.index(node) + 1, program)
    return _op(node.name, program)


def _of_code(frame: FrameType, line: int, program: Program) -> Where | None:
    """The same of generated code."""
    file, first = frame.f_code.co_filename, frame.f_code.co_firstlineno
    lines = [linecache.getline(file, n, frame.f_globals) for n in range(first, line + AHEAD)]
    before, here, behind = lines[: line - first], lines[line - first], lines[line - first + 1 :]
    called = _CALL.search(here)
    if called is not None:
        texts = [t for t in (*before, here) if not t.lstrip().startswith("#")]
        names = [m[1] for t in texts for m in _CALL.finditer(t)]
        return _collective(called[1], names.count(called[1]), program)
    if "eval_with_key" in file:
        result = _RESULT.match(here)
        return _op(result[1], program) if result else None
    # What is allocated is for the kernel behind it.
    allocates = any(word in here for word in ALLOCATES)
    comments = behind if allocates else reversed(before)
    found = next((m for t in comments if (m := _SOURCES.search(t))), None)
    return _kernel(found[1].split(", "), found[2], program) if found else None


def _collective(name: str, count: int, program: Program) -> Where | None:
    """The collective that the `count`-th call of `name` starts or awaits."""
    same = [text for op, text in program.calls if op == name.rstrip("_")]
    if not 0 < count <= len(same):
        return None
    does = "waited for the result of" if name == _WAITS else "started"
    starts = program.starts
    return Where(
        f"It {does} collective {starts.index(same[count - 1]) + 1} of {len(starts)}: "
        f"{same[count - 1]}.",
        collective=True,
    )


def _op(name: str, program: Program) -> Where | None:
    op = program.op(name)
    return Where(f"It was in {op.text}.", itself=op.itself) if op else None


def _kernel(names: list[str], ops: str, program: Program) -> Where:
    """A kernel of Inductor's; the last of the ops in it is the one that it is there for."""
    op = next((op for n in reversed(names) if (op := program.op(n)) is not None), None)
    if op is None:
        return Where(f"It was in a kernel for {ops}.", itself=True)
    others = f" (in one kernel with {len(names) - 1} ops before it)" if names[1:] else ""
    return Where(f"It was in {op.text}{others}.", itself=op.itself)
