"""What ran on which stream and touched which memory: order, overlap, races.

Streams of the simulator run at once, in the order of the program, so a missing wait never shows in
numbers. It shows here: two ops are ordered only if streams and events order them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cannsim import library

KERNEL, HCCL, MEMCPY, RECORD, WAIT, SYNC = "kernel", "hccl", "memcpy", "record", "wait", "sync"
_EXACT = 1 << 26  # elements; above this, strided tensors count as touching all of their extent


@dataclass(frozen=True)
class Region:
    """The device memory of a tensor."""

    start: int
    end: int
    itemsize: int = 1
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dense: bool = True

    @staticmethod
    def of(t: Tensor) -> Region | None:
        """Memory that `t` spans; None if it has no elements."""
        if t.numel() == 0:
            return None
        span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        start, size = t.data_ptr(), t.element_size()
        dense = span == t.numel()
        return Region(start, start + span * size, size, tuple(t.shape), t.stride(), dense)

    @staticmethod
    def range(pointer: int, nbytes: int) -> Region | None:
        """Plain bytes."""
        return Region(pointer, pointer + nbytes) if nbytes else None

    def overlaps(self, other: Region) -> bool:
        """Whether both hold one byte in common; columns of one matrix do not."""
        low, high = max(self.start, other.start), min(self.end, other.end)
        if low >= high:
            return False
        if (self.dense and other.dense) or high - low > _EXACT:
            return True
        return bool((self._bytes(low, high) & other._bytes(low, high)).any())

    def _bytes(self, low: int, high: int) -> Tensor:
        touched = torch.zeros(self.end - self.start, dtype=torch.bool)
        if self.dense:
            touched[:] = True
        else:
            strides = [s * self.itemsize for s in self.strides]
            torch.as_strided(touched, (*self.shape, self.itemsize), (*strides, 1)).fill_(True)
        return touched[low - self.start : high - self.start]


def regions(tensors: Sequence[Tensor]) -> list[Region]:
    """Memory of tensors, which the caller has found to be on the device."""
    return [r for t in tensors if (r := Region.of(t)) is not None]


@dataclass
class Op:
    """One thing that a stream was given to do."""

    kind: str
    name: str
    stream: int
    reads: list[Region] = field(default_factory=list)
    writes: list[Region] = field(default_factory=list)
    event: int = 0
    replay: Callable[[], None] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Race:
    """Two ops that nothing orders, and that share memory which one of them writes."""

    first: int
    second: int
    names: tuple[str, str]
    what: str
    """What the first and the second do: "write/read", "read/write" or "write/write"."""
    where: tuple[int, int]


class Trace:
    """What was given to the streams, in the order of the program."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._ordered: list[int] = []  # per op, as bits: the ops that must be over before it

    def find(self, part: str) -> list[int]:
        """Ops with `part` in their name."""
        return [i for i, op in enumerate(self.ops) if part in op.name]

    def _clocks(self) -> list[int]:
        if len(self._ordered) == len(self.ops):
            return self._ordered
        streams: dict[int, int] = {}
        events: dict[int, int] = {}
        host, out = 0, []
        for i, op in enumerate(self.ops):
            done = streams.get(op.stream, 0) | host
            if op.kind == WAIT:
                done |= events.get(op.event, 0)
            elif op.kind == SYNC:  # the host waits, and gives nothing more to any stream till then
                done = {
                    "stream": done,
                    "event": host | events.get(op.event, 0),
                    "device": host | _union(streams.values()),
                }[op.name]
                host |= done
            out.append(done)
            done |= 1 << i
            if op.kind == RECORD:
                events[op.event] = done
            if op.kind != SYNC:
                streams[op.stream] = done
        self._ordered = out
        return out

    def before(self, a: int, b: int) -> bool:
        """Whether op `a` is over before op `b` starts, whatever the timing."""
        return bool(self._clocks()[b] >> a & 1)

    def overlaps(self, a: int, b: int) -> bool:
        """Whether the two may run at the same time."""
        return a != b and not self.before(a, b) and not self.before(b, a)

    def races(self) -> list[Race]:
        """All pairs of ops that share memory, one writing, with no order between them."""
        uses = sorted(
            ((r.start, i, "write" if w else "read", r)
             for i, op in enumerate(self.ops)
             for w, rs in ((False, op.reads), (True, op.writes)) for r in rs),
            key=lambda use: use[0],
        )  # fmt: skip
        found: dict[tuple[int, int, str], Race] = {}
        live: list[tuple[int, int, str, Region]] = []
        for use in uses:
            live = [other for other in live if other[3].end > use[0]]
            for other in live:
                (_, i, how_i, region_i), (_, j, how_j, region_j) = sorted(
                    (other, use), key=lambda u: u[1]
                )
                what = f"{how_i}/{how_j}"
                if what == "read/read" or (i, j, what) in found or not self.overlaps(i, j):
                    continue
                if region_i.overlaps(region_j):
                    where = (
                        max(region_i.start, region_j.start),
                        min(region_i.end, region_j.end),
                    )
                    names = (self.ops[i].name, self.ops[j].name)
                    found[i, j, what] = Race(i, j, names, what, where)
            live.append(use)
        return [found[key] for key in sorted(found)]

    def __str__(self) -> str:
        """One line an op: what a failing test should print."""
        lines = []
        for i, op in enumerate(self.ops):
            event = f" event {op.event}" if op.event else ""
            lines.append(f"{i:4d} stream {op.stream:<4d} {op.kind:7s} {op.name}{event}")
        return "\n".join(lines)


def _union(clocks: Sequence[int] | object) -> int:
    out = 0
    for clock in clocks:  # type: ignore[attr-defined]
        out |= clock
    return out


_open: list[Trace] = []


def _add(trace: Trace) -> None:
    _open.append(trace)
    library.load().cannsim_listen(1)


def _remove(trace: Trace) -> None:
    if trace in _open:
        _open.remove(trace)
    library.load().cannsim_listen(int(bool(_open)))


_captured: dict[int, Trace] = {}
_shown: list[Trace] = []


def emit(op: Op) -> None:
    """Add to every trace that is being made."""
    for trace in _open:
        trace.ops.append(op)


def active() -> bool:
    """Whether anyone listens."""
    return bool(_open)


@contextlib.contextmanager
def recording() -> Iterator[Trace]:
    """A trace of what runs inside, eagerly; ``with recording() as trace: ...``."""
    trace = Trace()
    _add(trace)
    try:
        yield trace
    finally:
        _remove(trace)


def begin_capture(graph: int) -> Trace:
    """For capture.py: everything from now on belongs to that ACL graph."""
    trace = _captured[graph] = Trace()
    _shown.append(trace)
    _add(trace)
    return trace


def end_capture(graph: int) -> None:
    """For capture.py."""
    _remove(_captured[graph])


def captured(graph: int) -> Trace:
    """The trace of one ACL graph."""
    return _captured[graph]


def destroyed(graph: int) -> None:
    """For capture.py: the graph will not run again; what it did can still be looked at."""
    trace = _captured.pop(graph, Trace())
    for op in trace.ops:
        op.replay = None


def captured_graphs() -> list[Trace]:
    """The traces of all ACL graphs with something in them, in the order of capture."""
    return [t for t in _shown if t.ops]


def forget() -> None:
    """Start captured_graphs() anew; graphs that were captured before still run."""
    _shown.clear()
