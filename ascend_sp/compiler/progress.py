"""What a compile is doing, said once it takes long."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType

log = logging.getLogger(__name__)

AFTER = 10.0
"""Seconds before anything is said."""
EVERY_LINE = 0.5
"""Seconds between two looks at a terminal."""
EVERY_ENTRY = 30.0
"""Seconds between two entries of a log."""


class Progress:
    """A context around a compile that takes longer than `AFTER`, which says what it does.

    The first rank has the last line of the terminal, if stderr is one. All others, and a program
    without a terminal, have entries in the log of this module, at the level INFO.

    Args:
        rank: among all processes.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._phase = "tracing (AOTAutograd)"
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def phase(self, what: str, done: int = 0, of: int = 0) -> None:
        """Say what comes now: ``what``, or ``what, done of of``."""
        self._phase = f"{what}, {done} of {of}" if of else what

    def over(self) -> bool:
        """Whether the compile has ended."""
        return self._ended.is_set()

    def __enter__(self) -> Progress:
        self._thread = threading.Thread(target=self._watch, name="ascend_sp progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        assert self._thread
        self._thread.join()

    def _watch(self) -> None:
        terminal = self._rank == 0 and sys.stderr.isatty()
        if self._ended.wait(AFTER):
            return
        width = 0
        while True:
            seconds = time.monotonic() - self._start
            text = f"ascend_sp has been compiling for {seconds:.0f} s: {self._phase}"
            if terminal:
                print("\r" + text.ljust(width), end="", file=sys.stderr, flush=True)
                width = len(text)
            else:
                log.info("%s", text)
            if self._ended.wait(EVERY_LINE if terminal else EVERY_ENTRY):
                break
        if terminal:
            print("\r" + " " * width + "\r", end="", file=sys.stderr, flush=True)
