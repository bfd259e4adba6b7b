"""Products without tokens, a share of the features on each rank: the same values, where it pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ascend_sp.compiler.report.facts import report
from ascend_sp.compiler.report.page import summary
from ascend_sp.graph.layout import SHARE
from checks import error, worst
from models import flux, flux_inputs, qwen, qwen_inputs, z_image, z_image_inputs
from processes import run, values
from simulator import SEPARATE, Captured, capture, compile_rank, simulate
from toy import Block

ON = replace(SEPARATE, split_features="on")


class Conditioned(nn.Module):
    """Modulation of several widths, behind two products that embed the condition."""

    def __init__(self, bias: bool, dim: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Sequential(nn.Linear(6, 10, bias), nn.SiLU(), nn.Linear(10, 9, bias))
        self.scales = nn.ModuleList(nn.Linear(9, n * dim, bias) for n in (2, 2, 1))
        self.block = Block(dim, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        condition = self.embed(condition)
        for scale in self.scales:
            scales = scale(nn.functional.silu(condition))[:, None].split(12, 2)
            x = x * (1 + scales[0]) + scales[-1]
        return self.block(x)


def shares(captured: Captured, ranks: int = 2, rank: int = 0, **options: Any) -> list[list[int]]:
    """The shapes of what rank 0 computes a share of."""
    gm, _ = compile_rank(captured, rank, ranks, replace(ON, verify=False, **options))
    return [list(n.meta["val"].shape) for n in gm.graph.nodes if SHARE in n.meta]


@pytest.mark.parametrize(
    ("ranks", "batch", "bias", "dtype"),
    [
        (2, 1, True, torch.float32),
        (3, 2, False, torch.float32),
        (4, 2, True, torch.bfloat16),
        (7, 1, True, torch.float32),
    ],
)
def test_the_same_values(ranks: int, batch: int, bias: bool, dtype: torch.dtype) -> None:
    """Numbers of features that ranks divide, and others; one gather for what is ready together."""
    model = Conditioned(bias).to(dtype)
    inputs = torch.randn(batch, 11, 12, dtype=dtype), torch.randn(batch, 6, dtype=dtype)
    with torch.no_grad():
        want = model(*inputs)
    captured = capture(model, *inputs, dynamic=batch == 2 and ranks == 3)
    outputs, programs, ctx, network = simulate(captured, ranks, ON)
    assert worst(outputs, want) <= (1e-5 if dtype == torch.float32 else 0.03)
    # The two products of the embedding, then all of the modulation; and the result.
    assert network.calls["all_gather_into_tensor"] == 3 + 1
    shapes = [tuple(n.meta["val"].shape) for n in programs[0].graph.nodes if SHARE in n.meta]
    assert sorted(shapes) == sorted((batch, -(-n // ranks)) for n in (10, 9, 24, 24, 12))
    assert "3 products without tokens are split by output features" in summary(
        report(programs[0], ctx, 0, {}, {}, [])
    )
    assert all(torch.equal(o[0], outputs[0][0]) for o in outputs)


def test_where_it_pays() -> None:
    """Weights of a few kilobytes are not worth a gather, weights of megabytes are, by estimate."""
    small = capture(Conditioned(True), torch.randn(1, 11, 12), torch.randn(1, 6))
    assert not shares(small, split_features="auto")

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.block = nn.Linear(2048, 12 * 512), Block(12, 3)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            scale = self.scale(condition).unflatten(-1, (512, 12)).mean(1, keepdim=True)
            return self.block(x * scale)

    captured = capture(Wide(), torch.randn(1, 11, 12), torch.randn(1, 2048))
    for model in ("cpu", "910B4"):
        assert shares(captured, split_features="auto", cost_model=model) == [[1, 3072]]
    assert not shares(captured, split_features="off", cost_model="910B4")


class Others(nn.Module):
    """Products that look like it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.block = form, Block(12, 3)
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.form == "tokens":
            return self.block(x @ self.weight.t())
        if self.form == "computed weight":
            scale = condition @ (self.weight * 2).t()
        elif self.form == "many rows":
            table = condition.repeat(999, 1) @ self.weight.t()
            scale = table.exp().mean(0, keepdim=True)
        elif self.form == "behind random numbers":
            scale = (condition + torch.rand_like(condition)) @ self.weight.t()
        else:
            scale = condition @ self.weight
        return self.block(x * scale[:, None])


@pytest.mark.parametrize(
    "form", ["tokens", "computed weight", "many rows", "behind random numbers", "columns"]
)
def test_what_is_not_split(form: str) -> None:
    captured = capture(Others(form), torch.randn(1, 40, 12), torch.randn(1, 12))
    assert not shares(captured)


def compile_models(rank: int, world: int, cases: list[tuple[str, str]]) -> list[Any]:
    found = []
    for name, target in cases:
        torch._dynamo.reset()
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if name == "flux":
            model, kwargs = flux(1, 1, 3), flux_inputs(2, 33, 7)
        elif name == "qwen":
            model, kwargs = qwen(3, 1), qwen_inputs()
        else:
            model, args, kwargs = z_image(), z_image_inputs(), {"return_dict": False}
        options = {"target": target, "split_features": True}
        got = torch.compile(model, backend="ascend_sp", options=options)(*args, **kwargs)[0]
        want = model(*args, **kwargs)[0]
        pairs = zip(got, want, strict=True) if isinstance(want, list) else [(got, want)]
        found.append(max(error(a, b) for a, b in pairs))
    return found


@pytest.mark.slow
def test_models_on_real_ranks() -> None:
    cases = [("flux", "inductor"), ("z_image", "eager")]
    for errors in values(run(compile_models, 2, cases, timeout=280)):
        assert max(errors) <= 1e-5
