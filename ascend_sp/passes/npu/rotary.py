"""Rotary embedding spelled out in ATen becomes ``npu_rotary_mul``.

    x * cos + turned(x) * sin

where `turned` takes neighbours ``(a, b) -> (-b, a)`` (interleaved, also what complex rotations
decompose to) or halves of the channels (half: most language models). The op runs in the precision
that the model multiplies in, so the numbers are the same. torchair's converter drops the mode on
Atlas A2 and A3 and always turns halves; in GE graphs only that form is fused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of, widened_source
from ascend_sp.graph.families import SPLITS, VIEWS
from ascend_sp.graph.sizes import equal
from ascend_sp.runtime.npu import npu_op

aten = torch.ops.aten
MAX_DIM = 896
"""Channels a head, a limit of the op (its page in the op-plugin documents)."""


def fuse_rotary(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace every match that the op takes in this kind of graph."""
    op = npu_op("npu_rotary_mul")
    if op is None:
        return gm
    emit = Emitter(gm, "fuse_rotary")
    for root in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        found = _match(root)
        if found is None or (found[3] == "interleave" and ctx.target == "torchair"):
            continue
        x, cos, sin, mode = found
        with emit.at(root):
            rows, tables = _four(emit, x, cos, sin)
            if rows is None:
                continue
            new = emit.call(op, rows, *tables, mode)
            emit.replace(root, emit.view(new, as_shape_of(root)))
    gm.graph.eliminate_dead_code()
    return gm


def _match(root: Any) -> tuple[fx.Node, fx.Node, fx.Node, str] | None:
    """``(x, cos, sin, mode)`` of a rotation that ends in the sum `root`."""
    if root.kwargs or not all(_is(a, aten.mul.Tensor) for a in root.args):
        return None
    for straight, crossed in (root.args, root.args[::-1]):
        for x, cos in (straight.args, straight.args[::-1]):
            for turned, sin in (crossed.args, crossed.args[::-1]):
                if not all(isinstance(n, fx.Node) for n in (x, cos, turned, sin)):
                    continue
                mode = _turn_of(turned, x)
                if mode and _fits(x, cos, sin):
                    return x, cos, sin, mode
    return None


def _fits(x: fx.Node, cos: fx.Node, sin: fx.Node) -> bool:
    dtypes = {n.meta["val"].dtype for n in (x, cos, sin)}
    shapes = [as_shape_of(n) for n in (x, cos, sin)]
    return len(dtypes) == 1 and shapes[1] == shapes[2] and len(shapes[1]) <= len(shapes[0])


def _turn_of(turned: Any, x: Any) -> str | None:
    """How the channels of `x` are turned in `turned`: ``"interleave"``, ``"half"``, or not."""
    if turned.meta["val"].dtype != x.meta["val"].dtype:
        return None
    turned, x = _uncast(turned), _uncast(x)
    if _is(turned, aten.cat.default):
        low, high = _low_and_high(turned)
        return "half" if _half(low, x) == 0 and _half(high, x) == 1 else None
    whole = _is(turned, *VIEWS) and as_shape_of(turned) == as_shape_of(x)
    stack = turned.args[0] if whole else turned
    if not _is(stack, aten.stack.default) or not (whole or equal(as_shape_of(x)[-1], 2)):
        return None
    low, high = _low_and_high(stack)
    return "interleave" if _neighbour(low, x) == 0 and _neighbour(high, x) == 1 else None


def _low_and_high(joined: Any) -> tuple[Any, Any]:
    """``(a, b)`` where `joined` puts ``-b`` in front of ``a`` along the last dim, else None."""
    pieces, dim = joined.args[0], _argument(joined, 1, 0)
    last = dim in (-1, joined.meta["val"].dim() - 1)
    if not last or len(pieces) != 2 or not _is(pieces[0], aten.neg.default):
        return None, None
    return pieces[1], pieces[0].args[0]


