"""Biases of linear layers, added by the kernel behind the product.

On a CPU ``addmm`` writes the bias to every row of its result before it multiplies. Where a kernel
that reads the result follows, it can add the bias for nothing: the one that packs values for their
all-to-all, which then does more than copy, or a norm, an activation. For GPUs Inductor does this
itself (torch/_inductor/fx_passes/post_grad.py, unfuse_bias_add_to_pointwise).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.cost.estimate import is_free, is_fusible
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import GLOBAL_SHAPES, PLACEMENTS
from ascend_sp.graph.sizes import has_unbacked

aten = torch.ops.aten

EXACT = (torch.float32, torch.float64)
"""Half precisions would round the product once more before the bias."""


def unfuse_bias(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Turn ``addmm(bias, x, w)`` into ``mm(x, w) + bias`` where the sum is fused."""
    emit = Emitter(gm, "unfuse_bias")
    for node in gm.graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, x, w = node.args
        if not _is_bias(node) or not _is_fused(node):
            continue
        with emit.at(node):
            product = emit.call(aten.mm.default, x, w)
            # Inductor would make one addmm of a sum that stands right behind the product.
            rows = emit.call(aten.unsqueeze.default, product, 0)
            added = emit.call(aten.add.Tensor, rows, bias)
            new = emit.call(aten.squeeze.dim, added, 0)
        # The product has the rows of the result.
        product.meta |= {k: node.meta[k] for k in (PLACEMENTS, GLOBAL_SHAPES) if k in node.meta}
        emit.replace(node, new)
    return gm


def _is_bias(node: fx.Node) -> bool:
    """Whether `node` adds one row, unscaled, to more than one."""
    bias: Any = node.args[0]
    value = node.meta["val"]
    rows = as_shape_of(node)[0]
    return (
        not node.kwargs
        and bias.meta["val"].dim() == 1
        and value.dtype in EXACT
        and rows not in (0, 1)
        # Inductor slices at a place that the data decide only what is in memory, as products are.
        and not has_unbacked(rows)
    )


def _is_fused(node: fx.Node) -> bool:
    """Whether only kernels that Inductor writes read `node`."""
    users = list(node.users)
    readers = []
    for user in users:
        if is_free(user) and user.op == "call_function":
            users.extend(u for u in user.users if u not in users)
        else:
            readers.append(user)
    return bool(readers) and all(is_fusible(reader) for reader in readers)
