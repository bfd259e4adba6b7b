"""Qwen-Image-Edit and Z-Image on simulated ranks: masks, ragged batches, complex rotary tables."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from ascend_sp.graph.context import PassContext
from checks import complex_nodes, missing, swapped, worst
from models import qwen, qwen_inputs, z_image, z_image_inputs
from simulator import Captured, capture, simulate

TOLERANCE = 1e-5
RANKS = [(3,), pytest.param((1, 2, 8), marks=pytest.mark.slow)]
"""Each rank is a compile: three, for which nothing is even, run always."""


def gathers(ctx: PassContext) -> list[str]:
    return [n.text for n in ctx.notes if n.kind == "gather"]


# batch, sizes of the noise and of each reference, prompt tokens, real ones of each item.
QWEN = {
    "one reference": (1, ((4, 4), (3, 4)), 7, None),
    "text-to-image": (1, ((8, 8),), 8, None),
    "two references, uneven": (1, ((5, 5), (3, 3), (1, 4)), 5, None),
    "batch of 2": (2, ((4, 6), (2, 3)), 7, None),
    "padded prompts": (2, ((4, 6), (2, 3)), 11, (11, 4)),
    "all prompts padded": (2, ((3, 5),), 9, (2, 6)),
    "mask that hides nothing": (1, ((4, 4), (3, 4)), 7, (7,)),
    "one token of text": (2, ((4, 4),), 1, (1, 1)),
}
SLOW = (
    *("one reference", "text-to-image", "batch of 2"),
    *("padded prompts", "all prompts padded", "mask that hides nothing"),
)


@pytest.mark.parametrize("numbers", RANKS, ids=str)
@pytest.mark.parametrize(
    ("name", "layers", "zero_cond_t"),
    [
        *((name, 1, False) for name in QWEN if name not in SLOW),
        *(pytest.param(name, 1, False, marks=pytest.mark.slow) for name in SLOW),
        pytest.param("padded prompts", 2, False, marks=pytest.mark.slow),
        ("padded prompts", 1, True),
        pytest.param("two references, uneven", 1, True, marks=pytest.mark.slow),
    ],
)
def test_qwen_equals_eager(
    name: str, layers: int, zero_cond_t: bool, numbers: tuple[int, ...]
) -> None:
    model, inputs = qwen(3, layers, zero_cond_t), qwen_inputs(*QWEN[name])
    with torch.no_grad():
        reference = model(**inputs)[0]
    captured = capture(model, **inputs)
    assert captured.graphs == 1
    for ranks in numbers:
        outputs, programs, ctx, network = simulate(captured, ranks)
        assert worst(outputs, reference) <= TOLERANCE, ranks
        if ranks > 1:
            calls = {"all_to_all_single": 4 * layers, "all_gather_into_tensor": 1}
            assert network.calls == calls, [str(n) for n in ctx.notes]
            assert not any(map(complex_nodes, programs))


def test_a_padded_prompt_token_counts_for_nothing() -> None:
    """What the leading peer got wrong: other values behind the mask must not change the picture."""
    model, inputs = qwen(3, 1), qwen_inputs(*QWEN["padded prompts"])
    captured = capture(model, **inputs)
    first, *_ = simulate(captured, 2)
    text = next(
        x
        for x in captured.inputs
        if torch.is_tensor(x) and torch.equal(x, inputs["encoder_hidden_states"])
    )
    text[1, 4:] = 100.0
    second, *_ = simulate(captured, 2)
    assert worst(second, first[0][0]) <= TOLERANCE
    text[1, :4] = 100.0
    third, *_ = simulate(captured, 2)
    assert worst(third, first[0][0]) > 100 * TOLERANCE


@pytest.mark.parametrize("broken", [swapped, missing])
def test_a_broken_all_to_all_is_noticed(broken: object) -> None:
    model, inputs = qwen(3, 1), qwen_inputs(*QWEN["padded prompts"])
    with torch.no_grad():
        reference = model(**inputs)[0]
    outputs, *_ = simulate(capture(model, **inputs), 2, broken=broken)  # type: ignore[arg-type]
    assert worst(outputs, reference) > 100 * TOLERANCE


def captured_z_image(
    model: nn.Module, sizes: Sequence[tuple[int, int]], text: Sequence[int]
) -> tuple[Captured, list[torch.Tensor]]:
    inputs = z_image_inputs(sizes, text)
    with torch.no_grad():
        reference = model(*inputs, return_dict=False)[0]
    return capture(model, *inputs, return_dict=False), reference


# latent height and width of each item, caption tokens of each item
Z_IMAGE = {
    "one": (((12, 16),), (9,)),
    "even": (((16, 16),), (32,)),
    "two alike": (((12, 16), (12, 16)), (9, 9)),
    "captions of different lengths": (((12, 16), (12, 16)), (9, 40)),
    "pictures of different sizes": (((12, 16), (16, 20)), (9, 40)),
}


@pytest.mark.parametrize("numbers", RANKS, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "one",
        *(pytest.param(name, marks=pytest.mark.slow) for name in Z_IMAGE if name != "one"),
    ],
)
def test_z_image_equals_eager(name: str, numbers: tuple[int, ...]) -> None:
    sizes, text = Z_IMAGE[name]
    captured, reference = captured_z_image(z_image(3, 1), sizes, text)
    assert captured.graphs == 1
    for ranks in numbers:
        outputs, programs, ctx, network = simulate(captured, ranks)
        assert worst(outputs, reference) <= TOLERANCE, ranks
        if ranks == 1:
            continue
        assert not any(map(complex_nodes, programs))
        assert network.calls["all_to_all_single"] == 4 * 3
        # Each item's picture is gathered where it is cut out, behind the last block, all in one.
        between = [n for n in ctx.notes if n.kind == "reshard"]
        assert len(gathers(ctx)) == len(sizes) + len(between)
        assert network.calls["all_gather_into_tensor"] == 1 + len(between)
        # Between the refiners and the main layers nothing is, unless the segments of two items
        # do not line up; the report says so.
        assert bool(between) == (name == "pictures of different sizes")
        assert all("rnn.py" in n.source for n in between)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_z_image_has_30_heads(ranks: int) -> None:
    captured, reference = captured_z_image(z_image(30, 1), ((12, 16),), (9,))
    outputs, _, _, network = simulate(captured, ranks)
    assert worst(outputs, reference) <= TOLERANCE
    assert network.calls == {"all_to_all_single": 4 * 3, "all_gather_into_tensor": 1}


@pytest.mark.slow
def test_a_bf16_model_rotates_in_float32() -> None:
    model = qwen(3, 1, dtype=torch.bfloat16)
    inputs = qwen_inputs(2, mask=(7, 4), dtype=torch.bfloat16)
    with torch.no_grad():
        eager = model(**inputs)[0].float()
        exact = model.float()(**{k: _wide(v) for k, v in inputs.items()})[0]
    model.to(torch.bfloat16)
    outputs, *_ = simulate(capture(model, **inputs), 3)
    noise = (eager - exact).abs().max()
    assert max((o[0].float() - exact).abs().max() for o in outputs) <= 1.5 * noise


def _wide(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    return value
