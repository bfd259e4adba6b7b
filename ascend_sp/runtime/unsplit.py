"""Saying that nothing is split where somebody asked for a split: a warning, or an error.

One `UserWarning` for each cause in a process. Python's own filters would show one again for each
text, and a model in pieces has dozens of graphs with one cause.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from ascend_sp.runtime.errors import UnshardedError

_UNWANTED = (
    "If no split is wanted here, sequence_parallel=False (ASCEND_SP_SEQUENCE_PARALLEL=0) says so, "
    "and nothing is said of it."
)
_told: set[str] = set()


@dataclass(frozen=True)
class Unsplit:
    """Something that every rank does alone."""

    causes: Iterable[str]
    """One text is enough for each of them; numbers and addresses do not count."""
    text: str
    """What is not split, why, and what to do."""
    silence: str = _UNWANTED
    """How a user says that this is wanted."""

    def tell(self, *, error: bool) -> None:
        """Warn, unless this process has been told of all causes; or raise.

        Args:
            error: ``on_unsharded="error"`` was asked for.

        Raises:
            UnshardedError: `error`.
        """
        if error:
            raise self.error()
        causes = {re.sub(r"0x[0-9a-f]+|\d+", "#", c) for c in self.causes}
        if not causes <= _told:
            warnings.warn(f"ascend_sp: {self.text}\n{self.silence}", stacklevel=3)
            # Behind it: where warnings are errors, every compile has this one.
            _told.update(causes)

    def error(self) -> UnshardedError:
        """What to raise for it."""
        return UnshardedError(f'on_unsharded="error", and {self.text}\n{self.silence}')


def forget() -> None:
    """Tell everything anew; for tests."""
    _told.clear()
