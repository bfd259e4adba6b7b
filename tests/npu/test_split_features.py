"""Products without tokens, split by output features, in both of Ascend's graphs."""

from __future__ import annotations

import warnings

import pytest
import simulated_npu
import torch
from torch import Tensor, nn

from toy import Block


class Conditioned(nn.Module):
    """Two modulations, one of a width that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.gate, self.block = nn.Linear(6, 12), nn.Linear(6, 9), Block(12, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gate = self.gate(condition).mean(-1)[:, None, None]
        return self.block(x * self.scale(condition)[:, None]) * gate


def compile_model(rank: int, world: int, target: str) -> list[float]:
    errors = []
    for batch in (1, 2):
        torch._dynamo.reset()
        g = torch.Generator().manual_seed(batch)
        model = Conditioned()
        inputs = torch.randn(batch, 11, 12, generator=g), torch.randn(batch, 6, generator=g)
        want = model(*inputs)
        options = {"target": target, "split_features": True}
        compiled = torch.compile(model.to("npu"), backend="ascend_sp", options=options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
            got = compiled(*(x.to("npu") for x in inputs)).cpu()
        errors.append(((got - want).abs().max() / want.abs().max()).item())
    return errors


@pytest.mark.parametrize(
    "target", ["npugraph_ex", pytest.param("torchair", marks=pytest.mark.slow)]
)
def test_the_same_values(target: str) -> None:
    for errors in simulated_npu.run(compile_model, 2, target, timeout=200):
        assert max(errors) <= 1e-5
