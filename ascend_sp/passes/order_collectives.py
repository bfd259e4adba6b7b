"""Collectives start as early, and are waited for as late, as the data allows.

Work is put in order of demand: before each start stands only what that start needs, so the query's
all-to-all leaves before the keys are projected, and a branch that nothing in flight needs yet (an
MLP beside the attention, say) fills the time until a wait. Each wait, with the rearrangement behind
it, then moves to just before its first use. The order of the starts themselves, which all ranks
must share, is not touched.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import fx

from ascend_sp.passes.context import PassContext
from ascend_sp.runtime.collectives import STARTS, WAIT

aten = torch.ops.aten
MOVES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.clone.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.constant_pad_nd.default,
    }
)
"""Ops with one operand that only rearrange it."""


def order_collectives(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Reorder the nodes of `gm`; what they compute stays the same."""
    nodes = list(gm.graph.nodes)
    _relink(_by_demand(nodes))
    _sink(list(gm.graph.nodes))
    return gm


def _by_demand(nodes: list[fx.Node]) -> list[fx.Node]:
    """Each start, and at last the output, behind all that it needs and nothing else."""
    position = {n: i for i, n in enumerate(nodes)}
    order = [n for n in nodes if n.op == "placeholder"]
    done = set(order)
    for goal in nodes:
        if goal.target not in STARTS and goal.op != "output":
            continue
        needed, stack = {goal}, [goal]
        while stack:
            for x in stack.pop().all_input_nodes:
                if x not in done and x not in needed:
                    needed.add(x)
                    stack.append(x)
        order += sorted(needed, key=position.__getitem__)
        done |= needed
    return order


def _relink(order: list[fx.Node]) -> None:
    for before, after in pairwise(order):
        if before.next is not after:
            before.append(after)


def _sink(nodes: list[fx.Node]) -> None:
    """Move waits, and moves of what they yield, to their first use."""
    late: set[fx.Node] = set()
    for node in nodes:
        if node.target is WAIT or (node.target in MOVES and node.args[0] in late):
            late.add(node)
    for node in reversed(nodes):
        first = min(node.users, default=None) if node in late else None
        if first is not None and node.next is not first:
            first.prepend(node)
