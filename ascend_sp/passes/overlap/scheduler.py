"""A list scheduler over two resources: the device, which computes, and the link, which transfers.

Both do one thing after another, in the order of the program; a transfer begins when the program
reaches it and the link is free, and whatever needs it waits for its end. Some links need the device
to move the data (sockets and the CPU): that is the work of a transfer. Nothing here knows FX:
tasks are numbers, and the same tasks give the same order on every rank.

Order is made in two steps. **By demand**: before each transfer stands only what it needs, and of
the transfers of one attention the one that needs the least work goes first, so that it travels
while the others are computed (the rule of Johnson, "Optimal two- and three-stage production
schedules with setup times included", 1954, where transfers are no shorter than that work).
**Backfill**: where the device would stand still, later work that waits for nothing is done (as in
batch queues: Lifka, "The ANL/IBM SP scheduling system", 1995).

Transfers that gather **weights** wait for nothing, so the question is not how early they can begin
but how late. They go in the order in which they are needed, each when the link would stand still
before the next operation has ended, and while there is room: what is gathered is held until its
last use. Room are the two largest, one that is in use and one that travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

WINDOW = 64
"""How many fillable tasks further down backfill looks at: two blocks or so. What is done early
keeps its result in memory."""


@dataclass(frozen=True)
class Task:
    """One operation, in program order; `needs` are indices of earlier tasks."""

    name: str
    seconds: float
    needs: tuple[int, ...] = ()
    transfer: bool = False
    """Runs on the link."""
    work: float = 0.0
    """Seconds that a transfer takes of the device besides, at its start."""
    serves: str = ""
    """What the transfers of one attention have in common."""
    fills: bool = False
    """May be done ahead of its turn."""
    holds: int = 0
    """Bytes that it keeps in memory up to their last use, if it is a transfer of weights."""


@dataclass(frozen=True)
class Stall:
    """A transfer that the device stood still for."""

    transfer: int
    seconds: float
    needed_by: int
    """The task that could not go on."""


@dataclass(frozen=True)
class Run:
    """What an order comes to, by the estimates of its tasks. Times are seconds from the start."""

    reached: tuple[float, ...]
    """When the device came to each task: a transfer then begins when the link is free."""
    begins: tuple[float, ...]
    ends: tuple[float, ...]
    stalls: tuple[Stall, ...]

    @property
    def makespan(self) -> float:
        """When everything has ended."""
        return max(self.ends, default=0.0)

    @property
    def exposed(self) -> float:
        """Seconds in which the device stands still for the link."""
        return sum(s.seconds for s in self.stalls)


def simulate(tasks: Sequence[Task], order: Iterable[int]) -> Run:
    """Run `tasks` in `order` on the two resources."""
    clock = _Clock(tasks)
    for t in order:
        clock.run(t)
    return Run(tuple(clock.reached), tuple(clock.begins), tuple(clock.ends), tuple(clock.stalls))


def schedule(tasks: Sequence[Task], window: int = WINDOW) -> list[int]:
    """An order of all `tasks` that hides transfers; 0 for `window` leaves backfill out."""
    return _Scheduler(tasks, window, by_demand(tasks), eager=True).run()


def in_turn(tasks: Sequence[Task]) -> list[int]:
    """`tasks` as they are, but for weights, which are gathered as late as hides them."""
    return _Scheduler(tasks, 0, range(len(tasks)), eager=False).run()


class _Clock:
    """The two resources."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.now = self.link = 0.0
        self.reached = [0.0] * len(tasks)
        self.begins = [0.0] * len(tasks)
        self.ends = [0.0] * len(tasks)
        self.stalls: list[Stall] = []
        self.transfers_of = [tuple(n for n in t.needs if tasks[n].transfer) for t in tasks]

    def wait_of(self, t: int) -> tuple[float, int]:
        """How long task `t` would have to wait now, and for which transfer."""
        last = max(self.transfers_of[t], key=lambda n: self.ends[n], default=None)
        if last is None or self.ends[last] <= self.now:
            return 0.0, -1
        return self.ends[last] - self.now, last

    def run(self, t: int) -> None:
        task = self.tasks[t]
        # In the order in which they arrive, so that each second is one transfer's.
        for n in sorted(self.transfers_of[t], key=lambda n: self.ends[n]):
            if self.ends[n] > self.now:
                self.stalls.append(Stall(n, self.ends[n] - self.now, t))
                self.now = self.ends[n]
        self.reached[t] = self.now
        begin = max(self.now, self.link) if task.transfer else self.now
        self.begins[t], self.ends[t] = begin, begin + task.seconds
        if task.transfer:
            self.link = self.ends[t]
            self.now += task.work
        else:
            self.now = self.ends[t]


