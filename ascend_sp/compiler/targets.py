"""Lowering targets: who turns the finished ATen graph of one rank into something that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from ascend_sp.compiler import _pytorch

Runnable = Callable[[list[Any]], Sequence[Any]]
"""Takes the inputs in one list, which it may empty (PyTorch's boxed convention)."""


class Target(Protocol):
    """One way to lower."""

    def __call__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]
    ) -> Runnable:
        """Lower `gm`.

        Args:
            gm: functional ATen on local shapes, every node with ``meta["val"]``, collectives as
                ``_c10d_functional`` starts and waits. Owned by the target from here on.
            inputs: fake tensors and SymInts, one for each placeholder.
            static_inputs: positions of the placeholders that are parameters or buffers: same
                tensor, same address, on every call.
        """


def eager(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Run the ATen ops one by one: the reference."""

    def run(args: list[Any]) -> Sequence[Any]:
        values = tuple(args)
        args.clear()
        return gm(*values)

    return run


def inductor(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """PyTorch's own compiler, for CPUs and CUDA devices."""
    return _pytorch.inductor(gm, inputs, static_inputs)


TARGETS: dict[str, Target] = {"inductor": inductor, "eager": eager}


def choose(name: str, device_type: str) -> Target:
    """The target called `name`; ``"auto"`` is Inductor where it compiles for `device_type`."""
    if name == "auto":
        name = "inductor" if device_type in ("cpu", "cuda") else "eager"
    return TARGETS[name]
