"""Collectives start as early, and are waited for as late, as the data allows (Async Ulysses).

The order is `overlap/scheduler.py`'s; here it is tried on the graph. The estimates that it stands
on leave out what only some ranks have (padding, offsets), so that all ranks start collectives in
one order; the compiler compares that afterwards. If the results that live at once would grow by
more than the memory budget, less is done ahead.
"""

from __future__ import annotations

from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.cost.estimate import Estimator
from ascend_sp.passes.overlap.memory import Memory, made_of_weights
from ascend_sp.passes.overlap.saving import saving
from ascend_sp.passes.overlap.scheduler import WINDOW, in_turn, schedule, simulate
from ascend_sp.passes.overlap.tasks import (
    alike_on_all_ranks,
    neutral_seconds,
    nodes_in,
    program,
    relink,
)
from ascend_sp.passes.overlap.timeline import Timelines, timeline


def schedule_collectives(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Reorder the nodes of `gm`; what they compute stays the same."""
    given = list(gm.graph.nodes)
    neutral = ctx.estimator(fuses=False)
    best, limited, step = _ordered(given, ctx, neutral)
    ctx.results.put(saving(best, step, neutral))
    estimator = ctx.estimator()
    first = timeline(given, estimator, made=False, limited=False)
    relink(best)
    memory = Memory(given)
    ctx.results.put(
        Timelines(
            first,
            timeline(best, estimator, made=ctx.overlap, limited=limited),
            estimator.device.name,
            memory.peak(given),
            memory.peak(best),
            ctx.memory_budget,
            limited,
            ctx.overlap,
        )
    )
    return gm


def _ordered(
    given: list[fx.Node], ctx: PassContext, neutral: Estimator
) -> tuple[list[fx.Node], bool, float]:
    """The order that hides most within the budget, whether the budget ruled out another, its step.

    Every rank comes to the same: what it may not share with the others costs neither time nor
    memory here.
    """
    p = program(given, neutral_seconds(neutral), neutral, ctx.fuses, ctx.static_inputs)
    as_given = simulate(p.tasks, range(len(p.tasks))).makespan
    if not ctx.overlap:
        return given, False, as_given
    # Of weights that are gathered the scheduler keeps no more than two, whatever the window.
    weights = made_of_weights(given, ctx.static_inputs)
    memory = Memory(given, lambda n: n not in weights and alike_on_all_ranks(n))
    allowed = memory.peak(given) * (1 + ctx.memory_budget)
    limited = False
    for window in (WINDOW, WINDOW // 8, 0):
        order = schedule(p.tasks, window)
        step = simulate(p.tasks, order).makespan
        if step > as_given:
            continue
        nodes = nodes_in(order, p)
        if memory.peak(nodes) <= allowed:
            return nodes, limited, step
        limited = True
    if any(t.holds for t in p.tasks):
        order = in_turn(p.tasks)
        return nodes_in(order, p), limited, simulate(p.tasks, order).makespan
    return given, limited, as_given
