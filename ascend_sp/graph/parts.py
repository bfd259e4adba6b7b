"""Parameters of which each rank holds a part: how a graph makes one whole.

A rank holds equally many rows of the first dim, those of the first rank first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import as_shape_of
from ascend_sp.runtime._pytorch import group_by_name, ranks_of
from ascend_sp.runtime.ops import ALL_GATHER, WAIT
from ascend_sp.runtime.topology import Topology

aten = torch.ops.aten


@dataclass(frozen=True)
class Gather:
    """A parameter that is gathered."""

    parameter: fx.Node
    """The placeholder of this rank's part, ``[n, ...]``, n = N / P."""
    start: fx.Node
    whole: fx.Node
    """The parameter as the model has it, ``[N, ...]``."""

    def erase_unused(self, graph: fx.Graph) -> None:
        """Take it out of the graph if nothing reads the whole; nothing else does for a wait."""
        node = self.whole
        while node is not self.parameter and not node.users:
            below: Any = node.args[0]
            graph.erase_node(node)
            node = below


def gather_of(whole: Any, ctx: PassContext) -> Gather | None:
    """How `whole` is made of the ranks' rows of a parameter; None if it is not made so."""
    if not isinstance(whole, fx.Node):
        return None
    waited: Any = whole
    if whole.target is aten.slice.Tensor and list(whole.args[1:3]) == [0, 0]:
        waited = whole.args[0]
    start: Any = waited.args[0] if waited.target is WAIT else None
    if start is None or start.target is not ALL_GATHER or len(waited.users) > 1:
        return None
    parameter, size, group = start.args
    if parameter.op != "placeholder" or parameter.name not in ctx.own_inputs:
        return None
    if size != ctx.topology.size or not _same_order(group, ctx.topology):
        return None
    if as_shape_of(parameter)[0] * size != as_shape_of(whole)[0]:
        return None
    return Gather(parameter, start, whole)


def gathers(graph: fx.Graph, ctx: PassContext) -> Iterator[Gather]:
    """All parameters that a graph gathers so, in its order."""
    for node in graph.find_nodes(op="call_function", target=WAIT):
        cut = next(iter(node.users), node)
        found = gather_of(cut, ctx) or gather_of(node, ctx)
        if found is not None:
            yield found


def _same_order(group: str, topology: Topology) -> bool:
    return group == topology.group_name or ranks_of(group_by_name(group)) == list(topology.ranks)
