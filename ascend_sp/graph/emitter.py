"""Adding nodes to an ATen graph so that every node has its fake value, its place and its origin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import sympy
import torch
from torch import fx

from ascend_sp.graph._pytorch import (
    UNBACKED_BINDINGS,
    FakeTensor,
    FakeTensorMode,
    OptimizedPythonReferenceAnalysis,
    enable_python_dispatcher,
    free_unbacked_symbols,
    py_sym_types,
    sympy_interp,
    tree_leaves,
    tree_map,
)
from ascend_sp.graph.families import VIEWS
from ascend_sp.graph.origin import set_origin
from ascend_sp.graph.sizes import Size, as_size, row_major
from ascend_sp.runtime.npu import DEVICE

aten = torch.ops.aten


class Emitter:
    """Inserts nodes into one graph. Every node gets ``meta["val"]`` by running it on fakes."""

    def __init__(self, gm: fx.GraphModule, pass_name: str) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.pass_name = pass_name
        self.fake_mode = _fake_mode(gm)
        self._unbacked = any(n.meta.get(UNBACKED_BINDINGS) for n in gm.graph.nodes)
        self._symbolic = self._unbacked or any(
            isinstance(n.meta.get("val"), torch.SymInt)
            for n in gm.graph.find_nodes(op="placeholder")
        )
        self._symbols: dict[sympy.Symbol, fx.Node] | None = None
        self._exprs: dict[sympy.Expr, fx.Node] = {}
        self._origin: fx.Node | None = None

    @contextmanager
    def at(self, where: fx.Node, *, origin: fx.Node | None = None) -> Iterator[None]:
        """Insert before `where`; new nodes take over the stack trace of `origin`, or of `where`."""
        before, self._origin = self._origin, origin or where
        try:
            with self.graph.inserting_before(where):
                yield
        finally:
            self._origin = before

    def after(self, x: fx.Node, *, origin: fx.Node | None = None) -> AbstractContextManager[None]:
        """`at` the first place behind `x` and the inputs."""
        node = x.next
        while node.op == "placeholder":
            node = node.next
        return self.at(node, origin=origin)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Put `new` in the place of `node`, in the memory order that users of `node` count on.

        What ascend_sp knows of `node` (placements, whole shapes, where it comes from) goes over to
        `new`.
        """
        with self.at(node):
            if isinstance(node.meta["val"], torch.Tensor):
                new = self.restride(new, node.meta["val"].stride())
        new.meta.update({k: v for k, v in node.meta.items() if k.startswith("ascend_sp")})
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append ``target(*args, **kwargs)`` at the current place.

        Arguments are nodes, plain values, or `Size`s, whose symbols become nodes.
        """
        args, kwargs = tree_map(self.argument, (args, kwargs))
        node = self.graph.call_function(target, args, kwargs)
        if self._origin is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in self._origin.meta:
                    node.meta[key] = self._origin.meta[key]
            set_origin(node, self.pass_name, self._origin)
        try:
            self.refresh(node)
        except Exception:
            self.graph.erase_node(node)
            raise
        return node

    def refresh(self, node: fx.Node) -> Any:
        """Recompute ``node.meta["val"]`` from the values of its arguments."""
        node.meta["val"] = self.evaluate(node)
        return node.meta["val"]

    def refresh_after_move(self, node: fx.Node) -> None:
        """`refresh`, where operands may have other strides than the ones recorded.

        A view that these forbid gets a copy in front.
        """
        try:
            self.refresh(node)
        except (RuntimeError, ValueError):
            if node.target not in VIEWS:
                raise
            with self.at(node):
                copy = self.contiguous(node.args[0], force=True)  # type: ignore[arg-type]
            node.args = (copy, *node.args[1:])
            self.refresh(node)

    def evaluate(self, node: fx.Node) -> Any:
        """What `node` yields on the fake values of its arguments.

        Sizes that only the data decide are what they were when the model was traced.
        """
        recorded = node.meta.get("val")
        if self._unbacked and _finds_sizes(node, recorded):
            return recorded  # another run would name them anew
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # Symbolic sizes need the Python meta kernels, which cost time, so only then.
        symbolic = enable_python_dispatcher() if self._symbolic else nullcontext()
        shape_env = self.fake_mode.shape_env if self._unbacked else None
        unnamed = shape_env.ignore_fresh_unbacked_symbols() if shape_env else nullcontext()
        with self.fake_mode, symbolic, unnamed:
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        if self._unbacked and recorded is not None and _finds_sizes(node, found):
            return recorded  # tracing knew more about a size than can be seen here
        return found

    # The few shapes of code that the passes need. Shapes are lists of `Size`.

    def view(self, x: fx.Node, shape: Sequence[Size]) -> fx.Node:
        """`x` viewed as `shape`; a copy goes first only if its strides demand one."""
        shape = list(shape)
        if as_shape_of(x) == tuple(shape):
            return x
        try:
            return self.call(aten.view.default, x, shape)
        except (RuntimeError, ValueError):
            return self.call(aten.view.default, self.contiguous(x, force=True), shape)

    def permute(self, x: fx.Node, dims: Sequence[int]) -> fx.Node:
        """`x` with its dims reordered.

        Two reorderings become one, and one that only moves dims of one element becomes a view:
        graph engines copy for every permute that they are given.
        """
        dims = list(dims)
        inner = _reordering(x)
        if inner is not None:
            source: Any = x.args[0]
            return self.permute(source, [inner[d] for d in dims])
        shape = as_shape_of(x)
        moved = [d for d in dims if shape[d] != 1]
        if moved == sorted(moved):
            return self.view(x, [shape[d] for d in dims])
        return self.call(aten.permute.default, x, dims)

    def contiguous(self, x: fx.Node, *, force: bool = False) -> fx.Node:
        """`x` in row-major order: `x` itself if it is known to be so already."""
        if not force and row_major(x.meta["val"]):
            return x
        return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)

    def restride(self, x: fx.Node, strides: Sequence[int]) -> fx.Node:
        """`x` with its dims in the memory order that `strides` say, without gaps.

        Views behind a value were recorded for its strides, so what replaces it must have them.
        """
        val = x.meta["val"]
        if same_strides(val.shape, val.stride(), strides):
            return x
        order = sorted(range(val.dim()), key=lambda d: strides[d], reverse=True)
        back = [order.index(d) for d in range(len(order))]
        return self.permute(self.contiguous(self.permute(x, order)), back)

    def narrow(self, x: fx.Node, dim: int, start: Size, stop: Size) -> fx.Node:
        """``x[start:stop]`` along `dim`.

        Where it depends on a symbol whether that leaves gaps (padding is cut off, if there is any),
        `dim` becomes the outermost in memory, and it leaves none: PyTorch asks it of every value
        that it traces, and what it finds would be a guard of the program.
        """
        if start == 0 and stop == as_shape_of(x)[dim]:
            return x
        out = self.call(aten.slice.Tensor, x, dim, start, stop)
        if row_major(out.meta["val"]) is not None:
            return out
        self.graph.erase_node(out)
        order = [dim, *(d for d in range(x.meta["val"].dim()) if d != dim)]
        rows = self.contiguous(self.permute(x, order))
        rows = self.call(aten.slice.Tensor, rows, 0, start, stop)
        return self.permute(rows, [order.index(d) for d in range(len(order))])

    def pad_end(
        self, x: fx.Node, dim: int, amount: Size, value: float = 0, below: int = 0
    ) -> fx.Node:
        """`x` with `amount` rows of `value` behind its end along `dim`, fewer than `below`.

        `below` is for amounts that symbols decide, and may be zero: GE has no padding by a symbol.
        So NPUs get `below` rows in any case, and what is too many, one at least, is cut off.
        """
        if amount == 0:
            return x
        if below and not isinstance(amount, int) and x.meta["val"].device.type == DEVICE:
            shape = list(as_shape_of(x))
            end = as_size(shape[dim] + amount)
            shape[dim] = below
            rows = self.call(aten.new_full.default, x, shape, value)
            return self.narrow(self.cat([x, rows], dim), dim, 0, end)
        pad: list[Size] = [0, 0] * (x.meta["val"].dim() - 1 - dim) + [0, amount]
        return self.call(aten.constant_pad_nd.default, x, pad, value)

    def cat(self, xs: Sequence[fx.Node], dim: int) -> fx.Node:
        """`xs` one behind the other along `dim`."""
        return xs[0] if len(xs) == 1 else self.call(aten.cat.default, list(xs), dim)

    def repeat_each(self, x: fx.Node, times: Size, dim: int) -> fx.Node:
        """Each row of `x` along `dim` `times` times in a row: ``torch.repeat_interleave``."""
        shape = list(as_shape_of(x))
        grown = self.call(aten.unsqueeze.default, x, dim + 1)
        grown = self.call(aten.expand.default, grown, [*shape[: dim + 1], times, *shape[dim + 1 :]])
        shape[dim] = shape[dim] * times
        return self.call(aten.reshape.default, grown, shape)

    def argument(self, value: Any) -> Any:
        """`value` as an argument of a node: symbolic sizes become nodes that compute them."""
        if isinstance(value, py_sym_types):
            value = as_size(value)  # type: ignore[arg-type]
        return self.size_node(value) if isinstance(value, sympy.Expr) else value

    def size_node(self, expr: sympy.Expr) -> fx.Node | int:
        """A node that computes `expr` from the sizes of the graph's inputs."""
        # Fake values may have told since that a symbol has one value only, or is another's.
        shape_env = self.fake_mode.shape_env
        expr = shape_env.replace(expr) if shape_env is not None else expr
        if expr.is_Integer:
            return int(expr)
        if expr not in self._exprs:
            # Size nodes stand behind the inputs, so that they dominate every use.
            anchor = next(n for n in self.graph.nodes if n.op != "placeholder")
            seen = set(self.graph.nodes)
            with self.graph.inserting_before(anchor):
                tracer = fx.proxy.GraphAppendingTracer(self.graph)
                env = {s: fx.Proxy(n, tracer) for s, n in self._symbol_nodes().items()}
                out = sympy_interp(OptimizedPythonReferenceAnalysis, env, expr)
            for node in self.graph.nodes:
                if node not in seen:
                    set_origin(node, self.pass_name, "size")
                    self.refresh(node)
            self._exprs[expr] = out.node
        return self._exprs[expr]

    def _symbol_nodes(self) -> dict[sympy.Symbol, fx.Node]:
        if self._symbols is None:
            self._symbols = {}
            for node in self.graph.find_nodes(op="placeholder"):
                val = node.meta.get("val")
                if isinstance(val, torch.SymInt) and isinstance(val.node.expr, sympy.Symbol):
                    self._symbols.setdefault(val.node.expr, node)
            last = self.graph.find_nodes(op="placeholder")[-1]
            for node in self.graph.find_nodes(op="placeholder"):
                val = node.meta.get("val")
                for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
                    expr = as_size(size)
                    if isinstance(expr, sympy.Symbol) and expr not in self._symbols:
                        with self.graph.inserting_after(last):
                            new = self.graph.call_function(aten.sym_size.int, (node, dim))
                        self.refresh(new)
                        self._symbols[expr] = new
        return self._symbols


