"""Ranks as child processes that do what they are asked over a pipe, in a given time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from namespaces import INTERFACE, SlowLink
from quota import Quota

PROGRAM = Path(__file__).with_name("slow_link_rank.py")
WORLD = 2


class RankError(Exception):
    """A rank ended, or did not answer in time."""


@dataclass
class Prepared:
    """What a rank says of the programs that it compiled."""

    model: str = ""
    bytes: dict[str, float] = field(default_factory=dict)
    """Sent by this rank in a step of each program."""
    errors: dict[str, float] = field(default_factory=dict)
    """Largest difference to the first program that communicates, over its largest value."""
    absent: dict[str, str] = field(default_factory=dict)
    """Programs that there are not, and why."""


@dataclass
class Times:
    """Seconds of each round of each program on one rank."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    """Of the whole process, gloo's threads included."""


class Ranks:
    """Two ranks, at the ends of `link` or, without one, on the loopback; a context manager.

    While a rank measures, the thread that computes has `compute` of its core, 0 .. 1, and the
    sockets have the rest; with None they share it as they come.
    """

    def __init__(self, link: SlowLink | None, compute: float | None = None) -> None:
        self.link = link
        self.compute = compute
        self.quotas = ExitStack()
        self.processes: list[subprocess.Popen] = []
        self.pipes: list[Connection] = []
        self.folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Ranks:
        try:
            for rank in range(WORLD):
                self._start(rank)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, method: str, timeout: float = 300, **arguments: Any) -> list[Any]:
        """Each rank's answer to a `method` of `slow_link_rank.Rank`, all within `timeout` s."""
        for pipe in self.pipes:
            pipe.send((method, arguments))
        end = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        while len(answers) < WORLD:
            for rank in set(range(WORLD)) - set(answers):
                try:
                    if self.pipes[rank].poll(0.05):
                        answers[rank] = self.pipes[rank].recv()
                except (EOFError, OSError):
                    raise RankError(f"rank {rank} ended; what it said is above") from None
            if time.monotonic() > end:
                raise RankError(f"no answer to {method!r} within {timeout:.0f} seconds")
        return [answers[rank] for rank in range(WORLD)]

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.quotas.close()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        self.pipes.append(ours)
        # A file that both see, so that only what is measured passes the link.
        store = f"{self.folder.name}/store"
        command = [sys.executable, str(PROGRAM), "--store", store, "--rank", str(rank)]
        command += ["--world", str(WORLD), "--pipe", str(theirs.fileno())]
        if self.compute is not None:
            quota = self.quotas.enter_context(Quota(self.compute))
            command += ["--quota", str(quota.folder)]
        interface = INTERFACE if self.link else "lo"
        with theirs:
            process = subprocess.Popen(
                [*(self.link.inside(rank) if self.link else []), *command],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # our standard output is for the tables
            )
        self.processes.append(process)
