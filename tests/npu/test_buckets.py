"""Capacities on NPUs: captures for few sizes serve all lengths, and each replay knows its own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import simulated_npu
import torch
from test_lengths import Joint

from prompts import CAPACITY, MODELS, answer

LENGTHS = (7, 9, 12, 5, 17, 33, 40, 64)
CAPACITIES = 4
"""Of 16 rows: 16, 32, 48, 64."""


def serve(rank: int, world: int, target: str, buckets: Any) -> dict[str, Any]:
    import cannsim
    from torch._dynamo.utils import counters

    import ascend_sp  # noqa: F401

    torch.manual_seed(0)
    model = Joint().to("npu")
    options = {"target": target, "strategy": "separate", "buckets": buckets}
    compiled = torch.compile(model, backend="ascend_sp", options=options, dynamic=True)
    image = torch.randn(1, 10, 32).to("npu")
    worst = 0.0
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
        for n in (*LENGTHS, *LENGTHS):
            text = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)).to("npu")
            got, want = compiled(text, image), model(text, image)
            worst = max(worst, (got.cpu() - want.cpu()).abs().max().item())
    return {
        "worst": worst,
        "programs": counters["ascend_sp"]["graphs"],
        "captures": len(cannsim.trace.captured_graphs()),
    }


@pytest.mark.parametrize(
    ("target", "buckets"),
    [
        *(("npugraph_ex", 16), ("torchair", 16)),
        pytest.param("npugraph_ex", "auto", marks=pytest.mark.slow),
    ],
)
def test_all_lengths(target: str, buckets: Any) -> None:
    for found in simulated_npu.run(serve, 2, target, buckets, timeout=300):
        assert found["worst"] < 1e-5
        assert found["programs"] == 1
        assert found["captures"] == (CAPACITIES if target == "npugraph_ex" else 0)


def answer_prompts(rank: int, world: int, name: str, target: str) -> dict[str, Any]:
    import cannsim

    options = {"target": target, "buckets": CAPACITY}
    found = answer(name, options, "npu", eager=True)
    return {**found, "captures": len(cannsim.trace.captured_graphs())}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["npugraph_ex", "torchair"])
@pytest.mark.parametrize("name", MODELS)
def test_sixty_prompts(name: str, target: str) -> None:
    for found in simulated_npu.run(answer_prompts, 2, name, target, timeout=1500):
        assert found["worst"] < 1e-5
        # Z-Image fills captions up by itself; those that lack no row, or one, are other graphs.
        programs = 3 if name == "z_image" else 1
        assert found["compiles"] <= programs
        assert found["captures"] <= (8 * programs if target == "npugraph_ex" else 0)
