"""The slow link of the benchmarks: true to its rate, gone afterwards; and what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import namespaces
import pytest
import quota
import slow_link
from ranks import Ranks

LACKS = namespaces.missing()
needs_link = pytest.mark.skipif(LACKS is not None, reason=f"no slow link here: {LACKS}")

RATE = 200e6
"""Bits/s."""


def _in_use() -> set[str]:
    """Network namespaces of all processes."""
    found = set()
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(process))
        except OSError:  # it ended meanwhile, or is not ours to see
            continue
    return found


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@needs_link
@pytest.mark.slow
def test_the_link_takes_as_long_as_its_rate_says() -> None:
    with namespaces.SlowLink() as link, Ranks(link) as ranks:
        link.limit(RATE)
        sockets, gloo = slow_link.check(ranks, RATE)
        large = slow_link.SIZES[-1]
        assert sockets[large] == pytest.approx(1, abs=0.2)
        # Twice if a rank is late; `check` says why.
        assert gloo[large][0] > 0.8
        assert gloo[large][2] < 2.4
        link.limit(None)
        free, _ = slow_link.check(ranks, RATE)
        assert free[large] < 0.5


@needs_link
def test_nothing_is_left_behind() -> None:
    ours: set[str] = set()

    def fails_inside() -> None:
        with namespaces.SlowLink() as link:
            ours.update(link.namespaces())
            assert len(ours) == 2 and ours <= _in_use()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_inside()
    assert _within(10, lambda: not ours & _in_use())


@needs_link
@pytest.mark.slow
def test_nothing_is_left_behind_by_a_benchmark_that_is_killed() -> None:
    code = (
        "import namespaces, ranks, time\n"
        "with namespaces.SlowLink() as link, ranks.Ranks(link):\n"
        "    print(*link.namespaces(), flush=True)\n"
        "    time.sleep(100)"
    )
    path = str(Path(namespaces.__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.getcwd()])},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout
            theirs = set(child.stdout.readline().split())
            assert len(theirs) == 2 and theirs <= _in_use()
        finally:
            child.kill()
    # The ranks notice when they ask for work, which they do after importing PyTorch.
    assert _within(60, lambda: not theirs & _in_use())


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: None if tool == "tc" else tool)
    monkeypatch.setattr(sys, "argv", ["slow_link.py"])
    slow_link.main()  # and exits with 0
    out = capsys.readouterr().out
    assert out.startswith("skipped") and "`tc`" in out and "iproute2" in out


def test_the_hidden_share() -> None:
    wall = {
        slow_link.SYNCHRONOUS: [10.0, 20.0, 10.0],
        slow_link.LOCAL: [6.0, 12.0, 6.0],
        "half": [8.0, 16.0, 90.0],
    }
    assert slow_link.hidden(wall, slow_link.LOCAL) == pytest.approx(1)
    assert slow_link.hidden(wall, "half") == pytest.approx(0.5)
    assert slow_link.hidden_at_best(wall, "half") == pytest.approx(0.5)
    # Of the 4 seconds of two ranks each, 2 are their CPUs': whoever hides 2 of 4 hides all it can.
    cpu = {slow_link.LOCAL: [12.0, 24.0, 12.0], slow_link.SYNCHRONOUS: [16.0, 32.0, 16.0]}
    limited = wall | {slow_link.LIMIT: slow_link.limit(wall, cpu)}
    assert limited[slow_link.LIMIT] == [8.0, 16.0, 8.0]
    assert slow_link.hidden(limited, "half", best=slow_link.LIMIT) == pytest.approx(1)


@needs_link
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_overlapping_is_not_slower_than_waiting() -> None:
    programs = {
        name: slow_link.PROGRAMS[name]
        for name in (slow_link.LOCAL, slow_link.SYNCHRONOUS, "default")
    }
    with namespaces.SlowLink() as link, Ranks(link) as ranks:
        prepared, times, _ = slow_link.measured(
            ranks, link, "flux", small=True, rate=None, share=0.4, rounds=8, programs=programs
        )
    wall = slow_link.slowest(times)
    print(slow_link.table(prepared, times, with_hidden=True))
    assert prepared.errors["default"] < 1e-5
    assert slow_link.hidden_at_best(wall, "default") > 0
    ratios = sorted(slow_link.ratios(wall, "default"))
    assert ratios[len(ratios) // 2] < 1.02


def _spin(seconds: float) -> float:
    """CPU seconds of this thread in so many seconds of trying."""
    end, used = time.perf_counter() + seconds, time.thread_time()
    while time.perf_counter() < end:
        pass
    return time.thread_time() - used


@pytest.mark.slow
def test_a_thread_gets_its_share_of_a_core_and_no_more() -> None:
    with ThreadPoolExecutor(1) as other:
        other.submit(_spin, 0.0).result()  # threads start in the group of who starts them
        try:
            with quota.Quota(0.3) as group:
                with quota.inside(group.folder):
                    limited = _spin(1.0)
                    free = other.submit(_spin, 0.5).result() / 0.5
                after = _spin(0.5) / 0.5
        except quota.QuotaError as e:
            pytest.skip(str(e))
    assert 0.15 < limited < 0.4
    assert free > 1.3 * limited and after > 1.3 * limited
    assert not group.folder.exists()


@pytest.mark.slow
def test_what_serves_the_sockets_goes_first() -> None:
    with ExitStack() as stack:
        try:
            ranks = stack.enter_context(Ranks(None, 0.7))
        except quota.QuotaError as e:
            pytest.skip(str(e))
        ranks.ask("all_to_alls", sizes=[1 << 18])  # they are there, and have been told
        for process in ranks.processes:
            tasks = [*Path(f"/proc/{process.pid}/task").iterdir()]
            gloo = {t for t in tasks if "gloo" in (t / "comm").read_text()}
            first = {t for t in tasks if os.sched_getscheduler(int(t.name)) == os.SCHED_FIFO}
            assert gloo and gloo <= first
            assert not any(t.name == str(process.pid) for t in first)


def test_no_priority_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(quota.os, "sched_setscheduler", refuse)
    with pytest.raises(quota.QuotaError, match="real-time priority"), quota.Quota(0.5):
        pass


def test_no_share_without_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quota, "ROOT", tmp_path / "none")
    with pytest.raises(quota.QuotaError, match="no share of a core can be given"), quota.Quota(0.5):
        pass
