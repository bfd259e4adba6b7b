"""Random calls of the ops that rearrange dims, for `rule_cases.CASES`."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch

from ascend_sp.graph.layout import REPLICATE, Sequence, Shard
from ascend_sp.graph.sizes import product
from brute_force import Placed
from rule_cases import CASES, TO_THE_END, Draw, case, margined

aten = torch.ops.aten
__all__ = ["CASES"]


def grouped(g: Draw, factors: list[int]) -> list[list[int]]:
    """`factors` in order, in one group for each dim; a dim of one may come in between."""
    groups: list[list[int]] = [[]]
    for i in range(len(factors)):
        if i and g.flag():
            groups.append([])
        groups[-1].append(i)
    if g.pick(False, False, True):
        groups.insert(g.integer(0, len(groups)), [])
    return groups


def regrouping(g: Draw) -> tuple[Placed, list[int]]:
    """A tensor and a shape to view it as, in which the sequence is a factor of one dim."""
    factors = [g.pick(1, 2, 3) for _ in range(4)]
    at = g.integer(0, 4)
    factors.insert(at, g.split.seq.total)
    source, target = grouped(g, factors), grouped(g, factors)
    dim = next(d for d, group in enumerate(source) if at in group)
    outer = product(factors[i] for i in source[dim] if i < at)
    inner = product(factors[i] for i in source[dim] if i > at)
    shape = [product(factors[i] for i in group) for group in source]
    new = [product(factors[i] for i in group) for group in target]
    return Placed(g.values(shape), Shard(dim, g.split.seq, outer, inner)), new


def cutting(g: Draw) -> tuple[Placed, list[int]]:
    """A tensor and any shape to view it as."""
    x = g.some()
    rest, new = x.tensor.numel(), []
    while rest > 1 and len(new) < 4:
        factor = g.pick(*(f for f in (1, 2, 3, 4, 5, 7, 9, rest) if rest % f == 0))
        new.append(factor)
        rest //= factor
    new.insert(g.integer(0, len(new)), rest)
    return x, new


@case(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _(g: Draw, op: Any) -> Any:
    x, new = regrouping(g) if g.pick(True, True, False) else cutting(g)
    if g.flag() and new:
        new[g.integer(0, len(new) - 1)] = -1
    return x, new


@case(aten.permute.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some(4)
    ndim = x.tensor.ndim
    order = torch.randperm(ndim, generator=g.random).tolist()
    return x, [d - g.pick(0, ndim) for d in order]


@case(aten.transpose.int)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.dim_of(x), g.dim_of(x)


@case(aten.t.default, aten.numpy_T.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(2),)


@case(aten.view_as_complex.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    pairs = torch.stack([x.tensor, x.tensor.flip(0)], -1)
    if x.tensor.ndim > 1 and g.pick(False, False, False, True):
        shape = [*x.tensor.shape[:-1], 2]
        return (Placed(g.values(shape), Shard(len(shape) - 1, Sequence((2,)))),)
    return (Placed(pairs, x.placement),)


@case(aten.view_as_real.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(kind="complex"),)


@case(aten.unsqueeze.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.dim(x.tensor.ndim + 1)


@case(aten.squeeze.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(),)


@case(aten.squeeze.dim)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.dim_of(x)


@case(aten.squeeze.dims)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.pick(*[g.dims_of(x)] * 4, [])


@case(aten.expand.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    new = [g.pick(n, -1, *([3] if n == 1 else [])) for n in x.tensor.shape]
    return x, [*g.pick([], [1], [2], [2, 3]), *new]


@case(aten.repeat.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, [*g.pick([], [1], [2]), *(g.pick(1, 1, 2) for _ in x.tensor.shape)]


def edges(x: Placed) -> list[int]:
    """Where the segments of `x` begin and end."""
    assert isinstance(x.placement, Shard)
    return [0, *accumulate(x.placement.seq.lengths)]


@case(aten.slice.Tensor)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    if g.pick(False, False, False, True):
        x = margined(g, x, 0)
    dim = g.pick(x.placement.dim, x.placement.dim, g.dim_of(x))
    size = x.tensor.shape[dim]
    inside = edges(x) if isinstance(x.placement, Shard) else []
    ends = [*inside, *(e - size for e in inside), g.integer(-size - 2, size + 2)]
    start, end = g.pick(None, TO_THE_END, *ends), g.pick(None, TO_THE_END, *ends)
    full = (x, dim, start, end, g.pick(1, 1, 1, 2))
    return full[: g.pick(5, 5, 5, 4, 3, 2, 1)]


@case(aten.select.int)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    dim = g.dim_of(x)
    size = x.tensor.shape[dim]
    return x, dim, g.integer(-size, size - 1)


@case(aten.unbind.int)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return (x, g.dim_of(x)) if g.pick(True, True, False) else (x,)


@case(aten.split.Tensor)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    dim = g.pick(x.placement.dim, g.dim_of(x))
    size = g.pick(x.placement.seq.lengths[0], g.integer(1, x.tensor.shape[dim] + 1))
    return x, size, dim


@case(aten.split_with_sizes.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    dim = g.pick(x.placement.dim, g.dim_of(x))
    size = x.tensor.shape[dim]
    cuts = {e for e in (*edges(x), g.integer(0, size)) if e < size and g.pick(True, True, False)}
    bounds = sorted({0, size} | cuts)
    sizes = [b - a for a, b in pairwise(bounds)]
    if g.pick(False, False, False, True):
        sizes.insert(g.integer(0, len(sizes)), 0)
    return x, sizes, dim


@case(aten.cat.default)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(g.integer(1, 3))
    dim = g.dim(len(shape))
    xs = [g.tensor(*shape)]
    for _ in range(g.integer(0, 2)):
        other = list(shape)
        other[dim] = g.pick(g.n, 0, 1, 4)
        xs.append(g.other(*other))
    at = g.integer(0, len(xs) - 1)
    xs[0], xs[at] = xs[at], xs[0]
    return (xs, dim) if dim or g.flag() else (xs,)


@case(aten.stack.default)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(g.integer(1, 3))
    xs = [g.tensor(*shape), *(g.other(*shape) for _ in range(g.integer(0, 2)))]
    return xs[:: g.pick(1, -1)], g.dim(len(shape) + 1)


def _scatter_of_segments(g: Draw) -> Any:
    """Rows that begin and end between segments."""
    lengths = [g.integer(1, 5) for _ in range(g.integer(1, 4))]
    i = g.integer(0, len(lengths) - 1)
    j = g.integer(i + 1, len(lengths))
    start, end, dim = sum(lengths[:i]), sum(lengths[:j]), g.integer(0, 1)
    sizes = (sum(lengths), end - start)
    base, src = ([2, n] if dim else [n, 2] for n in sizes)
    which = g.integer(0, 2)
    whole, part = Sequence(tuple(lengths)), Sequence(tuple(lengths[i:j]))
    return (
        Placed(g.values(base), REPLICATE if which == 0 else Shard(dim, whole)),
        Placed(g.values(src), REPLICATE if which == 1 else Shard(dim, part)),
        *(dim, start, end),
    )


@case(aten.slice_scatter.default)
def _(g: Draw, op: Any) -> Any:
    if g.flag():
        return _scatter_of_segments(g)
    shape = g.shape(g.pick(3, 3, 2, 1))
    dim = g.short_dim(shape)
    start = g.integer(0, shape[dim] - 1)
    end = g.pick(TO_THE_END, g.integer(start + 1, shape[dim]))
    rows = list(shape)
    rows[dim] = len(range(start, min(end, shape[dim])))
    which = g.integer(0, 2)
    base, src = g.tensor(*shape, whole=which == 0), g.tensor(*rows, whole=which == 1)
    return base, src, dim, start, end


@case(aten.copy.default)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(g.pick(3, 2, 1))
    src = [1 if g.pick(True, False, False) else n for n in shape]
    which = g.integer(0, 2)
    return g.tensor(*shape, whole=which == 0), g.tensor(*src, whole=which == 1)


@case(aten.select_scatter.default)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(g.integer(2, 3))
    dim = g.short_dim(shape)
    row = list(shape)
    del row[dim]
    which = g.integer(0, 2)
    base, src = g.tensor(*shape, whole=which == 0), g.tensor(*row, whole=which == 1)
    return base, src, dim, g.integer(-shape[dim], shape[dim] - 1)


@case(aten.constant_pad_nd.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    pad = [g.pick(0, 0, 1, 2) for _ in range(2 * g.integer(1, x.tensor.ndim))]
    own = 2 * (x.tensor.ndim - 1 - x.placement.dim)
    if g.flag():
        pad[own : own + 2] = [0] * len(pad[own : own + 2])
    if x.tensor.shape[-1] > 1 and x.placement.dim != x.tensor.ndim - 1:
        pad[0] = g.pick(pad[0], -1)
    return (x, pad, *g.pick((), (1.5,)))
