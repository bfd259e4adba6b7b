"""The programs that a plan makes of a graph: the early part, the middle, the late part.

The middle, which has capacities, is traced anew, with symbols of its own. Where a length was, it
has a capacity, as a multiple of a symbol, so that it divides by whatever all of them divide by.
What is assumed of it on the way binds the middle only, and not the graph that it comes from, whose
symbols are real lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.buckets.plan import Plan, sizes_of
from ascend_sp.graph.arguments import position_of
from ascend_sp.graph.attention import Attention
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import Sequence as Rows
from ascend_sp.graph.sizes import Size, as_size, symbols_of, value_of
from ascend_sp.passes.sharding.plan import tensors
from ascend_sp.runtime.errors import LoweringError

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """A graph that takes values of a larger one, and yields some, all by their names there."""

    gm: fx.GraphModule
    takes: tuple[str, ...]
    yields: tuple[str, ...]

    def run(self, values: dict[str, Any]) -> None:
        """Add what it yields to `values`."""
        given = [values[name] for name in self.takes]
        values.update(zip(self.yields, self.gm.forward(*given), strict=True))


def part(gm: fx.GraphModule, given: Iterable[fx.Node], wanted: Sequence[fx.Node]) -> Part:
    """What computes `wanted` of `gm` from its inputs and the values `given`."""
    own = _pytorch.copy_of(gm)
    by_name = {n.name: n for n in own.graph.nodes}
    takes = {n.name: n for n in own.graph.nodes if n.op == "placeholder"}
    where = next(n for n in own.graph.nodes if n.op != "placeholder")
    for node in given:
        old = by_name[node.name]
        with own.graph.inserting_before(where):
            new = own.graph.placeholder(f"{node.name}_given")
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)
        by_name[node.name] = takes[node.name] = new
    yields = tuple(n.name for n in wanted)
    own.graph.output_node().args = (tuple(by_name[name] for name in yields),)
    own.graph.eliminate_dead_code()
    for node in [n for n in takes.values() if not n.users]:
        own.graph.erase_node(node)
    own.recompile()
    left = set(own.graph.nodes)
    return Part(own, tuple(name for name, n in takes.items() if n in left), yields)


@dataclass(frozen=True)
class Sized:
    """The middle, traced for some capacities.

    It takes values from outside, then of each length with capacities which rows are real, ``bool
    [capacity]``, and as many values as there are units, which nothing reads; then as many as each
    other number says. Torchair finds the value of a symbol as the size of a tensor, and a number
    that is no tensor's size comes with another shape than its graph says (torch_npu 2.13.0). Last
    come the numbers themselves.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    """Fake values of what it takes."""
    holds: Callable[[Sequence[int]], bool]
    """Whether it is right for other values of its numbers, too."""


def resized(node: fx.Node) -> bool:
    """Whether the middle takes a value as a copy in row-major order, for it has symbols in it."""
    val = node.meta["val"]
    return bool(symbols_of((*val.shape, *val.stride())))


