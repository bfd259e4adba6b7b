"""Twins of a model and its arguments whose tensors have a shape and a device, but no numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ascend_sp.compiler._pytorch import FakeTensorMode, behaves_as_tensor, has_parts, of_parts
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

    A tensor of a class that tells its parts (quantised weights do) stays of that class.

    Args:
        mode: the mode that the tensors belong to.
        device: where tensors of the ``meta`` device are said to be; others keep their device.
        values: modules, and what they are called with.

    Raises:
        AscendSPError: something in them cannot be copied.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if has_parts(tensor):
            return of_parts(tensor, fake)
        _refuse_unknown(tensor)
        on = device if tensor.device.type == "meta" else tensor.device
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=on)

    for value in values:
        if isinstance(value, nn.Module):
            # Parameters copy themselves by what they hold, which does not know their class.
            for tensor in (*value.parameters(), *value.buffers()):
                _refuse_unknown(tensor)
    with _Copying(fake):
        try:
            return copy.deepcopy(values)
        except (TypeError, RuntimeError, AttributeError) as e:
            raise AscendSPError(
                f"explain works on a copy of the model without data, and cannot make one: {e}. "
                "Pass the plain module, without hooks and wrappers."
            ) from e


def _refuse_unknown(tensor: torch.Tensor) -> None:
    """Raise for a tensor whose class does something that a tensor with its shape would not."""
    if behaves_as_tensor(tensor) or has_parts(tensor):
        return
    kind = type(tensor)
    raise AscendSPError(
        f"explain works on a copy of the model without data, and cannot make one of a "
        f"{kind.__module__}.{kind.__qualname__}: the class has ops of its own, but lacks "
        "__tensor_flatten__ and __tensor_unflatten__, which list the tensors that it holds. "
        "Explain the model before its weights are converted to that class; or compile it on the "
        "devices, with dump_dir, which writes the same report."
    )
