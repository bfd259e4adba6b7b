"""What a target cannot take is named before anything is compiled, and the next one takes over."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import simulated_npu
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Three heads of 16 over the sequence, and something else behind it."""

    def __init__(self, then: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.then = nn.Linear(48, 144), then

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return y if self.then is None else self.then(y)


def compiled_and_eager(
    model: nn.Module, target: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[str]]:
    """Results of both on an NPU, and what was warned about."""
    import cannsim

    torch._dynamo.reset()
    cannsim.ge.forget()
    cannsim.trace.forget()
    model = model.to("npu", dtype)
    x = torch.randn(1, 11, 48, generator=torch.Generator().manual_seed(1)).to("npu", dtype)
    compiled = torch.compile(
        model, backend="ascend_sp", options={"target": target, "strategy": "separate"}
    )
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        got, want = compiled(x).cpu(), model(x).cpu()
    said = [str(w.message) for w in caught if "ascend_sp" in str(w.message)]
    return got, want, said


def ran() -> set[str]:
    """Which graph engines have been given a graph."""
    import cannsim

    found = {"torchair"} if cannsim.ge.graphs() else set()
    return found | ({"npugraph_ex"} if cannsim.trace.captured_graphs() else set())


CASES = {
    "no converter": (
        "torchair",
        lambda y: y / y.amax(-1, keepdim=True),
        [r"torchair cannot take.*amax.default has no GE converter \(at .*test_ladder.py:"],
        {"npugraph_ex"},
    ),
    "a converter that raises": (
        "torchair",
        lambda y: y.nan_to_num(0.5),
        ["torchair cannot take this graph: its conversion fails.*npugraph_ex takes over"],
        {"npugraph_ex"},
    ),
    "no kernel": (
        "npugraph_ex",
        torch.special.bessel_j0,
        ["npugraph_ex cannot take.*bessel_j0.default has no kernel for NPUs.*eager takes over"],
        set(),
    ),
    "random numbers": (
        "npugraph_ex",
        lambda y: y + 0 * torch.rand_like(y),
        ["npugraph_ex cannot take.*rand_like.default draws random numbers.*eager takes over"],
        set(),
    ),
    "down to the last rung": (
        "torchair",
        lambda y: y.amax(-1) + 0 * torch.rand_like(y).amax(-1),
        ["torchair cannot take.*npugraph_ex takes over", "npugraph_ex cannot.*eager takes over"],
        set(),
    ),
    "a value for the host": (
        "npugraph_ex",
        lambda y: y + y.mean().to("cpu").mul(2).to("npu"),
        ["npugraph_ex cannot take.*brings a value of the device to the host"],
        set(),
    ),
    "decomposed": (
        "torchair",
        lambda y: y.repeat_interleave(2, 1) + F.softplus(y).repeat_interleave(2, dim=1),
        [],
        {"torchair"},
    ),
    "complex": (
        "torchair",
        lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * 2j),
        [],
        {"torchair"},
    ),
    "complex without a real form": (
        "torchair",
        lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))).tanh()),
        ["torchair cannot take.*complex, and GE graphs are not"],
        {"npugraph_ex"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ladder(case: str) -> None:
    import re

    target, then, messages, engines = CASES[case]
    got, want, said = compiled_and_eager(Attention(then), target)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(said) == len(messages), said
    for text, pattern in zip(said, messages, strict=True):
        assert re.search(pattern, text, re.S), text
    assert ran() == engines


def test_a_graph_that_makes_its_tensors_itself_runs_where_they_are() -> None:
    import cannsim

    torch._dynamo.reset()
    cannsim.trace.forget()

    def make(n: int) -> Tensor:
        return torch.arange(n, device="npu") * 2.0

    compiled = torch.compile(make, backend="ascend_sp")
    assert torch.equal(compiled(5).cpu(), make(5).cpu())
    assert ran() == {"npugraph_ex"}


def on_an_old_cann(rank: int, world: int) -> dict[str, Any]:
    import cannsim

    out: dict[str, Any] = {}
    for target in ("auto", "torchair"):
        got, want, said = compiled_and_eager(Attention(), target, torch.bfloat16)
        out[target] = {
            "error": float((got - want).abs().max() / want.abs().max()),
            "said": said,
            "ran": ran(),
            "types": dict(cannsim.ge.graphs()[0].types()) if cannsim.ge.graphs() else {},
        }
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "engine", "all_to_all", "fused"),
    [
        ("8.1.RC1", None, "HcomAllToAllV", "FusedInferAttentionScore"),
        ("", None, "HcomAllToAllV", "SoftmaxV2"),
    ],
)
def test_an_older_cann(version: str, engine: str | None, all_to_all: str, fused: str) -> None:
    for found in simulated_npu.run(
        on_an_old_cann, 2, method="spawn", CANNSIM_VERSION=version, timeout=120
    ):
        auto, torchair = found["auto"], found["torchair"]
        assert auto["error"] <= 0.02 and torchair["error"] <= 0.02
        (said,) = auto["said"]
        name = version or "of unknown version"
        assert f"npugraph_ex is not used: it needs CANN 8.5.0, and this is {name}" in said
        assert "eager takes over" in said
        assert auto["ran"] == set()
        assert torchair["said"] == [] and torchair["ran"] == {"torchair"}
        assert torchair["types"][all_to_all] == 4
        assert torchair["types"][fused] == 1