class _Scheduler:
    def __init__(
        self, tasks: Sequence[Task], window: int, base: Sequence[int], *, eager: bool
    ) -> None:
        self.tasks, self.window = tasks, window
        self.clock = _Clock(tasks)
        self.order: list[int] = []
        self.done = bytearray(len(tasks))
        self.weights = _Weights(tasks)
        self.place = {t: i for i, t in enumerate(base)}
        # What makes weights whole has an order of its own: as they are needed.
        self.queue = [t for t in base if tasks[t].holds]
        self.base = [t for t in base if t not in self.weights.made]
        self.fillers = [t for t in self.base if tasks[t].fills]
        self.first_filler = 0
        self.in_flight: list[int] = []
        self.arrived = 0
        self.bit, self.waits = waits(tasks)
        self.missing = [len(t.needs) for t in tasks]
        self.starts_of: list[list[int]] = [[] for _ in tasks]
        for i, task in enumerate(tasks):
            begins = eager and task.transfer and not task.holds
            if begins and not self.clock.transfers_of[i]:
                for n in task.needs:
                    self.starts_of[n].append(i)

    def run(self) -> list[int]:
        for t in self.base:
            if self.done[t]:
                continue
            self._gather_for(t)
            self._fill_before(t)
            self._do(t)
        for t in range(len(self.tasks)):
            if not self.done[t]:  # weights that nothing needs
                self._append(t)
        return self.order

    def _fill_before(self, t: int) -> None:
        while self.window:
            gap, _ = self.clock.wait_of(t)
            filler = self._filler(gap) if gap > 0 else None
            if not filler:
                return
            for x in filler:
                if not self.done[x]:
                    self._do(x)

    def _filler(self, gap: float) -> list[int] | None:
        """Work to do in `gap` seconds: what covers most of it, and of that the shortest."""
        self._land()
        while self.first_filler < len(self.fillers) and self.done[self.fillers[self.first_filler]]:
            self.first_filler += 1
        best: tuple[float, float] = (0.0, 0.0)
        found = None
        seen = 0
        for t in self.fillers[self.first_filler :]:
            if self.done[t]:
                continue
            seen += 1
            if seen > self.window:
                break
            if self.waits[t] & ~self.arrived:
                continue
            work = sorted(_needed(self.tasks, t, self.done), key=self.place.__getitem__)
            seconds = sum(self.tasks[x].seconds for x in work)
            score = (min(seconds, gap), -seconds)
            if seconds > 0 and score > best:
                best, found = score, work
        return found

    def _land(self) -> None:
        now = self.clock.now
        landed = [t for t in self.in_flight if self.clock.ends[t] <= now]
        for t in landed:
            self.arrived |= self.bit[t]
            self.in_flight.remove(t)

    def _gather_for(self, t: int) -> None:
        """Begin with all weights that `t` needs."""
        for x in sorted(_needed(self.tasks, t, self.done), key=self.place.__getitem__):
            if x in self.weights.made and not self.done[x]:
                self._append(x)

    def _gather_ahead(self, t: int) -> None:
        """Begin with weights that are needed later, so that the link has work while `t` runs."""
        gap, _ = self.clock.wait_of(t)
        end = self.clock.now + gap + self.tasks[t].seconds
        while self.queue and self.clock.link < end:
            weight = self.queue[0]
            if not self.done[weight]:
                if not self.weights.fits(weight):
                    return
                self._gather_for(weight)
            self.queue.pop(0)

    def _append(self, t: int) -> None:
        self.clock.run(t)
        self.order.append(t)
        self.done[t] = 1
        self.weights.runs(t)
        if self.tasks[t].transfer:
            self.in_flight.append(t)

    def _do(self, t: int) -> None:
        if not self.tasks[t].transfer:
            self._gather_ahead(t)
        self._append(t)
        # A transfer starts as soon as its operand exists.
        for start in self.starts_of[t]:
            self.missing[start] -= 1
            if not self.missing[start] and not self.done[start]:
                self._do(start)


