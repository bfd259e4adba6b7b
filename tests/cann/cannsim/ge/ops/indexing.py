"""Ops that choose elements by index."""

from __future__ import annotations

import torch
from torch import Tensor

from cannsim.ge.registry import Call, kernel


@kernel("Gather", "GatherV2")
def gather_v2(call: Call, x: Tensor, indices: Tensor, axis: Tensor | None = None) -> Tensor:
    if call.attr("batch_dims", 0):
        raise NotImplementedError("batch_dims is not simulated")
    dim = 0 if axis is None else int(axis) % max(x.dim(), 1)
    flat = indices.reshape(-1).long()
    # GE counts from the end only if negative_index_support says so; torchair always lets it.
    flat = torch.where(flat < 0, flat + x.shape[dim], flat)
    return x.index_select(dim, flat).reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])


@kernel("GatherElements")
def gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    return x.gather(call.attr("dim", 0), index.long())


@kernel("IndexByTensor")
def index_by_tensor(call: Call, x: Tensor, *indices: Tensor) -> Tensor:
    given = iter(indices)
    wanted = []
    for used in call.attr("indices_mask", []):
        index = next(given) if used else None
        as_is = index is None or index.dtype in (torch.bool, torch.int64)
        wanted.append(index if as_is else index.long())
    return torch.ops.aten.index.Tensor(x, wanted)


@kernel("ScatterElements")
def scatter_elements(call: Call, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    reduction, axis = call.attr("reduction", "none"), call.attr("axis", 0)
    if reduction == "none":
        return data.scatter(axis, indices.long(), updates)
    if reduction == "add":
        return data.scatter_add(axis, indices.long(), updates)
    raise NotImplementedError(f"reduction {reduction!r} is not simulated")


@kernel("ScatterUpdate")
def scatter_update(call: Call, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """In place, in dim 0."""
    var[indices.long()] = updates
    return var


@kernel("ScatterNdUpdate")
def scatter_nd_update(call: Call, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """In place."""
    var[tuple(indices.long().unbind(-1))] = updates
    return var
