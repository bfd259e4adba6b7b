"""Within the room that there is, weights whose gathers cost the most are gathered once and kept.

Of the weights that a graph gathers, `shard_weights` may allow so many bytes to stay whole. Worth it
first are those whose gathers the device would stand still for, by the scheduler's estimate of the
whole step: the longest wait a byte first, in several rounds, since a link that is relieved in one
place is free for what comes behind. What room is left then goes to those whose gathers take the
longest for their bytes. They become inputs of the program, which gathers them in its first run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.cost.estimate import bytes_of
from ascend_sp.graph.emitter import as_shape_of
from ascend_sp.graph.layout import GLOBAL_SHAPES, PLACEMENTS, REPLICATE
from ascend_sp.graph.parts import Gather, gathers
from ascend_sp.passes.overlap.packing import Trial
from ascend_sp.passes.overlap.scheduler import Run, Task, schedule, simulate

ROUNDS = 16
"""How often the step is estimated anew."""


@dataclass(frozen=True)
class KeptWeights:
    """Parameters that a program keeps whole, in the order of the inputs that it has for them."""

    parameters: Mapping[str, int]
    """By the name of the placeholder of this rank's part: bytes that the whole takes besides it."""
    nodes: tuple[fx.Node, ...]
    """The inputs."""


def keep_weights(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Make inputs of weights that are worth their room, in the place of their gathers."""
    found: dict[str, list[Gather]] = {}
    for g in gathers(gm.graph, ctx):
        found.setdefault(g.parameter.name, []).append(g)
    free = [name for name in found if name in ctx.kept_inputs]
    chosen = _chosen(gm, found, free, ctx) if found and ctx.room > 0 else []
    names = [*free, *chosen]
    if not names:
        return gm
    nodes = tuple(_input(gm.graph, found[name]) for name in names)
    ctx.static_inputs |= {n.name for n in nodes}
    ctx.results.put(KeptWeights({name: _more(found[name]) for name in names}, nodes))
    return gm


def _more(same: Sequence[Gather]) -> int:
    """Bytes of the whole that a rank does not have."""
    size: Any = same[0].start.args[1]
    return (size - 1) * bytes_of(same[0].parameter.meta["val"])


def _chosen(
    gm: fx.GraphModule,
    found: Mapping[str, Sequence[Gather]],
    free: Collection[str],
    ctx: PassContext,
) -> list[str]:
    trial = Trial(gm, ctx)
    tasks = trial.program.tasks
    starts = {name: [trial.index[g.start] for g in same] for name, same in found.items()}
    more = {name: _more(same) for name, same in found.items()}
    left, chosen = ctx.room, list[str]()
    for round_ in range(ROUNDS + 1):
        fit = [n for n in found if n not in free and n not in chosen and more[n] <= left]
        if not fit:
            break
        gone = {t for n in (*free, *chosen) for t in starts[n]}
        waits = _waits(tasks, gone, ctx.overlap) if round_ < ROUNDS else {}
        exposed = {n: sum(waits.get(t, 0.0) for t in starts[n]) for n in fit}
        link = {n: sum(tasks[t].seconds for t in starts[n]) for n in fit}
        # Half of what is exposed, then another look: one gather less shortens the wait of others.
        goal = sum(exposed.values()) / 2
        worth = exposed if goal > 0 else link
        for name in sorted(fit, key=lambda n: worth[n] / max(1, more[n]), reverse=True):
            if more[name] <= left:
                chosen.append(name)
                left -= more[name]
                goal -= link[name] if worth is exposed else 0.0
                if worth is exposed and goal <= 0:
                    break
    return chosen


def _waits(tasks: Sequence[Task], gone: Collection[int], overlap: bool) -> dict[int, float]:
    """Seconds that the device stands still for each transfer, those of `gone` left out."""
    rest = [
        replace(t, seconds=0.0, transfer=False, work=0.0, holds=0) if i in gone else t
        for i, t in enumerate(tasks)
    ]
    run: Run = simulate(rest, schedule(rest) if overlap else range(len(rest)))
    waits: dict[int, float] = defaultdict(float)
    for stall in run.stalls:
        waits[stall.transfer] += stall.seconds
    return waits


def _input(graph: fx.Graph, same: Sequence[Gather]) -> fx.Node:
    """An input in the place of all gathers of one parameter."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        new = graph.placeholder(f"{same[0].parameter.name}_kept")
    val: Any = same[0].whole.meta["val"]
    new.meta.update(
        {"val": val, PLACEMENTS: (REPLICATE,), GLOBAL_SHAPES: (as_shape_of(same[0].whole),)}
    )
    for g in same:
        g.whole.replace_all_uses_with(new)
        g.erase_unused(graph)
    return new
