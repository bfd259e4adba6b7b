"""Nearest upsampling by whole factors as one op again.

AOTAutograd writes ``F.interpolate(x, scale_factor=2)`` as a gather of rows and columns by tables of
positions, whose values no sharding rule sees. Here the tables are calculated, since they depend on
no input, and compared with what the op would read.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from ascend_sp.graph._pytorch import OpOverload, tree_leaves, tree_map
from ascend_sp.graph.context import PassContext, is_random
from ascend_sp.graph.emitter import Emitter
from ascend_sp.runtime._pytorch import without_modes

aten = torch.ops.aten
GATHERS = (aten._unsafe_index.Tensor, aten.index.Tensor)
UPSAMPLES = (
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
)
LARGEST = 1 << 16
"""Elements of a table that is calculated."""


def raise_upsampling(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace each such gather."""
    emit = Emitter(gm, "raise_upsampling")
    for node in list(gm.graph.nodes):
        if node.target in GATHERS:
            with without_modes():  # tables are numbers, also while the model is traced with fakes
                sizes = _grown(node)
            if sizes is not None:
                with emit.at(node):
                    new = emit.call(UPSAMPLES[len(sizes) - 1], node.args[0], sizes)
                emit.replace(node, new)
    return gm


def _grown(node: fx.Node) -> list[int] | None:
    """Sizes of the last dims, where each position of them is one of the operand's, in order."""
    x, indices = node.args
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    tables = [i for i in indices if i is not None]  # type: ignore[union-attr]
    count = len(tables)
    if not 1 <= count <= len(UPSAMPLES) or list(indices) != [None, None, *tables]:  # type: ignore[arg-type]
        return None
    if (
        not all(isinstance(n, int) for n in (*shape, *node.meta["val"].shape))
        or len(shape) != 2 + count
    ):
        return None
    sizes = []
    for i, table in enumerate(tables):
        found = _constant(table)
        n = shape[2 + i]
        # The table of a dim has one element in the dims behind it, and in those before, if any.
        if found is None or found.dim() > count or found.is_floating_point():
            return None
        full = (1,) * (count - found.dim()) + tuple(found.shape)
        if prod(full) != full[i] or full[i] == 0 or full[i] % n:
            return None
        wanted = torch.arange(full[i]) // (full[i] // n)
        if not torch.equal(found.flatten(), wanted.to(found.dtype)):
            return None
        sizes.append(full[i])
    return sizes


def _constant(node: Any) -> torch.Tensor | None:
    """The value of a node that depends on no input; None if it does, or is large."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, OpOverload):
        return None
    val = node.meta.get("val")
    if (
        not isinstance(val, torch.Tensor)
        or is_random(node.target)
        or node.target._schema.is_mutable
    ):
        return None
    if not all(isinstance(n, int) for n in val.shape) or val.numel() > LARGEST:
        return None
    failed = False

    def value(x: Any) -> Any:
        nonlocal failed
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not isinstance(x, fx.Node):
            return x
        found = _constant(x)
        failed = failed or found is None
        return found

    args, kwargs = tree_map(value, (node.args, node.kwargs))
    if failed or any(isinstance(x, torch.SymInt) for x in tree_leaves((args, kwargs))):
        return None
    return node.target(*args, **kwargs)
