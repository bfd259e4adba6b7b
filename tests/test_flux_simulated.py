"""diffusers' FLUX on ranks that are simulated in one process: right, and nothing wasted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ascend_sp.compiler.config import Config
from ascend_sp.runtime.ops import STARTS, WAIT
from checks import missing, swapped, worst
from models import flux, flux_inputs
from simulator import Captured, capture, run_ranks, simulate

TOLERANCE = 1e-5

# batch, image tokens, text tokens, heads, guidance: even, uneven, shorter than the rank count. Each
# rank is a compile, so a few numbers of ranks run always, and the others with the slow tests.
CASES = {
    (1, 16, 8, 4, True): ((), (1, 2, 3, 4, 8)),
    (1, 16, 1, 3, False): ((2,), (8,)),
    (2, 1023, 7, 3, True): ((3,), (4,)),
    (2, 64, 77, 8, False): ((), (2, 3)),
    (1, 4096, 512, 2, True): ((), (3,)),
    (1, 17, 1, 2, True): ((), (3, 8)),
}


def captured_flux(
    batch: int,
    image: int,
    text: int,
    heads: int,
    guidance: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Captured, torch.Tensor]:
    model = flux(1, 1, heads, guidance, dtype)
    inputs = flux_inputs(batch, image, text, guidance, dtype)
    with torch.no_grad():
        reference = model(**inputs)[0]
    return capture(model, **inputs), reference


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        *((case, some) for case, (some, _) in CASES.items() if some),
        *(pytest.param(case, more, marks=pytest.mark.slow) for case, (_, more) in CASES.items()),
    ],
    ids=str,
)
def test_equals_eager(case: tuple, numbers: tuple[int, ...]) -> None:
    captured, reference = captured_flux(*case)
    assert captured.graphs == 1
    for ranks in numbers:
        outputs, _, ctx, network = simulate(captured, ranks)
        assert worst(outputs, reference) <= TOLERANCE, ranks
        calls = {"all_to_all_single": 4 * 2, "all_gather_into_tensor": 1} if ranks > 1 else {}
        assert network.calls == calls, [str(n) for n in ctx.notes]


@pytest.mark.parametrize("ranks", [3])
def test_program_has_no_op_that_waits_for_a_size(ranks: int) -> None:
    captured, _ = captured_flux(1, 1023, 7, 3, True)
    _, programs, ctx, _ = simulate(captured, ranks)
    for program in programs:
        ops = Counter(str(n.target) for n in program.graph.nodes)
        starts = sum(ops[str(s)] for s in STARTS)
        assert starts == ops[str(WAIT)] == 4 * 2 + 1
        assert not any(".item." in op or "_local_scalar" in op or "nonzero" in op for op in ops)
    assert [n.kind for n in ctx.notes] == ["attention", "attention", "gather"]


@pytest.mark.parametrize("broken", [swapped, missing])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_broken_all_to_all_is_noticed(broken: object, ranks: int) -> None:
    captured, reference = captured_flux(1, 33, 7, 4, True)
    outputs, *_ = simulate(captured, ranks, broken=broken)
    assert worst(outputs, reference) > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_bf16_differs_no_more_than_two_orders_of_summation(ranks: int) -> None:
    """The yardstick: eager against itself with the image tokens in another order."""
    model = flux(1, 1, 3, dtype=torch.bfloat16)
    inputs = flux_inputs(1, 63, 7, dtype=torch.bfloat16)
    with torch.no_grad():
        eager = model(**inputs)[0].float()
        noise = 0.0
        for seed in range(4):
            order = torch.randperm(63, generator=torch.Generator().manual_seed(seed))
            other = dict(inputs)
            other["hidden_states"] = inputs["hidden_states"][:, order]
            other["img_ids"] = inputs["img_ids"][order]
            again = model(**other)[0].float()
            noise = max(noise, (again - eager[:, order]).abs().max().item())
    outputs, *_ = simulate(capture(model, **inputs), ranks)
    ours = max((o[0].float() - eager).abs().max().item() for o in outputs)
    assert noise > 0
    assert ours <= 1.5 * noise


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 8])
def test_one_program_for_all_lengths(ranks: int) -> None:
    """dynamic=True: compiled at one resolution, right at another, even and uneven."""
    model = flux(1, 1, 3)
    first = flux_inputs(2, 30, 9)
    captured = capture(model, dynamic=True, **first)
    other = flux_inputs(2, 23, 5, seed=2)
    with torch.no_grad():
        wants = [model(**x)[0] for x in (first, other)]
    sizes = {30: 23, 9: 5, 2: 2}
    swap = [
        (a, b) for a, b in zip(first.values(), other.values(), strict=True) if torch.is_tensor(a)
    ]

    def changed(value: object) -> object:
        if isinstance(value, int):
            return sizes[value]
        return next((b for a, b in swap if a is value), value)

    outputs, programs, _, network = simulate(captured, ranks)
    assert worst(outputs, wants[0]) <= TOLERANCE
    outputs, again = run_ranks(programs, [changed(v) for v in captured.inputs])
    assert worst(outputs, wants[1]) <= TOLERANCE
    assert network.calls == again.calls == {"all_to_all_single": 8, "all_gather_into_tensor": 1}


def test_math_attention_is_an_option() -> None:
    captured, reference = captured_flux(1, 17, 5, 3, True)
    outputs, programs, _, _ = simulate(captured, 2, Config(attention="math"))
    assert worst(outputs, reference) <= TOLERANCE
    ops = {str(n.target) for n in programs[0].graph.nodes}
    assert {"aten.matmul.default", "aten._softmax.default"} <= ops
