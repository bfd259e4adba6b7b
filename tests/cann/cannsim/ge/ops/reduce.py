"""Ops that combine elements along axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cannsim.ge.registry import Call, ints, kernel


def _axes(call: Call, x: Tensor, axes: Tensor | None) -> list[int]:
    """Axes as input or attribute; none at all means every axis."""
    given = ints(axes) if axes is not None else call.attr("axes", [])
    return given or list(range(x.dim()))


def _keep(call: Call) -> bool:
    return bool(call.attr("keep_dims", False))


@kernel("ReduceSum", "ReduceSumD")
def reduce_sum(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Keeps the dtype, also of integers."""
    return x.sum(_axes(call, x, axes), keepdim=_keep(call), dtype=x.dtype)


@kernel("ReduceMean", "ReduceMeanD")
def reduce_mean(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(_axes(call, x, axes), keepdim=_keep(call))


@kernel("ReduceMeanWithCast")
def reduce_mean_with_cast(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.to(call.dtype("dtype")).mean(_axes(call, x, axes), keepdim=_keep(call))


@kernel("ReduceMax", "ReduceMaxD")
def reduce_max(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.amax(_axes(call, x, axes), keepdim=_keep(call))


@kernel("ReduceMin", "ReduceMinD")
def reduce_min(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.amin(_axes(call, x, axes), keepdim=_keep(call))


@kernel("ReduceProd", "ReduceProdD")
def reduce_prod(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    for axis in sorted((a % max(x.dim(), 1) for a in _axes(call, x, axes)), reverse=True):
        x = x.prod(axis, keepdim=_keep(call), dtype=x.dtype)
    return x


@kernel("ReduceAll", "ReduceAllD")
def reduce_all(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return torch.all(x, _axes(call, x, axes), keepdim=_keep(call))


@kernel("ReduceAny", "ReduceAnyD")
def reduce_any(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return torch.any(x, _axes(call, x, axes), keepdim=_keep(call))


@kernel("Cumsum")
def cumsum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    if call.attr("exclusive", False) or call.attr("reverse", False):
        raise NotImplementedError("exclusive and reverse are not simulated")
    return x.cumsum(int(axis), dtype=x.dtype)


@kernel("ArgMaxV2")
def arg_max_v2(call: Call, x: Tensor, dimension: Tensor) -> Tensor:
    return x.argmax(int(dimension)).to(call.dtype("dtype", 9))


@kernel("ArgMaxWithValue")
def arg_max_with_value(call: Call, x: Tensor) -> Any:
    values, indices = x.max(call.attr("dimension"), keepdim=_keep(call))
    return indices.to(torch.int32), values


@kernel("TopKV2")
def top_k_v2(call: Call, x: Tensor, k: Tensor) -> Any:
    values, indices = x.topk(
        int(k), call.attr("dim", -1), bool(call.attr("largest", True)),
        bool(call.attr("sorted", True)),
    )  # fmt: skip
    return values, indices.to(torch.int32)


@kernel("Sort")
def sort(call: Call, x: Tensor) -> Any:
    values, indices = x.sort(
        dim=call.attr("axis", -1), descending=bool(call.attr("descending", False)), stable=True
    )
    return values, indices.to(torch.int32)


@kernel("SoftmaxV2")
def softmax_v2(call: Call, x: Tensor) -> Tensor:
    (axis,) = call.attr("axes", []) or [-1]
    dtype = torch.float32 if call.attr("half_to_float", False) else x.dtype
    return x.float().softmax(axis).to(dtype)


@kernel("LogSoftmaxV2")
def log_softmax_v2(call: Call, x: Tensor) -> Tensor:
    (axis,) = call.attr("axes", []) or [-1]
    return x.float().log_softmax(axis).to(x.dtype)
