"""Weights of which each rank holds a part, gathered by the program, in both graph modes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import simulated_npu
import torch
from torch.distributed.tensor import DTensor

from toy import SelfAttention


def sharded(rank: int, world: int, target: str) -> tuple[float, int, int]:
    import ascend_sp

    torch.manual_seed(0)
    model: Any = SelfAttention(12, 3).to("npu")
    total = sum(p.nbytes for p in model.parameters())
    options = {"target": target, "on_unsharded": "error"}
    x = torch.randn(1, 10, 12, generator=torch.Generator().manual_seed(1)).to("npu")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
        want = torch.compile(model, backend="ascend_sp", options=options)(x).cpu()
        torch.compiler.reset()
        ascend_sp.shard_weights(model)
        held = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
        program = torch.compile(model, backend="ascend_sp", options=options)
        error = 0.0
        for _ in range(2):  # the second is a replay
            error = max(error, (program(x).cpu() - want).abs().max().item())
    return error, held, total


@pytest.mark.parametrize(
    "target", ["npugraph_ex", pytest.param("torchair", marks=pytest.mark.slow)]
)
def test_the_same_bits(target: str) -> None:
    for error, held, total in simulated_npu.run(sharded, 2, target, timeout=200):
        assert error == 0
        assert held == total // 2
