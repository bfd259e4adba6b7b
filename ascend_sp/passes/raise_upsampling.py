"""Upsampling by whole factors in ops that have sharding rules.

AOTAutograd writes ``F.interpolate(x, scale_factor=2)`` as gathers of rows and columns by tables of
positions, whose values no sharding rule sees; linear interpolation is a sum of such gathers. Here
the tables are calculated, since they depend on no input. What reads every row n times becomes one
nearest upsampling again, and what reads rows i + o of a picture (or its border where there is none)
a slice of the picture with a replicated margin, of which n are laced into one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ascend_sp.graph._pytorch import OpOverload, tree_leaves, tree_map
from ascend_sp.graph.context import PassContext, is_random
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.runtime._pytorch import without_modes

aten = torch.ops.aten
GATHERS = (aten._unsafe_index.Tensor, aten.index.Tensor)
UPSAMPLES = (
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
)
PADS = (
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
LARGEST = 1 << 16
"""Elements of a table that is calculated."""


@dataclass(frozen=True)
class Table:
    """Which rows of a dim a gather reads."""

    dim: int
    rows: torch.Tensor
    """``[m]``, whole numbers."""
    size: int
    """Of the dim that they are read from."""

    @property
    def length(self) -> int:
        """Rows that come out."""
        return len(self.rows)

    def steps(self) -> list[list[int]] | None:
        """Gathers that are this one, one after the other; None if it cannot be said so.

        ``o`` is one in which row ``i * len(o) + j`` is row ``i + o[j]`` of its operand, or the
        nearest that there is. The second neighbour of linear interpolation needs two: it is the one
        behind the first, which is held inside of the picture.
        """
        times, rest = divmod(self.length, self.size)
        if rest or not times or int(self.rows.min()) < 0:
            return None
        by_row = self.rows.view(self.size, times).long()
        home, last = torch.arange(self.size), self.size - 1
        middle = self.size // 2
        for then in (0, 1):
            found = [int(n) - middle - then for n in by_row[middle]]
            rows = [((home + o).clamp(0, last) + then).clamp(0, last) for o in found]
            if torch.equal(by_row, torch.stack(rows, 1)):
                return [[then], found] if then else [found]
        return None


def raise_upsampling(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace each such gather."""
    emit = Emitter(gm, "raise_upsampling")
    for node in list(gm.graph.nodes):
        if node.target in GATHERS:
            with without_modes():  # tables are numbers, also while the model is traced with fakes
                tables = _tables(node)
                steps = [t.steps() for t in tables or ()]
            if not tables or None in steps:
                continue
            with emit.at(node):
                emit.replace(node, _taken(emit, node.args[0], tables, steps))  # type: ignore[arg-type]
    return gm


def _taken(e: Emitter, x: fx.Node, tables: list[Table], steps: list[list[list[int]]]) -> fx.Node:
    """What the gather yields."""
    moved = [any(map(any, s)) for s in steps]
    sizes = [t.size if m else t.length for t, m in zip(tables, moved, strict=True)]
    if sizes != [t.size for t in tables]:
        x = e.call(UPSAMPLES[len(tables) - 1], x, sizes)
    for table, each in zip(tables, steps, strict=True):
        for offsets in each if any(map(any, each)) else ():
            x = _laced(e, x, table.dim, offsets)
    return x


def _laced(e: Emitter, x: fx.Node, dim: int, offsets: list[int]) -> fx.Node:
    """Rows ``i * n + j`` of the result are rows ``i + offsets[j]``, for n offsets."""
    shape = as_shape_of(x)
    size: Any = shape[dim]
    before, after = max(0, -min(offsets)), max(0, *offsets)
    pad = [0] * (2 * (len(shape) - 2))
    at = 2 * (len(shape) - 1 - dim)
    pad[at : at + 2] = [before, after]
    padded = e.call(PADS[len(shape) - 3], x, pad)
    parts = [e.call(aten.slice.Tensor, padded, dim, before + o, before + o + size) for o in offsets]
    if len(parts) == 1:
        return parts[0]
    laced = e.call(aten.stack.default, parts, dim + 1)
    return e.view(laced, (*shape[:dim], size * len(offsets), *shape[dim + 1 :]))


def _tables(node: fx.Node) -> list[Table] | None:
    """What is read along each of the last dims; None if that is not known, or not only that."""
    x, indices = node.args
    val = x.meta["val"]  # type: ignore[union-attr]
    given = [i for i in indices if i is not None]  # type: ignore[union-attr]
    count = len(given)
    if not 1 <= count <= len(UPSAMPLES) or list(indices) != [None, None, *given]:  # type: ignore[arg-type]
        return None
    if (
        not all(isinstance(n, int) for n in (*val.shape, *node.meta["val"].shape))
        or val.dim() != 2 + count
        or not val.is_floating_point()
    ):
        return None
    tables = []
    for i, table in enumerate(given):
        found = _constant(table)
        # The table of a dim has one element in the dims behind it, and in those before, if any.
        if found is None or found.dim() > count or found.dtype not in (torch.int32, torch.int64):
            return None
        full = (1,) * (count - found.dim()) + tuple(found.shape)
        if prod(full) != full[i] or full[i] == 0:
            return None
        tables.append(Table(2 + i, found.flatten(), val.shape[2 + i]))
    return tables


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
