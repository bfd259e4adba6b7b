"""Ulysses: attention over a split sequence, by all-to-alls between sequence and heads.

Every rank holds all heads of its rows of the sequence. Three all-to-alls give it all rows of its
share of the heads; it attends there, and a fourth brings the result back (Jacobs et al., DeepSpeed
Ulysses, arXiv:2309.14509). Padding rows travel, since equal blocks are one static program on all
ranks (Ulysses Anything Attention), and are cut off before the attention. So are padding heads.

Between the all-to-alls rows may stand **rank by rank** (text 0, image 0, text 1, image 1, ...):
attention does not care about the order of keys, and that order costs no copy. They are put **in
global order** where something does care: a mask, causality, or padding in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ascend_sp.passes.context import PassContext
from ascend_sp.passes.emitter import Emitter, as_shape_of
from ascend_sp.passes.sharding.layout import Sequence
from ascend_sp.passes.sharding.materialise import GLOBAL_SHAPES, INPUTS, PLACEMENTS
from ascend_sp.passes.sharding.redistribute import by_rank, in_order
from ascend_sp.passes.sizes import Size, ceil_div, divide, equal
from ascend_sp.runtime import collectives
from ascend_sp.runtime.ops import attention, attention_arguments, split_attention
from ascend_sp.runtime.topology import Topology

aten = torch.ops.aten


def ulysses(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Expand every `split_attention`."""
    emit = Emitter(gm, "ulysses")
    for node in gm.graph.find_nodes(op="call_function", target=split_attention):
        queries, keys, *_ = node.meta[INPUTS]
        Expansion(emit, node, queries.seq, keys.seq, ctx.topology).run()
    return gm


@dataclass
class Expansion:
    """One attention node and the two sequences that it joins."""

    e: Emitter
    node: fx.Node
    queries: Sequence
    keys: Sequence
    topology: Topology

    def run(self) -> None:
        """Replace the node."""
        e, p = self.e, self.topology.size
        q, k, v, mask, causal, scale, gqa = attention_arguments(self.node).values()
        heads, *groups = (as_shape_of(x)[1] for x in (q, k, v))
        # Grouped, or one head that is broadcast.
        shared = not all(equal(n, heads) for n in groups)
        if shared and any(divide(n, p) is None for n in (heads, *groups)):
            k, v, gqa = self._repeat_heads(k, heads), self._repeat_heads(v, heads), False
        started = [self._start(x) for x in (q, k, v)]

        shape = as_shape_of(mask) if mask is not None else ()
        ordered_queries = causal or (len(shape) >= 2 and shape[-2] != 1)
        ordered_keys = causal or mask is not None
        rows: list[fx.Node] = []
        # By position: one value may be queries and keys, and keys still lose their padding.
        queries, keys = (self.queries, ordered_queries, False), (self.keys, ordered_keys, True)
        for x, flat, how in zip((q, k, v), started, (queries, keys, keys), strict=True):
            with e.at(self.node):
                rows.append(self._receive(x, flat, *how))
        with e.at(self.node):
            if mask is not None:
                mask = self._heads_of_mask(mask, heads)
            out = e.call(attention, *rows, mask, causal, scale, gqa)
            back = self._return(out, ordered_queries)
            result = self._unpack(collectives.wait(e, back), out, heads)
            result = e.restride(result, self.node.meta["val"].stride())
        result.meta[PLACEMENTS] = self.node.meta[PLACEMENTS]
        result.meta[GLOBAL_SHAPES] = self.node.meta[GLOBAL_SHAPES]
        self.node.replace_all_uses_with(result)
        e.graph.erase_node(self.node)

    def _repeat_heads(self, x: fx.Node, heads: Size) -> fx.Node:
        """``[B, G, c, D] -> [B, H, c, D]``: each head of keys once for each of its query heads."""
        times = divide(heads, as_shape_of(x)[1])
        assert times is not None  # PyTorch checks it when the model is traced
        if times == 1:
            return x
        with self.e.at(_next(x), origin=self.node):
            return self.e.repeat_each(x, times, 1)

    def _start(self, x: fx.Node) -> fx.Node:
        """``[B, H, c, D]``: pack by destination and send, as soon as `x` exists."""
        e, p = self.e, self.topology.size
        b, h, c, d = as_shape_of(x)
        share = ceil_div(h, p)
        with e.at(_next(x), origin=self.node):
            rows = e.pad_end(e.permute(x, (0, 2, 1, 3)), 2, share * p - h)
            blocks = e.permute(e.view(rows, (b, c, p, share, d)), (2, 0, 1, 3, 4))
            return collectives.all_to_all(e, blocks, self.topology)

    def _receive(
        self, x: fx.Node, started: fx.Node, seq: Sequence, ordered: bool, drop: bool
    ) -> fx.Node:
        """``[P, B, c, H/P, D]`` flat ``-> [B, H/P, S, D]``: all rows of this rank's heads."""
        e, p = self.e, self.topology.size
        b, h, c, d = as_shape_of(x)
        share = ceil_div(h, p)
        flat = collectives.wait(e, started)
        by_row = e.permute(e.view(flat, (p, b, c, share, d)), (1, 0, 2, 3, 4))
        kept = _rows_before_padding(seq, p) if drop else seq.local(p) * p
        if ordered or kept is None:
            rows = in_order(e, by_row, 1, seq, p)
        else:
            rows = e.narrow(e.view(by_row, (b, p * c, share, d)), 1, 0, kept)
        return e.permute(rows, (0, 2, 1, 3))

    def _heads_of_mask(self, mask: fx.Node, heads: Size) -> fx.Node:
        """The part of a mask with a head dim that belongs to this rank's heads."""
        shape = as_shape_of(mask)
        dim = len(shape) - 3
        if dim < 0 or shape[dim] == 1:
            return mask
        p, rank = self.topology.size, self.topology.rank
        share = ceil_div(heads, p)
        # Padding heads see everything: a row that sees nothing would be NaN.
        allowed = 1 if mask.meta["val"].dtype == torch.bool else 0
        padded = self.e.pad_end(mask, dim, share * p - heads, allowed)
        return self.e.narrow(padded, dim, rank * share, (rank + 1) * share)

    def _return(self, out: fx.Node, ordered: bool) -> fx.Node:
        """``[B, H/P, S, E]``: pack by the rank that owns the rows, and send."""
        e, p = self.e, self.topology.size
        b, share, _, d = as_shape_of(out)
        rows = e.permute(out, (0, 2, 1, 3))
        if ordered:
            blocks = by_rank(e, rows, 1, self.queries, p)
        else:
            blocks = e.view(rows, (b, p, self.queries.local(p), share, d))
        return collectives.all_to_all(e, e.permute(blocks, (1, 0, 2, 3, 4)), self.topology)

    def _unpack(self, flat: fx.Node, out: fx.Node, heads: Size) -> fx.Node:
        """``[P, B, c, H/P, E]`` flat ``-> [B, H, c, E]``."""
        e, p = self.e, self.topology.size
        b, share, _, d = as_shape_of(out)
        c = self.queries.local(p)
        blocks = e.permute(e.view(flat, (p, b, c, share, d)), (1, 2, 0, 3, 4))
        rows = e.narrow(e.view(blocks, (b, c, p * share, d)), 2, 0, heads)
        return e.permute(rows, (0, 2, 1, 3))


def _rows_before_padding(seq: Sequence, world: int) -> Size | None:
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


def _next(x: fx.Node) -> fx.Node:
    """The first place after `x`, but behind the inputs."""
    node = x.next
    while node.op == "placeholder":
        node = node.next
    return node
