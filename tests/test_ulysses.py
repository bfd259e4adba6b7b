"""Attention over a split sequence: every kind, any lengths, heads, ranks; and that a broken
all-to-all is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import masks, missing, swapped, worst
from simulator import capture, simulate
from toy import CrossAttention, HigherOrder, JointAttention, SelfAttention, Sliced

RANKS = st.sampled_from([2, 3, 4, 8])
TOLERANCE = 1e-5


def check(
    model: Callable, *args: object, ranks: int, all_to_alls: int, gathers: int = 1, **kwargs: object
) -> None:
    with torch.no_grad():
        reference = model(*args, **kwargs)
    captured = capture(model, *args, **kwargs)
    outputs, _, ctx, network = simulate(captured, ranks)
    notes = [str(n) for n in ctx.notes]
    assert worst(outputs, reference) <= TOLERANCE, notes
    assert network.calls["all_to_all_single"] == all_to_alls, notes
    assert network.calls["all_gather_into_tensor"] == gathers, notes
    assert sum(network.calls.values()) == all_to_alls + gathers, network.calls


@settings(max_examples=4)
@given(
    batch=st.integers(1, 2),
    length=st.integers(2, 40),
    heads=st.sampled_from([1, 2, 3, 4, 6]),
    ranks=RANKS,
)
def test_self_attention(batch: int, length: int, heads: int, ranks: int) -> None:
    x = torch.randn(batch, length, 4 * heads)
    check(SelfAttention(4 * heads, heads), x, ranks=ranks, all_to_alls=8)


@settings(max_examples=4)
@given(
    batch=st.integers(1, 2),
    image=st.integers(1, 30),
    text=st.integers(1, 12),
    heads=st.sampled_from([2, 3, 4]),
    ranks=RANKS,
)
def test_joint_attention(batch: int, image: int, text: int, heads: int, ranks: int) -> None:
    a, b = torch.randn(batch, image, 12), torch.randn(batch, text, 12)
    check(JointAttention(12, heads), a, b, ranks=ranks, all_to_alls=8)


@settings(max_examples=4)
@given(
    length=st.integers(2, 30),
    ranks=RANKS,
    heads_groups=st.sampled_from([(4, 2), (4, 1), (6, 3), (8, 4)]),
)
def test_grouped_heads(length: int, ranks: int, heads_groups: tuple[int, int]) -> None:
    heads, groups = heads_groups
    x = torch.randn(2, length, 4 * heads)
    check(SelfAttention(4 * heads, heads, groups), x, ranks=ranks, all_to_alls=8)


@settings(max_examples=4)
@given(length=st.integers(2, 30), ranks=RANKS)
def test_causal_attention(length: int, ranks: int) -> None:
    x = torch.randn(1, length, 12)
    check(SelfAttention(12, 3), x, None, True, ranks=ranks, all_to_alls=8)


@settings(max_examples=4)
@given(
    kind=st.sampled_from(["B11S", "B1SS", "BHSS", "SS", "1HSS", "B1S1", "BH1S", "1S", "HSS"]),
    additive=st.booleans(),
    image=st.integers(1, 16),
    text=st.integers(1, 9),
    heads=st.sampled_from([2, 3]),
    ranks=RANKS,
)
def test_masks(kind: str, additive: bool, image: int, text: int, heads: int, ranks: int) -> None:
    mask = masks(kind, 2, heads, image + text)
    if additive:
        mask = torch.where(mask, torch.rand(mask.shape), torch.tensor(-1e4))
    a, b = torch.randn(2, image, 12), torch.randn(2, text, 12)
    check(JointAttention(12, heads), a, b, mask, ranks=ranks, all_to_alls=8)


@settings(max_examples=4)
@given(
    batch=st.integers(1, 2),
    image=st.integers(2, 30),
    text=st.integers(1, 12),
    ranks=RANKS,
    masked=st.sampled_from(["", "keys", "rows"]),
)
def test_cross_attention_with_whole_keys_costs_nothing(
    batch: int, image: int, text: int, ranks: int, masked: str
) -> None:
    a, b = torch.randn(batch, image, 12), torch.randn(batch, text, 12)
    rows = image if masked == "rows" else 1
    mask = (torch.rand(batch, 1, rows, text) > 0.3) if masked else None
    if mask is not None:
        mask[..., 0] = True
    check(CrossAttention(12, 3), a, b, mask, ranks=ranks, all_to_alls=4)


@settings(max_examples=4)
@given(length=st.integers(2, 30), share=st.floats(0.1, 0.9), ranks=RANKS)
def test_a_slice_inside_the_sequence_makes_segments(length: int, share: float, ranks: int) -> None:
    keep = min(length - 1, max(1, int(length * share)))
    check(Sliced(keep), torch.randn(2, length, 12), ranks=ranks, all_to_alls=12)


def test_a_higher_order_op_runs_whole_and_all_around_it_is_split() -> None:
    x = torch.randn(1, 13, 16)
    check(HigherOrder(), x, ranks=3, all_to_alls=16, gathers=2)


@pytest.mark.parametrize("broken", [swapped, missing])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_broken_all_to_all_is_noticed(broken: Callable, ranks: int) -> None:
    model, x = SelfAttention(12, 3), torch.randn(1, 13, 12)
    with torch.no_grad():
        reference = model(x)
    outputs, *_ = simulate(capture(model, x), ranks, broken=broken)
    assert worst(outputs, reference) > 1e-3


@pytest.mark.parametrize(("groups", "values"), [(1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("world", [2, 3])
def test_one_head_of_keys_that_is_broadcast(groups: int, values: int, world: int) -> None:
    def fn(x: Tensor) -> Tensor:
        k, v = 0.3 * x[..., : 8 * groups], x[..., 32 - 8 * values :]
        q, k, v = (
            y.unflatten(2, (n, 8)).transpose(1, 2) for y, n in ((x, 4), (k, groups), (v, values))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x = torch.randn(2, 7, 32)
    outputs, _, _, network = simulate(capture(fn, x), world)
    assert network.calls["all_to_all_single"] == 4
    for out in outputs:
        torch.testing.assert_close(out[0], fn(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_one_value_that_is_queries_and_keys(world: int, causal: bool) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.unflatten(2, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, is_causal=causal)
        return y.transpose(1, 2).flatten(2)

    check(fn, torch.randn(2, 7, 8), ranks=world, all_to_alls=4)


def test_queries_that_are_broadcast_are_not_split() -> None:
    def fn(x: Tensor) -> Tensor:
        k = x.unflatten(2, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(k[:, :1], k, k).transpose(1, 2).flatten(2)

    x = torch.randn(2, 7, 32)
    outputs, _, ctx, network = simulate(capture(fn, x), 2)
    torch.testing.assert_close(outputs[1][0], fn(x))
    assert "all_to_all_single" not in network.calls
    assert any("queries are broadcast" in n.text for n in ctx.notes)
