"""Ops that rearrange dims and compute nothing: view, permute, expand, slice, split, cat, ..."""

from __future__ import annotations

from typing import Any

import torch

from ascend_sp.graph import windows
from ascend_sp.graph.layout import (
    Padded,
    Placement,
    Sequence,
    Shard,
    Window,
    at_dim,
    local_shape,
    reshaped,
)
from ascend_sp.graph.sizes import Size, as_int, as_size, equal, total
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    normal_dim,
    rule,
    takes_windows,
    unary,
)
from ascend_sp.passes.sharding.rules.pictures import picture

aten = torch.ops.aten


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(call: Call) -> Answer:
    """``[b, s, h*d] -> [b*s, h, d]`` and every other regrouping that keeps `s` in one dim."""
    x = call.operands[0]
    out = call.outputs[0]
    prefer = x.shard.dim if len(out) == x.ndim else None
    split = reshaped(x.shape, x.shard, out, prefer)
    if split is None:
        return Reshard(f"viewing {list(x.shape)} as {list(out)} cuts or regroups the sequence axis")
    return unary(call, split, args={1: list(local_shape(out, split, call.world))})


@rule(aten.permute.default)
def permute(call: Call) -> Answer:
    """``[b, s, c] -> [s, b, c]``."""
    x = call.operands[0]
    dims = [normal_dim(d, x.ndim) for d in call.argument("dims")]
    return unary(call, x.shard.moved(dims.index(x.shard.dim)))


@rule(aten.transpose.int, aten.t.default, aten.numpy_T.default)
def transpose(call: Call) -> Answer:
    """``[s, c] -> [c, s]``."""
    x = call.operands[0]
    dims = list(range(x.ndim))
    if call.op is aten.transpose.int:
        a, b = (normal_dim(d, x.ndim) for d in (call.argument("dim0"), call.argument("dim1")))
        dims[a], dims[b] = dims[b], dims[a]
    else:
        dims.reverse()
    return unary(call, x.shard.moved(dims.index(x.shard.dim)))


@rule(aten.view_as_complex.default)
def as_complex(call: Call) -> Answer:
    """``[s, 2] -> [s]``."""
    x = call.operands[0]
    if x.shard.dim == x.ndim - 1:
        return Reshard("the two parts of complex numbers are the sequence")
    return unary(call, x.shard)


@rule(aten.view_as_real.default)
def as_real(call: Call) -> Answer:
    """``[s] -> [s, 2]``."""
    return unary(call, call.operands[0].shard)


@rule(aten.unsqueeze.default)
def unsqueeze(call: Call) -> Answer:
    """``[s] -> [1, s]``."""
    x = call.operands[0]
    at = normal_dim(call.argument("dim"), x.ndim + 1)
    return unary(call, x.shard.moved(x.shard.dim + (at <= x.shard.dim)))


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: Call) -> Answer:
    """``[1, s] -> [s]``; a dim that is one only on the shards stays."""
    x = call.operands[0]
    dims = range(x.ndim) if call.op is aten.squeeze.default else call.argument("dim")
    dims = {normal_dim(d, x.ndim) for d in ([dims] if isinstance(dims, int) else dims)}
    gone = {d for d in dims if equal(x.shape[d], 1)}
    if x.shard.dim in gone:
        return Reshard("the sequence axis of one token is squeezed away")
    split = x.shard.moved(x.shard.dim - sum(d < x.shard.dim for d in gone))
    return unary(call, split, op=aten.squeeze.dims, args={1: sorted(gone)})


@rule(aten.expand.default)
def expand(call: Call) -> Answer:
    """``[1, s] -> [b, s]``."""
    x, out = call.operands[0], call.outputs[0]
    dim = x.shard.dim + len(out) - x.ndim
    if not equal(out[dim], x.shape[x.shard.dim]):
        return Reshard("the sequence axis of one token is expanded")
    split = x.shard.moved(dim)
    return unary(call, split, args={1: list(local_shape(out, split, call.world))})


@rule(aten.repeat.default)
def repeat(call: Call) -> Answer:
    """``[1, s] -> [b, s]`` by copying; the sequence itself may not be repeated."""
    x = call.operands[0]
    repeats = list(call.argument("repeats"))
    dim = x.shard.dim + len(repeats) - x.ndim
    if not equal(as_size(repeats[dim]), 1):
        return Reshard("the sequence axis is repeated")
    return unary(call, x.shard.moved(dim))


def bounds(start: Any, stop: Any, size: Size) -> tuple[Size, Size] | None:
    """Python's ``[start:stop]`` on a dim of `size` as ``0 <= start <= stop <= size``."""

    def clamp(v: Any, default: Size) -> Size | None:
        if v is None:
            return default
        v = as_size(v)
        if isinstance(v, int) and v >= 2**62:  # ATen's "to the end"
            return size
        if isinstance(v, int) and v < 0:
            v = v + size
        if isinstance(v, int) and isinstance(size, int):
            return min(max(v, 0), size)
        return as_size(v)

    lo, hi = clamp(start, 0), clamp(stop, size)
    return None if lo is None or hi is None else (lo, hi)