class _Weights:
    """What is held of weights that are gathered, while an order is made."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.room = sum(sorted((t.holds for t in tasks), reverse=True)[:2])
        self.held = 0
        made: set[int] = set()
        for i in range(len(tasks) - 1, -1, -1):
            if tasks[i].holds or i in made:
                made |= {i, *tasks[i].needs}
        self.made = frozenset(made)
        """The transfers, and what only packs for them."""
        self.read: list[tuple[int, ...]] = []
        """The transfers whose weights a task reads."""
        self.readers: dict[int, int] = {}
        """Of each, how many tasks still have to read it."""
        for i, task in enumerate(tasks):
            read = tuple(n for n in task.needs if tasks[n].holds) if i not in made else ()
            self.read.append(read)
            for n in read:
                self.readers[n] = self.readers.get(n, 0) + 1

    def fits(self, t: int) -> bool:
        """Whether there is room for one more."""
        return not self.held or self.held + self.tasks[t].holds <= self.room

    def runs(self, t: int) -> None:
        """Note that a task has been put in the order."""
        if t in self.readers:
            self.held += self.tasks[t].holds
        for n in self.read[t]:
            self.readers[n] -= 1
            if not self.readers[n]:
                self.held -= self.tasks[n].holds


def waits(tasks: Sequence[Task]) -> tuple[dict[int, int], list[int]]:
    """A bit for each transfer; for each task the bits of all that it needs, however indirectly."""
    bit = {t: 1 << i for i, t in enumerate(i for i, x in enumerate(tasks) if x.transfer)}
    masks: list[int] = []
    for i, task in enumerate(tasks):
        mask = bit.get(i, 0)
        for n in task.needs:
            mask |= masks[n]
        masks.append(mask)
    return bit, masks


def by_demand(tasks: Sequence[Task]) -> list[int]:
    """Each transfer, and at last the rest, behind all that it needs and nothing else."""
    order: list[int] = []
    done = bytearray(len(tasks))

    def take(work: Iterable[int]) -> None:
        for t in sorted(work):
            order.append(t)
            done[t] = 1

    goals = [i for i, t in enumerate(tasks) if t.transfer and not t.holds]
    for _, group in groupby(goals, key=lambda i: tasks[i].serves or i):
        left = list(group)
        while left:
            work = {g: _needed(tasks, g, done) for g in left}
            goal = min(left, key=lambda g: (_compute(tasks, work[g]), g))
            left.remove(goal)
            take(work[goal])
    take(i for i in range(len(tasks)) if not done[i])
    return order


def _compute(tasks: Sequence[Task], work: Iterable[int]) -> float:
    # Added up in one order, as sums of floats depend on it, and ranks must agree.
    return sum(tasks[t].seconds for t in sorted(work) if not tasks[t].transfer)


def _needed(tasks: Sequence[Task], goal: int, done: bytearray) -> set[int]:
    """`goal` and all that it needs and that is not done."""
    needed, stack = {goal}, [goal]
    while stack:
        for n in tasks[stack.pop()].needs:
            if not done[n] and n not in needed:
                needed.add(n)
                stack.append(n)
    return needed
