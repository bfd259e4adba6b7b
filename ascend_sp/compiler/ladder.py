"""From the captured graph to something that runs: passes and lowering, target by target.

Each target of `targets.ladder` is tried in turn. One that this machine cannot use, or that cannot
take the graph, says why; a warning passes that on, and the next one is tried on a fresh copy.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ascend_sp.compiler import _pytorch, targets
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.diagnostics import Dump
from ascend_sp.compiler.numerics import NumericCheck
from ascend_sp.compiler.pipeline import compile_aten
from ascend_sp.compiler.report import collectives
from ascend_sp.compiler.strides import Promised
from ascend_sp.compiler.targets import Runnable, Target
from ascend_sp.passes.border import border
from ascend_sp.passes.context import Note, PassContext, line_of, source_line
from ascend_sp.passes.emitter import ORIGIN
from ascend_sp.runtime import guards
from ascend_sp.runtime.collectives import STARTS, WAIT
from ascend_sp.runtime.errors import LoweringError
from ascend_sp.runtime.stopped import Op, Program


@dataclass(frozen=True)
class Lowered:
    """One rank's program, ready to run."""

    run: Runnable
    program: Program
    """What is in it, for its errors."""


def lower(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    static_inputs: Sequence[int],
    ctx: PassContext,
    config: Config,
    dump: Dump,
    check: NumericCheck | None = None,
) -> Lowered:
    """Compile `gm` for this rank, by the first target that takes it.

    All ranks try the same targets in the same order, since they have the same program and the same
    versions; after each try they compare how it went, so that none goes on alone.

    Raises:
        RankMismatchError: the ranks do not come out with the same collectives.
    """
    rungs = targets.ladder(config.target, ctx.device)
    promised = Promised(gm)
    refused: list[tuple[str, str]] = []
    for target in rungs:
        if refused:
            name, why = refused[-1]
            warnings.warn(f"ascend_sp: {name} {why}. {target.name} takes over.", stacklevel=2)
        last = target is rungs[-1]
        own = replace(
            ctx,
            target=target.name,
            converts=target.converts,
            notes=[*ctx.notes, *(Note("target", name, "lowering", w, "") for name, w in refused)],
            analysis=dict(ctx.analysis),
        )
        lacks = target.missing(ctx.ascend)
        if lacks:
            refused.append((target.name, f"is not used: {lacks}"))
            continue
        attempt = _pass_by_pass(gm if last else _pytorch.copy_of(gm), own, config, dump, check)
        found = collectives(attempt)
        rows, program = _rows(found), Program(_calls(attempt, found), _ops(attempt))
        why = "" if last else "; ".join(target.refuses(attempt))
        run: Runnable | None = None
        if not why:
            dump.finish(attempt, own, config.described())
            with dump.timed("lowering"):
                run, why = _lower(target, attempt, inputs, static_inputs, own, last)
        if config.check_ranks:
            with dump.timed("check_ranks"):
                facts = {"target": target.name, "refused": why, "collectives": rows}
                guards.agree(ctx.topology, facts, config.check_timeout, guards.ORDER)
        if run is not None:
            return Lowered(promised.kept_by(run), program)
        refused.append((target.name, f"cannot take this graph: {why}"))
    raise AssertionError("the last target takes every graph")


def _pass_by_pass(
    gm: fx.GraphModule, ctx: PassContext, config: Config, dump: Dump, check: NumericCheck | None
) -> fx.GraphModule:
    if check is None:
        return compile_aten(gm, ctx, config, dump)
    check.restart(ctx.target)
    return compile_aten(
        gm, ctx, config, dump, after=lambda name, gm: check.record(name, gm, border(ctx))
    )


def _rows(found: list[dict[str, Any]]) -> list[str]:
    """What this rank does together with the others, in order."""
    return [f"{_payload(r)}, {r['origin']}" for r in found]


def _payload(row: dict[str, Any]) -> str:
    return f"{row['name']} of {row['numel']} {row['dtype']}"


def _calls(gm: fx.GraphModule, found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = {r["name"]: _payload(r) for r in found}
    out = []
    for node in gm.graph.nodes:
        if node.target in STARTS:
            where = source_line(node)
            rows[node.name] += f" ({node.meta.get(ORIGIN, '')}{', at ' if where else ''}{where})"
            out.append((node.target._opname, rows[node.name]))
        elif node.target is WAIT:
            (started,) = node.all_input_nodes
            out.append((WAIT._opname, rows.get(started.name, started.name)))
    return out


def _ops(gm: fx.GraphModule) -> Callable[[str], Op | None]:
    """The other ops by name; of the nodes, which targets change, only what is needed is kept."""
    known = {
        n.name: (n.target, n.meta.get(ORIGIN, ""), n.meta.get("stack_trace"))
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
    target: Target,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    static_inputs: Sequence[int],
    ctx: PassContext,
    last: bool,
) -> tuple[Runnable | None, str]:
    """What runs, or why it could not be lowered."""
    crossing = border(ctx)
    try:
        return crossing.wrap(target.lower(gm, crossing.real_inputs(inputs), static_inputs)), ""
    except LoweringError as e:
        if last:
            raise
        return None, e.reason
