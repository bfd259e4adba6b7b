"""Complex numbers become pairs of real tensors, exactly: rotary embeddings, mostly.

Graph engines of accelerators have no complex type, Inductor does not fuse it, and a sharded graph
needs no second set of rules for it. ``view_as_complex(x)`` is ``(x[..., 0], x[..., 1])``, a product
is ``(ac - bd, ad + bc)``, what moves values moves both parts, and ``view_as_real`` stacks them
again. A complex input or output crosses the border as the real tensor ``[..., 2]`` that
``torch.view_as_real`` shows of the same memory, so no value is converted there.

An op that is not known here keeps its complex operands and is reported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ascend_sp.graph import families
from ascend_sp.graph._pytorch import tree_leaves, tree_map
from ascend_sp.graph.border import Border
from ascend_sp.graph.context import NoteKind, PassContext
from ascend_sp.graph.emitter import Emitter, same_strides

aten = torch.ops.aten

MOVED = families.MOVES | {
    *families.SPLITS,
    aten.reshape.default,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.expand.default,
    aten.repeat.default,
    aten.select.int,
    aten.unbind.int,
    aten.stack.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.flip.default,
    aten.roll.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.copy.default,
    aten.where.self,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
}
"""Ops that only move values."""

SELECTORS = {
    aten.where.self: 0,
    aten.index.Tensor: 1,
    aten.index_select.default: 2,
    aten.gather.default: 2,
}
"""Ops with an argument that says which values are meant, and is none itself; its position."""

LINEAR = MOVED | {
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.cumsum.default,
}
"""Ops that are the same on the real and on the imaginary part, each by itself."""

FILLS = {
    aten.full.default: 1,
    aten.new_full.default: 2,
    aten.full_like.default: 1,
    aten.constant_pad_nd.default: 2,
}
"""Ops that take a value to fill with, and where: it too has two parts."""

CONSTANTS = {
    aten.zeros.default: aten.zeros.default,
    aten.ones.default: aten.zeros.default,
    aten.new_zeros.default: aten.new_zeros.default,
    aten.new_ones.default: aten.new_zeros.default,
    aten.zeros_like.default: aten.zeros_like.default,
    aten.ones_like.default: aten.zeros_like.default,
}
"""Ops that make a known real value, and those that make the zeros beside it."""

Parts = tuple[fx.Node, fx.Node]


def decompose_complex(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Rewrite all complex arithmetic of `gm`; `border` says how to call the result."""
    if any(_is_complex(n) for n in gm.graph.nodes):
        ctx.results.put(_Decomposition(gm, ctx).run())
    return gm


def _is_complex(value: object) -> bool:
    if not isinstance(value, fx.Node):
        return False
    leaves = tree_leaves(value.meta.get("val"))
    return any(isinstance(x, torch.Tensor) and x.is_complex() for x in leaves)


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


class _UnknownError(Exception):
    """No real form of this op is known."""


