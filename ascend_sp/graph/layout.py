"""Placements: how the tensors of a graph are laid out over the ranks of one group.

One axis is split, the sequence. It is a list of segments (text, image, ...), and **each segment is
padded to a multiple of the rank count and cut on its own**, so that rank r of P holds rows
``[r * c, (r + 1) * c)`` of every segment, c = ceil(length / P). Equal shapes on all ranks follow
for any length (Ulysses Anything Attention), and so does that the concatenation of two sharded
tensors is the local concatenation of their shards. Rows past a segment's length are padding: they
may hold anything, and nothing may let them reach a real row.

The sequence need not be a whole tensor dim. ``view([B, S, C] -> [B * S, C])`` leaves it as the
minor factor of a merged dim, which is why `Shard` has `outer` and `inner`. The rows of a picture
are split in the same way; where it grows by a factor, that is a factor of `inner`. What a
convolution reads of a picture is a `Window`: a rank's rows with some of its neighbours'.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ascend_sp.graph.sizes import Size, ceil_div, divide, equal, product, total

PLACEMENTS = "ascend_sp_placements"
"""Meta key: the placement of each tensor that a node yields."""
GLOBAL_SHAPES = "ascend_sp_global_shapes"
"""Meta key: the global shape of each tensor that a node yields."""
INPUTS = "ascend_sp_inputs"
"""Meta key: the placements of a node's operands, where it has sharded ones."""


@dataclass(frozen=True)
class Seam:
    """A place inside a segment where something cuts the sequence; it could be two segments."""

    seed: str
    """The value in which the segment starts out."""
    offset: int
    """Rows of that value in front of the cut."""


@dataclass(frozen=True)
class Sequence:
    """The split axis: its segments' global lengths, in tokens, in the order of the tensor."""

    lengths: tuple[Size, ...]
    origins: tuple[Seam | None, ...] = field(default=(), compare=False)
    """For each segment, where it begins in the value that it was cut from; empty: not known."""

    @staticmethod
    def joined(parts: Seq[Sequence]) -> Sequence:
        """`parts` one behind the other."""
        lengths = tuple(n for p in parts for n in p.lengths)
        return Sequence(lengths, tuple(o for p in parts for o in p._origins()))

    def part(self, first: int, last: int) -> Sequence:
        """Segments ``[first, last)``."""
        return Sequence(self.lengths[first:last], self._origins()[first:last])

    def _origins(self) -> tuple[Seam | None, ...]:
        return self.origins or (None,) * len(self.lengths)

    def seams(self, *positions: Size) -> tuple[Seam, ...]:
        """The cuts that rows `positions` would make inside segments, as far as they are known."""
        found = []
        for position in positions:
            start = 0
            for length, origin in zip(self.lengths, self._origins(), strict=True):
                if not isinstance(length, int) or not isinstance(position, int):
                    break
                if start < position < start + length and origin is not None:
                    found.append(Seam(origin.seed, origin.offset + position - start))
                start += length
        return tuple(found)

    def cut_at(self, seam: Seam) -> Sequence:
        """The same sequence with the segment that `seam` lies in made two."""
        lengths: list[Size] = []
        origins: list[Seam | None] = []
        for length, origin in zip(self.lengths, self._origins(), strict=True):
            inside = 0
            if origin is not None and origin.seed == seam.seed and isinstance(length, int):
                inside = seam.offset - origin.offset
            if isinstance(length, int) and 0 < inside < length:
                lengths += [inside, length - inside]
                origins += [origin, seam]
            else:
                lengths.append(length)
                origins.append(origin)
        return Sequence(tuple(lengths), tuple(origins))

    @property
    def total(self) -> Size:
        """Global length, in tokens."""
        return total(self.lengths)

    def chunks(self, world: int) -> tuple[Size, ...]:
        """Rows that each of `world` ranks holds of each segment, padding included."""
        return tuple(ceil_div(n, world) for n in self.lengths)

    def local(self, world: int) -> Size:
        """Rows that each of `world` ranks holds in all, padding included."""
        return total(self.chunks(world))

    def padded(self, world: int) -> bool:
        """Whether some rank may hold padding rows."""
        pairs = zip(self.chunks(world), self.lengths, strict=True)
        return not all(equal(c * world, n) for c, n in pairs)

    def cut(self, start: Size, stop: Size) -> tuple[int, int] | None:
        """The segments ``[i, j)`` that rows ``[start, stop)`` are made of.

        None when the boundaries do not fall between segments.
        """
        edges: list[Size] = [0]
        for n in self.lengths:
            edges.append(edges[-1] + n)
        i = next((k for k, e in enumerate(edges) if equal(e, start)), None)
        j = next((k for k, e in enumerate(edges) if equal(e, stop)), None)
        return None if i is None or j is None or j <= i else (i, j)

    def __str__(self) -> str:
        return "+".join(str(n) for n in self.lengths)


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Partial:
    """Every rank holds a term; their sum is the tensor (DTensor's ``Partial("sum")``)."""

    def __str__(self) -> str:
        return "P(sum)"