@takes_windows
@rule(aten.slice.Tensor)
def slice_(call: Call) -> Answer:
    """``[b, s, c] -> [b, s', c]`` between segments, or any slice of another dim.

    Rows of a picture with a margin are cut out with rows of neighbours.
    """
    x = call.operands[0]
    dim = normal_dim(call.argument("dim"), x.ndim)
    if isinstance(x.placement, Padded):
        return _cut_out(call, x, dim)
    split = x.shard
    if dim != split.dim:
        return unary(call, split)
    where = bounds(call.argument("start"), call.argument("end"), x.shape[dim])
    if where is None or not equal(as_size(call.argument("step")), 1):
        return Reshard("the sequence axis is sliced with a step")
    if not split.whole_dim():
        if equal(where[0], 0) and equal(where[1], x.shape[dim]):
            return unary(call, split, args={1: dim, 2: 0, 3: split.local_size(call.world)})
        return Reshard("a dim that merges the sequence with another axis is sliced")
    cut = _segments(split.seq, *where, f"slice {where[0]}:{where[1]} falls")
    if isinstance(cut, Reshard):
        return cut
    begin, end = _local_range(split.seq, cut, call.world)
    kept = Shard(dim, split.seq.part(*cut))
    return unary(call, kept, args={1: dim, 2: begin, 3: end})


def _cut_out(call: Call, x: Operand, dim: int) -> Answer:
    """Rows of a picture that has some around it."""
    assert isinstance(x.placement, Padded)
    where = bounds(call.argument("start"), call.argument("end"), x.shape[dim])
    if dim != x.placement.dim or where is None or not equal(as_size(call.argument("step")), 1):
        return Reshard("another dim than that of a margin is sliced, or with a step")
    split = picture(call, x)
    if isinstance(split, Reshard):
        return split
    rows = as_int(split.local_size(call.world))
    want = Window(dim, rows, as_int(where[0]), rows)
    return Local((want,), (split,), args={1: dim, 2: 0, 3: rows})


def _segments(seq: Sequence, start: Size, stop: Size, what: str) -> tuple[int, int] | Reshard:
    """The segments ``[i, j)`` that rows ``[start, stop)`` are, or that they are none."""
    cut = seq.cut(start, stop)
    if cut is None:
        return Reshard(f"{what} inside a segment of [{seq}]", seq.seams(start, stop))
    return cut


def _local_range(seq: Sequence, cut: tuple[int, int], world: int) -> tuple[Size, Size]:
    chunks = seq.chunks(world)
    return total(chunks[: cut[0]]), total(chunks[: cut[1]])


@rule(aten.select.int)
def select(call: Call) -> Answer:
    """``[b, s, c] -> [s, c]``; one row of the sequence cannot be picked on the shards."""
    x = call.operands[0]
    dim = normal_dim(call.argument("dim"), x.ndim)
    if dim == x.shard.dim:
        return Reshard("one position of the sequence is selected")
    return unary(call, x.shard.moved(x.shard.dim - (dim < x.shard.dim)))


@rule(aten.unbind.int)
def unbind(call: Call) -> Answer:
    """``[k, s, c] -> k x [s, c]``."""
    x = call.operands[0]
    dim = normal_dim(call.argument("dim"), x.ndim)
    if dim == x.shard.dim:
        return Reshard("the sequence is unbound into single positions")
    return unary(call, x.shard.moved(x.shard.dim - (dim < x.shard.dim)))


@rule(aten.split.Tensor, aten.split_with_sizes.default)
def split(call: Call) -> Answer:
    """``[b, s1+s2, c] -> [b, s1, c], [b, s2, c]`` between segments, or along another dim."""
    x = call.operands[0]
    dim = normal_dim(call.argument("dim"), x.ndim)
    if dim != x.shard.dim:
        return unary(call, x.shard)
    if not x.shard.whole_dim():
        return Reshard("a dim that merges the sequence with another axis is split")
    pieces: list[Placement] = []
    sizes: list[Size] = []
    start: Size = 0
    for shape in call.outputs:
        cut = _segments(x.shard.seq, start, start + shape[dim], "the split falls")
        if isinstance(cut, Reshard):
            return cut
        piece = Shard(dim, x.shard.seq.part(*cut))
        pieces.append(piece)
        sizes.append(piece.local_size(call.world))
        start = start + shape[dim]
    if call.op is not aten.split.Tensor:
        return Local((x.shard,), tuple(pieces), args={1: sizes})
    if not all(equal(s, sizes[0]) for s in sizes):
        return Reshard("split() into equal sizes gives unequal shards")
    return Local((x.shard,), tuple(pieces), args={1: sizes[0]})