class _Decomposition:
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.emit = Emitter(gm, "decompose_complex")
        self.parts: dict[fx.Node, Parts] = {}
        """Real and imaginary part of each complex node."""
        self.left: set[fx.Node] = set()
        """Nodes that stay complex, since their op is not known."""
        self.made: dict[str, fx.Node] = {}
        """Every node that was added, by what it computes: all blocks rotate by the same tables."""
        self.moved: set[fx.Node] = set()
        """Real values in another memory order than the one that views of them were recorded for."""

    def run(self) -> Border:
        nodes = list(self.gm.graph.nodes)
        returned: Any = nodes[-1].args[0]
        strides = [n.meta["val"].stride() if _is_tensor(n) else () for n in returned]
        placeholders = [n for n in nodes if n.op == "placeholder"]
        body = next(n for n in nodes if n.op != "placeholder")
        with self.emit.at(body):
            inputs = tuple(i for i, n in enumerate(placeholders) if self._input(n))
        outputs: tuple[int, ...] = ()
        for node in nodes:
            if node.op == "output":
                outputs = self._output(node, strides)
            elif node.op == "placeholder":
                continue
            elif _is_complex(node) or not self.parts.keys().isdisjoint(node.all_input_nodes):
                self._rewrite(node)
            elif not self.moved.isdisjoint(node.all_input_nodes):
                self.emit.refresh_after_move(node)
                self.moved.add(node)
        for node in reversed(list(self.gm.graph.nodes)):
            if node in self.parts and not node.users and node.op != "placeholder":
                self.gm.graph.erase_node(node)
        return Border(inputs, outputs)

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        key = str((op, args, kwargs))
        if key not in self.made:
            self.made[key] = self.emit.call(op, *args, **kwargs)
        return self.made[key]

    def _input(self, node: fx.Node) -> bool:
        """Make one input real, if it is complex. A graph writes into none: AOTAutograd does."""
        if not _is_complex(node):
            return False
        with self.emit.fake_mode:
            node.meta["val"] = torch.view_as_real(node.meta["val"])
        self.parts[node] = self._halves(node)
        return True

    def _halves(self, pairs: fx.Node) -> Parts:
        select = aten.select.int
        return self._call(select, pairs, -1, 0), self._call(select, pairs, -1, 1)

    def _output(self, node: fx.Node, strides: list[tuple[Any, ...]]) -> tuple[int, ...]:
        """Results in the memory order of `strides`, complex ones as pairs; positions of those."""
        positions: list[int] = []
        returned: Any = node.args[0]
        values = list(returned)
        with self.emit.at(node):
            for i, x in enumerate(values):
                if x in self.parts:
                    pairs = self._call(aten.stack.default, list(self.parts[x]), -1)
                    values[i] = self.emit.restride(pairs, [*(2 * s for s in strides[i]), 1])
                    positions.append(i)
                elif x in self.moved:
                    values[i] = self.emit.restride(x, strides[i])
        node.args = (type(returned)(values),)
        return tuple(positions)

    def _rewrite(self, node: fx.Node) -> None:
        before = node.prev
        with self.emit.at(node):
            try:
                found = self._real_form(node)
                self._check(node, found)
            except _UnknownError:
                new = []
                while node.prev is not before:
                    new.append(node.prev)
                    self.gm.graph.erase_node(node.prev)
                self.made = {k: n for k, n in self.made.items() if n not in new}
                self._keep(node)
                return
        if isinstance(found, fx.Node):
            node.replace_all_uses_with(found)
            self.gm.graph.erase_node(node)
        else:
            self.parts[node] = found

    def _keep(self, node: fx.Node) -> None:
        """Leave an op as it is, between complex tensors made for it."""
        self.ctx.note(
            NoteKind.COMPLEX,
            node,
            "cannot be rewritten in real numbers, and runs on complex tensors",
        )
        with self.emit.at(node):
            whole = {
                x: self._call(aten.complex.default, *self.parts[x])
                for x in node.all_input_nodes
                if x in self.parts and x not in self.left
            }
        node.args = fx.map_arg(node.args, lambda n: whole.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: whole.get(n, n))
        self.emit.refresh_after_move(node)
        self.moved.add(node)
        self.left.add(node)
        if isinstance(node.meta.get("val"), torch.Tensor) and _is_complex(node):
            with self.emit.at(node.next, origin=node):
                self.parts[node] = self._halves(self._call(aten.view_as_real.default, node))

    def _check(self, node: fx.Node, found: fx.Node | Parts) -> None:
        """The parts must have the shape and the precision of the value that they stand for."""
        val = node.meta["val"]
        if isinstance(found, fx.Node):
            new = found.meta["val"]
            if new.dtype != val.dtype or new.shape != val.shape:
                raise _UnknownError
            if not same_strides(val.shape, new.stride(), val.stride()):
                self.moved.add(found)
            return
        for part in found:
            for x, y in zip(tree_leaves(part.meta["val"]), tree_leaves(val), strict=True):
                if x.dtype != y.dtype.to_real() or x.shape != y.shape:
                    raise _UnknownError

    def _real_form(self, node: fx.Node) -> fx.Node | Parts:
        handler = HANDLERS.get(node.target)
        if handler is None:
            raise _UnknownError
        return handler(self, node)

    def _item(self, node: fx.Node) -> Parts:
        if node.args[0] not in self.parts:
            raise _UnknownError
        return self._each(node)

    def _from_pairs(self, node: fx.Node) -> Parts:
        return self._halves(node.args[0])  # type: ignore[arg-type]

    def _to_pairs(self, node: fx.Node) -> fx.Node:
        x: Any = node.args[0]
        pairs = self._rotation(x) or self._pairs(*self._parts(x))
        return self.emit.restride(pairs, node.meta["val"].stride())

    def _real(self, node: fx.Node) -> fx.Node:
        return self._parts(node.args[0])[0]

    def _imaginary(self, node: fx.Node) -> fx.Node:
        return self._parts(node.args[0])[1]

    def _complex(self, node: fx.Node) -> Parts:
        re, im = node.args
        return re, im  # type: ignore[return-value]

    def _polar(self, node: fx.Node) -> Parts:
        length, angle = node.args
        cos, sin = self._call(aten.cos.default, angle), self._call(aten.sin.default, angle)
        return self._times(length, cos), self._times(length, sin)

    def _conjugate(self, node: fx.Node) -> Parts:
        re, im = self._parts(node.args[0])
        return re, self._call(aten.neg.default, im)

    def _quotient(self, node: fx.Node) -> Parts:
        if self._two(node.args[1]):
            raise _UnknownError
        re, im = self._parts(node.args[0])
        return self._call(node.target, re, node.args[1]), self._call(node.target, im, node.args[1])

    def _two(self, x: object) -> bool:
        return isinstance(x, complex) or x in self.parts or _is_complex(x)

    def _parts(self, x: Any) -> tuple[Any, Any]:
        """Real and imaginary part of a tensor or a number."""
        if isinstance(x, fx.Node):
            if x in self.parts:
                return self.parts[x]
            if _is_complex(x):
                raise _UnknownError
            return x, self._call(aten.zeros_like.default, x)
        return (x.real, x.imag) if isinstance(x, complex) else (x, 0)

    def _times(self, a: Any, b: Any) -> fx.Node:
        if not isinstance(a, fx.Node):
            a, b = b, a
        op = aten.mul.Tensor if isinstance(b, fx.Node) else aten.mul.Scalar
        return self._call(op, a, b)

    def _sum(self, node: fx.Node) -> Parts:
        if isinstance(node.kwargs.get("alpha", 1), complex):
            raise _UnknownError
        (a, b), (c, d) = self._parts(node.args[0]), self._parts(node.args[1])
        op: Any = node.target
        kwargs = dict(node.kwargs)
        # A number has no imaginary part to add.
        im = b if not isinstance(d, fx.Node) and d == 0 else self._call(op, b, d, **kwargs)
        return self._call(op, a, c, **kwargs), im

    def _product(self, node: fx.Node) -> Parts:
        x, y = node.args
        if not self._two(x) or not self._two(y):
            (re, im), factor = (self._parts(x), y) if self._two(x) else (self._parts(y), x)
            return self._times(re, factor), self._times(im, factor)
        (a, b), (c, d) = self._parts(x), self._parts(y)
        return (
            self._call(aten.sub.Tensor, self._times(a, c), self._times(b, d)),
            self._call(aten.add.Tensor, self._times(a, d), self._times(b, c)),
        )

    def _pairs(self, re: fx.Node, im: fx.Node) -> fx.Node:
        return self._call(aten.stack.default, [re, im], -1)

    def _rotation(self, product: fx.Node) -> fx.Node | None:
        """``view_as_real(view_as_complex(x) * (c + si))`` as ``x * [c, c] + [-im, re] * [s, s]``.

        The same numbers as the pair of products, to the last bit, but what comes last is an
        elementwise op, into which the packing for an all-to-all folds; and it is the form that
        fused rotary kernels know.
        """
        if product.target is not aten.mul.Tensor:
            return None
        for x, z in (product.args, product.args[::-1]):
            if not isinstance(x, fx.Node) or x.target is not aten.view_as_complex.default:
                continue
            if z not in self.parts:
                continue
            re, im = self.parts[x]
            c, s = self.parts[z]  # type: ignore[index]
            turned = self._pairs(self._call(aten.neg.default, im), re)
            return self._call(
                aten.add.Tensor,
                self._times(x.args[0], self._pairs(c, c)),
                self._times(turned, self._pairs(s, s)),
            )
        return None

    def _cast(self, node: fx.Node) -> fx.Node | Parts:
        if not _is_complex(node):
            raise _UnknownError  # PyTorch warns that the imaginary part is lost; let it
        kwargs = dict(node.kwargs)
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = node.meta["val"].dtype.to_real()
        op: Any = node.target
        re, im = self._parts(node.args[0])
        return self._call(op, re, **kwargs), self._call(op, im, **kwargs)

    def _fill(self, node: fx.Node) -> Parts:
        """What makes a constant, whose value is an argument (`FILLS`) or in the op's name."""
        target: Any = node.target
        position = FILLS.get(target, len(node.args))
        values: tuple[tuple[Any, ...], ...] = ((), ())
        if target in FILLS:
            value = node.args[position] if len(node.args) > position else 0
            if isinstance(value, fx.Node) or "value" in node.kwargs:
                raise _UnknownError
            re, im = self._parts(value)
            values = ((re,), (im,))
        kwargs = dict(node.kwargs)
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = node.meta["val"].dtype.to_real()
        parts = []
        for i, each in enumerate((target, CONSTANTS.get(target, target))):
            args = fx.map_arg(node.args[:position], lambda n, i=i: self.parts.get(n, (n, n))[i])  # type: ignore[misc]
            parts.append(self._call(each, *args, *values[i], **kwargs))
        return parts[0], parts[1]

    def _each(self, node: fx.Node) -> Parts:
        """The op on the real parts, and the op on the imaginary parts."""
        op: Any = node.target
        where = SELECTORS.get(op)
        choosing = set() if where is None else set(tree_leaves(node.args[where]))
        values = {
            x: self._parts(x)
            for x in node.all_input_nodes
            if isinstance(x.meta.get("val"), (torch.Tensor, tuple, list)) and x not in choosing
        }
        out: list[fx.Node] = []
        for i in (0, 1):

            def part(x: Any, i: int = i) -> Any:
                return values[x][i] if isinstance(x, fx.Node) and x in values else x

            args, kwargs = tree_map(part, (node.args, dict(node.kwargs)))
            if op in families.VIEWS:
                out.append(self.emit.view(args[0], args[1]))
            else:
                out.append(self._call(op, *args, **kwargs))
        return out[0], out[1]


