"""Where the symbols of a graph can be read off its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ascend_sp.graph.sizes import Size, as_shape, as_size


class InputSymbols:
    """The symbols that the inputs of a graph have in their sizes and strides.

    Args:
        gm: the graph as it was traced. Only what it says now is kept.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._places: dict[sympy.Symbol, tuple[int, Callable[[Any], int]]] = {}
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            for size, read in _sizes(node.meta.get("val")):
                if isinstance(size, sympy.Symbol):
                    self._places.setdefault(size, (i, read))

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._places

    def read(self, symbols: Iterable[sympy.Symbol], inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What `symbols` are in a call with `inputs`; of fake ones, SymInts."""
        places = (self._places[s] for s in symbols)
        return tuple(read(inputs[i]) for i, read in places)


def _sizes(value: Any) -> list[tuple[Size, Callable[[Any], int]]]:
    """The sizes and strides that an input has or is, and how to read each off the real one."""
    if isinstance(value, torch.SymInt):
        return [(as_size(value), lambda x: x)]
    if not isinstance(value, torch.Tensor):
        return []
    return [
        *((n, lambda x, d=d: x.shape[d]) for d, n in enumerate(as_shape(value.shape))),
        *((n, lambda x, d=d: x.stride(d)) for d, n in enumerate(as_shape(value.stride()))),
    ]
