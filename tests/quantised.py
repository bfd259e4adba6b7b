"""Linears with 8-bit weights and activations, as torchao makes them, in as little as that takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Weight(Tensor):
    """A weight of 8-bit integers with a scale for each channel; looks like the float that it is of.

    Activations are quantised when they come, each token by its largest value.
    """

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8Weight:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scale.dtype, device=values.device
        )
        made.values, made.scale = values, scale
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Int8Weight({tuple(self.shape)})"  # PyTorch 2.10 and 2.11 put it into an error text

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Int8Weight:
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return cls._linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of an Int8Weight")

    @staticmethod
    def _linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        values = (x / scale).round().clamp(-128, 127).to(torch.int8)
        product = torch._int_mm(values.reshape(-1, x.shape[-1]), weight.values.t())
        out = product.to(x.dtype).reshape(*x.shape[:-1], -1) * scale * weight.scale
        return out if bias is None else out + bias


def quantise(model: nn.Module) -> nn.Module:
    """`model`, in place, with an `Int8Weight` in each of its linears."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax(-1) / 127
            values = (weight / scale[:, None]).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Weight(values, scale), requires_grad=False)
    return model
