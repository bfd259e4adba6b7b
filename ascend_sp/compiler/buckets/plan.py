"""Which part of a graph may be run with more rows than its sequences have.

A **length** is a symbolic size along which values hold one row a token. Rows behind the real ones
may hold anything, as long as no real row is computed from them. That is what the sharding rules
know of padding rows, so they are asked: an op that runs on shards as it is, also runs with more
rows. Attention does, too, if the keys behind the real ones are masked. What asks for whole
sequences runs outside, op by op and with real lengths: *early*, if no attention stands before it,
else *late*.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ascend_sp.graph._pytorch import UNBACKED_BINDINGS, OpOverload, tree_leaves
from ascend_sp.graph.arguments import argument_of
from ascend_sp.graph.attention import Attention
from ascend_sp.graph.families import SPLITS, VIEWS, is_product
from ascend_sp.graph.layout import REPLICATE, Placement, Sequence, Shard, at_dim, same
from ascend_sp.graph.sizes import Size, as_size, equal, symbols_of, total
from ascend_sp.passes.sharding.plan import (
    call_of,
    is_getitem,
    operand_nodes,
    picked,
    shapes,
    tensors,
)
from ascend_sp.passes.sharding.rules import Local, answer
from ascend_sp.passes.sharding.rules.attention import SEQ
from ascend_sp.runtime.ops import attention as attention_op

aten = torch.ops.aten

RANKS = 2
"""For how many the rules are asked; their answers are the same for any number."""

SIZED = frozenset({*VIEWS, *SPLITS, aten.reshape.default, aten.expand.default, aten.slice.Tensor})
"""Ops on rows whose sizes may be arguments: they change shapes and no values."""
NEW = frozenset(
    {
        *(aten.new_full.default, aten.new_zeros.default, aten.new_ones.default),
        *(aten.new_empty.default, aten.new_empty_strided.default),
    }
)
CONSTANT = frozenset(
    {
        *(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format),
        *(*NEW, aten.expand.default, aten.repeat.default),
    }
)
"""Ops that make equal rows, as many as they are told; those in `NEW` read no row of an operand."""
COUNTS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})


@dataclass
class Plan:
    """The part with more rows, and what runs before and behind it."""

    lengths: tuple[sympy.Expr, ...] = ()
    early: set[fx.Node] = field(default_factory=set)
    late: set[fx.Node] = field(default_factory=set)
    placements: dict[fx.Node, tuple[Placement, ...]] = field(default_factory=dict)
    """Of all values between: `Shard` where a sequence with a length is a dim."""
    masked: dict[fx.Node, Sequence] = field(default_factory=dict)
    """Attentions with the keys of which some may not be real."""

    def placement(self, node: fx.Node) -> Placement:
        """Where the rows of a value are."""
        found = self.placements.get(node)
        return found[0] if found else REPLICATE


class _NoPlanError(Exception):
    """A length cannot be planned for."""

    def __init__(self, node: fx.Node, why: str) -> None:
        self.node, self.why = node, why


def plan(gm: fx.GraphModule) -> tuple[Plan | None, list[tuple[fx.Node, str]]]:
    """The part of `gm` that takes capacities for lengths, and where and why some are left out.

    None if there is no length, or none that could have a capacity.
    """
    nodes = list(gm.graph.nodes)
    attentions = [n for n in nodes if n.target is attention_op and len(shapes(n)[0]) == 4]
    if any(n.meta.get(UNBACKED_BINDINGS) for n in nodes):
        node = next(n for n in nodes if n.meta.get(UNBACKED_BINDINGS))
        return None, [(node, "sizes that only the data decide")]
    symbols: set[sympy.Symbol] = set()
    for n in attentions:
        q, k = (shapes(x)[0] for x in operand_nodes(n)[:2])
        symbols |= symbols_of((q[SEQ], k[SEQ]))
    reasons: list[tuple[fx.Node, str]] = []
    while symbols:
        walk = _Walk(nodes, frozenset(symbols))
        try:
            return walk.run(), reasons
        except _NoPlanError as stop:
            reasons.append((stop.node, stop.why))
            seen = {s for x in (stop.node, *stop.node.all_input_nodes) for s in _symbols_in(x)}
            symbols = symbols - seen if symbols & seen else set()
    return None, reasons


def given_sizes(node: fx.Node) -> list[Any]:
    """The sizes among the arguments of `node` that have symbols."""
    leaves = tree_leaves((node.args, node.kwargs))
    given = (x.meta.get("val") if isinstance(x, fx.Node) else x for x in leaves)
    return [x for x in given if isinstance(x, torch.SymInt)]


def sizes_of(node: fx.Node) -> list[Any]:
    """Sizes that are seen at `node`: of what it yields, and those among its arguments."""
    return [*given_sizes(node), *(n for shape in shapes(node) for n in shape)]


def _symbols_in(node: fx.Node) -> set[sympy.Symbol]:
    return symbols_of(s for shape in shapes(node) for s in shape)


class _Walk:
    """Walks over a graph until it is known which part each node belongs to."""

    def __init__(self, nodes: list[fx.Node], symbols: frozenset[sympy.Symbol]) -> None:
        self.nodes, self.symbols = nodes, symbols
        self.behind: set[fx.Node] = set()
        for n in nodes:
            if any(x in self.behind or x.target is attention_op for x in n.all_input_nodes):
                self.behind.add(n)
        self.plan = Plan()
        self.why: dict[fx.Node, str] = {}
        self.joined: dict[Size, Sequence] = {}
        """By their total: sequences that are made of several."""

    def run(self) -> Plan:
        """The plan.

        Raises:
            _NoPlanError: an attention would not be in it.
        """
        while self._changes():
            pass
        found = dict.fromkeys(
            n
            for each in self.plan.placements.values()
            for p in each
            if isinstance(p, Shard)
            for n in p.seq.lengths
            if self._varies((n,))
        )
        self.plan.lengths = tuple(found)  # type: ignore[arg-type]
        return self.plan

    def _changes(self) -> bool:
        """Place every node; whether that has moved one into another part, so that all look anew."""
        p, changed = self.plan, False
        p.placements.clear()
        p.masked.clear()
        for node in self.nodes:
            if node in p.early or node.op in ("placeholder", "get_attr"):
                self._enters(node)
                continue
            if node.op == "output" or node in p.late:
                changed |= self._late_operands(node)
                continue
            if not tensors(node):
                continue  # a size: each part computes it for itself
            late = next((x for x in node.all_input_nodes if x in p.late), None)
            why = self.why[late] if late is not None else self._place(node)
            if not why:
                changed |= self._learns(node)
                continue
            self.why[node] = why
            if node.target is attention_op and changed:
                return True  # what was learnt may be a remedy
            if node.target is attention_op:
                raise _NoPlanError(node if late is None else late, why)
            if late is not None or node in self.behind:
                p.late.add(node)
                changed |= self._late_operands(node)
            else:
                own = self._with_all_before(node)
                for n in own:
                    if is_product(n) and self._varies(s for shape in shapes(n) for s in shape):
                        if changed:
                            return True
                        raise _NoPlanError(
                            node, f"{why}, and {n.name} before it is a product of rows"
                        )
                p.early |= own
                self._enters(node)
                changed = True
        return changed

    def _learns(self, node: fx.Node) -> bool:
        """Note that a number of rows is that of a joined sequence; whether that is new.

        What has as many rows elsewhere then has those of each part.
        """
        placed = self.plan.placement(node)
        if not isinstance(placed, Shard) or len(placed.seq.lengths) == 1:
            return False
        if placed.seq.total in self.joined:
            return False
        self.joined[placed.seq.total] = placed.seq
        return True

    def _rows(self, size: Size) -> Sequence:
        """`size` rows that come from outside."""
        found = self.joined.get(size)
        if found is None:
            return Sequence((size,))
        return Sequence.joined([self._rows(n) for n in found.lengths])

    def _with_all_before(self, node: fx.Node) -> set[fx.Node]:
        out, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n not in out and n.op == "call_function":
                out.add(n)
                stack.extend(n.all_input_nodes)
        return out

    def _late_operands(self, node: fx.Node) -> bool:
        """Move to the late part what `node` could not cut real rows from."""
        p, changed = self.plan, False
        for x in node.all_input_nodes:
            split = p.placement(x)
            if x in p.late or not isinstance(split, Shard) or split.whole_dim():
                continue
            if x not in self.behind:
                raise _NoPlanError(node, f"it needs real rows of {x.name}, {split}")
            p.late.add(x)
            self.why[x] = f"{split} holds more than rows"
            changed = True
        return changed

    def _enters(self, node: fx.Node) -> None:
        """Place a value from outside: at most one of its dims has a length."""
        placed: list[Placement] = []
        for shape in shapes(node):
            dims = [d for d, n in enumerate(shape) if self._varies((n,))]
            if len(dims) > 1:
                return  # whoever reads it is refused
            placed.append(Shard(dims[0], self._rows(shape[dims[0]])) if dims else REPLICATE)
        self.plan.placements[node] = tuple(placed)

    def _varies(self, sizes: Iterable[Any]) -> bool:
        return bool(symbols_of(sizes) & self.symbols)

    def _place(self, node: fx.Node) -> str:
        """Place what `node` yields; else why it needs real lengths."""
        p = self.plan
        operands = operand_nodes(node)
        if is_getitem(node):
            source, i = node.args[0], picked(node)
            if source not in p.placements or i is None:
                return "its operand has several dims with a length"
            p.placements[node] = (p.placements[source][i],)  # type: ignore[index]
            return ""
        if any(x not in p.placements for x in operands):
            return "an operand has several dims with a length"
        if not isinstance(node.target, OpOverload):
            return f"{node.target} is not an ATen op"
        given = [p.placement(x) for x in operands]
        if node.target is attention_op:
            found: tuple[Placement, ...] | str = self._attention(node)
        elif node.target not in NEW and any(isinstance(g, Shard) for g in given):
            found = self._on_rows(node, operands, given)
        else:
            found = self._of_none(node)
        if isinstance(found, str):
            return found
        for shape, placed in zip(shapes(node), found, strict=True):
            rest = [
                n
                for d, n in enumerate(shape)
                if not (isinstance(placed, Shard) and d == placed.dim)
            ]
            if self._varies(rest):
                return "its result has more than one dim with a length"
        p.placements[node] = found
        return ""

    def _arguments(self, node: fx.Node) -> bool:
        """Whether an argument that is no tensor has a length in it."""
        return self._varies(given_sizes(node))

    def _on_rows(
        self, node: fx.Node, operands: list[fx.Node], given: list[Placement]
    ) -> tuple[Placement, ...] | str:
        if self._arguments(node) and node.target not in SIZED:
            return f"{node.target} computes with a length"
        found = answer(call_of(node, lambda i, _: given[i], RANKS))
        if not isinstance(found, Local):
            return found.reason
        if found.mask_padding:
            return "it adds up rows"
        for x, have, want in zip(operands, given, found.inputs, strict=True):
            if not isinstance(want, Shard) and want != REPLICATE:
                return f"it reads rows next to each other, {want}"
            if isinstance(have, Shard) and not same(shapes(x)[0], have, want):
                return f"it needs {x.name} as {want}, not {have}"
            if have == REPLICATE and isinstance(want, Shard) and self._varies(want.seq.lengths):
                return f"{x.name} has rows for one length only, {want}"
        if any(not isinstance(o, Shard) and o != REPLICATE for o in found.outputs):
            return "it adds up rows, or pads a picture"
        return found.outputs

    def _of_none(self, node: fx.Node) -> tuple[Placement, ...] | str:
        """Place what is made of no rows: not at all, or equal or counted rows, or first rows."""
        out = shapes(node)
        if not self._arguments(node) and not self._varies(n for s in out for n in s):
            return tuple(REPLICATE for _ in out)
        dims = [d for d, n in enumerate(out[0]) if self._varies((n,))]
        if len(out) != 1 or len(dims) != 1:
            return f"{node.target} makes several dims with a length"
        size = out[0][dims[0]]
        sizes = [as_size(v) for v in self._sizes(node)]
        right = node.target in CONSTANT
        if node.target is aten.repeat.default:
            # Of one row, not of several in turn.
            x = shapes(operand_nodes(node)[0])[0]
            of = dims[0] - (len(out[0]) - len(x))
            right = of < 0 or equal(x[of], 1)
        if node.target in COUNTS:
            start = sizes[0] if len(sizes) > 1 else 0
            step = sizes[2] if len(sizes) > 2 else 1
            end = sizes[1] if len(sizes) > 1 else sizes[0]
            right = not self._varies((start,)) and step == 1 and equal(size, end - start)
        elif node.target is aten.slice.Tensor:
            start, end, step = (_size_argument(node, n) for n in ("start", "end", "step"))
            right = end is not None and not self._varies((start,)) and step == 1
            right = right and equal(size, total([end, -(start or 0)]))
        if not right:
            return f"{node.target} computes with a length"
        rows = self._rows(size)
        if len(rows.lengths) > 1 and node.target not in CONSTANT:
            return f"{node.target} counts rows of several parts"
        return (Shard(dims[0], rows),)

    def _sizes(self, node: fx.Node) -> list[Any]:
        """The arguments of a node behind its first tensor."""
        given = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
        return [v for v in given if isinstance(v, (int, torch.SymInt))]

    def _attention(self, node: fx.Node) -> tuple[Placement, ...] | str:
        """Rows of queries stay; keys that are not real are to be masked."""
        p, a = self.plan, Attention.of(node)
        if any(len(shapes(x)[0]) != 4 for x in (a.q, a.k, a.v)):
            return "attention over other than 4 dims"
        splits: list[Shard | None] = []
        for x in (a.q, a.k, a.v):
            own = p.placement(x)
            split = at_dim(shapes(x)[0], own, SEQ) if isinstance(own, Shard) else None
            if isinstance(own, Shard) and split is None:
                return f"the length of {x.name} is not its sequence"
            splits.append(split)
        q, k, v = splits
        if (k is None) != (v is None) or (k is not None and k != v):
            return "keys and values have lengths of different kinds"
        if a.is_causal and q != k:
            return "it is causal, and queries and keys have lengths of different kinds"
        if a.attn_mask is not None:
            own = p.placement(a.attn_mask)
            last = len(shapes(a.attn_mask)[0]) - 1
            if isinstance(own, Shard):
                along = {last: k, last - 1: q}.get(own.dim)
                if not own.whole_dim() or along is None or along.seq != own.seq:
                    return "its mask has a length of another kind"
        if k is not None:
            p.masked[node] = k.seq
        return (q if q is not None else REPLICATE,)


def _size_argument(node: fx.Node, name: str) -> Any:
    """An argument that is a size; None if it is not given."""
    given = argument_of(node, name)
    value = given.meta["val"] if isinstance(given, fx.Node) else given
    return None if value is None else as_size(value)
