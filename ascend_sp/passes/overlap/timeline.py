"""What a program comes to in time, by estimate: both resources, and why transfers are exposed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_sp.graph.context import source_line
from ascend_sp.graph.cost.estimate import Estimator
from ascend_sp.passes.overlap.scheduler import Run, Task, simulate, waits
from ascend_sp.passes.overlap.tasks import program


@dataclass(frozen=True)
class Transfer:
    """One collective, by estimate; times in seconds."""

    node: fx.Node
    seconds: float
    exposed: float
    """How long the device stands still for it."""
    why: str
    """Why that could not be hidden; empty if nothing is exposed."""


@dataclass(frozen=True)
class Timeline:
    """An order of one rank's program on its two resources."""

    tasks: Sequence[Task]
    run: Run
    nodes: Sequence[fx.Node]
    """Of each task."""
    transfers: tuple[Transfer, ...]

    @property
    def seconds(self) -> float:
        """Length of a step."""
        return self.run.makespan

    @property
    def compute(self) -> float:
        """Seconds in which the device computes."""
        return sum(t.work if t.transfer else t.seconds for t in self.tasks)

    @property
    def travel(self) -> float:
        """Seconds in which the link transfers."""
        return sum(t.seconds for t in self.transfers)

    @property
    def exposed(self) -> float:
        """Seconds in which the device stands still."""
        return sum(t.exposed for t in self.transfers)

    @property
    def hidden(self) -> float:
        """Share of the link's time in which the device does not stand still."""
        return 1 - self.exposed / self.travel if self.travel else 1.0

    @property
    def waits(self) -> float:
        """Share of a step in which the device stands still."""
        return self.exposed / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Totals:
    """Estimates of a step before and after its order was made: seconds, shares, bytes."""

    device: str
    """Whose rates the estimates are from."""
    made: bool
    """Whether an order was made."""
    budget: float
    """Share by which the peak of memory might have grown."""
    limited: bool
    """Whether that ruled out a faster order."""
    step_before: float
    step_after: float
    compute_before: float
    compute_after: float
    travel_before: float
    travel_after: float
    hidden_before: float
    hidden_after: float
    waits_before: float
    waits_after: float
    peak_before: int
    peak_after: int


@dataclass(frozen=True)
class Timelines:
    """The program before and after its order was made."""

    before: Timeline
    after: Timeline
    device: str
    """Whose rates the estimates are from."""
    peak_before: int
    peak_after: int
    """Bytes of intermediate results at once, at most, by estimate."""
    budget: float
    """Share by which the peak might have grown."""
    limited: bool
    """Whether the budget ruled out a faster order."""
    made: bool
    """Whether an order was made."""

    def totals(self) -> Totals:
        """Sums over both orders."""
        old, new = self.before, self.after
        return Totals(
            device=self.device,
            made=self.made,
            budget=self.budget,
            limited=self.limited,
            step_before=old.seconds,
            step_after=new.seconds,
            compute_before=old.compute,
            compute_after=new.compute,
            travel_before=old.travel,
            travel_after=new.travel,
            hidden_before=old.hidden,
            hidden_after=new.hidden,
            waits_before=old.waits,
            waits_after=new.waits,
            peak_before=self.peak_before,
            peak_after=self.peak_after,
        )


def timeline(
    nodes: Iterable[fx.Node], estimator: Estimator, *, made: bool, limited: bool
) -> Timeline:
    """The timeline of one rank's nodes in the order given.

    Args:
        nodes: of the whole graph.
        estimator: costs.
        made: whether the order was made to hide transfers; else that is why some are exposed.
        limited: whether memory ruled out a faster order.
    """
    p = program(nodes, estimator.seconds, estimator, estimator.fuses)
    run = simulate(p.tasks, range(len(p.tasks)))
    exposed: dict[int, float] = defaultdict(float)
    for stall in run.stalls:
        exposed[stall.transfer] += stall.seconds
    reasons = _reasons(p.tasks, run, made, limited)
    transfers = tuple(
        Transfer(p.node_of[i], t.seconds, exposed[i], reasons.get(i, ""))
        for i, t in enumerate(p.tasks)
        if t.transfer
    )
    return Timeline(p.tasks, run, p.node_of, transfers)


def _reasons(tasks: Sequence[Task], run: Run, made: bool, limited: bool) -> dict[int, str]:
    """Why the device stood still, for each transfer that it stood still for."""
    bit, masks = waits(tasks)
    out = {}
    for stall in run.stalls:
        transfer, place = stall.transfer, stall.needed_by
        end = run.ends[transfer]
        covered = sum(
            t.seconds
            for i, t in enumerate(tasks[transfer + 1 : place], transfer + 1)
            if not t.transfer and run.begins[i] >= run.begins[transfer]
        )
        flying = sum(b for t, b in bit.items() if run.ends[t] > end - stall.seconds or t >= place)
        later = enumerate(tasks[place:], place)
        idle = [t for i, t in later if t.fills and not masks[i] & flying]
        if not made:
            out[transfer] = "nothing was moved: async is off"
        elif idle and limited:
            out[transfer] = f"memory budget: {idle[0].name} would have to be kept"
        elif covered:
            out[transfer] = (
                f"no more independent work: {covered / (covered + stall.seconds):.0%} is covered"
            )
        else:
            out[transfer] = f"dependency: {tasks[place].name} and all behind it need it"
    return out


def chrome_trace(timelines: Timelines) -> dict[str, Any]:
    """Both orders as a trace for Perfetto or chrome://tracing; ``ts`` in microseconds.

    The format is Google's Trace Event Format, complete events (``ph: X``).
    """
    events: list[dict[str, Any]] = []
    for pid, (name, line) in enumerate(
        (
            ("before: as the program has it", timelines.before),
            ("after: as compiled", timelines.after),
        ),
        1,
    ):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        for tid, resource in enumerate(("device", "link"), 1):
            events.append(
                {
                    "ph": "M",
                    "pid": pid,
                    "tid": tid,
                    "name": "thread_name",
                    "args": {"name": resource},
                }
            )
        why = {t.node: t for t in line.transfers}
        for i, task in enumerate(line.tasks):
            node = line.nodes[i]
            args = {"node": node.name, "op": str(node.target), "source": source_line(node)}
            if node in why:
                args |= {"exposed us": f"{why[node].exposed * 1e6:.1f}", "why": why[node].why}
            events.append(
                _event(
                    pid,
                    2 if task.transfer else 1,
                    task.name,
                    line.run.begins[i],
                    task.seconds,
                    args,
                )
            )
            if task.work:
                at = line.run.reached[i]
                events.append(_event(pid, 1, f"start {task.name}", at, task.work, args))
        for stall in line.run.stalls:
            end = line.run.ends[stall.transfer]
            waits_for = line.tasks[stall.transfer].name
            events.append(
                _event(
                    pid,
                    1,
                    f"wait for {waits_for}",
                    end - stall.seconds,
                    stall.seconds,
                    {},
                    "terrible",
                )
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(
    pid: int,
    tid: int,
    name: str,
    begin: float,
    seconds: float,
    args: dict[str, Any],
    color: str = "",
) -> dict[str, Any]:
    event: dict[str, Any] = {"ph": "X", "pid": pid, "tid": tid, "name": name, "args": args}
    event |= {"ts": begin * 1e6, "dur": seconds * 1e6}
    return event | {"cname": color} if color else event
