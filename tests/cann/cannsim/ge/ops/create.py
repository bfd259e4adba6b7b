"""Ops that make tensors from sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cannsim.ge.registry import Call, ints, kernel


@kernel("Fill")
def fill(call: Call, dims: Tensor, value: Tensor) -> Tensor:
    return torch.full(ints(dims), value.item(), dtype=value.dtype)


@kernel("Empty")
def empty(call: Call, shape: Tensor) -> Tensor:
    """NaN where nothing was promised, so that whoever reads it is found out."""
    dtype = call.dtype("dtype", 3)
    value = float("nan") if dtype.is_floating_point and not call.attr("init", False) else 0
    return torch.full(ints(shape), value, dtype=dtype)


@kernel("Range")
def arange(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    step = delta.item()
    if call.dry and step == 0:
        step = 1
    return torch.arange(start.item(), limit.item(), step, dtype=start.dtype)


@kernel("Shape")
def shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape), dtype=call.dtype("dtype", 3))


@kernel("ShapeN")
def shapes(call: Call, *xs: Tensor) -> list[Tensor]:
    return [torch.tensor(list(x.shape), dtype=call.dtype("dtype", 3)) for x in xs]


@kernel("Rank")
def rank(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.dim(), dtype=torch.int32)


@kernel("Size")
def size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(math.prod(x.shape), dtype=call.dtype("dtype", 3))


@kernel("Triu")
def triu(call: Call, x: Tensor) -> Tensor:
    return torch.triu(x, call.attr("diagonal", 0))


@kernel("Tril")
def tril(call: Call, x: Tensor) -> Tensor:
    return torch.tril(x, call.attr("diagonal", 0))


@kernel("Eye")
def eye(call: Call) -> Tensor:
    columns = call.attr("num_columns", 0) or call.attr("num_rows")
    return torch.eye(call.attr("num_rows"), columns, dtype=call.dtype("dtype", 0))
