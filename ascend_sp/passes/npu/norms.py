"""RMS normalisation spelled out in ATen becomes ``npu_rms_norm``.

    x * rsqrt(mean(x ** 2) + eps) * weight

as PyTorch's `rms_norm` decomposes, and as models write it with casts to float32 around. The op
computes in float32 inside and rounds once, so in half precision it may differ from the model's own
sequence of roundings in the last bit; that is also what diffusers chooses on Ascend.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of, cast_source, widened_source
from ascend_sp.graph.sizes import same_shape
from ascend_sp.runtime.npu import npu_op

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Norm:
    x: fx.Node
    """What is normalised, in the precision of the model."""
    weight: fx.Node
    eps: float
    result: fx.Node
    """The last node of the pattern."""


def fuse_rms_norm(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace every match, if torch_npu has the op."""
    op = npu_op("npu_rms_norm")
    if op is None:
        return gm
    emit = Emitter(gm, "fuse_rms_norm")
    for root in gm.graph.find_nodes(op="call_function", target=aten.rsqrt.default):
        found = _match(root)
        if found is None:
            continue
        with emit.at(found.result):
            x, weight = found.x, found.weight
            if found.result.meta["val"].dtype == torch.float32:
                x = _cast(emit, x, torch.float32)  # the op rounds to the dtype of x
            if weight.meta["val"].dtype != torch.float32:
                weight = _cast(emit, weight, x.meta["val"].dtype)
            both = emit.call(op, x, weight, found.eps)
            new = emit.call(operator.getitem, both, 0)
            emit.replace(found.result, _cast(emit, new, found.result.meta["val"].dtype))
    gm.graph.eliminate_dead_code()
    return gm


def _match(root: fx.Node) -> _Norm | None:
    """The norm around one ``rsqrt``, if it is one, to the last value."""
    added: Any = root.args[0]
    if added.target not in (aten.add.Scalar, aten.add.Tensor) or added.kwargs:
        return None
    mean, eps = added.args
    if not isinstance(eps, float) or mean.target is not aten.mean.dim or mean.kwargs:
        return None
    squared, dims, *keep = mean.args
    ndim = squared.meta["val"].dim()
    if keep != [True] or [d % ndim for d in dims or ()] != [ndim - 1]:
        return None
    wide = _squared(squared)
    scaled = _only_user(root)
    if wide is None or scaled is None or wide.meta["val"].dtype not in DTYPES:
        return None
    x = widened_source(wide) or wide
    # A product of x itself and the float32 root is in float32 too.
    if not _is_product(scaled, wide, root) and not _is_product(scaled, x, root):
        return None
    result = _narrowed(scaled, x)
    last = _only_user(result)
    if last is None or last.target is not aten.mul.Tensor:
        return None
    weight = next((a for a in last.args if a is not result), None)
    if not isinstance(weight, fx.Node) or not same_shape(as_shape_of(weight), as_shape_of(x)[-1:]):
        return None
    return _Norm(x, weight, eps, _narrowed(last, x))


def _squared(node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    product = node.target is aten.mul.Tensor and node.args[1] is x
    return x if (power or product) and isinstance(x, fx.Node) else None


def _is_product(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and set(node.args) == {a, b}


def _narrowed(node: fx.Node, x: fx.Node) -> fx.Node:
    """The cast of `node` back to the dtype of `x`, if that is all that becomes of it."""
    user = _only_user(node)
    if user is None or cast_source(user) is not node:
        return node
    return user if user.meta["val"].dtype == x.meta["val"].dtype else node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _cast(e: Emitter, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    same = x.meta["val"].dtype == dtype
    return x if same else e.call(aten._to_copy.default, x, dtype=dtype)
