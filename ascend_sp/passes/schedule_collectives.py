"""Collectives start as early, and are waited for as late, as the data allows (Async Ulysses).

The order is `overlap/scheduler.py`'s; here it is tried on the graph. The estimates that it stands
on leave out what only some ranks have (padding, offsets), so that all ranks start collectives in
one order; the compiler compares that afterwards. If the results that live at once would grow by
more than the memory budget, less is done ahead.
"""

from __future__ import annotations

from torch import fx

from ascend_sp.passes.context import PassContext
from ascend_sp.passes.overlap.memory import Memory
from ascend_sp.passes.overlap.scheduler import WINDOW, schedule, simulate
from ascend_sp.passes.overlap.tasks import alike_on_all_ranks, nodes_in, program, relink
from ascend_sp.passes.overlap.timeline import TIMELINES, Timelines, timeline


def schedule_collectives(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Reorder the nodes of `gm`; what they compute stays the same."""
    given = list(gm.graph.nodes)
    memory = Memory(given)
    before = memory.peak(given)
    limited = False
    best, after = given, before
    if ctx.overlap:
        neutral = ctx.estimator(fuses=False)
        p = program(
            given,
            lambda n: neutral.seconds(n) if alike_on_all_ranks(n) else 0.0,
            neutral.transfer,
            ctx.fuses,
        )
        as_given = simulate(p.tasks, range(len(p.tasks))).makespan
        for window in (WINDOW, WINDOW // 8, 0):
            order = schedule(p.tasks, window)
            if simulate(p.tasks, order).makespan > as_given:
                continue
            nodes = nodes_in(order, p)
            needed = memory.peak(nodes)
            if needed <= before * (1 + ctx.memory_budget):
                best, after = nodes, needed
                break
            limited = True
    estimator = ctx.estimator()
    first = timeline(given, estimator, made=False, limited=False)
    relink(best)
    ctx.analysis[TIMELINES] = Timelines(
        first,
        timeline(best, estimator, made=ctx.overlap, limited=limited),
        estimator.device.name,
        before,
        after,
        ctx.memory_budget,
        limited,
        ctx.overlap,
    )
    return gm
