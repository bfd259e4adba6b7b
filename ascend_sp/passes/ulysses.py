"""Ulysses: attention over a split sequence, by all-to-alls between sequence and heads.

Every rank holds all heads of its rows of the sequence. Three all-to-alls give it all rows of its
share of the heads; it attends there, and a fourth brings the result back (Jacobs et al., DeepSpeed
Ulysses, arXiv:2309.14509). Padding rows travel, since equal blocks are one static program on all
ranks (Ulysses Anything Attention), and are cut off before the attention. So are padding heads.

Between the all-to-alls rows may stand **rank by rank** (text 0, image 0, text 1, image 1, ...):
attention does not care about the order of keys, and that order costs no copy. They are put **in
global order** where something does care: a mask, causality, or padding in the middle.

Queries, keys and values travel apart, so that each can leave while the next is projected
(**separate**), or in one all-to-all (**packed**), or a group of heads after the other
(**pipelined**): one group then travels while another attends. `choose_strategy` chooses.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import fx

from ascend_sp.graph import collectives
from ascend_sp.graph.attention import Attention
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import INPUTS, Sequence
from ascend_sp.graph.origin import ULYSSES
from ascend_sp.graph.sizes import Size, ceil_div, divide, equal
from ascend_sp.passes.exchange import Exchange, rows_of
from ascend_sp.passes.overlap.strategies import SEPARATE, STRATEGY, Strategy
from ascend_sp.passes.sharding.redistribute import by_rank
from ascend_sp.runtime.ops import attention, split_attention
from ascend_sp.runtime.topology import Topology

aten = torch.ops.aten


def ulysses(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Expand every `split_attention` whose heads are exchanged."""
    emit = Emitter(gm, ULYSSES)
    for node in gm.graph.find_nodes(op="call_function", target=split_attention):
        queries, keys, *_ = node.meta[INPUTS]
        strategy: Strategy = node.meta.get(STRATEGY, SEPARATE)
        if strategy.gathers:
            continue
        ctx.results.add(Exchange.of(node, queries.seq, keys.seq, strategy))
        Expansion(emit, node, queries.seq, keys.seq, ctx.topology, strategy).run()
    return gm


