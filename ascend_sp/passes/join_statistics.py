"""Group norms over positions that are split: every rank's statistics, joined into those of all.

Each rank takes mean and variance of the rows that it has, padding left out, and sends two numbers a
group. With n positions in a group, of which rank r has n_r,

    mean = sum(n_r * mean_r) / n        var = sum(n_r * (var_r + (mean_r - mean)^2)) / n

which is exact, and as stable as the variance of each part, since no squares of values are
subtracted. It is all done in float32. An all-reduce could add up only squares about a mean that all
know before: two collectives, one behind the other, where this is one all-gather.
"""

from __future__ import annotations

import operator
from itertools import groupby

import torch
from torch import fx

from ascend_sp.graph import collectives
from ascend_sp.graph.context import NoteKind, PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import INPUTS, Shard
from ascend_sp.graph.origin import MATERIALISE
from ascend_sp.graph.windows import valid_rows
from ascend_sp.runtime.ops import split_group_norm

aten = torch.ops.aten


def join_statistics(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Write out every `split_group_norm`."""
    for node in gm.graph.find_nodes(op="call_function", target=split_group_norm):
        _expand(gm, ctx, node)
    return gm


def _expand(gm: fx.GraphModule, ctx: PassContext, node: fx.Node) -> None:
    x, weight, bias, n, c, _, groups, eps = node.args
    assert isinstance(x, fx.Node)
    split: Shard = node.meta[INPUTS][0]
    emit = Emitter(gm, "join_statistics")
    with emit.at(node):
        grouped = _as_groups(emit, x, n, c, groups)  # type: ignore[arg-type]
        mean, var = _joined(gm, ctx, node, grouped, split)
        rstd = emit.call(aten.rsqrt.default, emit.call(aten.add.Tensor, var, eps))
        if _is_half(x) and _op_by_op(ctx):  # type: ignore[arg-type]
            out = _in_one_op(emit, x, mean, var, eps, weight, bias)  # type: ignore[arg-type]
        else:
            out = _normalised(emit, x, mean, rstd, weight, bias)  # type: ignore[arg-type]
    results = (out, mean, rstd)
    ctx.note(NoteKind.ALL_REDUCE, node, f"statistics of {split} are joined over the ranks")
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        new = results[index]
        with emit.at(user):
            if index:
                new = emit.view(new, as_shape_of(user))
            if new.meta["val"].dtype != user.meta["val"].dtype:
                new = emit.call(aten._to_copy.default, new, dtype=user.meta["val"].dtype)
        emit.replace(user, new)
    gm.graph.erase_node(node)


def _as_groups(e: Emitter, x: fx.Node, n: int, c: int, groups: int) -> fx.Node:
    """``[n, c, ...] -> [n, groups, c / groups, ...]`` in float32."""
    new = e.view(x, (n, groups, c // groups, *as_shape_of(x)[2:]))
    return _wide(e, new) if _is_half(new) else new


def _is_half(x: fx.Node) -> bool:
    return x.meta["val"].dtype in (torch.float16, torch.bfloat16)


def _wide(e: Emitter, x: fx.Node) -> fx.Node:
    return e.call(aten._to_copy.default, x, dtype=torch.float32)


def _op_by_op(ctx: PassContext) -> bool:
    """Whether every op's result is held. GE, which has no batch norm of bfloat16, plans its own."""
    return not ctx.fuses and ctx.target != "torchair"


def _joined(
    gm: fx.GraphModule, ctx: PassContext, node: fx.Node, x: fx.Node, split: Shard
) -> tuple[fx.Node, fx.Node]:
    """Mean and variance ``[n, groups, 1, 1 ...]`` of ``x [n, groups, ...]`` on all ranks."""
    e = Emitter(gm, "join_statistics")
    t = ctx.topology
    shape = as_shape_of(x)
    per_rank = [sum(n for _, n in valid_rows(split, r, t.size)) for r in range(t.size)]
    with e.at(node):
        both = _own(gm, node, x, split, ctx)
        table = collectives.wait(e, collectives.all_gather(e, both, t))
        # One row of dims for the ranks, then those of the statistics.
        ones = (1,) * (len(shape) - 2)
        table = e.view(table, (t.size, 2, *shape[:2], *ones))
        means, variances = (e.call(aten.select.int, table, 1, i) for i in (0, 1))
        weights = _weights(e, per_rank, table, len(shape))

        def over_ranks(value: fx.Node) -> fx.Node:
            return e.call(aten.sum.dim_IntList, e.call(aten.mul.Tensor, value, weights), [0])

        mean = over_ranks(means)
        off = e.call(aten.sub.Tensor, means, mean)
        square = e.call(aten.mul.Tensor, off, off)
        return mean, over_ranks(e.call(aten.add.Tensor, variances, square))


def _own(gm: fx.GraphModule, node: fx.Node, x: fx.Node, split: Shard, ctx: PassContext) -> fx.Node:
    """``[2, n, groups]``: mean and variance of this rank's rows; zeros if it has only padding.

    Other ranks may have other nodes here, so no order may depend on what they cost.
    """
    e = Emitter(gm, MATERIALISE)
    t, shape = ctx.topology, as_shape_of(x)
    with e.at(node):
        rows = list(valid_rows(split, t.rank, t.size))
        if not rows:
            # Made of `x`, so that the collective has the same place in all ranks' orders.
            like = x
            for _ in shape[2:]:
                like = e.call(aten.select.int, like, 2, 0)
            return e.call(aten.zeros_like.default, e.call(aten.stack.default, [like, like]))
        dim = split.dim + 1
        real = e.cat([e.narrow(x, dim, start, start + n) for start, n in rows], dim)
        mean, var = _mean_and_variance(e, real, list(range(2, len(shape))), ctx)
        return e.call(aten.stack.default, [mean, var])


def _mean_and_variance(
    e: Emitter, x: fx.Node, dims: list[int], ctx: PassContext
) -> tuple[fx.Node, fx.Node]:
    """Over `dims`; written out where the target cannot take the one op for it."""
    if ctx.converts is None or ctx.converts(aten.var_mean.correction):
        found = e.call(aten.var_mean.correction, x, dims, correction=0)
        return e.call(operator.getitem, found, 1), e.call(operator.getitem, found, 0)
    mean = e.call(aten.mean.dim, x, dims, True)
    off = e.call(aten.sub.Tensor, x, mean)
    var = e.call(aten.mean.dim, e.call(aten.mul.Tensor, off, off), dims)
    return e.view(mean, as_shape_of(var)), var


def _weights(e: Emitter, rows: list[int], like: fx.Node, ndim: int) -> fx.Node:
    """Each rank's share of all rows, ``[ranks, 1, 1, ...]``."""
    val = like.meta["val"]
    parts = []
    for count, alike in groupby(rows):
        size = (len(list(alike)), *(1,) * ndim)
        share = count / sum(rows)
        parts.append(e.call(aten.full.default, size, share, dtype=val.dtype, device=val.device))
    return e.cat(parts, 0)


def _normalised(
    e: Emitter,
    x: fx.Node,
    mean: fx.Node,
    rstd: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
) -> fx.Node:
    """``(x - mean) * rstd * weight + bias`` as one multiply-add of each element."""
    shape = as_shape_of(x)
    n, groups = as_shape_of(mean)[:2]
    ones = (1,) * (len(shape) - 2)

    def of_channels(p: fx.Node) -> fx.Node:
        return e.view(p, (1, groups, shape[1] // groups))

    mean, scale = (e.view(v, (n, groups, 1)) for v in (mean, rstd))
    if weight is not None:
        scale = e.call(aten.mul.Tensor, scale, of_channels(weight))
    shift = e.call(aten.neg.default, e.call(aten.mul.Tensor, mean, scale))
    if bias is not None:
        shift = e.call(aten.add.Tensor, shift, of_channels(bias))
    every = (n, groups, shape[1] // groups)

    def spread(v: fx.Node) -> fx.Node:
        if as_shape_of(v) != every:  # without weights a group has one value
            v = e.contiguous(e.call(aten.expand.default, v, list(every)), force=True)
        return e.view(v, (n, shape[1], *ones))

    return e.call(aten.addcmul.default, spread(shift), x, spread(scale))


def _in_one_op(
    e: Emitter,
    x: fx.Node,
    mean: fx.Node,
    var: fx.Node,
    eps: float,
    weight: fx.Node | None,
    bias: fx.Node | None,
) -> fx.Node:
    """The same as a batch norm of inference: wide inside, so that no wide copy of x is held."""
    shape = as_shape_of(x)
    n, groups = as_shape_of(mean)[:2]
    each = shape[1] // groups
    channels = (n * shape[1],)

    def of_groups(v: fx.Node) -> fx.Node:
        spread = e.call(aten.expand.default, e.view(v, (n, groups, 1)), [n, groups, each])
        return e.view(e.contiguous(spread, force=True), channels)

    def of_channels(p: fx.Node | None) -> fx.Node | None:
        if p is None:
            return None
        return e.call(aten.repeat.default, _wide(e, p) if _is_half(p) else p, [n])

    found = e.call(
        aten._native_batch_norm_legit_no_training.default,
        e.view(x, (1, *channels, *shape[2:])),
        of_channels(weight),
        of_channels(bias),
        of_groups(mean),
        of_groups(var),
        0.0,
        eps,
    )
    return e.view(e.call(operator.getitem, found, 0), shape)
