"""Convolutions and pooling. Along a split dim each rank reads its rows and some of its neighbours'.

What it reads is a `Window`, which begins a whole number of rows further with each rank. So the rows
that come out lie as those that go in do, finer or coarser by the stride where that divides them, or
else as a picture of their own. Rows of a window outside of the picture are the zeros that the model
pads with, and the op itself pads along that dim no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ascend_sp.graph.arguments import position_of
from ascend_sp.graph.layout import REPLICATE, Padded, Placement, Shard, Window
from ascend_sp.graph.sizes import as_int
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    inputs_of,
    rule,
    takes_windows,
)
from ascend_sp.passes.sharding.rules.pictures import picture

aten = torch.ops.aten


@takes_windows
@rule(aten.convolution.default)
def convolution(call: Call) -> Answer:
    """``([b, i, *x], [o, i, *taps], [o]) -> [b, o, *y]``: b, or one of x, with rows of neighbours.

    A dim with one tap needs none. Transposed ones too, if rows come out in whole multiples.
    """
    x, *others = call.operands
    if x.placement == REPLICATE or any(w.placement != REPLICATE for w in others):
        return Reshard("the sequence is in the weights of a convolution")
    assert isinstance(x.placement, Shard | Padded)
    dim = x.placement.dim
    if dim == 1:
        return Reshard("the sequence is the channels of a convolution")
    if isinstance(x.placement, Shard) and (dim == 0 or _one_tap(call, dim)):
        return Local(inputs_of(call, {x.index: x.placement}), (x.placement,))
    if dim == 0:
        return Reshard("a convolution of a padded batch")
    split = picture(call, x)
    if isinstance(split, Reshard):
        return split
    taps = _at(call.argument("dilation"), dim - 2) * (as_int(others[0].shape[dim]) - 1) + 1
    stride, padding = (_at(call.argument(a), dim - 2) for a in ("stride", "padding"))
    rows = as_int(split.local_size(call.world))
    if call.argument("transposed"):
        return _transposed(call, x, split, rows, taps, stride, padding)
    want = Window(dim, rows * stride, -padding, (rows - 1) * stride + taps)
    return _windowed(call, x, want, split, {"padding": 0})


def _one_tap(call: Call, dim: int) -> bool:
    """Whether a position along `dim` is made of that position only."""
    along = [_at(call.argument(a), dim - 2) for a in ("stride", "padding", "output_padding")]
    return bool(call.operands[1].shape[dim] == 1) and along == [1, 0, 0]


def _transposed(
    call: Call, x: Operand, split: Shard, rows: int, taps: int, stride: int, padding: int
) -> Answer:
    """Rows ``[r * rows, (r + 1) * rows)`` of the result, from those that reach into them.

    Row i of the operand reaches rows ``[i * stride, i * stride + taps)`` of a result from which
    nothing is cut off. `cut_off` rows of the local one are cut off in front, and as many behind,
    but for `extra`.
    """
    if rows % stride:
        return Reshard(
            "a transposed convolution makes no whole number of rows for each that it reads"
        )
    first = -(-(padding - taps + 1) // stride)
    first = min(first, padding // stride)
    last = (padding + rows - 1) // stride
    while True:
        cut_off = padding - first * stride
        extra = rows + 2 * cut_off - (last - first) * stride - taps
        if extra < 0:  # too much would be left
            first -= 1
        elif extra >= stride:
            last += 1
        else:
            break
    want = Window(x.placement.dim, rows // stride, first, last - first + 1)  # type: ignore[union-attr]
    return _windowed(call, x, want, split, {"padding": cut_off, "output_padding": extra})


@takes_windows
@rule(aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(call: Call) -> Answer:
    """``[b, c, *x] -> [b, c, *y]``: b, c, or one of x, with rows of neighbours."""
    x = call.operands[0]
    assert isinstance(x.placement, Shard | Padded)
    dim = x.placement.dim
    sizes = call.argument("kernel_size")
    first = x.ndim - (2 if call.op is aten.avg_pool2d.default else 3)
    if dim < first:
        if isinstance(x.placement, Padded):
            return Reshard("a pooling of padded channels")
        return Local((x.placement,), (x.placement,))
    padding = _at(call.argument("padding"), dim - first)
    if call.argument("ceil_mode") or (padding and not call.argument("count_include_pad")):
        return Reshard("a pooling does not count the rows around the picture")
    split = picture(call, x)
    if isinstance(split, Reshard):
        return split
    stride = _at(call.argument("stride") or sizes, dim - first)
    rows = as_int(split.local_size(call.world))
    want = Window(dim, rows * stride, -padding, (rows - 1) * stride + _at(sizes, dim - first))
    return _windowed(call, x, want, split, {"padding": 0}, first)


def _windowed(
    call: Call, x: Operand, want: Window, split: Shard, changes: Mapping[str, int], first: int = 2
) -> Local:
    """The op on windows of `x`; `changes` are new values of arguments for the dim that is split."""
    args: dict[int, Any] = {}
    for name, value in changes.items():
        given = list(call.argument(name))
        values = given if len(given) > 1 else given * (x.ndim - first)
        values[want.dim - first] = value
        position = position_of(call.op, name)
        assert position is not None
        args[position] = values
    inputs: dict[int, Placement] = {x.index: want}
    return Local(inputs_of(call, inputs), (split,), args)


def _at(values: list[int], i: int) -> int:
    """The value for the dim `i` of positions; one alone is for all of them."""
    return values[i] if len(values) > 1 else values[0]
