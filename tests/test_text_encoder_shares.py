"""Which rank of a split text encoder holds which heads and rows."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ascend_sp.text_encoder.split import (
    PADDING,
    Cut,
    piece_of,
    share_evenly,
    share_heads,
)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_every_head_is_on_one_rank_with_its_own_kv_head(kv: int, group: int, ranks: int) -> None:
    heads = kv * group
    query, keys = share_heads(heads, kv, ranks)
    assert sorted(h for rank in query.ranks for h in rank if h != PADDING) == list(range(heads))
    assert len({len(r) for r in query.ranks}) == len({len(r) for r in keys.ranks}) == 1
    local_group = query.local // keys.local
    assert query.local == local_group * keys.local
    for mine, mine_kv in zip(query.ranks, keys.ranks, strict=True):
        for i, head in enumerate(mine):
            if head != PADDING:
                assert mine_kv[i // local_group] == head // group
    # A rank holds no more than its part and a slot: a K/V head and its query heads.
    assert query.local + keys.local <= (heads + kv) / ranks + 1 + group
    if kv % ranks == 0:
        assert (query.local, keys.local) == (heads // ranks, kv // ranks)


@pytest.mark.parametrize(
    ("heads", "kv", "ranks", "local"),
    [
        (64, 64, 4, (16, 16)),
        (28, 4, 4, (7, 1)),
        (28, 4, 2, (14, 2)),
        # Fewer K/V heads than ranks: copies, each with a part of the queries.
        (28, 4, 8, (4, 1)),
        (32, 8, 16, (2, 1)),
        (6, 1, 4, (2, 1)),
        # No whole number of slots for each rank: a copy more costs less than a slot of zeros.
        (28, 4, 3, (12, 3)),
        (5, 5, 2, (3, 3)),
    ],
)
def test_heads_of_a_rank(heads: int, kv: int, ranks: int, local: tuple[int, int]) -> None:
    query, keys = share_heads(heads, kv, ranks)
    assert (query.local, keys.local) == local


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_pieces_put_the_whole_together(kv: int, group: int, ranks: int, width: int) -> None:
    """Summed over ranks, rows times columns give the product of the wholes."""
    query, keys = share_heads(kv * group, kv, ranks)
    shares = {"query": query, "kv": keys}
    torch.manual_seed(0)
    a, b = torch.randn(2, kv * group * width, 3).double()
    rows = [piece_of(Cut(0, ("query",), width), shares, r, a.shape).take(a) for r in range(ranks)]
    columns = [
        piece_of(Cut(1, ("query",), width), shares, r, b.T.shape).take(b.T) for r in range(ranks)
    ]
    total = sum(c @ r for c, r in zip(columns, rows, strict=True))
    torch.testing.assert_close(total, b.T @ a)
    fused = torch.arange((kv * group + 2 * kv) * width)
    for r in range(ranks):
        got = piece_of(Cut(0, ("query", "kv", "kv"), width), shares, r, fused.shape).take(fused)
        q, k, v = fused.split([kv * group * width, kv * width, kv * width])
        want = [
            torch.cat(
                [
                    torch.zeros(width) if u == PADDING else x[u * width : (u + 1) * width]
                    for u in share.ranks[r]
                ]
            )
            for x, share in ((q, query), (k, keys), (v, keys))
        ]
        assert got.tolist() == torch.cat(want).tolist()


def test_reading_slices_is_few_runs() -> None:
    share = share_evenly(10, 4)
    pieces = [piece_of(Cut(0, ("inner", "inner"), 1), {"inner": share}, r, (20,)) for r in range(4)]
    assert pieces[0].runs == ((0, 3), (10, 3))
    assert pieces[3].runs == ((9, 1), (PADDING, 2), (19, 1), (PADDING, 2))
