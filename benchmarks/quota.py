"""A share of a core for the thread that computes; the rest of the core is for what serves a link.

An accelerator's link moves bytes by itself. Gloo's threads take them from the core that computes,
which no order of a program can hide. A thread in a control group with a quota (`cpu`, version 1,
where single threads may be in a group) computes as if on a slower core, and whatever serves the
sockets has the time that is left. Needs root.

Kernel documentation: Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup/cpu")
PERIOD = 20_000
"""Microseconds after which a share is given anew: a few scheduler ticks, little of a collective."""


class QuotaError(Exception):
    """Threads cannot be given a share of a core; says why."""


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