def as_shape_of(node: fx.Node) -> tuple[Size, ...]:
    """Shape of the fake value of `node`."""
    return tuple(as_size(s) for s in node.meta["val"].shape)


def cast_source(node: Any) -> fx.Node | None:
    """What `node` is a cast of, to another dtype and nothing else; None if it is no such cast."""
    if not isinstance(node, fx.Node) or node.target is not aten._to_copy.default:
        return None
    source: Any = node.args[0]
    old, new = source.meta["val"], node.meta["val"]
    same = old.device == new.device and same_strides(old.shape, old.stride(), new.stride())
    return source if same and old.dtype != new.dtype else None


def widened_source(node: Any) -> fx.Node | None:
    """What `node` is a cast of, if it goes from a half precision to float32: every value stays."""
    source = cast_source(node)
    if source is None or node.meta["val"].dtype != torch.float32:
        return None
    return source if source.meta["val"].dtype in (torch.float16, torch.bfloat16) else None


def _finds_sizes(node: fx.Node, yields: Any) -> bool:
    """Whether what `node` yields has sizes, or is a number, that its data decide."""
    given = [n.meta.get("val") for n in node.all_input_nodes]
    return not free_unbacked_symbols(yields) <= free_unbacked_symbols(given)


def _reordering(x: fx.Node) -> list[int] | None:
    """The dims of its operand that `x` has in turn, if it only reorders them."""
    given: Any = x.args[1:]
    if x.target is aten.permute.default:
        return [d % len(given[0]) for d in given[0]]
    if x.target is aten.transpose.int:
        order = list(range(x.meta["val"].dim()))
        a, b = given
        order[a], order[b] = order[b], order[a]
        return order
    return None


def same_strides(shape: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether strides `a` and `b` lay out a tensor of `shape` alike (dims of one do not matter)."""
    return all(
        as_size(n) == 1 or as_size(x) == as_size(y) for n, x, y in zip(shape, a, b, strict=True)
    )


def _fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    for node in gm.graph.nodes:
        for val in tree_leaves(node.meta.get("val")):
            if isinstance(val, FakeTensor):
                return val.fake_mode
    return FakeTensorMode()
