"""Values that are needed together travel together: the same values, and only where that pays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ascend_sp.compiler.report.facts import collectives, report
from ascend_sp.compiler.report.page import summary
from ascend_sp.runtime.ops import ALL_GATHER
from checks import worst
from models import flux_controlnet, flux_inputs, z_image, z_image_inputs
from simulator import SEPARATE, capture, run_ranks, simulate
from toy import Block

APART = replace(SEPARATE, skip_passes=("pack_gathers",))
ONE_GATHER = {"all_gather_into_tensor": 1}


class Branches(nn.Module):
    """Two sequences in one, and a value of each block leaves, each in another form."""

    def __init__(self, forms: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(12, 3) for _ in forms)
        self.ends = nn.ModuleList(nn.Linear(12, 12) for _ in forms)
        self.forms = forms

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = torch.cat([y, x], 1)
        out = []
        for block, end, form in zip(self.blocks, self.ends, self.forms, strict=True):
            z = block(z)
            out.append(FORMS[form](end(z), y.shape[1]))
        return tuple(out)


FORMS: dict[str, Any] = {
    "plain": lambda z, n: z,
    "half": lambda z, n: z.to(torch.bfloat16),
    "flags": lambda z, n: z > 0,
    "part": lambda z, n: z[:, n:],
    "rows": lambda z, n: z.flatten(0, 1).exp(),
    "inner": lambda z, n: z.flatten(1).exp(),
    "turned": lambda z, n: z.transpose(1, 2).exp(),
    "used": lambda z, n: z.cumsum(1) + 1,  # whole, behind the gather
}


def controlnet_inputs(batch: int, image: int, text: int) -> dict[str, Any]:
    inputs = flux_inputs(batch, image, text)
    return inputs | {"controlnet_cond": inputs["hidden_states"].flip(1)}


@pytest.mark.slow
def test_residuals_of_a_controlnet() -> None:
    """diffusers' own: one all-gather for those of two kinds of blocks, and the report of it."""
    model, inputs = flux_controlnet(2, 1), controlnet_inputs(1, 17, 7)
    with torch.no_grad():
        want = [x for part in model(**inputs) for x in part]
    captured = capture(model, **inputs)
    outputs, programs, ctx, network = simulate(captured, 2)
    assert worst(outputs, want) <= 1e-5
    assert network.calls == {"all_to_all_single": 4 * 3} | ONE_GATHER
    (row,) = (r for r in collectives(programs[0]) if r.op == "all_gather_into_tensor")
    assert row.origin == "pack_gathers(mul_64 and 2 more)"
    assert "conditioning_scale" in row.source and row.numel == 3 * 9 * 32
    page = summary(report(programs[0], ctx, 0, {}, {}, []))
    for told in ("12 all-to-alls, 1 all-gather;", "## Gathered (3)", "3 of 3 values travel in one"):
        assert told in page


def test_pictures_of_a_batch() -> None:
    """Behind each gather stands work of its own, and then they leave."""
    model, inputs = z_image(3, 1), z_image_inputs(((16, 16), (8, 16)), (30, 17))
    with torch.no_grad():
        want = model(*inputs, return_dict=False)[0]
    outputs, _, _, network = simulate(capture(model, *inputs, return_dict=False), 2)
    assert worst(outputs, want) <= 1e-5
    assert network.calls == {"all_to_all_single": 4 * 3} | ONE_GATHER


@pytest.mark.parametrize("seed", range(3))
def test_the_same_values(seed: int) -> None:
    """Bit for bit, and stride for stride, what comes of a gather for each."""
    choose = random.Random(seed)
    forms = choose.choices(list(FORMS), k=4)
    batch, ranks = 1 + seed % 2, 2 + seed % 3
    inputs = [torch.randn(batch, choose.randint(1, most), 12) for most in (20, 9)]
    captured = capture(Branches(forms), *inputs)
    apart, separate, _, _ = simulate(captured, ranks, APART)
    together, _, _, network = simulate(captured, ranks)
    assert network.calls["all_gather_into_tensor"] == len(set(sent(separate[0]))), forms
    assert len(sent(separate[0])) == len(forms)
    for out, expected in zip(together, apart, strict=True):
        for got, want in zip(out, expected, strict=True):
            assert torch.equal(got, want), forms
            assert got.stride() == want.stride(), forms


def sent(program: fx.GraphModule) -> list[torch.dtype]:
    """Of what all-gathers there are, by dtype."""
    nodes = program.graph.find_nodes(op="call_function", target=ALL_GATHER)
    return [n.meta["val"].dtype for n in nodes]


@pytest.mark.slow
def test_one_program_for_all_lengths() -> None:
    model = Branches(("part", "inner", "rows", "plain"))
    first, other = (
        tuple(torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)) for n in lengths)
        for lengths in ((14, 5), (9, 3))
    )
    captured = capture(model, *first, dynamic=True)
    _, programs, _, network = simulate(captured, 2)
    assert network.calls == {"all_to_all_single": 4 * 4} | ONE_GATHER
    sizes = {14: 9, 5: 3, 2: 2}
    pairs = list(zip(first, other, strict=True))
    swapped = [
        sizes[v] if isinstance(v, int) else next((b for a, b in pairs if a is v), v)
        for v in captured.inputs
    ]
    with torch.no_grad():
        want = model(*other)
    outputs, _ = run_ranks(programs, swapped)
    assert worst(outputs, want) <= 1e-5


class Whole(nn.Module):
    """Blocks around an op that has no rule and reads three values of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(12, 3) for _ in range(3))
        self.ends = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            a, b, c = (end(x) for end in self.ends)
            x = x + torch.baddbmm(a.transpose(1, 2) @ b, c.transpose(1, 2), b).mean(1, True) / 99
        return x


def test_operands_of_one_op() -> None:
    """In the middle of a graph, a kind of place at a time; what comes later waits for it."""
    captured = capture(Whole(), torch.randn(1, 11, 12))
    apart, _, _, before = simulate(captured, 2, APART)
    together, _, _, after = simulate(captured, 2)
    # Two operands of each of three blocks, and the result.
    assert before.calls["all_gather_into_tensor"] == 7
    assert after.calls["all_gather_into_tensor"] == 4
    for out, expected in zip(together, apart, strict=True):
        assert torch.equal(out[0], expected[0])
