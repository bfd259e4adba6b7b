"""A bias goes to the kernel behind its product where there is one, and else stays in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from ascend_sp.graph.context import PassContext
from ascend_sp.passes.unfuse_bias import unfuse_bias
from checks import text
from models import flux, flux_inputs
from processes import run, values
from simulator import capture, compile_rank

W, B = torch.randn(5, 4), torch.randn(5)


def activated(x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, W, B))


def packed(x: Tensor) -> Tensor:
    heads = F.linear(x, W, B).view(2, 3, 5, 1)
    return heads.permute(2, 0, 1, 3).contiguous()


def test_the_kernel_behind_a_product_adds_its_bias() -> None:
    x = torch.randn(2, 3, 4)
    gm = unfuse_bias(capture(activated, x).gm, PassContext())
    assert text(gm) == (
        "view [6, 4]\nt [4, 5]\nmm [6, 5]\nunsqueeze [1, 6, 5]\nadd.Tensor [1, 6, 5]\n"
        "squeeze.dim [6, 5]\nview [2, 3, 5]\ngelu [2, 3, 5]"
    )


@pytest.mark.parametrize("fn", [activated, packed])
def test_the_numbers_stay(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 4)
    captured = capture(fn, x)
    gm = unfuse_bias(captured.gm, PassContext())
    gm.recompile()
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    torch.testing.assert_close(gm(*captured.inputs)[0], fn(x))


def to_product(x: Tensor) -> Tensor:
    return F.linear(F.linear(x, W, B), W.t(), B[:4])


def to_both(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, W, B)
    return y.relu(), y @ W


def scaled(x: Tensor) -> Tensor:
    return torch.addmm(B, x[0], W.t(), beta=2).relu()


def addend(x: Tensor) -> Tensor:
    return torch.addmm(B.expand(3, 5), x[0], W.t()).relu()


def one_row(x: Tensor) -> Tensor:
    return F.linear(x[:1, 0], W, B).relu()


def half(x: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), W.bfloat16(), B.bfloat16()).relu()


@pytest.mark.parametrize("fn", [to_product, to_both, scaled, addend, one_row, half])
def test_a_bias_that_nothing_takes_over_stays(fn: Callable[..., Any]) -> None:
    before = capture(fn, torch.randn(2, 3, 4)).gm
    expected = text(before)
    assert "addmm" in expected
    assert text(unfuse_bias(before, PassContext())) == expected


@pytest.mark.parametrize(("target", "size"), [("eager", 2), ("inductor", 1), ("inductor", 2)])
def test_only_for_several_ranks_and_inductor(
    target: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank has just what Inductor makes of the model."""
    monkeypatch.setattr(PassContext, "fuses", target == "inductor")
    gm, _ = compile_rank(capture(flux(1, 1, 4), **flux_inputs(1, 33, 7)), 0, size)
    assert ("mm [" in text(gm).replace("addmm [", "")) == (target == "inductor" and size > 1)


PACKING = re.compile(
    r"^ +cpp_fused_(?:all_to_all_single|cat|clone|permute|unsafe|view|_)+_\d+\(", re.M
)
"""A call of a kernel that only packs what is sent."""


def compiled(rank: int, world: int) -> list[int]:
    """How many kernels only pack, with the pass and without it."""
    found = []
    for skip in ("", "unfuse_bias"):
        torch._dynamo.reset()
        program = torch.compile(
            flux(1, 2, 4),
            backend="ascend_sp",
            options={"skip_passes": skip, "strategy": "separate"},
            fullgraph=True,
        )
        _, codes = run_and_get_code(partial(program, **flux_inputs(1, 32, 8)))
        calls = [m.group() for m in PACKING.finditer(codes[-1])]
        found.append(sum("all_to_all" in call for call in calls))
    return found


@pytest.mark.slow
def test_packing_values_is_no_kernel_of_its_own() -> None:
    for with_it, without in values(run(compiled, 2, timeout=240)):
        assert with_it == 0
        assert without == 3  # one for each attention: values have no norm and no rotation
