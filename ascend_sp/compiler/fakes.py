"""Twins of a model and its arguments whose tensors have a shape and a device, but no numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ascend_sp.compiler._pytorch import FakeTensorMode
from ascend_sp.runtime.errors import AscendSPError


class _Copying(TorchFunctionMode):
    """While it is on, `copy.deepcopy` makes tensors fake instead of copying them."""

    def __init__(self, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.clone:  # by which parameters copy themselves
            return self.fake(args[0])
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.fake(tensor)
            return memo[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def twins(mode: FakeTensorMode, device: str, *values: Any) -> tuple[Any, ...]:
    """Deep copies of `values` with fake tensors; what is shared between them stays shared.

    Args:
        mode: the mode that the tensors belong to.
        device: where tensors of the ``meta`` device are said to be; others keep their device.
        values: modules, and what they are called with.

    Raises:
        AscendSPError: something in them cannot be copied.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        on = device if tensor.device.type == "meta" else tensor.device
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=on)

    with _Copying(fake):
        try:
            return copy.deepcopy(values)
        except (TypeError, RuntimeError, AttributeError) as e:
            raise AscendSPError(
                f"explain works on a copy of the model without numbers, and cannot make one: {e}. "
                "Give it the module itself, as it is before hooks or wrappers are put on it."
            ) from e
