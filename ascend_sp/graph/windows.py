"""Where the rows of a `Window` come from: which rank holds each, and what is sent to whom.

Pure arithmetic, and every rank calculates it for all ranks. A rank sends to the one that is d
behind it as many rows as any rank must to its own: then all ranks send equally much, and an
estimate of what that costs is the same everywhere. For a 3 x 3 convolution that is one row to each
neighbour, round in a circle; what nobody reads is the last rank's row to the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ascend_sp.graph.layout import Padded, Shard, Window
from ascend_sp.graph.sizes import as_int


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a window."""

    rank: int | None
    """Who holds them; None for rows of `value`."""
    start: int
    """The first of them, as that rank counts its rows."""
    count: int
    value: float = 0.0


def known(split: Shard) -> bool:
    """Whether windows over a dim that lies as `split` can be found: its sizes are known."""
    sizes = (*split.seq.lengths, split.inner)
    return split.outer == 1 and all(isinstance(n, int) for n in sizes)


def pieces(
    window: Window, home: Shard | Padded | None, size: int, rank: int, world: int
) -> list[Piece]:
    """What the window of `rank` is made of, in order.

    Args:
        window: the rows that each rank is to have.
        home: how the tensor lies; None if every rank holds it whole.
        size: global size of the dim, rows around a picture included.
        rank: whose window.
        world: number of ranks.
    """
    out: list[Piece] = []
    for row in window.rows(rank):
        new = _source(row, window, home, size, rank, world)
        last = out[-1] if out else None
        if last is not None and last.rank == new.rank and _goes_on(last, new):
            out[-1] = Piece(last.rank, last.start, last.count + 1, last.value)
        else:
            out.append(new)
    return out


def _goes_on(last: Piece, new: Piece) -> bool:
    if last.rank is None:
        return last.value == new.value
    return last.start + last.count == new.start


def _source(
    row: int, window: Window, home: Shard | Padded | None, size: int, rank: int, world: int
) -> Piece:
    """Where one row, which may be outside the tensor, comes from."""
    if not 0 <= row < size:
        return Piece(None, 0, 1, window.value)
    if home is None:
        return Piece(rank, row, 1)
    if isinstance(home, Padded):
        inside = inner_row(row, home, size)
        if inside is None:
            return Piece(None, 0, 1, home.value)
        row, home = inside, home.split
    holder, local = holder_of(row, home, world)
    return Piece(holder, local, 1)


def inner_row(row: int, home: Padded, size: int) -> int | None:
    """The row of the picture that stands at `row` of the padded one; None if it is a constant."""
    n = size - home.before - home.after
    row -= home.before
    if 0 <= row < n:
        return row
    if home.mode == "constant":
        return None
    if home.mode == "reflect":
        return -row if row < 0 else 2 * (n - 1) - row
    assert home.mode == "replicate"
    return min(max(row, 0), n - 1)


def holder_of(row: int, split: Shard, world: int) -> tuple[int, int]:
    """The rank that holds a global row, and which of its rows that is."""
    token, rest = divmod(row, as_int(split.inner))
    offset = 0
    for length, chunk in zip(split.seq.lengths, split.seq.chunks(world), strict=True):
        length, chunk = as_int(length), as_int(chunk)
        if token < length:
            rank, at = divmod(token, chunk)
            return rank, (offset + at) * as_int(split.inner) + rest
        token, offset = token - length, offset + chunk
    raise IndexError(f"there is no row {row} in {split}")


def valid_rows(split: Shard, rank: int, world: int) -> Iterator[tuple[int, int]]:
    """The rows of `rank` that are no padding: where each run of them starts, and its length."""
    offset, inner = 0, as_int(split.inner)
    for length, chunk in zip(split.seq.lengths, split.seq.chunks(world), strict=True):
        length, chunk = as_int(length), as_int(chunk)
        valid = max(0, min(chunk, length - rank * chunk))
        if valid:
            yield offset * inner, valid * inner
        offset += chunk


@dataclass(frozen=True)
class Exchange:
    """Who sends which of its rows to whom."""

    needed: tuple[tuple[tuple[int, ...], ...], ...]
    """``needed[to][source]``: rows as `source` counts them, rising; none of one's own."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.needed)

    def block(self, source: int, to: int) -> int:
        """Rows of what `source` sends to `to`, those included that only fill it up."""
        p = self.world
        distance = (to - source) % p
        return max(len(self.needed[(r + distance) % p][r]) for r in range(p))

    def blocks(self, source: int) -> list[int]:
        """`block` for each rank that `source` sends to. The sum is the same for all."""
        return [self.block(source, to) for to in range(self.world)]

    @property
    def rows(self) -> int:
        """Rows that each rank sends."""
        return sum(self.blocks(0))


def exchange(window: Window, home: Shard | Padded | None, size: int, world: int) -> Exchange:
    """What must travel so that every rank has its window; see `pieces`."""
    table: list[tuple[tuple[int, ...], ...]] = []
    for to in range(world):
        rows: list[set[int]] = [set() for _ in range(world)]
        for piece in pieces(window, home, size, to, world):
            if piece.rank is not None and piece.rank != to:
                rows[piece.rank].update(range(piece.start, piece.start + piece.count))
        table.append(tuple(tuple(sorted(r)) for r in rows))
    return Exchange(tuple(table))


def runs(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rising `rows` as runs: the first of each, and its length."""
    out: list[tuple[int, int]] = []
    for row in rows:
        if out and sum(out[-1]) == row:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((row, 1))
    return out
