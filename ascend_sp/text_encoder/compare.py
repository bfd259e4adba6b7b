"""Comparing what a whole module returns with what its parts return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_sp.text_encoder.split import PADDING

# Far above rounding in fp32, also of matrix units that round their operands; far below what a
# wrong head or a lost feature changes.
TOLERANCE = 3e-3


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether all tensors of two lists are equal up to `TOLERANCE`."""
    return all(close(y, x) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor))


def close(got: Tensor, want: Tensor, dim: int = 0, units: tuple[int, ...] | None = None) -> bool:
    """Equal up to `TOLERANCE`; with `units`, `got` holds these of `want` in `dim`."""
    if units is not None:
        if got.ndim != want.ndim or got.shape[dim] != len(units):
            return False
        got, want = held(got, dim, _blank(units)), held(want, dim, units)
    if got.shape != want.shape:
        return False
    return got.numel() == 0 or error(got, want) <= TOLERANCE


def held(whole: Tensor, dim: int, units: tuple[int, ...]) -> Tensor:
    """The `units` of `whole` in `dim`, zeros for padding."""
    index = torch.tensor(units, device=whole.device)
    out = whole.index_select(dim, index.clamp_min(0))
    padding = (index == PADDING).view([-1 if d == dim else 1 for d in range(whole.ndim)])
    return out.masked_fill(padding, 0)


def _blank(units: tuple[int, ...]) -> tuple[int, ...]:
    """The places themselves, but for those that are padding: what is there does not matter."""
    return tuple(PADDING if u == PADDING else i for i, u in enumerate(units))


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, of the largest value. Infinities of the same sign are equal."""
    got, want = got.double(), want.double()
    equal = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(equal, 0.0, (got - want).abs()).max()
    largest = torch.where(want.isfinite(), want, 0.0).abs().max()
    return (difference / largest.clamp_min(1e-30)).nan_to_num(torch.inf).item()
