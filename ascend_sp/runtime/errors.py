"""The exceptions that ascend_sp raises on purpose, so that callers can tell them from bugs."""

from __future__ import annotations

from ascend_sp.runtime.versions import software


class AscendSPError(RuntimeError):
    """Base of every error that ascend_sp raises itself; its text ends with the versions found."""

    @property
    def reason(self) -> str:
        """What is wrong and what to do, without the versions."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.reason}\n[{software()}]"


class ConfigError(AscendSPError, ValueError):
    """An option or environment variable has a name or a value that is not allowed."""


class TopologyError(AscendSPError):
    """The process group or DeviceMesh does not fit the request, or is gone."""


class RankMismatchError(AscendSPError):
    """The ranks of one group do not compile the same program, or differ in another common step."""


class UnshardedError(AscendSPError):
    """Something could not be sharded and ``on_unsharded="error"`` was asked for."""


class LoweringError(AscendSPError):
    """A lowering target cannot take a graph."""


class CollectiveError(AscendSPError):
    """A compiled graph failed while it ran on several ranks: in a collective, or place unknown."""


class OpError(AscendSPError):
    """An op of a compiled graph failed while it ran on several ranks, by itself."""


class VerificationError(AscendSPError):
    """A pass left a graph that breaks the compiler's invariants: a bug in ascend_sp."""


class TextEncoderError(AscendSPError):
    """A text encoder cannot be split or loaded, or its split is proved wrong."""


class NumericsError(AscendSPError):
    """A compiled graph does not compute what the model does; found by ``check_numerics``."""
