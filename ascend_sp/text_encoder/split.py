"""Which heads and features a rank holds: all ranks get the same shapes, padded with zeros.

A slot is a K/V head with (part of) the query heads that attend to it, so that on every rank the
heads group as in the whole module. Slots are dealt out evenly; where there are not enough, a rank
gets a slot of zeros. It adds nothing: the rows of its projections and its columns of the output
projection are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Share:
    """For each rank the units (heads, or features) that it holds; `PADDING` is a unit of zeros."""

    total: int
    """Units of the whole module."""
    ranks: tuple[tuple[int, ...], ...]

    @property
    def local(self) -> int:
        """Units on each rank, padding included."""
        return len(self.ranks[0])


def share_evenly(total: int, ranks: int) -> Share:
    """`total` units in order, in equal parts; the last ranks pad."""
    size = -(-total // ranks)
    dealt = [u if u < total else PADDING for u in range(size * ranks)]
    return Share(total, tuple(tuple(dealt[r * size : (r + 1) * size]) for r in range(ranks)))


def share_heads(heads: int, kv_heads: int, ranks: int) -> tuple[Share, Share]:
    """Who holds which query heads and which K/V heads.

    Query head ``h`` of the whole attends to K/V head ``h // (heads // kv_heads)``; so it does on
    its rank, with the local numbers. A K/V head may be on several ranks, each with other query
    heads: as many copies are made as give a rank the fewest heads to hold.

    Args:
        heads: query heads, a multiple of `kv_heads`.
        kv_heads: heads of keys and values.
        ranks: P.
    """
    group = heads // kv_heads

    def held(copies: int) -> int:
        return -(-kv_heads * copies // ranks) * (-(-group // copies) + 1)

    copies = min(range(1, group + 1), key=lambda c: (held(c), c))
    size = -(-group // copies)
    slots = []
    for kv in range(kv_heads):
        for first in range(0, size * copies, size):
            part = range(first, first + size)
            slots.append((kv, [kv * group + i if i < group else PADDING for i in part]))
    dealt = share_evenly(len(slots), ranks).ranks
    none = (PADDING, [PADDING] * size)
    mine = [[none if s == PADDING else slots[s] for s in rank] for rank in dealt]
    queries = tuple(tuple(h for _, part in rank for h in part) for rank in mine)
    return Share(heads, queries), Share(kv_heads, tuple(tuple(kv for kv, _ in r) for r in mine))


@dataclass(frozen=True)
class Cut:
    """How one dim of a parameter is made of units.

    The dim is the blocks one after the other, each all units of that kind: ``("query", "kv",
    "kv")`` for a fused projection of queries, keys and values.
    """

    dim: int
    blocks: tuple[str, ...]
    width: int
    """Elements of one unit."""


@dataclass(frozen=True)
class Piece:
    """One rank's part of a parameter: runs of consecutive elements of one dim of the whole."""

    dim: int
    runs: tuple[tuple[int, int], ...]
    """(start, length) of each; a start of `PADDING` stands for zeros."""
    shape: tuple[int, ...]
    """Shape of the whole."""

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part, in memory of its own."""
        real = [whole.narrow(self.dim, s, n) for s, n in self.runs if s != PADDING]
        return self.join(real, whole)

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """This rank's part from its runs that are not padding, in order; padding is like `like`."""
        rest, out = list(parts), []
        for start, length in self.runs:
            if start == PADDING:
                shape = [length if d == self.dim else n for d, n in enumerate(self.shape)]
                out.append(like.new_zeros(shape))
            else:
                out.append(rest.pop(0))
        return torch.cat(out, self.dim)


def piece_of(cut: Cut, shares: dict[str, Share], rank: int, shape: Sequence[int]) -> Piece:
    """What `rank` holds of a parameter of `shape` that is cut like this."""
    runs: list[tuple[int, int]] = []
    offset = 0
    for kind in cut.blocks:
        for unit in shares[kind].ranks[rank]:
            start = PADDING if unit == PADDING else offset + unit * cut.width
            last, length = runs[-1] if runs else (None, 0)
            expected = PADDING if last in (None, PADDING) else last + length
            if last is not None and start == expected:
                runs[-1] = (last, length + cut.width)
            else:
                runs.append((start, cut.width))
        offset += shares[kind].total * cut.width
    return Piece(cut.dim, tuple(runs), tuple(shape))
