"""HCCL between processes, over gloo.

A communicator's ranks meet in a file named after it, so that nothing has to be set up. Everything
travels as bytes, and sums are made by every rank alike, in the order of ranks: all dtypes work, and
results do not depend on timing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cannsim import capture, library, memory, trace

_DTYPES = {
    0: torch.int8,
    1: torch.int16,
    2: torch.int32,
    3: torch.float16,
    4: torch.float32,
    5: torch.int64,
    6: torch.uint64,
    7: torch.uint8,
    8: torch.uint16,
    9: torch.uint32,
    10: torch.float64,
    11: torch.bfloat16,
}
_REDUCE = ("sum", "prod", "max", "min")  # HcclReduceOp


class Communicator:
    """The ranks of one HCCL communicator, with the collectives that the rest is made of."""

    def __init__(self, name: str, size: int, rank: int) -> None:
        self.name, self.size, self.rank = name, size, rank
        folder = os.environ.get("CANNSIM_TMP", tempfile.gettempdir())
        seconds = float(os.environ.get("CANNSIM_HCCL_TIMEOUT", "60"))
        timeout = timedelta(seconds=seconds)
        self._file = Path(folder) / name
        store = dist.FileStore(str(self._file), size)
        store.set_timeout(timeout)
        self.group = dist.ProcessGroupGloo(store, rank, size, timeout)

    def all_to_all(
        self, send: Tensor, recv: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> None:
        """1-D, contiguous; block i of `send` goes to rank i."""
        size = send.element_size()
        self.group.alltoall_base(
            recv.view(torch.uint8),
            send.view(torch.uint8),
            [n * size for n in recv_counts],
            [n * size for n in send_counts],
        ).wait()

    def all_gather(self, send: Tensor) -> Tensor:
        """Every rank's `send`, one after another."""
        gathered = torch.empty(self.size * send.numel(), dtype=send.dtype)
        counts = [send.numel()] * self.size
        self.all_to_all(send.reshape(-1).repeat(self.size), gathered, counts, counts)
        return gathered

    def reduce(self, send: Tensor, op: str) -> Tensor:
        """The sum (product, ...) over the ranks, as all of them compute it."""
        parts = self.all_gather(send).view(self.size, -1)
        wide = parts.float() if send.dtype in (torch.float16, torch.bfloat16) else parts
        out = {
            "sum": lambda: wide.sum(0),
            "prod": lambda: wide.prod(0),
            "max": lambda: wide.amax(0),
            "min": lambda: wide.amin(0),
        }[op]()
        return out.to(send.dtype)

    def broadcast(self, buffer: Tensor, root: int) -> Tensor:
        """The root's buffer."""
        return self.all_gather(buffer).view(self.size, -1)[root]

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> None:
        self.group.send([buffer.view(torch.uint8)], to, tag).wait()

    def recv(self, buffer: Tensor, source: int, tag: int = 0) -> None:
        self.group.recv([buffer.view(torch.uint8)], source, tag).wait()

    def barrier(self) -> None:
        self.all_gather(torch.zeros(1, dtype=torch.uint8))


_joined: dict[tuple[int, str], Communicator] = {}


def communicator(name: str) -> Communicator:
    """The HCCL communicator of that name; its ranks meet when they first use it.

    Raises:
        KeyError: this process has made no communicator of that name.
    """
    key = (os.getpid(), name)  # a forked child has no threads, so it must meet anew
    if key not in _joined:
        size, rank = ctypes.c_uint32(), ctypes.c_uint32()
        found = library.load().cannsim_find_communicator(
            name.encode(), ctypes.byref(size), ctypes.byref(rank)
        )
        if not found:
            raise KeyError(f"no HCCL communicator is called {name!r}")
        _joined[key] = Communicator(name, size.value, rank.value)
    return _joined[key]


