"""From the captured graph to something that runs: passes and lowering, target by target.

Each target of `targets.ladder` is tried in turn. One that this machine cannot use, or that cannot
take the graph, says why; a warning passes that on, and the next one is tried on a fresh copy.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ascend_sp.compiler import _pytorch, targets
from ascend_sp.compiler.blocks import watched
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.numerics.check import NumericCheck
from ascend_sp.compiler.pieces import Pieces
from ascend_sp.compiler.pipeline import compile_aten
from ascend_sp.compiler.report.diagnostics import Dump
from ascend_sp.compiler.report.facts import Collective, collectives
from ascend_sp.compiler.report.weights import weights
from ascend_sp.compiler.strides import Promised
from ascend_sp.compiler.targets import Runnable, Target
from ascend_sp.graph.border import border
from ascend_sp.graph.context import Note, NoteKind, PassContext, line_of, source_line
from ascend_sp.graph.origin import made_by
from ascend_sp.passes.keep_weights import KeptWeights
from ascend_sp.runtime import guards
from ascend_sp.runtime.errors import LoweringError
from ascend_sp.runtime.kept import with_wholes
from ascend_sp.runtime.memory import total_memory
from ascend_sp.runtime.ops import STARTS, WAIT
from ascend_sp.runtime.stopped import Op, Program


@dataclass(frozen=True)
class Lowered:
    """One rank's program, ready to run."""

    run: Runnable
    program: Program
    """What is in it, for its errors."""
    kept: KeptWeights
    """Weights that it keeps whole."""


@dataclass(frozen=True)
class Attempt:
    """What the passes make of a graph for one target."""

    target: Target
    ctx: PassContext
    """What they were told, and left."""
    program: fx.GraphModule
    last: bool
    """Whether no other target is left."""
    refused: str
    """What of the program the target cannot take; empty if nothing is known."""


