"""Collectives that a graph holds before it is split: those that gather parameters, or others.

Weights may be sharded by the user: each rank holds a part of each, and the model gathers it where
it is needed (FSDP; in one graph as in SimpleFSDP, arXiv 2411.00284; `shard_weights`). Such a graph
computes the same on every rank, so its sequence can be split. Of a graph with other collectives
(tensor parallelism) one rank's values are not the other's, and it is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ascend_sp.graph._pytorch import OpOverload
from ascend_sp.runtime._pytorch import group_by_name, ranks_of
from ascend_sp.runtime.ops import ALL_GATHER, WAIT, communicates


def first_collective(graph: fx.Graph) -> fx.Node | None:
    """The first node by which a graph talks to other ranks; None if it does not."""
    return next((n for n in graph.nodes if communicates(n.target)), None)


def parts_gathered(
    graph: fx.Graph, parameters: Collection[str], parts: Collection[str], ranks: Collection[int]
) -> frozenset[str] | None:
    """The inputs of which each rank has a part of its own, if all of them are gathered; or None.

    None says that a rank's part goes into something else, or that there are other collectives.

    Args:
        graph: functional ATen, as it was traced.
        parameters: names of the placeholders that are parameters or buffers.
        parts: names of the placeholders that are known to be a rank's own.
        ranks: the global ranks that must have the same values.
    """
    own: set[fx.Node] = set()
    gathered: set[fx.Node] = set()
    # Back from the gathers: what they are made of is a rank's own.
    for node in reversed(graph.nodes):
        if node.target is ALL_GATHER or node in own:
            own.update(node.all_input_nodes)
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in parts:
                own.add(node)
            if node in own and node.name not in parameters:
                return None
        elif node.target is ALL_GATHER:
            if not set(ranks) <= set(ranks_of(group_by_name(str(node.args[-1])))):
                return None
            own.discard(node)
            gathered.add(node)
        elif node.target is WAIT:
            if node.args[0] not in gathered:
                return None
        elif communicates(node.target):
            return None
        elif not own.isdisjoint(node.all_input_nodes):
            # A pad or a view on the way to a gather, of nothing else.
            if node.op == "output" or not isinstance(node.target, OpOverload):
                return None
            if not own.issuperset(node.all_input_nodes):
                return None
            own.add(node)
    if not all(u in own or u.target is ALL_GATHER for n in own for u in n.users):
        return None
    return frozenset(n.name for n in own if n.op == "placeholder")
