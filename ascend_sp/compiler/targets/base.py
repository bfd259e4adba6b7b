"""What a lowering target is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

from ascend_sp.runtime.npu import Ascend

Runnable: TypeAlias = "Callable[[list[Any]], Sequence[Any]]"
"""Takes the inputs in one list, which it may empty (PyTorch's boxed convention)."""


def _all(_: Any) -> bool:
    return True


def _fits(_: Ascend) -> str | None:
    return None


def _nothing(_: fx.GraphModule) -> list[str]:
    return []


@dataclass(frozen=True)
class Target:
    """One way to turn the finished graph of one rank into something that runs."""

    name: str
    lower: Callable[[fx.GraphModule, Sequence[Any], Sequence[int]], Runnable] = field(repr=False)
    """``lower(gm, inputs, static_inputs)``.

    `gm` is functional ATen on local shapes, every node with ``meta["val"]``, collectives as
    ``_c10d_functional`` starts and waits; the target owns it from here on. `inputs` are fake
    tensors and SymInts, one for each placeholder; `static_inputs` the positions of parameters and
    buffers: the same tensor at the same address on every call.
    """
    converts: Callable[[Any], bool] = field(default=_all, repr=False)
    """Whether it can take an op."""
    missing: Callable[[Ascend], str | None] = field(default=_fits, repr=False)
    """What this machine lacks for it, or None."""
    refuses: Callable[[fx.GraphModule], list[str]] = field(default=_nothing, repr=False)
    """What of a finished graph it cannot take, a line each; asked before compiling starts."""
