"""Comparing values: what is far and what is near, and which part of a value a rank holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ascend_sp.compiler.numerics.lockstep import TOLERANCES, _held, distance
from ascend_sp.graph.layout import PARTIAL, REPLICATE, Sequence, Shard
from ascend_sp.runtime.topology import Topology


def noisy(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A deep sum in two orders, as two kernels would do it."""
    terms = torch.randn(64, 500, 8, dtype=torch.float64).to(dtype)
    return terms.sum(1), terms.flip(1).cumsum(1)[:, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_near_and_a_wrong_row_far(dtype: torch.dtype) -> None:
    got, want = noisy(dtype)
    assert distance(got, want) < TOLERANCES[dtype]
    wrong = want.repeat(64, 1)
    right = wrong.clone()
    wrong[77] = wrong[78]  # one row of 4096
    assert distance(wrong, right) > TOLERANCES[dtype]
    assert distance(want * 1.2, want) > TOLERANCES[dtype]


def test_what_is_not_a_finite_number_must_be_the_same() -> None:
    want = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert distance(want.clone(), want) == 0
    for i, value in ((0, math.nan), (1, 1.0), (2, -math.inf), (3, 1e30)):
        got = want.clone()
        got[i] = value
        assert distance(got, want) == math.inf
    assert distance(torch.tensor([3]), torch.tensor([4])) == math.inf
    assert distance(torch.tensor([True]), torch.tensor([True])) == 0
    assert distance(torch.ones(2), torch.ones(3)) == math.inf
    assert distance(torch.empty(0), torch.empty(0)) == 0
    assert distance(None, None) == 0 and distance(2, 3) == math.inf
    huge = torch.full((4,), 3e38)
    assert distance(huge, huge * 0.999) < 2e-3


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_part_that_a_rank_holds_without_its_padding(rank: int) -> None:
    """Segments of 7 and 2 rows on three ranks, the sequence minor in a dim of 2 * 9."""
    whole = torch.arange(2 * 9 * 5).reshape(18, 5)
    split = Shard(0, Sequence((7, 2)), outer=2)
    by_row = whole.reshape(2, 9, 5)
    first = [(0, 3), (3, 6), (6, 7)][rank]
    second = [(7, 8), (8, 9), (9, 9)][rank]
    rows = [*range(*first), *range(*second)]
    mine = torch.full((2, 4, 5), -1)
    mine[:, : first[1] - first[0]] = by_row[:, slice(*first)]
    mine[:, 3 : 3 + second[1] - second[0]] = by_row[:, slice(*second)]
    both = _held(mine.reshape(8, 5), whole, split, Topology(rank, 3), {})
    assert both is not None
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0].reshape(2, -1, 5), by_row[:, rows])


def test_values_that_cannot_be_compared() -> None:
    x, topology = torch.ones(4, 2), Topology(0, 2)
    assert _held(x, x, PARTIAL, topology, {}) is None
    assert _held(x, x[:3], REPLICATE, topology, {}) is None
    assert _held(x, x, Shard(0, Sequence((4,))), topology, {}) is None
