"""Packed and pipelined exchanges: right for every kind of attention, and bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ascend_sp.compiler.config import Config
from ascend_sp.graph.cost.device import DEVICES
from ascend_sp.passes.choose_strategy import Choice
from ascend_sp.passes.overlap.strategies import Strategy, parse
from ascend_sp.passes.overlap.timeline import Timelines
from checks import masks, missing, swapped, worst
from models import flux, flux_inputs, ltx, qwen, qwen_inputs, sd3, wan, z_image, z_image_inputs
from simulator import capture, compile_rank, simulate
from toy import JointAttention, SelfAttention

STRATEGIES = ("separate", "packed", "pipelined:2", "pipelined:3")


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "flux": lambda: (flux(1, 2, 4), flux_inputs(1, 33, 7)),
    "qwen": lambda: (qwen(2, 4), qwen_inputs()),
    "z_image": lambda: (z_image(4, 2), z_image_inputs()),
    "wan": wan,
    "sd3": sd3,
    "ltx": ltx,
}


SLOW = ("qwen", "z_image", "wan", "sd3", "ltx")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODELS]
)
def test_same_numbers_bit_for_bit_whatever_the_order_and_the_strategy(name: str) -> None:
    model, inputs = MODELS[name]()
    captured = capture(model, **inputs) if isinstance(inputs, dict) else capture(model, *inputs)
    plain, *_ = simulate(captured, 2, Config(strategy="separate", async_=False))
    for strategy in ("auto", *STRATEGIES):
        outputs, _, ctx, _ = simulate(captured, 2, Config(strategy=strategy))
        gathers = any(c.strategy.gathers for c in ctx.results.all(Choice))
        for ours, theirs in zip(outputs, plain, strict=True):
            same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            # Of a rank's own queries kernels cut other blocks of sums.
            assert same or (gathers and worst([ours], theirs) <= 1e-5), strategy
        lines = ctx.results.get(Timelines)
        # A gather of keys may have nothing to be moved behind in a small model.
        assert lines.after.exposed < lines.before.exposed + 1e-12 * gathers, strategy
        # Some of every model's transfers are hidden by its own work.
        assert lines.after.exposed < lines.after.travel


@settings(max_examples=3)
@given(
    strategy=st.sampled_from(["packed", "pipelined:2", "pipelined:3"]),
    kind=st.sampled_from(
        ["self", "causal", "grouped", "one group", "joint", "B1SS", "BHSS", "BH1S"]
    ),
    length=st.integers(2, 30),
    text=st.integers(1, 9),
    share=st.integers(1, 4),
    ranks=st.sampled_from([2, 3, 4]),
)
def test_any_attention(
    strategy: str, kind: str, length: int, text: int, share: int, ranks: int
) -> None:
    heads = share * ranks - (kind in ("self", "joint", "BHSS") and share > 1)  # padded too
    x = torch.randn(2, length, 4 * heads)
    model: Callable = SelfAttention(4 * heads, heads)
    args: tuple[Any, ...] = (x,)
    if kind == "causal":
        args = (x, None, True)
    elif kind == "grouped":
        model = SelfAttention(8 * heads, 2 * heads, heads)
        args = (torch.randn(2, length, 8 * heads),)
    elif kind == "one group":
        model = SelfAttention(4 * heads, heads, 1)
    elif kind == "joint":
        model, args = JointAttention(4 * heads, heads), (x, torch.randn(2, text, 4 * heads))
    elif kind.startswith("B"):
        args = (x, masks(kind, 2, heads, length))
    with torch.no_grad():
        want = model(*args)
    outputs, _, ctx, network = simulate(capture(model, *args), ranks, Config(strategy=strategy))
    assert worst(outputs, want) <= 1e-5
    (choice,) = {str(c.strategy): c for c in ctx.results.all(Choice)}.values()
    attentions = len(choice.nodes)
    taken = choice.strategy
    each = 2 if taken.kind == "packed" else 4 * taken.groups
    assert network.calls["all_to_all_single"] == each * attentions
    # What was asked for is taken, or there is a reason.
    refused = choice.refused.get(strategy, "")
    assert str(taken) == (strategy if not refused else "separate")
    assert any(n.kind == "strategy" and refused in n.text for n in ctx.notes) == bool(refused)
    groups = parse(strategy).groups
    if share >= 3 and kind != "one group" and not (kind == "grouped" and share % groups):
        assert not refused


@pytest.mark.parametrize("broken", [swapped, missing])
@pytest.mark.parametrize("strategy", ["packed", "pipelined:2"])
def test_a_broken_all_to_all_is_noticed(broken: Callable, strategy: str) -> None:
    model, x = SelfAttention(24, 6), torch.randn(1, 13, 24)
    with torch.no_grad():
        want = model(x)
    outputs, *_ = simulate(capture(model, x), 3, Config(strategy=strategy), broken)
    assert worst(outputs, want) > 1e-3


def chosen(x: Tensor, ranks: int, **options: Any) -> list[Any]:
    model = SelfAttention(x.shape[-1], 8).to(x.device, x.dtype)
    captured = capture(model, x)
    config = Config(verify=False, **options)
    orders = {str(compile_rank(captured, r, ranks, config)[0].code) for r in range(ranks)}
    assert orders
    return compile_rank(captured, 0, ranks, config)[1].results.all(Choice)


def test_short_sequences_on_many_ranks_travel_in_one() -> None:
    (choice,) = chosen(torch.randn(1, 16, 64, dtype=torch.bfloat16), 8, cost_model="910B4")
    assert str(choice.strategy) in ("packed", "gather"), str(choice)  # two collectives
    assert choice.estimates["packed"] < choice.estimates["separate"]


def test_long_sequences_on_two_ranks_are_pipelined() -> None:
    x = torch.randn(1, 4608, 3072, dtype=torch.bfloat16, device="meta")
    (choice,) = chosen(x, 2, cost_model="910B4")
    assert choice.strategy.kind == "pipelined", str(choice)
    assert set(choice.estimates) == {
        *("separate", "packed"),
        *(f"pipelined:{g}" for g in (2, 3, 4)),
    }
    assert "heads divide by 2 ranks" in choice.refused["gather"]


def test_what_the_device_must_move_itself_is_not_cut_up(tmp_path: Path) -> None:
    x = torch.randn(1, 4608, 3072, dtype=torch.bfloat16, device="meta")
    for launch, kinds in ((0.0, {"pipelined"}), (1e-3, {"separate", "packed", "gather"})):
        path = tmp_path / "device.json"
        path.write_text(replace(DEVICES["910B4"], link_launch=launch).to_json())
        (choice,) = chosen(x, 2, cost_model=str(path))
        assert choice.strategy.kind in kinds, str(choice)


@pytest.mark.parametrize("text", ["pipelined:1", "pipelined:x", "ring", "packed:2", "gather:1"])
def test_strategies_that_there_are_not(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse(text)
    with pytest.raises(Exception, match=r"must be auto, separate, packed, pipelined"):
        Config.load({"strategy": text})


def test_strategies_by_name() -> None:
    assert parse("auto") is None
    assert parse("pipelined") == Strategy("pipelined", 2)
    assert str(parse("pipelined:3")) == "pipelined:3"
    assert str(parse("gather")) == "gather"
    # Groups differ by one head at most, and hold all heads.
    assert [Strategy("pipelined", 3).heads(7, g) for g in range(3)] == [(0, 2), (2, 4), (4, 7)]
