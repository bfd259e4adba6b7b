"""Moving one tensor from one placement to another, as nodes of the graph.

Whole to split is a local slice. Split to whole is one all-gather of a flat operand and a local
reordering. Partial to whole is one all-reduce.
"""

from __future__ import annotations

from torch import fx

from ascend_sp.graph import collectives
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import Sequence, Shard
from ascend_sp.graph.sizes import Size, product, total
from ascend_sp.runtime.topology import Topology


def scatter(e: Emitter, x: fx.Node, split: Shard, topology: Topology) -> fx.Node:
    """This rank's shard of `x`, which every rank holds whole; missing rows are zeros."""
    shape = as_shape_of(x)
    d, lead = split.dim, (split.outer,)
    parts = x
    if not split.whole_dim():
        new = (*shape[:d], split.outer, split.seq.total, split.inner, *shape[d + 1 :])
        parts, d = e.view(x, new), d + len(lead)
    pieces: list[fx.Node] = []
    start: Size = 0
    for length, chunk in zip(split.seq.lengths, split.seq.chunks(topology.size), strict=True):
        pieces.append(_rows_of_rank(e, parts, d, start, length, chunk, topology))
        start = start + length
    out = e.cat(pieces, d)
    if split.whole_dim():
        return out
    local = split.local_size(topology.size)
    return e.view(out, (*shape[: split.dim], local, *shape[split.dim + 1 :]))


def _rows_of_rank(
    e: Emitter, x: fx.Node, d: int, start: Size, length: Size, chunk: Size, topology: Topology
) -> fx.Node:
    first = topology.rank * chunk
    if isinstance(length, int) and isinstance(chunk, int):
        valid = max(0, min(chunk, length - first))
        begin = start + min(first, length)
        return e.pad_end(e.narrow(x, d, begin, begin + valid), d, chunk - valid)
    whole = e.narrow(x, d, start, start + length)
    whole = e.pad_end(whole, d, chunk * topology.size - length, below=topology.size)
    return e.narrow(whole, d, first, first + chunk)


def gather(
    e: Emitter, x: fx.Node, split: Shard, shape: tuple[Size, ...], topology: Topology
) -> fx.Node:
    """The whole tensor of global `shape` on every rank, from the ranks' shards."""
    p, d = topology.size, split.dim
    start = collectives.all_gather(e, x, topology)
    flat = collectives.wait(e, start)
    local = split.seq.local(p)
    # [P, *before, outer, local, inner, *after]; the rank axis moves in front of `local`.
    inner = split.inner * product(shape[d + 1 :])
    major = product(shape[:d]) * split.outer
    ranks_first = e.view(flat, (p, major, local, inner))
    by_row = e.permute(ranks_first, (1, 0, 2, 3))
    return e.view(in_order(e, by_row, 1, split.seq, p), shape)


def gather_flat(e: Emitter, xs: list[fx.Node], topology: Topology) -> tuple[fx.Node, list[fx.Node]]:
    """All of `xs`, which are flat and of one dtype, in one all-gather.

    Returns:
        The start of the collective, and of each of `xs` a table with a row for each rank, which is
        no dense one.
    """
    p = topology.size
    start = collectives.all_gather(e, e.cat(xs, 0), topology)
    sizes = [as_shape_of(x)[0] for x in xs]
    table = e.view(collectives.wait(e, start), (p, total(sizes)))
    parts: list[fx.Node] = []
    offset: Size = 0
    for size in sizes:
        parts.append(e.narrow(table, 1, offset, offset + size))
        offset = offset + size
    return start, parts


def in_order(e: Emitter, x: fx.Node, dim: int, seq: Sequence, world: int) -> fx.Node:
    """``[..., P, rows of a rank, ...] -> [..., seq.total, ...]``: ranks' rows in global order.

    Dims `dim` and ``dim + 1`` become one. Padding is dropped.
    """
    shape = as_shape_of(x)
    pieces: list[fx.Node] = []
    offset: Size = 0
    for length, chunk in zip(seq.lengths, seq.chunks(world), strict=True):
        rows = e.narrow(x, dim + 1, offset, offset + chunk)
        merged = e.view(rows, (*shape[:dim], world * chunk, *shape[dim + 2 :]))
        pieces.append(e.narrow(merged, dim, 0, length))
        offset = offset + chunk
    return e.cat(pieces, dim)


def by_rank(e: Emitter, x: fx.Node, dim: int, seq: Sequence, world: int) -> fx.Node:
    """``[..., seq.total, ...] -> [..., P, rows of a rank, ...]``: the inverse of `in_order`."""
    shape = as_shape_of(x)
    pieces: list[fx.Node] = []
    offset: Size = 0
    for length, chunk in zip(seq.lengths, seq.chunks(world), strict=True):
        rows = e.narrow(x, dim, offset, offset + length)
        rows = e.pad_end(rows, dim, chunk * world - length, below=world)
        pieces.append(e.view(rows, (*shape[:dim], world, chunk, *shape[dim + 1 :])))
        offset = offset + length
    return e.cat(pieces, dim + 1)


def zero_padding(e: Emitter, x: fx.Node, split: Shard, topology: Topology) -> fx.Node:
    """`x` with its padding rows set to zero, so that they add nothing to a sum over rows."""
    if not split.seq.padded(topology.size):
        return x
    assert split.whole_dim()
    pieces: list[fx.Node] = []
    offset: Size = 0
    for length, chunk in zip(split.seq.lengths, split.seq.chunks(topology.size), strict=True):
        if not (isinstance(length, int) and isinstance(chunk, int)):
            raise NotImplementedError("a sum over a sequence of symbolic length")
        valid = max(0, min(chunk, length - topology.rank * chunk))
        rows = e.narrow(x, split.dim, offset, offset + valid)
        pieces.append(e.pad_end(rows, split.dim, chunk - valid))
        offset = offset + chunk
    return e.cat(pieces, split.dim)


def add_up(e: Emitter, x: fx.Node, topology: Topology) -> fx.Node:
    """The sum of the ranks' terms, on every rank."""
    return collectives.wait(e, collectives.all_reduce(e, x, topology))
