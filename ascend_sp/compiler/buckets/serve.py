"""Calls with lengths, served by programs with capacities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from ascend_sp.compiler._pytorch import own_tracing_context
from ascend_sp.compiler.buckets.plan import Plan, plan
from ascend_sp.compiler.buckets.program import Middle, Sized, part, resized
from ascend_sp.compiler.buckets.remainders import drop_zero_remainders
from ascend_sp.compiler.capacities import OFF, Buckets, Capacities
from ascend_sp.compiler.input_symbols import InputSymbols
from ascend_sp.compiler.strides import Promised, keep_strides
from ascend_sp.compiler.targets.base import Runnable
from ascend_sp.graph.context import Note, NoteKind, source_line
from ascend_sp.graph.layout import Shard
from ascend_sp.graph.sizes import Size, symbols_of, value_of
from ascend_sp.passes.sharding.plan import tensors

Compile: TypeAlias = (
    "Callable[[fx.GraphModule, Sequence[Any], Sequence[str], Sequence[Note]], Runnable]"
)
"""Compiles a graph: its fake inputs, what a user calls them, and what to say of it."""


def serve(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    names: Sequence[str],
    buckets: Buckets,
    captured: bool,
    compile_: Compile,
) -> Runnable:
    """What runs `gm`: with capacities, if the option and the graph say so, else as it is.

    Unless told, only where programs are `captured` for the sizes that they first meet.
    """
    if buckets.off() or (buckets.automatic() and not captured):
        return compile_(gm, inputs, names, ())
    drop_zero_remainders(gm)
    found, reasons = plan(gm)
    notes = [
        Note(NoteKind.CAPACITY, n.name, str(n.target), f"has no capacity: {why}", source_line(n))
        for n, why in reasons
    ]
    if found is None or not found.lengths:
        return compile_(gm, inputs, names, notes)
    return Served(gm, found, inputs, names, buckets, notes, compile_).run()


@dataclass(frozen=True)
class Program:
    """A middle, traced for capacities (or for lengths, `exact`), and compiled."""

    exact: bool
    sized: Sized
    run: Runnable


@dataclass(frozen=True)
class Call:
    """What calls of the same sizes have in common."""

    program: Program
    rows: dict[Size, tuple[int, int]]
    """Of each part of a sequence how many rows are real, and how many the program has."""
    numbers: list[int]
    """What the program is told of its capacities, and of the other symbols."""


class Served:
    """A graph whose calls are served by programs with capacities.

    Args:
        gm: the graph.
        found: its parts.
        inputs: its fake inputs, which know the sizes of the call that is compiled.
        names: what a user calls them.
        buckets: the option.
        notes: what there is to say of the plan.
        compile_: compiles a middle.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        found: Plan,
        inputs: Sequence[Any],
        names: Sequence[str],
        buckets: Buckets,
        notes: Sequence[Note],
        compile_: Compile,
    ) -> None:
        self._plan, self._notes, self._compile = found, notes, compile_
        placeholders = gm.graph.find_nodes(op="placeholder")
        results: Any = gm.graph.output_node().args[0]
        self._inputs = [n.name for n in placeholders]
        self._results = [x.name if isinstance(x, fx.Node) else x for x in results]
        self._called = dict(zip(self._inputs, names, strict=True))
        leaving = _leaving(gm, found)
        self._splits = {n.name: found.placement(n) for n in leaving}
        exact = Middle(gm, found, [1] * len(found.lengths), leaving)
        self._symbols = InputSymbols(gm)
        self._read = sorted(symbols_of([*found.lengths, *exact.others]), key=str)
        now = self._values(inputs)
        self.capacities = self._capacities(placeholders, buckets, now)
        sized = Middle(gm, found, [c.unit for c in self.capacities], leaving)
        self._middles = {True: exact, False: sized}
        # What of the inputs has rows, or else only has to lie in order.
        self._fill = {n.name: found.placement(n) for n in exact.takes if resized(n)}
        self._early = _op_by_op(gm, (), [n for n in exact.takes if n in found.early])
        other = [x for x in results if isinstance(x, fx.Node) and _outside(x, found)]
        self._late = _op_by_op(gm, leaving, other)
        self._programs: list[Program] = []
        self._calls: dict[tuple[int, ...], Call] = {}
        self._failed: dict[tuple[int, ...], str] = {}
        self._told: set[str] = set()
        self._calls[tuple(now.values())] = self._find(now)
        self._promised = Promised(gm)

    def run(self) -> Runnable:
        """What serves calls, a function."""

        def call(args: list[Any]) -> Sequence[Any]:
            return self._serve(args)

        return self._promised.kept_by(call)

    def _values(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """The symbols of a call; of fake inputs, those of the call that is compiled."""
        found = self._symbols.read(self._read, inputs)
        return {
            s: int(v.node.hint if isinstance(v, torch.SymInt) else v)
            for s, v in zip(self._read, found, strict=True)
        }

    def _capacities(
        self, placeholders: Sequence[fx.Node], buckets: Buckets, now: dict[sympy.Symbol, int]
    ) -> list[Capacities]:
        """Those of each length, by the inputs that it comes from."""
        rows = self._plan.masked.values()
        tokens = max((sum(value_of(n, now) for n in r.lengths) for r in rows), default=0)
        tensors = [n for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor)]
        out = []
        for length in self._plan.lengths:
            own = symbols_of([length])
            of = {self._called[n.name] for n in tensors if own & symbols_of(n.meta["val"].shape)}
            out.append(buckets.of(of, tokens))
        return out

    def _serve(self, args: list[Any]) -> Sequence[Any]:
        """One call."""
        sizes = self._symbols.read(self._read, args)
        if sizes not in self._calls:
            self._calls[sizes] = self._find(dict(zip(self._read, sizes, strict=True)))
        call = self._calls[sizes]
        values: dict[str, Any] = dict(zip(self._inputs, args, strict=True))
        args.clear()
        self._early(values)
        middle = self._middles[call.program.exact]
        given: list[Any] = [self._given(n.name, values[n.name], call) for n in middle.takes]
        device = given[0].device
        for i in middle.validity:
            real, capacity = call.rows[self._plan.lengths[i]]
            valid = _real_rows(capacity, real, device)
            given += [valid, valid[: capacity // middle.units[i]]]
        unread = (n for i, n in enumerate(call.numbers) if i not in middle.validity)
        # Ranks compare what they are given, so not anything.
        given += [torch.zeros(n, dtype=torch.bool, device=device) for n in unread]
        given.extend(call.numbers)
        found = list(call.program.run(given))
        for (name, split), value in zip(self._splits.items(), found, strict=True):
            values[name] = _only_real(value, split, call)
        self._late(values)
        return [values[x] if isinstance(x, str) else x for x in self._results]

    def _find(self, now: dict[sympy.Symbol, int]) -> Call:
        """What serves calls of these sizes; compiled if there is none yet."""
        program, capacities = self._program(now)
        having = dict(zip(self._plan.lengths, capacities, strict=True))
        placed = (*self._fill.values(), *self._splits.values())
        parts = {n for p in placed if isinstance(p, Shard) for n in p.seq.lengths}
        rows: dict[Size, tuple[int, int]] = {}
        for n in (*self._plan.lengths, *parts):
            real = value_of(n, now)
            rows[n] = (real, having.get(n, real))  # type: ignore[call-overload]
        numbers = self._middles[program.exact].numbers(capacities, now)
        return Call(program, rows, numbers)

    def _program(self, now: dict[sympy.Symbol, int]) -> tuple[Program, list[int]]:
        """What serves a call, and the capacities of its lengths."""
        lengths = [value_of(n, now) for n in self._plan.lengths]
        fitting = [c.holding(n) for c, n in zip(self.capacities, lengths, strict=True)]
        if None not in fitting:
            capacities = [c for c in fitting if c is not None]
            key = tuple(capacities)
            try:
                if key not in self._failed:
                    return self._for(False, capacities, now), capacities
            except _NotTracedError as e:
                self._failed[key] = f"the model cannot be traced for {capacities} rows: {e}"
            why = self._failed[key]
        else:
            i = fitting.index(None)
            why = (
                f"{lengths[i]} is longer than the longest capacity, {self.capacities[i].listed[-1]}"
            )
        self._tell(why, lengths)
        return self._for(True, lengths, now), lengths

    def _for(self, exact: bool, capacities: list[int], now: dict[sympy.Symbol, int]) -> Program:
        middle = self._middles[exact]
        numbers = middle.numbers(capacities, now)
        for p in self._programs:
            if p.exact == exact and p.sized.holds(numbers):
                return p
        try:
            sized = middle.trace(numbers)
        except Exception as e:  # whatever an op raises of shapes that do not fit
            if exact:
                raise
            raise _NotTracedError(str(e)) from e
        placeholders = sized.gm.graph.find_nodes(op="placeholder")
        names = [self._called.get(n.name, n.name) for n in placeholders]
        notes = [*self._notes, *(self._note(i, c, now) for i, c in enumerate(capacities))]
        with own_tracing_context(sized.inputs):
            run = self._compile(sized.gm, sized.inputs, names, notes)
        self._programs.append(Program(exact, sized, run))
        return self._programs[-1]

    def _note(self, i: int, capacity: int, now: dict[sympy.Symbol, int]) -> Note:
        """What the report says of one length."""
        length, capacities = self._plan.lengths[i], self.capacities[i]
        first = next(
            n
            for n, placed in self._plan.placements.items()
            if any(isinstance(p, Shard) and length in p.seq.lengths for p in placed)
        )
        number = value_of(length, now)
        text = f"a length of {number} runs with a capacity of {capacity} ({capacities})"
        if capacities == OFF:
            text = f"a length of {number} runs as it is: no capacities are set for it"
        return Note(NoteKind.CAPACITY, first.name, str(first.target), text, source_line(first))

    def _tell(self, why: str, lengths: list[int]) -> None:
        if why in self._told:
            return
        self._told.add(why)
        warnings.warn(
            f"ascend_sp: lengths {lengths} run as they are, and not with a capacity (option "
            f"'buckets'): {why}. On Ascend each further length of this kind is captured anew.",
            stacklevel=3,
        )

    def _given(self, name: str, x: torch.Tensor, call: Call) -> torch.Tensor:
        """A value as the middle takes it: with a row for all that there is capacity for.

        Rows like real ones go through all that real ones go through: they become no NaN, and no
        index out of range, unless those do. Attention gives them a weight of zero.
        """
        if name not in self._fill:
            return x
        split = self._fill[name]
        if not isinstance(split, Shard):
            return x.contiguous()
        parts, start = [], 0
        for real, capacity in (call.rows[n] for n in split.seq.lengths):
            rows = x.narrow(split.dim, start, real)
            start += real
            parts.append(rows)
            if capacity > real:
                shape = list(x.shape)
                shape[split.dim] = capacity - real
                last = rows.narrow(split.dim, -1, 1) if real else x.new_zeros(())
                parts.append(last.expand(shape))
        filled = len(parts) > len(split.seq.lengths)
        return torch.cat(parts, split.dim) if filled else x.contiguous()


def _only_real(x: torch.Tensor, split: Any, call: Call) -> torch.Tensor:
    """The real rows of a result."""
    if not isinstance(split, Shard):
        return x
    rows = [call.rows[n] for n in split.seq.lengths]
    if all(real == capacity for real, capacity in rows):
        return x
    parts, start = [], 0
    for real, capacity in rows:
        parts.append(x.narrow(split.dim, start, real))
        start += capacity
    return parts[0].clone() if len(parts) == 1 else torch.cat(parts, split.dim)


class _NotTracedError(Exception):
    """A middle is not possible for some capacities."""


def _real_rows(capacity: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of the rows of a capacity are real."""
    return torch.arange(capacity, device=device) < length


def _outside(node: fx.Node, found: Plan) -> bool:
    """Whether a result is computed outside of the middle."""
    if node.op == "placeholder":
        return False
    return node in found.early or node in found.late or not tensors(node)


def _leaving(gm: fx.GraphModule, found: Plan) -> list[fx.Node]:
    """The values of the middle that are results, or that late nodes take."""
    late = found.late
    return [
        n
        for n in gm.graph.nodes
        if n.op in ("call_function", "get_attr")
        and not _outside(n, found)
        and any(u in late or u.op == "output" for u in n.users)
    ]


def _op_by_op(
    gm: fx.GraphModule, given: Sequence[fx.Node], wanted: Sequence[fx.Node]
) -> Callable[[dict[str, Any]], None]:
    """Computes `wanted` of `gm` among the values of a call."""
    if not wanted:
        return lambda values: None
    own = part(gm, given, wanted)
    keep_strides(own.gm)
    return own.run