class Attempts:
    """The targets of a ladder, best first, each with its program.

    Args:
        gm: the graph; the last attempt rewrites it, the others copies of it.
        ctx: what the passes are told, but for the target.
        config: options.
        dump: where passes and times are written.
        kind: device type that the ladder is for. If the graph was traced for another one, nothing
            is known of what targets lack or refuse.
        check: takes the program after each pass.
        warns: whether a warning says which target takes over, and why.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        config: Config,
        dump: Dump,
        *,
        kind: str,
        check: NumericCheck | None = None,
        warns: bool = True,
    ) -> None:
        self.gm, self.ctx, self.config, self.dump = gm, ctx, config, dump
        self.kind, self.check, self.warns = kind, check, warns
        self._refused: list[tuple[str, str]] = []

    def refuse(self, target: Target, why: str) -> None:
        """Say that `target` cannot take its program, so that the next one is tried."""
        self._refused.append((target.name, f"cannot take this graph: {why}"))

    def __iter__(self) -> Iterator[Attempt]:
        """One target after the other."""
        there = self.ctx.device == self.kind
        rungs = targets.ladder(self.config.target, self.kind)
        for target in rungs:
            if self._refused and self.warns:
                name, why = self._refused[-1]
                warnings.warn(f"ascend_sp: {name} {why}. {target.name} takes over.", stacklevel=3)
            lacks = target.missing(self.ctx.ascend) if there else None
            if lacks:
                self._refused.append((target.name, f"is not used: {lacks}"))
                continue
            last = target is rungs[-1]
            notes = (Note(NoteKind.TARGET, n, "lowering", why, "") for n, why in self._refused)
            ctx = replace(
                self.ctx,
                target=target.name,
                converts=target.converts if there else None,
                notes=[*self.ctx.notes, *notes],
                results=self.ctx.results.copy(),
            )
            program = self._passes(self.gm if last else _pytorch.copy_of(self.gm), ctx)
            why = "; ".join(target.refuses(program)) if there and not last else ""
            yield Attempt(target, ctx, program, last, why)

    def _passes(self, gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
        check = self.check
        if check is None:
            return compile_aten(gm, ctx, self.config, self.dump)
        check.restart(ctx.target)

        def record(name: str, gm: fx.GraphModule) -> None:
            check.record(name, gm, border(ctx))

        return compile_aten(gm, ctx, self.config, self.dump, after=record)


def lower(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    static_inputs: Sequence[int],
    ctx: PassContext,
    config: Config,
    dump: Dump,
    pieces: Pieces,
    check: NumericCheck | None = None,
) -> Lowered:
    """Compile `gm` for this rank, by the first target that takes it.

    All ranks try the same targets in the same order, since they have the same program and the same
    versions; after each try they compare how it went, so that none goes on alone.

    Raises:
        RankMismatchError: the ranks do not come out with the same collectives.
        UnshardedError: nothing is split, or it does not pay, and ``on_unsharded="error"``.
    """
    attempts = Attempts(gm, ctx, config, dump, kind=ctx.device, check=check)
    promised = Promised(gm)  # before a pass rewrites it
    for a in attempts:
        pieces.tell(dump.number, a.ctx)
        found = collectives(a.program)
        rows = _rows(found)
        program = Program(_calls(a.program, found), _ops(a.program), _memory(a))
        run: Runnable | None = None
        why = a.refused
        if not why:
            dump.finish(a.program, a.ctx, config.described())
            with dump.timed("lowering"):
                run, why = _lower(a, inputs, static_inputs)
        if config.check_ranks:
            with dump.timed("check_ranks"):
                facts = {"target": a.target.name, "refused": why, "collectives": rows}
                guards.agree(ctx.topology, facts, config.check_timeout, guards.ORDER)
        if run is not None:
            run = watched(promised.kept_by(run), pieces.name, static_inputs, a.ctx)
            return Lowered(run, program, _kept(a.ctx))
        attempts.refuse(a.target, why)
    raise AssertionError("the last target takes every graph")


def _rows(found: list[Collective]) -> list[str]:
    """What this rank does together with the others, in order."""
    return [f"{_payload(r)}, {r.origin}" for r in found]


def _payload(row: Collective) -> str:
    return f"{row.name} of {row.numel} {row.dtype}"


def _calls(gm: fx.GraphModule, found: list[Collective]) -> list[tuple[str, str]]:
    rows = {r.name: _payload(r) for r in found}
    out = []
    for node in gm.graph.nodes:
        if node.target in STARTS:
            where = source_line(node)
            rows[node.name] += f" ({made_by(node)}{', at ' if where else ''}{where})"
            out.append((node.target._opname, rows[node.name]))
        elif node.target is WAIT:
            (started,) = node.all_input_nodes
            out.append((WAIT._opname, rows.get(started.name, started.name)))
    return out


def _memory(a: Attempt) -> Callable[[], str]:
    """What to say if the program does not fit."""
    facts, device = weights(a.program, a.ctx), a.ctx.device
    return lambda: facts.remedy(total_memory(device)) if facts is not None else ""


def _ops(gm: fx.GraphModule) -> Callable[[str], Op | None]:
    """The other ops by name; of the nodes, which targets change, only what is needed is kept."""
    known = {
        n.name: (n.target, made_by(n), n.meta.get("stack_trace"))
        for n in gm.graph.nodes
        if n.op == "call_function"
    }

    def op(name: str) -> Op | None:
        if name not in known:
            return None
        target, origin, trace = known[name]
        # An op is PyTorch's, or of a library; a function may be of a user's pass, and do anything.
        function = inspect.isfunction(target)
        made = f", made by {origin}" if origin else ""
        place = line_of(trace)
        text = f"{name} ({target.__name__ if function else target}{made})"
        return Op(text + (f", at {place}" if place else ""), not function)

    return op


def _lower(
    a: Attempt, inputs: Sequence[Any], static_inputs: Sequence[int]
) -> tuple[Runnable | None, str]:
    """What runs, or why it could not be lowered."""
    crossing, kept, topology = border(a.ctx), _kept(a.ctx), a.ctx.topology
    more = [n.meta["val"] for n in kept.nodes]
    static = [*static_inputs, *range(len(inputs), len(inputs) + len(more))]
    places = {n.name: i for i, n in enumerate(a.program.graph.find_nodes(op="placeholder"))}
    parts = [places[name] for name in kept.parameters]
    try:
        run = a.target.lower(a.program, [*crossing.real_inputs(inputs), *more], static)
    except LoweringError as e:
        if a.last:
            raise
        return None, e.reason
    return with_wholes(crossing.wrap(run), parts, topology.group_name, topology.size), ""


def _kept(ctx: PassContext) -> KeptWeights:
    return ctx.results.get(KeptWeights) or KeptWeights({}, ())
