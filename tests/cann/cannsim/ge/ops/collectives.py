"""Hcom ops: GE's collectives, on the HCCL communicator that the attribute `group` names.

For a process group of another backend torchair writes "tag=...;rank_list=..." instead; these run
on that process group. Counts are of elements. An execution that only finds shapes sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cannsim import hccl
from cannsim.ge.registry import Call, GeError, ints, kernel


class _TorchGroup(hccl.Communicator):
    """The same collectives on a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.name, self._group = group.group_name, group
        self.size, self.rank = group.size(), group.rank()

    def all_to_all(
        self, send: Tensor, recv: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> None:
        size = send.element_size()
        dist.all_to_all_single(
            recv.view(torch.uint8),
            send.view(torch.uint8),
            [n * size for n in recv_counts],
            [n * size for n in send_counts],
            group=self._group,
        )

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> None:
        dist.send(buffer, group=self._group, group_dst=to, tag=tag)

    def recv(self, buffer: Tensor, source: int, tag: int = 0) -> None:
        dist.recv(buffer, group=self._group, group_src=source, tag=tag)


def communicator(name: str) -> hccl.Communicator:
    """Who an Hcom op speaks to."""
    if not name.startswith("tag="):
        return hccl.communicator(name)
    tag, _, ranks = name.removeprefix("tag=").partition(";rank_list=")
    group = dist.distributed_c10d._find_pg_by_ranks_and_tag(tag, [int(r) for r in ranks.split(",")])
    if group is None:
        raise GeError(f"no process group for {name!r}")
    return _TorchGroup(group)


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1)


@kernel("HcomAllToAll")
def all_to_all(call: Call, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    if call.dry:
        return out
    comm = communicator(call.attr("group"))
    if x.dim() and x.shape[0] % comm.size:
        raise GeError(f"dim 0 of {tuple(x.shape)} is not {comm.size} equal blocks")
    counts = [x.numel() // comm.size] * comm.size
    comm.all_to_all(_flat(x), out.view(-1), counts, counts)
    return out


@kernel("HcomAllToAllV")
def all_to_all_v(
    call: Call,
    x: Tensor,
    send_counts: Tensor,
    send_starts: Tensor,
    recv_counts: Tensor,
    recv_starts: Tensor,
) -> Tensor:
    """Whatever the shape of `x`, GE infers one dim: the end of the last block received."""
    received, places = ints(recv_counts), ints(recv_starts)
    ends = [start + n for start, n in zip(places, received, strict=True)]
    out = torch.zeros(max(ends, default=0), dtype=x.dtype)
    if call.dry:
        return out
    sent, starts = ints(send_counts), ints(send_starts)
    flat = _flat(x)
    blocks = [flat[s : s + n] for s, n in zip(starts, sent, strict=True)]
    packed = torch.empty(sum(received), dtype=x.dtype)
    communicator(call.attr("group")).all_to_all(torch.cat(blocks), packed, sent, received)
    for start, block in zip(places, packed.split(received), strict=True):
        out[start : start + block.numel()] = block
    return out


@kernel("HcomAllReduce")
def all_reduce(call: Call, x: Tensor) -> Tensor:
    if call.dry:
        return torch.zeros_like(x)
    comm = communicator(call.attr("group"))
    return comm.reduce(_flat(x), call.attr("reduction")).view(x.shape)


@kernel("HcomAllGather")
def all_gather(call: Call, x: Tensor) -> Tensor:
    shape = [x.shape[0] * call.attr("rank_size"), *x.shape[1:]]
    if call.dry:
        return torch.zeros(shape, dtype=x.dtype)
    return communicator(call.attr("group")).all_gather(_flat(x)).view(shape)


@kernel("HcomReduceScatter")
def reduce_scatter(call: Call, x: Tensor) -> Tensor:
    size = call.attr("rank_size")
    if x.shape[0] % size:
        raise GeError(f"dim 0 of {tuple(x.shape)} is not {size} equal blocks")
    if call.dry:
        return torch.zeros(x.shape[0] // size, *x.shape[1:], dtype=x.dtype)
    comm = communicator(call.attr("group"))
    return comm.reduce(_flat(x), call.attr("reduction")).view(x.shape).chunk(size)[comm.rank]


@kernel("HcomBroadcast")
def broadcast(call: Call, *xs: Tensor) -> list[Tensor]:
    if call.dry:
        return [torch.zeros_like(x) for x in xs]
    comm = communicator(call.attr("group"))
    return [comm.broadcast(_flat(x), call.attr("root_rank")).view(x.shape) for x in xs]


@kernel("HcomSend")
def send(call: Call, x: Tensor) -> None:
    if not call.dry:
        comm = communicator(call.attr("group"))
        comm.send(_flat(x), call.attr("dest_rank"), call.attr("sr_tag"))


@kernel("HcomReceive")
def receive(call: Call) -> Tensor:
    out = torch.zeros(call.attr("shape"), dtype=call.dtype("dtype"))
    if not call.dry:
        comm = communicator(call.attr("group"))
        comm.recv(out.view(-1), call.attr("src_rank"), call.attr("sr_tag"))
    return out
