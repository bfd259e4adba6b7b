"""What rounding alone does to a graph's results, and that it is not taken for a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ascend_sp.compiler import ladder
from ascend_sp.compiler.numerics.lockstep import distance
from ascend_sp.compiler.numerics.rounding import Rounded
from ascend_sp.compiler.targets import EAGER
from ascend_sp.runtime.errors import NumericsError


def mixed(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = (x @ w).transpose(0, 1)
    return y.flatten(), y.argmax(), torch.relu(y)[1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_off_by_a_rounding_and_no_more(dtype: torch.dtype) -> None:
    x, w = torch.randn(4, 16).to(dtype), torch.randn(16, 6).to(dtype)
    gm = make_fx(mixed)(x, w)
    want, found = gm(x, w), Rounded(gm).run(x, w)
    again = Rounded(gm).run(x, w)
    for a, b, c in zip(want, found, again, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(b, c)
    assert torch.equal(want[1], found[1])
    eps = torch.finfo(dtype).eps
    off = ((found[0] - want[0]) / want[0]).abs().double()
    # One product; the copy in `flatten` adds nothing. A product and a relu.
    assert 0 < off.max() <= 2.02 * eps
    torch.testing.assert_close(found[2], want[2], rtol=4.04 * eps, atol=0)


def test_what_is_finite_stays_finite_and_what_is_not_stays_as_it_is() -> None:
    least = torch.finfo(torch.bfloat16).min

    def masks(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(x, least), x * 2

    x = torch.full((64,), float("inf"), dtype=torch.bfloat16)
    gm = make_fx(masks)(x)
    mask, twice = Rounded(gm).run(x)
    assert mask.isfinite().all() and (mask != least).any()
    assert torch.equal(twice, x)


class Chaos(nn.Module):
    """A rounding decides what comes out."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(12):
            x = torch.sin(20 * x)
        return x


def checked(model: nn.Module, target: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"check_numerics": True, "target": target}
    return torch.compile(model, backend="ascend_sp", options=options)


@torch.no_grad()
def test_rounding_is_no_fault() -> None:
    x = torch.rand(64, 64, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="rounding explains the difference") as seen:
        got = checked(Chaos(), "inductor")(x)
    assert distance(got, Chaos()(x)) > 0.05, [str(w.message) for w in seen]


@torch.no_grad()
def test_a_fault_in_half_precision_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(EAGER, lower=lambda gm, *_: lambda args: [gm(*args)[0] * 1.125])
    monkeypatch.setattr(ladder.targets, "ladder", lambda *_: (wrong,))
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8))).bfloat16()
    with pytest.raises(NumericsError, match=r"allowed 0\.05"):
        checked(model, "eager")(torch.randn(4, 32).bfloat16())