@dataclass
class Expansion:
    """One attention node and the two sequences that it joins."""

    e: Emitter
    node: fx.Node
    queries: Sequence
    keys: Sequence
    topology: Topology
    strategy: Strategy

    def run(self) -> None:
        """Replace the node."""
        e, p = self.e, self.topology.size
        q, k, v, mask, causal, scale, gqa = Attention.of(self.node)
        heads, *shared_by = (as_shape_of(x)[1] for x in (q, k, v))
        # Grouped, or one head that is broadcast.
        shared = not all(equal(n, heads) for n in shared_by)
        if shared and any(divide(n, p) is None for n in (heads, *shared_by)):
            k, v, gqa = self._repeat_heads(k, heads), self._repeat_heads(v, heads), False
        started = self._send((q, k, v))

        shape = as_shape_of(mask) if mask is not None else ()
        ordered_queries = causal or (len(shape) >= 2 and shape[-2] != 1)
        ordered_keys = causal or mask is not None
        outs = []
        with e.at(self.node):
            if mask is not None:
                mask = self._heads_of_mask(mask, heads)
            for group in range(self.strategy.groups):
                blocks = self._arrived((q, k, v), started[group], group)
                rows = [
                    rows_of(e, blocks[0], self.queries, p, ordered=ordered_queries, drop=False),
                    *(
                        rows_of(e, x, self.keys, p, ordered=ordered_keys, drop=True)
                        for x in blocks[1:]
                    ),
                ]
                hides = self._of_group(mask, group) if mask is not None else None
                outs.append(e.call(attention, *rows, hides, causal, scale, gqa))
            backs = [self._return(out, ordered_queries) for out in outs]
            e.replace(self.node, self._unpack(backs, outs, heads))

    def _repeat_heads(self, x: fx.Node, heads: Size) -> fx.Node:
        """``[B, G, c, D] -> [B, H, c, D]``: each head of keys once for each of its query heads."""
        times = divide(heads, as_shape_of(x)[1])
        assert times is not None  # PyTorch checks it when the model is traced
        if times == 1:
            return x
        with self.e.after(x, origin=self.node):
            return self.e.repeat_each(x, times, 1)

    def _send(self, xs: tuple[fx.Node, ...]) -> list[list[fx.Node]]:
        """Pack ``[B, H, c, D]`` by destination and send it; for each group of heads its starts."""
        if self.strategy.kind == "packed":
            with self.e.at(self.node):
                return [[self._start(self.e.cat([self._by_owner(x) for x in xs], 3))]]
        started: list[list[fx.Node]] = [[] for _ in range(self.strategy.groups)]
        for x in xs:
            with self.e.after(x, origin=self.node):  # as soon as it exists
                blocks = self._by_owner(x)
                for group, starts in enumerate(started):
                    starts.append(self._start(self._cut(blocks, 3, group)))
        return started

    def _by_owner(self, x: fx.Node) -> fx.Node:
        """``[B, H, c, D] -> [B, c, P, H/P, D]``, with heads of zeros if P does not divide them."""
        e, p = self.e, self.topology.size
        b, h, c, d = as_shape_of(x)
        share = ceil_div(h, p)
        rows = e.pad_end(e.permute(x, (0, 2, 1, 3)), 2, share * p - h)
        return e.view(rows, (b, c, p, share, d))

    def _start(self, blocks: fx.Node) -> fx.Node:
        """Send ``[B, c, P, h, D]``, to each rank its heads."""
        packed = self.e.permute(blocks, (2, 0, 1, 3, 4))
        return collectives.all_to_all(self.e, packed, self.topology)

    def _cut(self, x: fx.Node, dim: int, group: int) -> fx.Node:
        """The heads of one group, of one rank's heads along `dim`."""
        return self.e.narrow(x, dim, *self.strategy.heads(as_shape_of(x)[dim], group))

    def _arrived(self, xs: tuple[fx.Node, ...], starts: list[fx.Node], group: int) -> list[fx.Node]:
        """What the starts of one group yield, each ``[B, P, c, h, D]``."""
        e, p = self.e, self.topology.size
        shares = [ceil_div(as_shape_of(x)[1], p) for x in xs]
        if self.strategy.kind == "packed":
            blocks = self._blocks(starts[0], xs[0], sum(shares))
            ends = list(itertools.accumulate(shares))
            return [e.narrow(blocks, 3, n - own, n) for n, own in zip(ends, shares, strict=True)]
        out = []
        for x, start, share in zip(xs, starts, shares, strict=True):
            first, last = self.strategy.heads(share, group)
            out.append(self._blocks(start, x, last - first))
        return out

    def _blocks(self, start: fx.Node, x: fx.Node, heads: Size) -> fx.Node:
        """The flat result of a start as ``[B, P, c, h, D]``, `x` being ``[B, H, c, D]``."""
        e, p = self.e, self.topology.size
        b, _, c, d = as_shape_of(x)
        flat = collectives.wait(e, start)
        return e.permute(e.view(flat, (p, b, c, heads, d)), (1, 0, 2, 3, 4))

    def _of_group(self, mask: fx.Node, group: int) -> fx.Node:
        """The part of this rank's mask that belongs to the heads of one group."""
        shape = as_shape_of(mask)
        dim = len(shape) - 3
        return mask if dim < 0 or shape[dim] == 1 else self._cut(mask, dim, group)

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
        """``[B, h, S, E]``: pack by the rank that owns the rows, and send."""
        e, p = self.e, self.topology.size
        b, h, _, d = as_shape_of(out)
        rows = e.permute(out, (0, 2, 1, 3))
        if ordered:
            blocks = by_rank(e, rows, 1, self.queries, p)
        else:
            blocks = e.view(rows, (b, p, self.queries.local(p), h, d))
        return collectives.all_to_all(e, e.permute(blocks, (1, 0, 2, 3, 4)), self.topology)

    def _unpack(self, backs: list[fx.Node], outs: list[fx.Node], heads: Size) -> fx.Node:
        """What came back of each group, ``[P, B, c, h, E]`` flat, ``-> [B, H, c, E]``."""
        e, p = self.e, self.topology.size
        c = self.queries.local(p)
        parts = []
        for back, out in zip(backs, outs, strict=True):
            b, h, _, d = as_shape_of(out)
            flat = collectives.wait(e, back)
            parts.append(e.permute(e.view(flat, (p, b, c, h, d)), (1, 2, 0, 3, 4)))
        blocks = e.cat(parts, 3)
        b, _, _, share, d = as_shape_of(blocks)
        rows = e.narrow(e.view(blocks, (b, c, p * share, d)), 2, 0, heads)
        return e.permute(rows, (0, 2, 1, 3))