@rule(aten.cat.default)
def cat(call: Call) -> Answer:
    """``[b, s1, c], [b, s2, c] -> [b, s1+s2, c]``, and along any other dim.

    Along the sequence the segments of all operands line up, in order; an operand that is
    replicated is cut as one more segment.
    """
    out = call.outputs[0]
    ndim = len(out)
    dim = normal_dim(call.argument("dim"), ndim)
    xs = call.operands
    if any(x.ndim != ndim for x in xs):
        return Reshard("an empty legacy operand is concatenated")
    leader = call.leader
    if at_dim(leader.shape, leader.shard, dim) is None:
        if leader.shard.dim == dim:
            return Reshard("a dim that merges the sequence with another axis is concatenated")
        return Local(tuple(leader.shard for _ in xs), (leader.shard,))
    inputs = [_along(x, dim) for x in xs]
    if any(p is None for p in inputs):
        return Reshard("tensors split along different axes are concatenated")
    found = tuple(p for p in inputs if p is not None)
    joined = Sequence.joined([p.seq for p in found])
    return Local(found, (Shard(dim, joined),), {1: dim})


def _along(x: Operand, dim: int) -> Shard | None:
    if isinstance(x.placement, Shard):
        return at_dim(x.shape, x.placement, dim)
    return Shard(dim, Sequence((x.shape[dim],)))


@rule(aten.stack.default)
def stack(call: Call) -> Answer:
    """``k x [s, c] -> [k, s, c]``."""
    xs = call.operands
    dim = normal_dim(call.argument("dim"), xs[0].ndim + 1)
    split = call.leader.shard
    moved = split.moved(split.dim + (dim <= split.dim))
    return Local(tuple(split for _ in xs), (moved,))


@rule(aten.slice_scatter.default)
def slice_scatter(call: Call) -> Answer:
    """``[b, s, c], [b, s', c] -> [b, s, c]``: whole segments are written, or another dim."""
    base, written = call.operands
    split = call.leader.shard
    dim = normal_dim(call.argument("dim"), base.ndim)
    if dim != split.dim:
        return Local((split, split), (split,))
    where = bounds(call.argument("start"), call.argument("end"), base.shape[dim])
    if where is None or not equal(as_size(call.argument("step")), 1):
        return Reshard("rows of the sequence are overwritten with a step")
    if not split.whole_dim():
        return Reshard("a dim that merges the sequence with another axis is overwritten")
    if isinstance(base.placement, Shard):
        whole = at_dim(base.shape, base.placement, dim)
    else:  # its segments follow those of what is written
        own = at_dim(written.shape, written.shard, dim)
        ends = (where[0], base.shape[dim] - where[1])
        before, after = (Sequence((n,) if not equal(n, 0) else ()) for n in ends)
        whole = own and Shard(dim, Sequence.joined([before, own.seq, after]))
    if whole is None:
        return Reshard("tensors split along different axes are written into each other")
    cut = _segments(whole.seq, *where, f"rows {where[0]}:{where[1]} end")
    if isinstance(cut, Reshard):
        return cut
    begin, end = _local_range(whole.seq, cut, call.world)
    part = Shard(dim, whole.seq.part(*cut))
    return Local((whole, part), (whole,), args={2: dim, 3: begin, 4: end})


@rule(aten.select_scatter.default)
def select_scatter(call: Call) -> Answer:
    """``[b, s, c], [b, s] -> [b, s, c]``, written into a dim that is not split."""
    base, _ = call.operands
    dim = normal_dim(call.argument("dim"), base.ndim)
    leader = call.leader
    split = leader.shard
    if leader.index != base.index:
        split = split.moved(split.dim + (dim <= split.dim))
    if dim == split.dim:
        return Reshard("a row of the sequence is overwritten")
    return Local((split, split.moved(split.dim - (dim < split.dim))), (split,))


@rule(aten.constant_pad_nd.default)
def constant_pad(call: Call) -> Answer:
    """``[b, s, c] -> [b, s+p, c']``: rows that are added to the sequence are segments of it.

    Where a dim holds several rows for each of the sequence, they stay outside of the shards, for
    what reads windows.
    """
    x = call.operands[0]
    pad = list(call.argument("pad"))
    at = 2 * (x.ndim - 1 - x.shard.dim)
    own = [as_size(p) for p in pad[at : at + 2]] or [0, 0]
    if all(equal(p, 0) for p in own):
        return unary(call, x.shard)
    if not all(isinstance(p, int) and p >= 0 for p in own):
        return Reshard("the sequence axis is cut by a negative padding")
    if not x.shard.whole_dim():
        if not windows.known(x.shard):
            return Reshard("a dim that merges the sequence with another axis is padded")
        pad[at : at + 2] = [0, 0]
        value = float(call.argument("value"))
        padded = Padded(x.shard, own[0], own[1], "constant", value)  # type: ignore[arg-type]
        return unary(call, padded, args={1: pad})
    before, after = (Sequence((p,) if p else ()) for p in own)
    pad[at : at + 2] = [before.local(call.world), after.local(call.world)]
    longer = Shard(x.shard.dim, Sequence.joined([before, x.shard.seq, after]))
    return unary(call, longer, args={1: pad})
