"""Attention over a split sequence, by an all-gather of keys and values.

Queries stay where they are, with all their heads, and so does the result. Each rank is sent the
keys and values of all others and attends its own queries to them. Heads need not divide by the
ranks, a mask gives only the rows of this rank's queries, and there is no exchange of the result. At
P = 2 that is as many bytes as `ulysses` sends, in half as many collectives; with grouped heads
fewer; on more ranks P / 2 times as many. `choose_strategy` chooses.

Keys and values travel apart, so that values are under way while keys and queries are projected. In
the order in which projections leave them, ``[B, c, G, D]``, they need no packing, and at batch 1
what arrives needs no unpacking. Padding rows of keys travel, too, and are cut off before the
attention; those of queries attend, and yield padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ascend_sp.graph import collectives
from ascend_sp.graph.attention import Attention
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import INPUTS, Sequence, Shard
from ascend_sp.graph.origin import GATHER_KEYS
from ascend_sp.graph.sizes import Size, equal
from ascend_sp.passes.exchange import Exchange, rows_of
from ascend_sp.passes.overlap.strategies import SEPARATE, STRATEGY, Strategy
from ascend_sp.passes.sharding.redistribute import scatter
from ascend_sp.runtime.ops import attention, split_attention
from ascend_sp.runtime.topology import Topology

aten = torch.ops.aten


def gather_keys(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Expand every `split_attention` whose strategy is ``gather``."""
    emit = Emitter(gm, GATHER_KEYS)
    for node in gm.graph.find_nodes(op="call_function", target=split_attention):
        strategy: Strategy = node.meta.get(STRATEGY, SEPARATE)
        if strategy.gathers:
            queries, keys, *_ = node.meta[INPUTS]
            ctx.results.add(Exchange.of(node, queries.seq, keys.seq, strategy))
            Gathering(emit, node, queries.seq, keys.seq, ctx.topology).run()
    return gm


@dataclass
class Gathering:
    """One attention node and the two sequences that it joins."""

    e: Emitter
    node: fx.Node
    queries: Sequence
    keys: Sequence
    topology: Topology

    def run(self) -> None:
        """Replace the node."""
        e = self.e
        q, k, v, mask, causal, scale, gqa = Attention.of(self.node)
        groups = [as_shape_of(x)[1] for x in (k, v)]
        # One head that is broadcast is one group; said so, fused kernels take it.
        gqa = gqa or (equal(*groups) and not equal(groups[0], as_shape_of(q)[1]))
        started = {x: self._send(x) for x in dict.fromkeys((k, v))}
        with e.at(self.node):
            if mask is not None:
                mask = self._rows_of_mask(mask)
            if causal:
                mask = self._triangle(q)
            arrived = {
                x: self._whole(x, start, ordered=mask is not None) for x, start in started.items()
            }
            out = e.call(attention, q, arrived[k], arrived[v], mask, False, scale, gqa)
            e.replace(self.node, out)

    def _send(self, x: fx.Node) -> fx.Node:
        """Send ``[B, G, c, D]`` to all ranks, as soon as it exists."""
        with self.e.after(x, origin=self.node):
            return collectives.all_gather(self.e, self.e.permute(x, (0, 2, 1, 3)), self.topology)

    def _whole(self, x: fx.Node, start: fx.Node, *, ordered: bool) -> fx.Node:
        """What a start yields as ``[B, G, T, D]``, `x` being this rank's part."""
        e, p = self.e, self.topology.size
        b, g, c, d = as_shape_of(x)
        blocks = e.view(collectives.wait(e, start), (p, b, c, g, d))
        blocks = e.permute(blocks, (1, 0, 2, 3, 4))
        return rows_of(e, blocks, self.keys, p, ordered=ordered, drop=True)

    def _rows_of_mask(self, mask: fx.Node) -> fx.Node:
        """The part of a whole mask ``[..., S, T]`` that belongs to this rank's queries."""
        shape = as_shape_of(mask)
        dim = len(shape) - 2
        if dim < 0 or shape[dim] == 1:
            return mask
        return scatter(self.e, mask, Shard(dim, self.queries), self.topology)

    def _triangle(self, like: fx.Node) -> fx.Node:
        """Causality as a mask ``[c, T]``: a row for each query of this rank, by its position."""
        e, rank = self.e, self.topology.rank
        device = like.meta["val"].device
        pieces: list[fx.Node] = []
        start: Size = 0
        for length, chunk in zip(
            self.queries.lengths, self.queries.chunks(self.topology.size), strict=True
        ):
            first = start + rank * chunk
            pieces.append(e.call(aten.arange.start_step, first, first + chunk, 1, device=device))
            start = start + length
        rows = e.call(aten.unsqueeze.default, e.cat(pieces, 0), 1)
        columns = e.call(aten.arange.start_step, 0, self.keys.total, 1, device=device)
        return e.call(aten.ge.Tensor, rows, columns)
