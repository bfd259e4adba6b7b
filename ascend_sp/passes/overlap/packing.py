"""Operations of a program that become one, as tasks for the scheduler, and what that would gain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.passes.overlap.scheduler import Task, schedule, simulate
from ascend_sp.passes.overlap.tasks import Program, neutral_seconds, program


@dataclass(frozen=True)
class Packed:
    """Some of a list of tasks, none of which needs another, and what replaces them."""

    members: tuple[int, ...]
    """In program order."""
    steps: tuple[Task, ...]
    """What is done instead, one after the other; `needs` are left empty."""


def with_packed(
    tasks: Sequence[Task], packed: Iterable[Packed]
) -> tuple[list[Task], dict[int, int]]:
    """`tasks` with those of each of `packed` made one, in the place of its last member.

    What needs an earlier member stands behind it then.

    Returns:
        The new tasks, and where each of the old ones is; a member is the last step.
    """
    group_of = {t: p for p in packed for t in p.members}
    out: list[Task] = []
    new: dict[int, int] = {}
    late: list[int] = []

    def add(task: Task, needs: Iterable[int]) -> int:
        out.append(replace(task, needs=tuple(sorted(set(needs)))))
        return len(out) - 1

    for i in range(len(tasks)):
        group = group_of.get(i)
        if group is not None and i != group.members[-1]:
            continue
        if group is None:
            late.append(i)
        else:
            needs = {new[n] for m in group.members for n in tasks[m].needs}
            holds = sum(tasks[m].holds for m in group.members)
            for step in group.steps:
                needs = {add(replace(step, holds=holds) if step.transfer else step, needs)}
            new.update(dict.fromkeys(group.members, *needs))
        left = []
        for t in late:
            if all(n in new for n in tasks[t].needs):
                new[t] = add(tasks[t], (new[n] for n in tasks[t].needs))
            else:
                left.append(t)
        late = left
    return out, new


class Trial:
    """Estimated steps of a graph with some of its operations packed; all ranks come to the same."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.estimator = ctx.estimator(fuses=False)

    @cached_property
    def program(self) -> Program:
        """The graph as it is."""
        e = self.estimator
        ctx = self.ctx
        nodes = self.gm.graph.nodes
        return program(nodes, neutral_seconds(e), e, ctx.fuses, ctx.static_inputs)

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        """The task of each node that is one."""
        return {n: i for i, n in enumerate(self.program.node_of)}

    @cached_property
    def apart(self) -> tuple[float, dict[int, float]]:
        """What `step` says if nothing is packed."""
        return self.step([])

    def step(self, packed: Sequence[Packed]) -> tuple[float, dict[int, float]]:
        """Estimated seconds of a step, and when the device comes to each task of the graph."""
        tasks, new = with_packed(self.program.tasks, packed)
        order = schedule(tasks) if self.ctx.overlap else range(len(tasks))
        run = simulate(tasks, order)
        return run.makespan, {i: run.reached[t] for i, t in new.items()}
