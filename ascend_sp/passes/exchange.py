"""What all ways share in which queries meet keys of other ranks: facts, and rows that arrived."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ascend_sp.graph.attention import Attention
from ascend_sp.graph.context import source_line
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import Sequence
from ascend_sp.graph.sizes import Size
from ascend_sp.passes.overlap.strategies import Strategy
from ascend_sp.passes.sharding.redistribute import in_order


@dataclass(frozen=True)
class Exchange:
    """Facts of one attention whose queries meet keys of other ranks."""

    name: str
    batch: str
    heads: str
    kv_heads: str
    width: str
    """Of one head."""
    queries: str
    """Lengths of the segments of the sequence."""
    keys: str
    mask: str
    causal: bool
    strategy: str
    source: str

    @staticmethod
    def of(node: fx.Node, queries: Sequence, keys: Sequence, strategy: Strategy) -> Exchange:
        """The facts of a `split_attention`."""
        a = Attention.of(node)
        batch, heads, _, width = map(str, as_shape_of(a.q))
        shape = str(list(as_shape_of(a.attn_mask))) if a.attn_mask is not None else "no"
        return Exchange(
            *(node.name, batch, heads, str(as_shape_of(a.k)[1]), width, str(queries), str(keys)),
            *(shape, bool(a.is_causal), str(strategy), source_line(node)),
        )


def rows_of(
    e: Emitter, blocks: fx.Node, seq: Sequence, world: int, *, ordered: bool, drop: bool
) -> fx.Node:
    """What every rank sent, ``[B, P, c, h, D]``, as ``[B, h, S, D]``.

    Args:
        e: where nodes go.
        blocks: the rows of all ranks, rank by rank.
        seq: the sequence that they are of.
        world: P.
        ordered: in global order; else rank by rank, which costs no copy at batch 1.
        drop: without padding rows, if the order is not global: that has none.
    """
    b, _, c, h, d = as_shape_of(blocks)
    kept = rows_before_padding(seq, world) if drop else seq.local(world) * world
    if ordered or kept is None:
        rows = in_order(e, blocks, 1, seq, world)
    else:
        rows = e.narrow(e.view(blocks, (b, world * c, h, d)), 1, 0, kept)
    return e.permute(rows, (0, 2, 1, 3))


def rows_before_padding(seq: Sequence, world: int) -> Size | None:
    """How many rows stand before the padding, rank by rank; None if rows follow it."""
    if not seq.padded(world):
        return seq.local(world) * world
    if len(seq.lengths) == 1:
        return seq.total
    *others, last = zip(seq.lengths, seq.chunks(world), strict=True)
    if not all(isinstance(n, int) for pair in (*others, last) for n in pair):
        return None
    if any(c * world != n for n, c in others):
        return None
    missing = last[1] * world - last[0]
    return seq.local(world) * world - missing if missing <= last[1] else None
