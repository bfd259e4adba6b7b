"""Transfers of a program that become one, as tasks for the scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ascend_sp.passes.overlap.scheduler import Task


@dataclass(frozen=True)
class Packed:
    """Some transfers of a list of tasks, none of which needs another, and what replaces them."""

    members: tuple[int, ...]
    """In program order."""
    steps: tuple[Task, ...]
    """What is done instead, one after the other; `needs` are left empty."""


def with_packed(
    tasks: Sequence[Task], packed: Iterable[Packed]
) -> tuple[list[Task], dict[int, int]]:
    """`tasks` with transfers made one, each in the place of its last member.

    What needs an earlier member stands behind the one transfer then.

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
            for step in group.steps:
                needs = {add(step, needs)}
            new.update(dict.fromkeys(group.members, *needs))
        left = []
        for t in late:
            if all(n in new for n in tasks[t].needs):
                new[t] = add(tasks[t], (new[n] for n in tasks[t].needs))
            else:
                left.append(t)
        late = left
    return out, new
