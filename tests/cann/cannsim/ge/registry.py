"""Kernels of GE ops by type, and what a kernel is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cannsim.ge.graph import Op

# ge::DataType, as in attributes and in tensors that cross the C++ border.
GE_DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
}
TO_GE = {v: k for k, v in GE_DTYPES.items()}

# The numbering of the serialized graph.
PROTO_DTYPES = {
    1: torch.float32,
    2: torch.float16,
    3: torch.int8,
    4: torch.uint8,
    5: torch.int16,
    7: torch.int32,
    8: torch.int64,
    11: torch.bool,
    12: torch.float64,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
}


class GeError(RuntimeError):
    """GE would refuse this graph or this run."""


class Call:
    """One execution of a node: its attributes, and its inputs by name."""

    def __init__(self, op: Op, named: dict[str, Tensor | None], dry: bool) -> None:
        self.op, self.dry = op, dry
        self._named = named

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, or GE's default of it."""
        return self.op.attrs.get(name, default)

    def get(self, name: str) -> Tensor | None:
        """The input of that name in GE's definition of the op; None if it is not connected."""
        return self._named.get(name)

    def dtype(self, name: str, default: int | None = None) -> torch.dtype:
        """An attribute that is a ge::DataType."""
        return GE_DTYPES[self.attr(name, default)]


Kernel = Callable[..., Any]
KERNELS: dict[str, Kernel] = {}


def kernel(*types: str) -> Callable[[Kernel], Kernel]:
    """The function executes GE ops of these types: ``fn(call, *inputs)``, None if not connected."""

    def register(fn: Kernel) -> Kernel:
        for t in types:
            assert t not in KERNELS, f"two kernels for {t}"
            KERNELS[t] = fn
        return fn

    return register


def plain(functions: Iterable[tuple[str, Kernel]]) -> None:
    """Kernels that are a function of the inputs alone."""
    for name, fn in functions:

        def run(call: Call, *args: Any, _fn: Kernel = fn) -> Any:
            return _fn(*args)

        kernel(name)(run)


def ints(t: Tensor | None) -> list[int]:
    """The values of a shape-like input."""
    return [] if t is None else [int(v) for v in t.reshape(-1).tolist()]
