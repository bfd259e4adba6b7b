"""The scheduler on tasks: orders that can run, that hide what can be hidden, always the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_sp.passes.overlap.scheduler import Task, by_demand, schedule, simulate


@st.composite
def programs(draw: st.DrawFn, size: int = 14) -> list[Task]:
    """Any program: each task needs some earlier ones."""
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, size))):
        needs = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        transfer = draw(st.booleans())
        seconds = draw(st.integers(0 if transfer else 1, 9))
        serves = draw(st.sampled_from(["", "a", "b"])) if transfer else ""
        fills = not transfer and draw(st.booleans())
        work = float(draw(st.integers(0, 2))) if transfer else 0.0
        needed = tuple(sorted(needs))
        tasks.append(Task(f"t{i}", float(seconds), needed, transfer, work, serves, fills))
    return tasks


@settings(max_examples=300)
@given(tasks=programs(), window=st.sampled_from([0, 1, 64]))
def test_every_task_runs_once_and_behind_what_it_needs(tasks: list[Task], window: int) -> None:
    order = schedule(tasks, window)
    assert sorted(order) == list(range(len(tasks)))
    place = {t: i for i, t in enumerate(order)}
    assert all(place[n] < place[t] for t in order for n in tasks[t].needs)
    assert schedule(tasks, window) == order


@settings(max_examples=300)
@given(tasks=programs())
def test_what_a_simulation_says(tasks: list[Task]) -> None:
    run = simulate(tasks, range(len(tasks)))
    for i, t in enumerate(tasks):
        assert run.ends[i] == run.begins[i] + t.seconds
        # Nothing begins before what it needs has ended.
        assert all(run.ends[n] <= run.reached[i] <= run.begins[i] for n in t.needs)
    everything = list(zip(tasks, run.reached, run.begins, run.ends, strict=True))
    on_link = sorted((begin, end) for t, _, begin, end in everything if t.transfer)
    on_device = sorted(
        (reached, reached + t.work if t.transfer else end) for t, reached, _, end in everything
    )
    for spans in (on_link, on_device):
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    # The device computes, stands still for the link, or has finished.
    compute = sum(t.work if t.transfer else t.seconds for t in tasks)
    last = max(end for _, end in on_device)
    assert last == pytest.approx(compute + run.exposed)


def best(tasks: Sequence[Task]) -> float:
    """The shortest of all orders."""

    def orders(done: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(done) == len(tasks):
            return [done]
        free = [i for i, t in enumerate(tasks) if i not in done and all(n in done for n in t.needs)]
        return [o for i in free for o in orders((*done, i))]

    return min(simulate(tasks, o).makespan for o in orders(()))


@settings(max_examples=30)
@given(tasks=programs(size=7))
def test_no_order_is_shorter_than_the_best_and_ours_is_not_twice_as_long(
    tasks: list[Task],
) -> None:
    # Twice is the bound of any order that leaves neither resource idle needlessly on two resources
    # (Graham 1966); transfers that wait for other transfers stop the device in ours, hence thrice.
    assert best(tasks) <= simulate(tasks, schedule(tasks)).makespan <= 3 * best(tasks)


def block(
    transfer: float, *, mlp: float = 0.0, groups: int = 1, behind: Sequence[int] = (), at: int = 0
) -> list[Task]:
    """Q (with a norm), K (with a norm), V, attention, its return, a linear; an MLP beside it."""
    out: list[Task] = []

    def add(name: str, seconds: float, *needs: int, transfer: bool = False) -> int:
        serves = "attention" if transfer else ""
        fills = not transfer
        out.append(Task(name, seconds, tuple(sorted(needs)), transfer, 0.0, serves, fills))
        return at + len(out) - 1

    q = add("q norm", 1.0, add("q", 4.0, *behind))
    k = add("k norm", 1.0, add("k", 4.0, *behind))
    v = add("v", 4.0, *behind)
    sent = [
        [add(f"send {x}{g}", transfer / groups, i, transfer=True) for g in range(groups)]
        for x, i in (("q", q), ("k", k), ("v", v))
    ]
    backs = []
    for g in range(groups):
        a = add(f"attention{g}", 10.0 / groups, *(s[g] for s in sent))
        backs.append(add(f"back{g}", transfer / groups, a, transfer=True))
    beside = [add("mlp", mlp, *behind)] if mlp else []
    add("out", 4.0, *backs, *beside)
    return out


def names(tasks: Sequence[Task], order: Sequence[int]) -> list[str]:
    return [tasks[t].name for t in order]


def test_values_travel_first_and_each_transfer_starts_at_once() -> None:
    tasks = block(3.0)
    assert names(tasks, schedule(tasks)) == [
        *("v", "send v0", "q", "q norm", "send q0", "k", "k norm", "send k0"),
        *("attention0", "back0", "out"),
    ]
    run = simulate(tasks, schedule(tasks))
    assert run.exposed == 6.0  # of 12: that of the last of Q and K, and of the result
    in_order = simulate(tasks, range(len(tasks)))
    assert in_order.exposed == 12.0


def test_independent_work_covers_a_transfer_best_where_it_fits() -> None:
    tasks = block(3.0, mlp=3.0)
    order = names(tasks, schedule(tasks))
    # One of the two exposed transfers; the other has nothing left.
    assert order.index("send k0") < order.index("mlp") < order.index("attention0")
    assert simulate(tasks, schedule(tasks)).exposed == 3.0
    assert simulate(tasks, schedule(tasks, window=0)).exposed == 3.0 + 0.0  # behind the attention


def test_groups_of_heads_travel_while_others_attend() -> None:
    exposed = [simulate(t, schedule(t)).exposed for t in (block(3.0, groups=g) for g in (1, 2, 3))]
    assert exposed == pytest.approx([6.0, 3.0, 2.0])  # one group of Q, and one of the result


def test_the_next_block_is_not_begun_before_what_is_due() -> None:
    first = block(3.0, mlp=20.0)
    tasks = first + block(3.0, mlp=20.0, behind=(len(first) - 1,), at=len(first))
    order = schedule(tasks)
    # Everything of the first block but what hides stands in front of the second.
    assert names(tasks, order[: len(first)]).count("mlp") == 1
    assert simulate(tasks, order).exposed <= 6.0 + 6.0


def test_backfill_looks_no_further_than_its_window() -> None:
    far = [Task(f"far{i}", 2.0, (), fills=True) for i in range(10)]
    send = Task("send", 5.0, (0,), transfer=True)
    use = Task("use", 1.0, (1,))
    tasks = [Task("make", 1.0), send, use, *far]
    for window, between in ((0, 0), (1, 3), (64, 3)):
        order = schedule(tasks, window)
        assert order.index(2) - order.index(1) - 1 == between


def test_random_large_programs_stay_fast_and_no_worse_than_given() -> None:
    rng = random.Random(0)
    tasks: list[Task] = []
    for _ in range(40):
        base = len(tasks) - 1
        tasks += block(
            rng.uniform(0, 6),
            mlp=rng.uniform(0, 9),
            groups=rng.randint(1, 4),
            behind=(base,) if base >= 0 else (),
            at=len(tasks),
        )
    given_order = simulate(tasks, range(len(tasks))).makespan
    demand = simulate(tasks, by_demand(tasks)).makespan
    ours = simulate(tasks, schedule(tasks)).makespan
    assert ours < demand < given_order
