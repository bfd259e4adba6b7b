"""Ops whose GE converter loses part of what they mean, said in ops whose converters do not.

torchair converts all of these without a word (the converters in
``torchair/_ge_concrete_graph/ge_converter/aten``, the same in torch_npu 2.10.0.post7 to 2.14.0):

* ``gelu`` ignores `approximate`: GE's Gelu is the tanh form. GeluV2, which ``npu_gelu`` becomes,
  has both.
* ``_safe_softmax`` is a plain softmax: a row of -inf gives NaN, not zeros.
* ``baddbmm`` and ``addmm`` with ``beta=0`` multiply the addend by 0, where PyTorch ignores it: it
  may be uninitialised memory.
* ``sub`` casts `alpha` to the dtype of what is subtracted: 0.5 becomes 0 next to integers.
* ``upsample_nearest2d`` becomes ResizeNearestNeighborV2 for every dtype; GE lists no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter
from ascend_sp.passes.decompose_unsupported import decomposed
from ascend_sp.runtime.npu import npu_op

aten = torch.ops.aten


def respell_for_ge(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace each call that would be converted to something else."""
    emit = Emitter(gm, "respell_for_ge")
    for op, respell in WORDS.items():
        for node in gm.graph.find_nodes(op="call_function", target=op):
            with emit.at(node):
                new = respell(emit, node, ctx)
            if new is not None:
                emit.replace(node, new)
    return gm


def _gelu(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node | None:
    if node.kwargs.get("approximate", "none") != "none":
        return None
    op = npu_op("npu_gelu")
    if op is None:
        return decomposed(e, node, ctx)
    new = e.call(op, node.args[0], approximate="none")
    return e.restride(new, node.meta["val"].stride())


def _safe_softmax(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node:
    x: Any = node.args[0]
    dim = node.args[1]
    value = node.meta["val"]
    if x.meta["val"].dtype != value.dtype:
        x = e.call(aten._to_copy.default, x, dtype=value.dtype)
    weights = e.call(aten._softmax.default, x, dim, False)
    seen = e.call(aten.any.dim, e.call(aten.ne.Scalar, x, float("-inf")), dim, True)
    zero = e.call(aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
    return e.restride(e.call(aten.where.self, seen, weights, zero), value.stride())


def _without_addend(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node | None:
    if node.kwargs.get("beta", 1) != 0:
        return None
    product = aten.bmm.default if node.target is aten.baddbmm.default else aten.mm.default
    new = e.call(product, *node.args[1:])
    alpha = node.kwargs.get("alpha", 1)
    return new if alpha == 1 else e.call(aten.mul.Tensor, new, alpha)


def _sub(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node | None:
    alpha: Any = node.kwargs.get("alpha", 1)
    other: Any = node.args[1]
    dtype = node.meta["val"].dtype
    if alpha == 1 or not isinstance(other, fx.Node) or other.meta["val"].dtype == dtype:
        return None
    other = e.call(aten._to_copy.default, other, dtype=dtype)
    return e.call(aten.sub.Tensor, node.args[0], other, alpha=alpha)


def _upsample(e: Emitter, node: fx.Node, ctx: PassContext) -> fx.Node | None:
    return decomposed(e, node, ctx) if node.meta["val"].dtype == torch.bfloat16 else None


WORDS: dict[Any, Callable[[Emitter, fx.Node, PassContext], fx.Node | None]] = {
    aten.gelu.default: _gelu,
    aten._safe_softmax.default: _safe_softmax,
    aten.baddbmm.default: _without_addend,
    aten.addmm.default: _without_addend,
    aten.sub.Tensor: _sub,
    aten.upsample_nearest2d.default: _upsample,
}
"""By op: the node to put in the place of a call, or None if the converter does it justice."""
