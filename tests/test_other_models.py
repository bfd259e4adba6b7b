"""Models that nothing was written for: right on several ranks, with these collectives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from checks import worst
from models import ltx, sana, sd3, wan
from simulator import capture, simulate


@pytest.mark.parametrize(
    ("build", "collectives"),
    [
        pytest.param(
            sd3, {"all_to_all_single": 8, "all_gather_into_tensor": 1}, marks=pytest.mark.slow
        ),
        (wan, {"all_to_all_single": 8, "all_gather_into_tensor": 1}),
        pytest.param(
            ltx, {"all_to_all_single": 8, "all_gather_into_tensor": 1}, marks=pytest.mark.slow
        ),
        # Cross attention is free; linear attention adds up, convolutions gather.
        (sana, {"all_reduce": 2, "all_gather_into_tensor": 3}),
    ],
)
def test_equals_eager(build: Callable, collectives: dict[str, int]) -> None:
    model, inputs = build()
    with torch.no_grad():
        reference = model(**inputs)[0]
    captured = capture(model, **inputs)
    for ranks in (2, 3):
        outputs, _, ctx, network = simulate(captured, ranks)
        assert worst([[out[0]] for out in outputs], reference) <= 1e-5
        assert network.calls == collectives, [str(n) for n in ctx.notes]
