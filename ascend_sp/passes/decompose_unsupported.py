"""Ops that the target has no converter for become PyTorch's own decomposition of them.

Only where everything that comes out can be converted; the others are left for the target to name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_sp.graph._pytorch import OpOverload, decompositions, trace
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.sizes import product

aten = torch.ops.aten


def decompose_unsupported(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace what ``ctx.converts`` refuses, where that can be done."""
    if ctx.converts is None:
        return gm
    emit = Emitter(gm, "decompose_unsupported")
    for node in list(gm.graph.nodes):
        if isinstance(node.target, OpOverload) and not ctx.converts(node.target):
            with emit.at(node):
                new = _replacement(emit, node, ctx)
            if new is not None:
                emit.replace(node, new)
    return gm


def _replacement(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node | None:
    if node.target is aten.repeat_interleave.self_int:
        return _repeat_interleave(e, *node.args, **node.kwargs)
    return decomposed(e, node, ctx)


def decomposed(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node | None:
    """PyTorch's decomposition of `node`, emitted; None if the target cannot take all of it."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    tensors = list(node.all_input_nodes)
    if not all(isinstance(n.meta.get("val"), torch.Tensor) for n in tensors):
        return None

    def call(*values: Any) -> Any:
        env = dict(zip(tensors, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with e.fake_mode:
        traced = trace(call, decompositions(), [n.meta["val"] for n in tensors])
    if traced is None:
        return None
    inner = [n for n in traced.graph.nodes if n.op == "call_function"]
    takes = ctx.converts or (lambda op: True)
    known = all(not isinstance(n.target, OpOverload) or takes(n.target) for n in inner)
    if not known or any(n.op == "get_attr" for n in traced.graph.nodes):
        return None
    places = dict(zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True))
    for n in inner:
        args, kwargs = fx.map_arg((n.args, n.kwargs), places.__getitem__)
        places[n] = e.call(n.target, *args, **kwargs)
    result: Any = traced.graph.output_node().args[0]
    new = places[result]
    same = as_shape_of(new) == as_shape_of(node)
    if not same or new.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return e.restride(new, node.meta["val"].stride())


def _repeat_interleave(
    e: Emitter, x: Any, times: Any, dim: Any = None, output_size: Any = None
) -> fx.Node:
    if dim is None:
        x, dim = e.call(aten.reshape.default, x, [product(as_shape_of(x))]), 0
    return e.repeat_each(x, times, dim % len(as_shape_of(x)))
