"""Collectives start as early, and are waited for as late, as the data allows.

Work is put in order of demand: before each start stands only what that start needs, so a branch
that nothing in flight needs yet (an MLP beside the attention, say) fills the time until a wait. Of
the all-to-alls of one attention the one that needs the least work goes first: values mostly, which
travel while queries and keys are projected, normalised and rotated (Async Ulysses). Each wait, with
the rearrangement behind it, then moves to just before its first use. Where nothing is left to do
between a start and its wait, a matrix product from further down that needs nothing in flight is
done there: the next block's modulation. All ranks must start collectives in one order, so nothing
here looks at what only some ranks have (padding).
"""

from __future__ import annotations

from bisect import bisect
from itertools import groupby, pairwise

import torch
from torch import fx

from ascend_sp.passes.context import PassContext
from ascend_sp.passes.emitter import ORIGIN
from ascend_sp.runtime.collectives import ALL_TO_ALL, STARTS, WAIT

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
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
    }
)
"""Work that takes as long as a collective does, or longer."""
PER_RANK = ("materialise_sharding", "ulysses")
"""Passes whose nodes may be others on another rank."""


def order_collectives(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Reorder the nodes of `gm`; what they compute stays the same."""
    nodes = list(gm.graph.nodes)
    _relink(_by_demand(nodes))
    _sink(list(gm.graph.nodes))
    _relink(_fill(list(gm.graph.nodes)))
    return gm


def _by_demand(nodes: list[fx.Node]) -> list[fx.Node]:
    """Each start, and at last the output, behind all that it needs and nothing else."""
    position = {n: i for i, n in enumerate(nodes)}
    order = [n for n in nodes if n.op == "placeholder"]
    done = set(order)
    goals = [n for n in nodes if n.target in STARTS or n.op == "output"]
    for _, group in groupby(goals, key=_attention_of):
        left = list(group)
        while left:
            goal = min(left, key=lambda n: (_work(_needed(n, done)), position[n]))
            left.remove(goal)
            needed = _needed(goal, done)
            order += sorted(needed, key=position.__getitem__)
            done |= needed
    return order


def _attention_of(goal: fx.Node) -> str:
    """What neighbours in the program have in common if they serve one attention."""
    origin = goal.meta.get(ORIGIN, "")
    return origin if goal.target is ALL_TO_ALL else goal.name


def _work(nodes: set[fx.Node]) -> int:
    """How many of `nodes` compute something, on any rank."""
    return sum(not n.meta.get(ORIGIN, "").startswith(PER_RANK) for n in nodes)


def _needed(goal: fx.Node, done: set[fx.Node]) -> set[fx.Node]:
    """`goal` and all that it needs and that is not done."""
    needed, stack = {goal}, [goal]
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in done and x not in needed:
                needed.add(x)
                stack.append(x)
    return needed


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


def _fill(nodes: list[fx.Node]) -> list[fx.Node]:
    """Do a later product, if one is free, before each wait that nothing stands in front of."""
    waits = [n for n in nodes if n.target is WAIT]
    number = {w: i for i, w in enumerate(waits)}
    latest: dict[fx.Node, int] = {}
    for n in nodes:  # the last wait that a node needs, however indirectly
        latest[n] = max([number.get(n, -1), *(latest[x] for x in n.all_input_nodes)])
    products = [n for n in nodes if n.target in PRODUCTS]
    position = {n: i for i, n in enumerate(nodes)}
    hidden, covering = _windows(waits, products, position)
    free = [n for n in products if n not in covering]
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for node in nodes:
        if node in number and node not in hidden:
            filler = next(
                (n for n in free if position[n] > position[node] and latest[n] < number[node]), None
            )
            if filler is not None:
                free.remove(filler)
                needed = _needed(filler, done)
                order += sorted(needed, key=position.__getitem__)
                done |= needed
        if node not in done:
            order.append(node)
            done.add(node)
    return order


def _windows(
    waits: list[fx.Node], products: list[fx.Node], position: dict[fx.Node, int]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Waits with a product between their start and them, and those products."""
    places = [position[n] for n in products]
    hidden, covering = set(), set()
    for wait in waits:
        start = wait.args[0]
        assert isinstance(start, fx.Node)
        first, last = (bisect(places, position[n]) for n in (start, wait))
        if last > first:
            hidden.add(wait)
            covering.update(products[first:last])
    return hidden, covering
