"""Values that are made of sizes alone take a tensor as well, where npugraph_ex compiles them.

To learn what a graph does, npugraph_ex calls each op on fake tensors, outside of any fake mode. An
op without a tensor among its arguments then yields a real one, and a size that is a symbol is an
error, there and in what is made of it (torch_npu 2.13.0: "SymIntArrayRef expected to contain only
concrete integers").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.arguments import argument_of
from ascend_sp.graph.emitter import Emitter
from ascend_sp.graph.sizes import symbols_of

aten = torch.ops.aten


def give_factories_a_tensor(gm: fx.GraphModule) -> None:
    """Rewrite the factories of a graph whose inputs have symbols in their sizes."""
    inputs = gm.graph.find_nodes(op="placeholder")
    tensors = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    sizes = [n for x in tensors for n in x.meta["val"].shape]
    if not symbols_of([*sizes, *(x.meta.get("val") for x in inputs)]):
        return
    emit = Emitter(gm, "factories")
    for node in [n for n in gm.graph.nodes if n.target in FORMS]:
        device = node.meta["val"].device
        like = next((t for t in tensors if t.meta["val"].device == device), None)
        if like is None:
            continue
        with emit.at(node):
            new = FORMS[node.target](emit, node, like)
        emit.replace(node, new)
    gm.recompile()


def _as(node: fx.Node) -> dict[str, Any]:
    val = node.meta["val"]
    return {"dtype": val.dtype, "device": val.device}


def _constant(form: Any) -> Callable[[Emitter, fx.Node, fx.Node], fx.Node]:
    """By a form that takes a tensor, and reads nothing of it; otherwise the same arguments."""
    return lambda emit, node, like: emit.call(form, like, *node.args, **_as(node))


def _scalar(emit: Emitter, node: fx.Node, like: fx.Node) -> fx.Node:
    return emit.call(aten.new_full.default, like, [], *node.args, **_as(node))


def _count(emit: Emitter, node: fx.Node, like: fx.Node) -> fx.Node:
    """``start, start + step, ...``, by adding up ones."""
    start = 0 if node.target is aten.arange.default else argument_of(node, "start")
    step = argument_of(node, "step") if node.target is aten.arange.start_step else 1
    val = node.meta["val"]
    ones = emit.call(aten.new_ones.default, like, list(val.shape), **_as(node))
    sums = emit.call(aten.cumsum.default, ones, 0, dtype=val.dtype)
    counted = emit.call(aten.mul.Tensor, emit.call(aten.sub.Tensor, sums, 1), step)
    return emit.call(aten.add.Tensor, counted, start)


FORMS: dict[Any, Callable[[Emitter, fx.Node, fx.Node], fx.Node]] = {
    aten.zeros.default: _constant(aten.new_zeros.default),
    aten.ones.default: _constant(aten.new_ones.default),
    aten.full.default: _constant(aten.new_full.default),
    aten.empty.memory_format: _constant(aten.new_empty.default),
    aten.scalar_tensor.default: _scalar,
    aten.arange.default: _count,
    aten.arange.start: _count,
    aten.arange.start_step: _count,
}
