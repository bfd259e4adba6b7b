"""What `shard_weights` makes of a graph, written into one that was traced with whole weights.

For `explain`, which has no process group: DTensors need one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.runtime.ops import ALL_GATHER, WAIT
from ascend_sp.weights.shard import split_dim


def shard_parameters(gm: fx.GraphModule, ctx: PassContext, names: Iterable[str]) -> None:
    """Make a rank's parts of the parameters `names`, and gather each wherever it is read."""
    emit, size = Emitter(gm, "shard_weights"), ctx.topology.size
    wanted, split = set(names), set[str]()
    for node in gm.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if node.name not in wanted or not isinstance(val, torch.Tensor):
            continue
        shape = tuple(val.shape)
        dim = split_dim(shape, size)
        if dim < 0:
            continue
        mine = shape[dim] // size
        with emit.fake_mode:
            node.meta["val"] = val.new_empty([*shape[:dim], mine, *shape[dim + 1 :]])
        for user in list(node.users):
            with emit.at(user):
                user.replace_input_with(node, _whole(emit, node, dim, ctx))
        split.add(node.name)
    ctx.own_inputs |= split


def _whole(emit: Emitter, part: fx.Node, dim: int, ctx: PassContext) -> fx.Node:
    """All rows of a parameter, as DTensor gathers them."""
    size = ctx.topology.size
    got = emit.call(WAIT, emit.call(ALL_GATHER, part, size, ctx.topology.group_name))
    if dim:
        first = as_shape_of(part)[0]
        got = emit.cat([emit.narrow(got, 0, r * first, (r + 1) * first) for r in range(size)], dim)
    return got