class Middle:
    """The part of a graph that runs with capacities.

    Args:
        gm: the whole graph.
        plan: which of it is the middle.
        units: of which number the capacities of each length are multiples; 1: they are the lengths.
        wanted: the values that it yields.
    """

    def __init__(
        self, gm: fx.GraphModule, plan: Plan, units: Sequence[int], wanted: Sequence[fx.Node]
    ) -> None:
        self.gm, self.plan, self.wanted = gm, plan, list(wanted)
        self.units = units
        self.nodes = self._nodes()
        inside = set(self.nodes)
        uses = {x for n in self.nodes for x in n.all_input_nodes}
        self.takes = [
            n
            for n in gm.graph.nodes
            if n in uses and n not in inside and n.op != "get_attr" and tensors(n)
        ]
        """Values that come from outside."""
        self.validity = [i for i, u in enumerate(units) if u > 1]
        """The lengths of which it is told which rows are real, by position: ``bool [capacity]``."""
        left: set[sympy.Expr] = set()
        found = {s for n in (*self.takes, *self.nodes) for s in map(as_size, sizes_of(n))}
        for size in found:
            left |= self._others_in(self._without_lengths(size))
        self.others = sorted(left, key=str)
        """What else sizes are sums and products of: a batch, rows that fill up a picture."""

    def _nodes(self) -> list[fx.Node]:
        """What is needed of the middle, in order."""
        p, needed = self.plan, set(self.wanted)
        out = []
        for node in reversed(self.gm.graph.nodes):
            inside = node in needed and node not in p.early and node not in p.late
            if inside and node.op in ("call_function", "get_attr") and tensors(node):
                out.append(node)
                needed.update(node.all_input_nodes)
        return out[::-1]

    def _without_lengths(self, size: Any) -> Size:
        """`size`, each length in it made a number."""
        return _replaced(as_size(size), dict.fromkeys(self.plan.lengths, sympy.Integer(0)))

    def _others_in(self, size: Size) -> set[sympy.Expr]:
        """Symbols, and what is calculated of them by other functions (quotients, remainders).

        Such a function is one number to the program: its text is nothing that npugraph_ex reads
        everywhere (torch_npu 2.13.0), and sizes that are sums and products stay so behind views.
        """
        if isinstance(size, int):
            return set()
        out: set[sympy.Expr] = set()
        of_lengths = symbols_of(self.plan.lengths)
        for f in sorted(size.atoms(sympy.core.function.Application), key=lambda f: -f.count_ops()):
            if size.has(f) and not symbols_of([f]) & of_lengths:
                out.add(f)
                size = size.xreplace({f: sympy.Integer(1)})
        return out | symbols_of([size])

    def numbers(self, capacities: Sequence[int], now: Mapping[sympy.Symbol, int]) -> list[int]:
        """What a program is told of `capacities`, and of the other symbols as they are `now`."""
        units = [c // u for c, u in zip(capacities, self.units, strict=True)]
        return [*units, *(value_of(s, now) for s in self.others)]

    def trace(self, numbers: Sequence[int]) -> Sized:
        """The middle for these numbers.

        Raises:
            LoweringError: a size is calculated from a length in a way that is not understood.
        """
        return _Trace(self, numbers).run()


def _replaced(size: Size, new: Mapping[sympy.Expr, sympy.Expr]) -> Size:
    """`size` with other expressions in the place of some."""
    if isinstance(size, int):
        return size
    # Larger ones first: a length may be calculated from another one. By way of names that nobody
    # has, since symbols of two graphs may have one name.
    names = {old: sympy.Dummy(integer=True, positive=True) for old in new}
    for old in sorted(new, key=lambda e: -e.count_ops()):
        size = size.xreplace({old: names[old]})
    return as_size(size.xreplace({names[old]: value for old, value in new.items()}))


class _Trace:
    """One tracing of a `Middle`."""

    def __init__(self, middle: Middle, numbers: Sequence[int]) -> None:
        self.m = middle
        self.fresh = _pytorch.FreshSizes(numbers)
        self.graph = fx.Graph()
        self.inputs: list[Any] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        lengths, symbols = middle.plan.lengths, self.fresh.symbols
        self.sizes: dict[sympy.Expr, Any] = {
            n: u * s for n, u, s in zip(lengths, middle.units, symbols, strict=False)
        }
        self.sizes |= dict(zip(middle.others, symbols[len(lengths) :], strict=True))

    def run(self) -> Sized:
        m = self.m
        for node in m.takes:
            self._input(node.name, self._like(node), node)
        lengths = m.plan.lengths
        device = next(x.meta["val"].device for x in m.takes)
        valid = {}
        for i in m.validity:
            valid[lengths[i]] = self._input(
                f"valid_{i}", self._bools(self._size(lengths[i]), device)
            )
            self._input(f"rows_{i}", self._bools(self.fresh.sizes[i], device))
        for i, number in enumerate(self.fresh.sizes):
            if i not in m.validity:
                self._input(f"rows_{i}", self._bools(number, device))
        for i, number in enumerate(self.fresh.sizes):
            self._input(f"units_{i}", number)
        output = self.graph.output(())
        gm = fx.GraphModule(m.gm, self.graph)
        emit = Emitter(gm, "buckets")
        masks: dict[Rows, fx.Node] = {}
        for node in m.nodes:
            new = self._copy(emit, node, output)
            rows = m.plan.masked.get(node)
            if rows is None or not any(n in valid for n in rows.lengths):
                continue
            with emit.at(new):
                if rows not in masks:
                    masks[rows] = self._mask(emit, rows, valid, device)
                _hide(emit, new, masks[rows])
        output.args = (tuple(self.copies[n] for n in m.wanted),)
        gm.recompile()
        return Sized(gm, self.inputs, self.fresh.holds)

    def _input(self, name: str, value: Any, of: fx.Node | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        if of is not None:
            node.meta.update(of.meta)
            self.copies[of] = node
        node.meta["val"] = value
        self.inputs.append(value)
        return node

    def _bools(self, size: Any, device: torch.device) -> torch.Tensor:
        with self.fresh.mode:
            return torch.empty([size], dtype=torch.bool, device=device)

    def _expr(self, size: Any) -> Size:
        """A size of the whole graph as one of this program."""
        found = _replaced(as_size(size), self.sizes)
        if symbols_of([found]) - set(self.fresh.symbols):
            raise LoweringError(f"the size {as_size(size)} is not understood with capacities")
        return found

    def _size(self, size: Any) -> Any:
        """The same as a number for fake values."""
        return self.fresh.size(self._expr(size))

    def _like(self, node: fx.Node) -> torch.Tensor:
        """A fake value like that of `node`."""
        val = node.meta["val"]
        shape = [self._size(n) for n in val.shape]
        with self.fresh.mode:
            if resized(node):
                return torch.empty(shape, dtype=val.dtype, device=val.device)
            strides = [self._size(n) for n in val.stride()]
            return torch.empty_strided(shape, strides, dtype=val.dtype, device=val.device)

    def _copy(self, emit: Emitter, node: fx.Node, where: fx.Node) -> fx.Node:
        def argument(x: fx.Node) -> Any:
            if x in self.copies:
                return self.copies[x]
            return emit.argument(self._expr(x.meta["val"]))

        with self.graph.inserting_before(where):
            new = self.graph.node_copy(node, argument)
        if node.op == "get_attr":
            new.meta["val"] = self._like(node)
        else:
            emit.refresh_after_move(new)
        self.copies[node] = new
        return new

    def _mask(
        self, emit: Emitter, rows: Rows, valid: dict[sympy.Expr, fx.Node], device: torch.device
    ) -> fx.Node:
        """Which keys are real, ``bool [1, 1, 1, T]``."""
        parts = [
            valid.get(n)  # type: ignore[arg-type]
            or emit.call(aten.ones.default, [self._expr(n)], dtype=torch.bool, device=device)
            for n in rows.lengths
        ]
        return emit.view(emit.cat(parts, 0), [1, 1, 1, self._expr(rows.total)])


def _hide(emit: Emitter, node: fx.Node, real: fx.Node) -> None:
    """Have an attention leave out keys that are not `real`."""
    a = Attention.of(node)
    if a.attn_mask is not None:
        if a.attn_mask.meta["val"].dtype == torch.bool:
            mask = emit.call(aten.logical_and.default, a.attn_mask, real)
        else:
            hidden = emit.call(aten.logical_not.default, real)
            mask = emit.call(aten.masked_fill.Scalar, a.attn_mask, hidden, float("-inf"))
    elif a.is_causal:
        shape = [as_shape_of(a.q)[2], as_shape_of(a.k)[2]]
        ones = emit.call(aten.ones.default, shape, dtype=torch.bool, device=real.meta["val"].device)
        mask = emit.call(aten.logical_and.default, emit.call(aten.tril.default, ones), real)
    else:
        mask = real
    args = list(a)
    args[position_of(node.target, "attn_mask")] = mask  # type: ignore[index]
    args[position_of(node.target, "is_causal")] = False  # type: ignore[index]
    node.args, node.kwargs = tuple(args), {}
