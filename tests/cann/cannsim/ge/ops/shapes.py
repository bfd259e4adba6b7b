"""Ops that move elements without changing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cannsim.ge.registry import Call, GeError, ints, kernel


@kernel("Reshape")
def reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape(ints(shape))


@kernel("Flatten", "FlattenV2")
def flatten(call: Call, x: Tensor) -> Tensor:
    """Always 2-D."""
    axis = call.attr("axis", 1) % max(x.dim(), 1)
    return x.reshape(torch.Size(x.shape[:axis]).numel(), -1)


@kernel("Transpose")
def transpose(call: Call, x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


@kernel("TransposeD")
def transpose_d(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.attr("perm"))


@kernel("Unsqueeze")
def unsqueeze(call: Call, x: Tensor) -> Tensor:
    axes = call.attr("axes", [])
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@kernel("ExpandDims")
def expand_dims(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return x.unsqueeze(int(axis))


@kernel("Squeeze")
def squeeze(call: Call, x: Tensor) -> Tensor:
    """Without axes, all dims of size 1 go; an axis of another size is left."""
    axes = call.attr("axis", []) or [i for i, n in enumerate(x.shape) if n == 1]
    for axis in sorted({a % max(x.dim(), 1) for a in axes}, reverse=True):
        x = x.squeeze(axis) if x.dim() else x
    return x


@kernel("BroadcastTo")
def broadcast_to(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.broadcast_to(ints(shape))


@kernel("Expand")
def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Sizes of 1, and -1, keep the size that there is."""
    sizes = ints(shape)
    own = [1] * (len(sizes) - x.dim()) + list(x.shape)
    return x.expand([o if n in (1, -1) else n for n, o in zip(sizes, own, strict=True)])


@kernel("Tile")
def tile(call: Call, x: Tensor, multiples: Tensor) -> Tensor:
    return x.repeat(ints(multiples))


@kernel("ConcatV2")
def concat_v2(call: Call, *inputs: Tensor) -> Tensor:
    *xs, axis = inputs
    return torch.cat(xs, int(axis))


@kernel("ConcatD")
def concat_d(call: Call, *xs: Tensor) -> Tensor:
    return torch.cat(xs, call.attr("concat_dim"))


@kernel("Concat")
def concat(call: Call, axis: Tensor, *xs: Tensor) -> Tensor:
    return torch.cat(xs, int(axis))


@kernel("Pack")
def pack(call: Call, *xs: Tensor) -> Tensor:
    return torch.stack(xs, call.attr("axis", 0))


@kernel("Unpack")
def unpack(call: Call, x: Tensor) -> Sequence[Tensor]:
    return x.unbind(call.attr("axis", 0))


@kernel("SplitV")
def split_v(call: Call, x: Tensor, sizes: Tensor, axis: Tensor) -> Sequence[Tensor]:
    dim, counts = int(axis), ints(sizes)
    if -1 in counts:
        rest = x.shape[dim] - sum(n for n in counts if n >= 0)
        counts[counts.index(-1)] = rest
    return x.split(counts, dim)


@kernel("Split")
def split(call: Call, axis: Tensor, x: Tensor) -> Sequence[Tensor]:
    return x.tensor_split(call.attr("num_split"), int(axis))


@kernel("SplitD")
def split_d(call: Call, x: Tensor) -> Sequence[Tensor]:
    return x.tensor_split(call.attr("num_split"), call.attr("split_dim"))


@kernel("Slice")
def slice_(call: Call, x: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    for dim, (start, n) in enumerate(zip(ints(offsets), ints(size), strict=True)):
        x = x.narrow(dim, start, x.shape[dim] - start if n == -1 else n)
    return x


@kernel("StridedSliceV2")
def strided_slice_v2(
    call: Call,
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    axes: Tensor | None = None,
    strides: Tensor | None = None,
) -> Tensor:
    _no_masks(call)
    starts, stops = ints(begin), ints(end)
    dims = ints(axes) if axes is not None else list(range(len(starts)))
    steps = ints(strides) if strides is not None else [1] * len(starts)
    for dim, low, high, step in zip(dims, starts, stops, steps, strict=True):
        x = torch.ops.aten.slice.Tensor(x, dim, low, high, step)
    return x


@kernel("StridedSlice")
def strided_slice(call: Call, x: Tensor, begin: Tensor, end: Tensor, strides: Tensor) -> Tensor:
    _no_masks(call)
    for dim, (low, high, step) in enumerate(
        zip(ints(begin), ints(end), ints(strides), strict=True)
    ):
        x = torch.ops.aten.slice.Tensor(x, dim, low, high, step)
    return x


def _no_masks(call: Call) -> None:
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    used = [m for m in masks if call.attr(m, 0)]
    if used:
        raise NotImplementedError(f"attributes {used} are not simulated")


@kernel("PadV3")
def pad_v3(call: Call, x: Tensor, paddings: Tensor, value: Tensor | None = None) -> Tensor:
    mode = call.attr("mode", "constant")
    if mode != "constant":
        raise NotImplementedError(f"mode {mode!r} is not simulated")
    flat = ints(paddings)
    half = len(flat) // 2
    if call.attr("paddings_contiguous", True):
        pairs = [(flat[2 * i], flat[2 * i + 1]) for i in range(half)]
    else:
        pairs = list(zip(flat[:half], flat[half:], strict=True))
    torch_order = [n for pair in reversed(pairs) for n in pair]
    return F.pad(x, torch_order, value=0.0 if value is None else value.item())


@kernel("ReverseV2")
def reverse_v2(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return x.flip(ints(axis))


@kernel("Roll")
def roll(call: Call, x: Tensor) -> Tensor:
    return x.roll(call.attr("shifts"), call.attr("dims", []) or None)


@kernel("AsStrided")
def as_strided(call: Call, x: Tensor, size: Tensor, stride: Tensor, offset: Tensor) -> Tensor:
    return x.contiguous().as_strided(ints(size), ints(stride), int(offset))


@kernel("RepeatInterleave")
def repeat_interleave(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    axis = call.attr("axis", 1000)
    return x.repeat_interleave(repeats.reshape(-1), None if axis == 1000 else axis)


@kernel("ResizeNearestNeighborV2")
def resize_nearest_neighbor(call: Call, x: Tensor, size: Tensor) -> Tensor:
    """Of a picture. REG_OP lists no bfloat16."""
    if x.dtype == torch.bfloat16:
        raise GeError("ResizeNearestNeighborV2: x is bfloat16")
    layout = call.op.layout(0)
    if layout != "NCHW" or call.attr("align_corners", False):
        raise NotImplementedError(f"format {layout!r} or align_corners is not simulated")
    mode = "nearest-exact" if call.attr("half_pixel_centers", False) else "nearest"
    return F.interpolate(x, size=ints(size), mode=mode)
