"""Results have the strides of the traced graph, whatever the graph engines return."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import simulated_npu
import torch
from torch import Tensor, nn

from toy import SelfAttention


class Turned(nn.Module):
    """What leaves is as computed, in another memory order, and a part of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = SelfAttention(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.blocks(x)
        return y, y.transpose(1, 2).exp(), x[:, 3:], y.unflatten(2, (3, 4)).permute(0, 2, 1, 3)


def compile_turned(rank: int, world: int, target: str, dynamic: bool) -> list[Any]:
    model = Turned().to("npu")
    compiled = torch.compile(
        model, backend="ascend_sp", options={"target": target}, dynamic=dynamic, fullgraph=True
    )
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
        for batch, length in ((1, 17), (2, 17)):
            x = torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(1)).to("npu")
            for i, (got, want) in enumerate(zip(compiled(x), model(x), strict=True)):
                error = (got.cpu() - want.cpu()).abs().max().item()
                found.append((batch, i, error, got.stride(), want.stride()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["eager", "npugraph_ex", "torchair"])
def test_strides(target: str) -> None:
    for dynamic in (False, True):
        for found in simulated_npu.run(compile_turned, 2, target, dynamic, timeout=200):
            for batch, i, error, got, want in found:
                assert error < 1e-4, (batch, i)
                assert got == want, (batch, i)
