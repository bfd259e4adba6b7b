"""A share of a core for the thread that computes; the rest of the core is for what serves a link.

An accelerator's link moves bytes by itself, and at once. Gloo's threads take the time for it from
the core that computes, which no order of a program can hide, and wait for that core each time that
they have something to do. A thread in a control group with a quota (`cpu`, version 1, where single
threads may be in a group) computes as if on a slower core, and whatever serves the sockets has the
time that is left; with a real-time priority it also has it when it wants it. Needs root.

Kernel documentation: Documentation/scheduler/sched-bwc.rst, sched-rt-group.rst.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup/cpu")
PERIOD = 20_000
"""Microseconds after which a share is given anew: a few scheduler ticks, little of a collective."""


class QuotaError(Exception):
    """Threads cannot be given a share of a core, or be served first; says why."""


class Quota:
    """A group whose threads get `share` of one core, 0 .. 1; a context manager.

    An empty group stays behind if this process is killed.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        Quota.count += 1
        self.folder = ROOT / f"ascend_sp_{os.getpid()}_{Quota.count}"

    count = 0

    def __enter__(self) -> Quota:
        policy = os.sched_getscheduler(0), os.sched_getparam(0)
        serve_first([0])  # whoever takes a share will want to be served first, too
        os.sched_setscheduler(0, *policy)
        try:
            self.folder.mkdir()
            (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (self.folder / "cpu.cfs_quota_us").write_text(str(int(self.share * PERIOD)))
        except OSError as e:
            self.__exit__(None, None, None)
            raise QuotaError(
                f"no share of a core can be given: {e}; this needs root and version 1 of the "
                f"control group `cpu` at {ROOT}"
            ) from e
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self.folder.rmdir()
        except OSError:  # it was not made, or a thread is in it still: the error says more
            if kind is None and self.folder.exists():
                raise


@contextmanager
def inside(folder: Path | None) -> Iterator[None]:
    """This thread, and no other of its process, is in the group `folder`; None is no group."""
    if folder is None:
        yield
        return
    me = str(threading.get_native_id())
    (folder / "tasks").write_text(me)
    try:
        yield
    finally:
        (ROOT / "tasks").write_text(me)


def own_threads() -> set[int]:
    """Ids of the threads of this process."""
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def serve_first(threads: Iterable[int]) -> None:
    """`threads` of this process (0 is the one that calls) run before all others.

    Raises:
        QuotaError: this process may not do that.
    """
    for thread in threads:
        try:
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
        except OSError as e:
            raise QuotaError(
                f"no thread can be given a real-time priority: {e}; this needs root"
            ) from e