def _contiguous_blocks(what: str, counts: Sequence[int], starts: Sequence[int]) -> None:
    expected = [sum(counts[:i]) for i in range(len(counts))]
    if list(starts) != expected:
        raise NotImplementedError(f"{what}: blocks with gaps (counts {counts}, starts {starts})")


def _plan(c: Any) -> tuple[list[Tensor], list[Tensor], Callable[[Communicator], None]]:
    """What a call reads and writes, and how to do it. All is copied out of the call's record."""
    kind, n, rank, count, peer = c.kind.decode(), c.size, c.rank, c.count, c.peer
    if kind == "barrier":
        return [], [], lambda comm: comm.barrier()
    if c.dtype not in _DTYPES:
        raise NotImplementedError(f"HCCL {kind} of HcclDataType {c.dtype}")
    dtype, op = _DTYPES[c.dtype], _REDUCE[c.op]

    def buffers(sent: int, received: int) -> tuple[Tensor, Tensor]:
        return memory.at(c.send or 0, sent, dtype), memory.at(c.recv or 0, received, dtype)

    if kind in ("alltoall", "alltoallv"):
        outgoing = incoming = [count] * n
        if kind == "alltoallv":
            outgoing, incoming = list(c.send_counts[:n]), list(c.recv_counts[:n])
            _contiguous_blocks("HcclAlltoAllV", outgoing, c.send_starts[:n])
            _contiguous_blocks("HcclAlltoAllV", incoming, c.recv_starts[:n])
        send, recv = buffers(sum(outgoing), sum(incoming))
        return [send], [recv], lambda comm: comm.all_to_all(send, recv, outgoing, incoming)
    if kind == "allgatherv":
        incoming = list(c.recv_counts[:n])
        _contiguous_blocks("HcclAllGatherV", incoming, c.recv_starts[:n])
        send, recv = buffers(count, sum(incoming))
        return (
            [send],
            [recv],
            lambda comm: comm.all_to_all(send.repeat(n), recv, [count] * n, incoming),
        )
    if kind == "allgather":
        send, recv = buffers(count, count * n)
        return [send], [recv], lambda comm: _fill(recv, comm.all_gather(send))
    if kind == "allreduce":
        send, recv = buffers(count, count)
        return [send], [recv], lambda comm: _fill(recv, comm.reduce(send, op))
    if kind == "reducescatter":
        send, recv = buffers(count * n, count)
        return (
            [send],
            [recv],
            lambda comm: _fill(recv, comm.reduce(send, op).view(n, count)[rank]),
        )
    if kind == "broadcast":
        send, recv = buffers(count, count)
        reads = [send] if rank == peer else []
        return reads, [recv], lambda comm: _fill(recv, comm.broadcast(send, peer))
    send, recv = buffers(count if kind == "send" else 0, count if kind == "recv" else 0)
    if kind == "send":
        return [send], [], lambda comm: comm.send(send, peer)
    return [], [recv], lambda comm: comm.recv(recv, peer)


def _fill(to: Tensor, value: Tensor) -> None:
    to.copy_(value)


def _on_call(pointer: Any) -> None:
    c = pointer[0]
    name, kind = c.comm.decode(), c.kind.decode()
    reads, writes, run = _plan(c)

    def execute() -> None:
        try:
            run(communicator(name))
        except RuntimeError as e:
            raise RuntimeError(f"HCCL {kind} on communicator {name}: {e}") from e

    capture.will_write(*writes)
    execute()
    trace.emit(
        trace.Op(
            trace.HCCL,
            f"hccl.{kind}",
            c.stream,
            trace.regions(reads),
            trace.regions(writes),
            replay=execute,
        )
    )


def leave() -> None:
    """End all connections, at the end of the process."""
    for (pid, _), comm in list(_joined.items()):
        if pid == os.getpid():
            with contextlib.suppress(OSError):
                comm._file.unlink()
    _joined.clear()


def install() -> None:
    """Connect to the runtime."""
    library.set_hooks("cannsim_set_hccl_hook", library.HCCL_HOOK(library.reports_errors(_on_call)))
