"""Attentions of every kind that `F.scaled_dot_product_attention` takes, and what it computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def seen(*shape: int) -> Tensor:
    """A mask in which every row sees somebody, but not all."""
    mask = torch.rand(*shape) > 0.4
    mask[..., 0], mask[..., -1] = True, False
    return mask


def with_empty_rows(*shape: int) -> Tensor:
    """Likewise, but rows 1 and 3 see nobody."""
    mask = seen(*shape)
    mask[..., (1, 3), :] = False
    return mask


@dataclass(frozen=True)
class Case:
    """One attention: shapes of q and k (v like k), and what else is passed."""

    q: tuple[int, ...] = (2, 4, 9, 16)
    k: tuple[int, ...] = (2, 4, 7, 16)
    mask: Callable[[], Tensor] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    values: int | None = None
    """Channels of v, if not those of k."""
    permuted: bool = True
    """Whether q, k and v are views of ``[B, S, N, D]``, as projections leave them."""
    spelled: str = ""
    """Words of the reason why Ascend's fused ops do not take it; empty if they do."""

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and maybe a mask, contiguous. Scores are large enough to show a wrong scale."""
        shapes = [self.q, self.k, (*self.k[:-1], self.values or self.k[-1])]
        if self.permuted and len(self.q) == 4:
            shapes = [(b, s, n, d) for b, n, s, d in shapes]
        rows = [(1.5 * torch.randn(*s)).to(dtype) for s in shapes]
        if self.mask is None:
            return rows
        mask = self.mask()
        return [*rows, mask if mask.dtype == torch.bool else mask.to(dtype)]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """What a model would write."""
        if self.permuted and q.dim() == 4:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, **self.more)


GROUPED = {"enable_gqa": True}
CAUSAL = {"is_causal": True}
HEADS = "the mask differs between heads"
BROADCAST = "operands are broadcast"

CASES: dict[str, Case] = {
    "no mask": Case(),
    "contiguous BNSD": Case(permuted=False),
    "scale": Case(more={"scale": 0.6}),
    "scale of one": Case(more={"scale": 1.0}),
    "negative scale": Case(more={"scale": -0.3}),
    "mask B11T": Case(mask=lambda: seen(2, 1, 1, 7)),
    "mask B1ST": Case(mask=lambda: seen(2, 1, 9, 7)),
    "mask ST": Case(mask=lambda: seen(9, 7)),
    "mask 1T": Case(mask=lambda: seen(1, 7)),
    "mask 11ST": Case(mask=lambda: seen(1, 1, 9, 7)),
    "mask 1ST": Case(mask=lambda: seen(1, 9, 7)),
    "mask S1": Case(mask=lambda: torch.tensor([True] * 5 + [False] + [True] * 3)[:, None]),
    "mask and scale": Case(mask=lambda: seen(9, 7), more={"scale": 0.5}),
    "mask, contiguous BNSD": Case(mask=lambda: seen(2, 1, 9, 7), permuted=False),
    "empty rows B1ST": Case(mask=lambda: with_empty_rows(2, 1, 9, 7)),
    "empty rows ST": Case(mask=lambda: with_empty_rows(9, 7)),
    "an item without keys": Case(mask=lambda: torch.tensor([True, False]).view(2, 1, 1, 1)),
    "causal": Case(k=(2, 4, 9, 16), more=CAUSAL),
    "causal, more queries": Case(more=CAUSAL),
    "causal, more keys": Case(q=(2, 4, 5, 16), k=(2, 4, 11, 16), more=CAUSAL),
    "causal and scale": Case(more={**CAUSAL, "scale": 0.7}),
    "grouped": Case(q=(2, 6, 9, 16), k=(2, 2, 7, 16), more=GROUPED),
    "grouped to one": Case(k=(2, 1, 7, 16), more=GROUPED),
    "grouped and masked": Case(
        q=(2, 6, 9, 16), k=(2, 3, 7, 16), mask=lambda: with_empty_rows(2, 1, 9, 7), more=GROUPED
    ),
    "grouped and causal": Case(q=(1, 4, 9, 32), k=(1, 2, 7, 32), more={**GROUPED, **CAUSAL}),
    "one item": Case(q=(1, 4, 9, 16), k=(1, 4, 7, 16), mask=lambda: seen(1, 1, 1, 7)),
    "one head": Case(q=(2, 1, 9, 16), k=(2, 1, 7, 16), mask=lambda: seen(2, 1, 1, 7)),
    "one key": Case(k=(2, 4, 1, 16)),
    "head of 12": Case(
        q=(2, 4, 9, 12),
        k=(2, 4, 7, 12),
        spelled="12 channels a head are not known to be a multiple of 16",
    ),
    "head of 12, masked": Case(
        q=(2, 4, 9, 12), k=(2, 4, 7, 12), mask=lambda: with_empty_rows(9, 7), spelled="12 channels"
    ),
    "other values": Case(values=32, spelled="values have 32 channels, keys 16"),
    "one query": Case(q=(2, 4, 1, 16), spelled="one query"),
    "one query, masked": Case(q=(2, 4, 1, 16), mask=lambda: seen(2, 1, 1, 7), spelled="one query"),
    "mask per head": Case(mask=lambda: seen(2, 4, 9, 7), spelled=HEADS),
    "mask per head 1": Case(mask=lambda: with_empty_rows(4, 9, 7), spelled=HEADS),
    "float mask": Case(mask=lambda: torch.randn(2, 1, 9, 7), spelled="an additive mask"),
    "float mask, empty rows": Case(
        mask=lambda: with_empty_rows(9, 7).float().log(), spelled="an additive mask"
    ),
    "three dims": Case(q=(4, 9, 16), k=(4, 7, 16), spelled="3-D operands"),
    "three dims, masked": Case(
        q=(4, 9, 16), k=(4, 7, 16), mask=lambda: with_empty_rows(9, 7), spelled="3-D operands"
    ),
    "three dims, grouped": Case(q=(4, 9, 16), k=(2, 7, 16), more=GROUPED, spelled="3-D operands"),
    "five dims": Case(q=(2, 3, 4, 9, 16), k=(2, 3, 4, 7, 16), spelled="5-D operands"),
    "one head for all": Case(k=(2, 1, 7, 16), spelled=BROADCAST),
    "one item for all": Case(k=(1, 4, 7, 16), spelled=BROADCAST),
    "keys of two items": Case(q=(1, 4, 9, 16), spelled=BROADCAST),
}


def inputs(dtype: torch.dtype) -> list[list[Tensor]]:
    """Operands of all cases."""
    torch.manual_seed(3)
    return [case.inputs(dtype) for case in CASES.values()]


def run(operands: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """All cases, as one program."""
    return [case(*xs) for case, xs in zip(CASES.values(), operands, strict=True)]


def expected(operands: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What PyTorch computes of them on the CPU in float32."""

    def exact(x: Tensor) -> Tensor:
        return x.cpu().float() if x.is_floating_point() else x.cpu()

    return run([[exact(x) for x in xs] for xs in operands])


TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Operands are exact and sums made in float32, so what is left is the rounding of the result."""


def wrong(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """The cases that differ, and by how much."""
    found = {}
    for name, a, b in zip(CASES, got, want, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == dtype, name
        error = ((a.cpu().float() - b).abs() / b.abs().clamp(min=1)).max().item()
        if not error <= TOLERANCE[dtype]:
            found[name] = error
    return found


def told(summary: str, words: str) -> int:
    """Of how many nodes a summary says `words`; like nodes share a line, with their number."""
    lines = [line for line in summary.splitlines() if words in line and line.startswith("- ")]
    numbers = [re.match(r"- (\d+) x ", line) for line in lines]
    return sum(int(n[1]) if n else 1 for n in numbers)