HANDLERS: dict[Any, Callable[[_Decomposition, fx.Node], fx.Node | Parts]] = {
    **dict.fromkeys(LINEAR, _Decomposition._each),
    # Behind those that move: a pad moves values and takes one to fill with.
    **dict.fromkeys((*FILLS, *CONSTANTS), _Decomposition._fill),
    operator.getitem: _Decomposition._item,
    aten.view_as_complex.default: _Decomposition._from_pairs,
    aten.view_as_real.default: _Decomposition._to_pairs,
    aten.real.default: _Decomposition._real,
    aten.imag.default: _Decomposition._imaginary,
    aten.complex.default: _Decomposition._complex,
    aten.polar.default: _Decomposition._polar,
    aten._conj.default: _Decomposition._conjugate,
    aten._conj_physical.default: _Decomposition._conjugate,
    aten.conj_physical.default: _Decomposition._conjugate,
    aten.mul.Tensor: _Decomposition._product,
    aten.mul.Scalar: _Decomposition._product,
    aten.add.Tensor: _Decomposition._sum,
    aten.sub.Tensor: _Decomposition._sum,
    aten.div.Tensor: _Decomposition._quotient,
    aten.div.Scalar: _Decomposition._quotient,
    aten._to_copy.default: _Decomposition._cast,
}
"""The real form of each op: a real node, or the parts of a complex one."""