def _picked(node: Any, dim: int) -> tuple[fx.Node, int] | None:
    """The tensor whose dim `dim`, from the end, `node` picks one position of, and which."""
    if _is(node, aten.select.int):
        source, along, index = node.args
    elif _is(node, operator.getitem) and _is(node.args[0], aten.unbind.int):
        unbind, index = node.args
        source, along = unbind.args[0], _argument(unbind, 1, 0)
    else:
        return None
    ndim = source.meta["val"].dim()
    return (source, index) if along % ndim == ndim + dim else None


def _is_regrouped(node: Any, x: fx.Node, last: tuple[Any, Any]) -> bool:
    """Whether `node` is `x` with its channels viewed as two dims."""
    if not _is(node, *VIEWS) or _uncast(node.args[0]) is not x:
        return False
    return as_shape_of(node) == (*as_shape_of(x)[:-1], *last)


def _neighbour(node: Any, x: fx.Node) -> int | None:
    """Whether `node` is all the first (0) or all the second (1) channels of the pairs of `x`."""
    size = as_shape_of(x)[-1]
    if not isinstance(size, int) or size % 2:
        return None
    if _is(node, aten.slice.Tensor):
        source, along, start = node.args[0], _argument(node, 1, 0), _argument(node, 2, 0)
        every = _argument(node, 4, 1) == 2 and as_shape_of(node)[-1] == size // 2
        last = along in (-1, x.meta["val"].dim() - 1)
        if not (every and last and start in (0, 1)):
            return None
        return start if _uncast(source) is x else None
    found = _picked(node, -1)
    if found is None:
        return None
    source, index = found
    if source is x and size == 2:
        return index
    return index if _is_regrouped(source, x, (size // 2, 2)) else None


def _half(node: Any, x: fx.Node) -> int | None:
    """Which half of the channels of `x` `node` is."""
    size = as_shape_of(x)[-1]
    if not isinstance(size, int) or size % 2:
        return None
    found = _picked(node, -2)
    if found is not None:
        return found[1] if _is_regrouped(found[0], x, (2, size // 2)) else None
    if _is(node, aten.slice.Tensor):
        source, dim = node.args[0], _argument(node, 1, 0)
        which = {0: 0, size // 2: 1}.get(_argument(node, 2, 0))
        if _argument(node, 4, 1) != 1:
            return None
    elif _is(node, operator.getitem) and _is(node.args[0], *SPLITS):
        split, which = node.args
        source, dim = split.args[0], _argument(split, 2, 0)
    else:
        return None
    full = as_shape_of(node)[-1] == size // 2 and dim in (-1, x.meta["val"].dim() - 1)
    return which if full and _uncast(source) is x else None


def _four(
    e: Emitter, x: fx.Node, cos: fx.Node, sin: fx.Node
) -> tuple[fx.Node | None, list[fx.Node]]:
    """`x` and its tables as the op wants them: ``[B, S, N, D]`` and ``[1, S, 1, D]`` or alike."""
    shape, table = list(as_shape_of(x)), list(as_shape_of(cos))
    table = [1] * (len(shape) - len(table)) + table
    if equal(shape[-1], 2) and len(shape) == 5:
        if not equal(table[-2], shape[-2]) or not equal(table[-1], 2):
            return None, []
        shape, table = [*shape[:3], shape[3] * 2], [*table[:3], table[3] * 2]
    size = shape[-1]
    known = isinstance(size, int) and size % 2 == 0 and size < MAX_DIM
    broadcasts = all(equal(t, n) or equal(t, 1) for t, n in zip(table, shape, strict=True))
    if len(shape) != 4 or not known or not equal(table[-1], size) or not broadcasts:
        return None, []
    return e.view(x, shape), [e.view(t, table) for t in (cos, sin)]


def _argument(node: Any, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _uncast(node: Any) -> Any:
    return widened_source(node) or node


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets
