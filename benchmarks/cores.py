"""Which core a rank runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_core(rank: int, world: int) -> Iterator[None]:
    """Bind this thread to a core of its rank's own, where there are enough of them.

    Not while programs are compiled, for which compilers use all cores. Threads that exist already,
    such as gloo's, go where there is room.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) >= world:
        os.sched_setaffinity(0, {sorted(cores)[rank]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def spare_cores(world: int) -> int:
    """Cores of this process that no rank computes on: they serve the sockets."""
    return max(len(os.sched_getaffinity(0)) - world, 0)