@dataclass(frozen=True)
class Shard:
    """Dim `dim` has size ``outer * seq.total * inner``, major to minor, and `seq` is split."""

    dim: int
    seq: Sequence
    outer: Size = 1
    inner: Size = 1

    def local_size(self, world: int) -> Size:
        """Size of dim `dim` on each rank."""
        return self.outer * self.seq.local(world) * self.inner

    def whole_dim(self) -> bool:
        """Whether the sequence is all that dim `dim` holds."""
        return equal(self.outer, 1) and equal(self.inner, 1)

    def moved(self, dim: int) -> Shard:
        """The same split at another dim index."""
        return replace(self, dim=dim)

    def __str__(self) -> str:
        inner = "" if equal(self.inner, 1) else f"*{self.inner}"
        outer = "" if equal(self.outer, 1) else f"{self.outer}*"
        return f"S({self.dim}: {outer}[{self.seq}]{inner})"


@dataclass(frozen=True)
class Padded:
    """A picture with rows around it that nobody holds: each rank has its shard of the picture.

    Dim ``split.dim`` of the whole tensor has `before` rows, those of `split`, and `after` rows.
    Only what takes a `Window` can use it; for everything else it is made whole.
    """

    split: Shard
    before: int
    after: int
    mode: str = "constant"
    """What the rows around it are: ``"constant"``, ``"reflect"`` or ``"replicate"``."""
    value: float = 0.0
    """Of constant rows."""

    @property
    def dim(self) -> int:
        """The dim that is split, and padded."""
        return self.split.dim

    def __str__(self) -> str:
        what = f"{self.value:g}" if self.mode == "constant" else self.mode
        return f"{self.split} in {self.before}+{self.after} rows of {what}"


@dataclass(frozen=True)
class Window:
    """Rank r holds rows ``[start + r * step, start + r * step + count)`` of dim `dim`.

    Ranks' rows may overlap, as those that a convolution reads do. Rows outside the tensor are
    `value`. Only what an op is given lies so, never what it yields.
    """

    dim: int
    step: int
    start: int
    count: int
    value: float = 0.0

    def rows(self, rank: int) -> range:
        """The rows of `rank`; some may be outside the tensor."""
        first = self.start + rank * self.step
        return range(first, first + self.count)

    def __str__(self) -> str:
        return f"W({self.dim}: {self.start}+{self.step}r, {self.count} rows)"


Placement: TypeAlias = "Replicate | Shard | Partial | Padded | Window"
REPLICATE = Replicate()
PARTIAL = Partial()


def local_shape(shape: Seq[Size], placement: Placement, world: int) -> tuple[Size, ...]:
    """Shape of each rank's tensor, given the `shape` of the whole one."""
    if isinstance(placement, Window):
        return (*shape[: placement.dim], placement.count, *shape[placement.dim + 1 :])
    if isinstance(placement, Padded):
        placement = placement.split
    if not isinstance(placement, Shard):
        return tuple(shape)
    sizes = list(shape)
    sizes[placement.dim] = placement.local_size(world)
    return tuple(sizes)


def _strides_around(shape: Seq[Size], p: Shard) -> tuple[Size, Size]:
    """Elements major to the sequence axis, and minor to it, in row-major order."""
    major = product(shape[: p.dim]) * p.outer
    return major, p.inner * product(shape[p.dim + 1 :])


def reshaped(
    shape: Seq[Size], p: Shard, new_shape: Seq[Size], prefer: int | None = None
) -> Shard | None:
    """Where the split of a tensor of `shape` lands when it is viewed as `new_shape`.

    Exact: a view keeps the row-major index, so the sequence axis is found by the number of
    elements major and minor to it. None if `new_shape` cuts the axis, or glues it together with
    a part of another one. Only a sequence of one token can land in several dims, and then all
    mean the same shards; `prefer` names the dim that the caller wants, else the plainest form wins
    (a dim of its own, then the minor factor of a dim) and of those the last dim.
    """
    major, minor = _strides_around(shape, p)
    found: list[Shard] = []
    for dim in range(len(new_shape)):
        outer = divide(major, product(new_shape[:dim]))
        inner = divide(minor, product(new_shape[dim + 1 :]))
        if outer is None or inner is None:
            continue
        if equal(outer * p.seq.total * inner, new_shape[dim]):
            found.append(Shard(dim, p.seq, outer, inner))
    if not found:
        return None
    plain = [f for f in found if f.whole_dim()] or [f for f in found if equal(f.inner, 1)] or found
    return next((f for f in plain if f.dim == prefer), plain[-1])


def at_dim(shape: Seq[Size], p: Shard, dim: int) -> Shard | None:
    """`p` said with the sequence filling dim `dim`, if that names the same shards."""
    if p.dim == dim:
        return p if p.whole_dim() else None
    q = reshaped(shape, p, shape, prefer=dim)
    return q if q is not None and q.dim == dim and q.whole_dim() else None


def same(shape: Seq[Size], a: Placement, b: Placement) -> bool:
    """Whether `a` and `b` give every rank the same part of a tensor of `shape`."""
    if not isinstance(a, Shard) or not isinstance(b, Shard):
        return a == b
    if len(a.seq.lengths) != len(b.seq.lengths):
        return False
    if not all(equal(x, y) for x, y in zip(a.seq.lengths, b.seq.lengths, strict=True)):
        return False
    (a_major, a_minor), (b_major, b_minor) = _strides_around(shape, a), _strides_around(shape, b)
    return equal(a_major, b_major) and equal(a_minor, b_minor)
