"""Waits move to just before the first use of what they wait for.

The rearrangement behind a wait goes with it. A collective is then in flight while everything that
does not need it runs. The order of the collectives' starts is not touched.
"""

from __future__ import annotations

from torch import fx

from ascend_sp.passes.context import PassContext
from ascend_sp.passes.emitter import ROLE
from ascend_sp.runtime.collectives import WAIT


def sink_waits(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Move waits, and the nodes that only unpack their results, as late as they can go."""
    for node in reversed(list(gm.graph.nodes)):
        if node.target is not WAIT and node.meta.get(ROLE) != "unpack":
            continue
        first = min(node.users, default=None)
        if first is not None and node.next is not first:
            first.prepend(node)
    return gm
