"""Which core a rank runs on."""

from __future__ import annotations

import os


def one_core_a_rank(rank: int, world: int) -> None:
    """Bind this process to a core of its own, where there are enough of them.

    Threads that exist already, such as gloo's, go where there is room.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= world:
        os.sched_setaffinity(0, {cores[rank]})
