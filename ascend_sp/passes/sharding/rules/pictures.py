"""Pictures that grow, shrink, or get a margin, of which the height or the width is split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ascend_sp.graph import windows
from ascend_sp.graph.layout import Padded, Sequence, Shard
from ascend_sp.graph.sizes import Size, as_int, divide
from ascend_sp.passes.sharding.rules.base import Answer, Call, Operand, Reshard, rule, unary

aten = torch.ops.aten
NEAREST: dict[Any, tuple[str, ...]] = {
    aten.upsample_nearest1d.default: ("scales",),
    aten.upsample_nearest2d.default: ("scales_h", "scales_w"),
    aten.upsample_nearest3d.default: ("scales_d", "scales_h", "scales_w"),
}
"""Names of what each of the last dims grows by."""
MARGINS: dict[Any, str] = {
    aten.reflection_pad1d.default: "reflect",
    aten.reflection_pad2d.default: "reflect",
    aten.reflection_pad3d.default: "reflect",
    aten.replication_pad1d.default: "replicate",
    aten.replication_pad2d.default: "replicate",
    aten.replication_pad3d.default: "replicate",
}


def picture(call: Call, x: Operand) -> Shard | Reshard:
    """How the rows of the result lie, so that a rank's begin a whole number of rows further."""
    home = x.placement
    held = home.split if isinstance(home, Padded) else home
    assert isinstance(held, Shard)
    sizes = [*x.shape, *call.outputs[0], held.inner, held.outer, *held.seq.lengths]
    if not all(isinstance(n, int) for n in sizes):
        return Reshard("rows of neighbours of a picture whose size is a symbol")
    if not windows.known(held):
        return Reshard("a dim that merges the sequence with another axis is convolved")
    size = as_int(call.outputs[0][held.dim])
    if size == 0:
        return Reshard("nothing comes out")
    if len(held.seq.lengths) == 1 and size % as_int(held.seq.total) == 0:
        return Shard(held.dim, held.seq, 1, size // as_int(held.seq.total))
    return Shard(held.dim, Sequence((size,)))


@rule(*NEAREST)
def nearest(call: Call) -> Answer:
    """``[b, c, *x] -> [b, c, *(n x)]``: every row of the shard becomes n rows of it."""
    x = call.operands[0]
    first = x.ndim - len(NEAREST[call.op])
    split = x.shard
    if split.dim < first:
        return unary(call, split)
    before, after = x.shape[split.dim], call.outputs[0][split.dim]
    times = divide(after, before)
    scale = call.argument(NEAREST[call.op][split.dim - first])
    if times is None or (scale is not None and (not isinstance(times, int) or scale != times)):
        return Reshard("a picture grows by no whole factor")
    grown = replace(split, inner=split.inner * times)
    sizes: list[Size] = list(call.outputs[0][first:])
    sizes[split.dim - first] = grown.local_size(call.world)
    return unary(call, grown, args={1: sizes})


@rule(*MARGINS)
def margin(call: Call) -> Answer:
    """``[b, c, *x] -> [b, c, *(p + x + q)]``: rows around it are for what reads windows."""
    x = call.operands[0]
    pad = list(call.argument("padding"))
    at = 2 * (x.ndim - 1 - x.shard.dim)
    own = pad[at : at + 2] or [0, 0]
    if own == [0, 0]:
        return unary(call, x.shard)
    if not all(isinstance(p, int) and p >= 0 for p in own) or not windows.known(x.shard):
        return Reshard("rows around a picture that merges the sequence with another axis")
    if not isinstance(x.shape[x.shard.dim], int):
        return Reshard("rows around a picture whose size is a symbol")
    pad[at : at + 2] = [0, 0]
    return unary(call, Padded(x.shard, own[0], own[1], MARGINS[call.op]), args={1: pad})


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call) -> Answer:
    """``[b, c r r, x, y] -> [b, c, r x, r y]``."""
    x = call.operands[0]
    split, times = x.shard, call.argument("upscale_factor")
    if split.dim == x.ndim - 3:
        return Reshard("channels that are split become positions")
    if split.dim > x.ndim - 3:
        split = replace(split, inner=split.inner * times)
    return unary(call, split)


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call) -> Answer:
    """``[b, c, r x, r y] -> [b, c r r, x, y]``."""
    x = call.operands[0]
    split, times = x.shard, call.argument("downscale_factor")
    if split.dim == x.ndim - 3:
        return Reshard("positions become channels that are split")
    if split.dim > x.ndim - 3:
        inner = divide(split.inner, times)
        if inner is None:
            return Reshard("positions of two ranks become channels of one")
        split = replace(split, inner=inner)
    return unary(call, split)
