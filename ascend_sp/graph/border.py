"""How complex inputs and outputs cross the border of a graph that has no complex type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascend_sp.graph.context import PassContext


@dataclass(frozen=True)
class Border:
    """Positions of the inputs and outputs of a graph that it has as real ``[..., 2]`` tensors."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def real_inputs(self, inputs: Sequence[Any]) -> list[Any]:
        """`inputs` of the original graph as those of the rewritten one."""
        out = list(inputs)
        for i in self.inputs:
            # A conjugate view is only a flag; its memory holds the other numbers.
            out[i] = torch.view_as_real(out[i].resolve_conj())
        return out

    def wrap(self, run: Callable[[list[Any]], Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        """`run` of the rewritten graph, callable like the original one."""
        if not self.inputs and not self.outputs:
            return run

        def call(inputs: list[Any]) -> Sequence[Any]:
            real = self.real_inputs(inputs)
            inputs.clear()  # the caller hands over its references, so that memory can be freed
            out = list(run(real))
            for i in self.outputs:
                out[i] = _complex(out[i])
            return out

        return call


def _complex(pairs: torch.Tensor) -> torch.Tensor:
    try:
        return torch.view_as_complex(pairs)
    except RuntimeError:  # the two numbers of a pair do not lie side by side
        return torch.view_as_complex(pairs.contiguous())


def border(ctx: PassContext) -> Border:
    """What this compile did to complex inputs and outputs."""
    return ctx.results.get(Border) or Border()
