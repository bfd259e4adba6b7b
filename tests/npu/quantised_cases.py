"""Random calls of torch_npu's quantised ops, and what those compute that the simulator lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cannsim import quantised
from torch import Tensor

from ascend_sp.graph.layout import REPLICATE
from brute_force import Placed
from rule_cases import Draw

HALF = torch.float16
NUMBER = {torch.int8: 1, torch.int32: 3, HALF: 5, torch.bfloat16: 15}
"""PyTorch's own numbers of types, which torch_npu takes."""


# What the ops compute, by their documents


def dynamic_quant_of(
    x: Tensor, *, smooth_scales: Tensor | None = None, quant_mode: str = "pertoken"
) -> Any:
    if quant_mode == "pertoken":
        return quantised.dynamic_quant(x, smooth_scales=smooth_scales)
    y, scale = quantised.dynamic_quant(x.reshape(1, -1))
    return y.view(x.shape), scale


def dynamic_quant_asymmetric(x: Tensor, *, smooth_scales: Tensor | None = None) -> Any:
    wide = x.float() if smooth_scales is None else x.float() * smooth_scales.float()
    high, low = wide.amax(-1), wide.amin(-1)
    scale = ((high - low) / 255).clamp(min=1e-6)
    offset = 127 - high / scale
    return quantised.to_int8(wide / scale[..., None] + offset[..., None]), scale, offset


def gelu_quant(
    x: Tensor,
    *,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    approximate: str = "none",
    quant_mode: str = "dynamic",
) -> Any:
    y = F.gelu(x.float(), approximate=approximate)
    y = y if input_scale is None else y * input_scale
    if quant_mode == "static":
        return quantised.to_int8(y if input_offset is None else y + input_offset), y.amax(-1)
    scale = y.abs().amax(-1) / 127
    return quantised.to_int8(y / scale[..., None]), scale


def dequant_bias(
    x: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    y = x.float() * weight_scale
    y = y if activation_scale is None else y * activation_scale[:, None]
    return (y if bias is None else y + bias).to(output_dtype or HALF)


def quant_matmul_dequant(
    x: Tensor,
    quantized_weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    quant_mode: str = "pertoken",
) -> Tensor:
    wide = x.float() if smooth_scale is None else x.float() * smooth_scale
    if x_scale is None:
        largest = wide.abs().amax(-1) if quant_mode == "pertoken" else wide.abs().amax().view(1)
        x_scale = largest / 127
    scale = x_scale[:, None]
    total = quantised.to_int8(wide / scale).float() @ quantized_weight.float().t()
    return (total * scale * weight_scale).to(x.dtype)


def quant_matmul_gelu(
    x1: Tensor,
    x2: Tensor,
    x1_scale: Tensor,
    x2_scale: Tensor,
    *,
    bias: Tensor | None = None,
    approximate: str = "gelu_erf",
) -> Tensor:
    y = (x1.int() @ x2.int()).float() * x2_scale * x1_scale[:, None]
    return F.gelu(y if bias is None else y + bias).to(HALF)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_dynamic_quant": dynamic_quant_of,
    "npu::npu_dynamic_quant_asymmetric": dynamic_quant_asymmetric,
    "npu::npu_gelu_quant": gelu_quant,
    "npu::npu_dequant_bias": dequant_bias,
    "npu::npu_quant_matmul_dequant": quant_matmul_dequant,
    "npu::npu_quant_matmul_gelu": quant_matmul_gelu,
}


# How to draw a call


def of(x: Placed, dtype: torch.dtype = HALF) -> Placed:
    return Placed(x.tensor.to(dtype), x.placement)


def positive(x: Placed) -> Placed:
    return Placed(x.tensor.abs().float() + 0.5, x.placement)


def whole(g: Draw, *shape: int, dtype: torch.dtype = HALF) -> Placed:
    return of(g.tensor(*shape, kind="int", whole=True), dtype)


def drawn(g: Draw, *shape: int, dtype: torch.dtype = HALF) -> Placed:
    """Activations, split most of the time."""
    kind = "float" if dtype.is_floating_point else "int"
    return of(g.tensor(*shape, kind=kind, whole=g.pick(False, False, False, True)), dtype)


def weight(g: Draw, x: Placed, *shape: int, dtype: torch.dtype = torch.int8) -> Placed:
    """Split where `x` is whole, since something has to be."""
    return of(g.tensor(*shape, kind="int", whole=x.placement != REPLICATE), dtype)


def optional(g: Draw, **arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None and g.flag()}


def quant_matmul(g: Draw, op: Any) -> Any:
    b, m, k, n = g.shape(4)
    batched = g.flag()
    x = drawn(g, *([b] if batched else []), m, k, dtype=torch.int8)
    own = g.flag()  # the batch may be the weight's only
    w = weight(g, x, *([b] if own else []), k, n)
    out = g.pick(torch.int8, torch.int32, HALF, HALF, torch.bfloat16)
    bias = whole(g, *g.pick([n], [b, 1, n] if batched or own else [1, n]), dtype=torch.int32)
    more: dict[str, Any] = {"output_dtype": NUMBER[out], **optional(g, bias=bias)}
    if out in (HALF, torch.bfloat16) and g.pick(True, True, False):
        more["pertoken_scale"] = positive(g.other(m))
    elif out == torch.int8:
        more |= optional(g, offset=whole(g, n, dtype=torch.float32))
    return (x, w, positive(whole(g, g.pick(1, n)))), more


def dequantised_matmul(g: Draw, op: Any) -> Any:
    m, k, n = g.shape(3)
    x = drawn(g, m, k)
    args = (x, weight(g, x, n, k), positive(whole(g, n)))
    if g.flag():
        return args, {"x_scale": positive(g.other(m)), **optional(g, smooth_scale=whole(g, k))}
    return args, {"quant_mode": g.pick("pertoken", "pertoken", "pertensor")}


def matmul_gelu(g: Draw, op: Any) -> Any:
    m, k, n = g.shape(3)
    x = drawn(g, m, k, dtype=torch.int8)
    scales = positive(g.other(m)), positive(whole(g, n))
    return (x, weight(g, x, k, n), *scales), optional(g, bias=whole(g, n, dtype=torch.float32))


def weight_quant_matmul(g: Draw, op: Any) -> Any:
    m, n = g.shape(2)
    k = g.pick(4, 64)
    group = 32 if k == 64 else 0
    shape = [2, n] if group else g.pick([1], [n], [1, n])
    x = drawn(g, m, k)
    args: tuple = (x, weight(g, x, k, n), whole(g, *shape))
    if g.flag():
        bias = g.pick(None, whole(g, n))
        return *args, whole(g, *shape), None, None, bias, group
    return args, {"antiquant_group_size": group}


def dynamic_quant(g: Draw, op: Any) -> Any:
    shape = g.shape(g.pick(2, 3, 3))
    x = of(g.tensor(*shape))
    if op is torch.ops.npu.npu_dynamic_quant.default and g.pick(False, False, True):
        return (x,), {"quant_mode": "pertensor"}
    return (x,), optional(g, smooth_scales=whole(g, shape[-1]))


def activation(g: Draw, op: Any) -> Any:
    x = of(g.tensor(*g.shape(3)))
    k = x.tensor.shape[-1]
    if g.flag():
        return (x,), {"approximate": g.pick("none", "tanh")}
    scale = positive(whole(g, g.pick(1, k)))
    return (x,), {"quant_mode": "static", "input_scale": scale}


def dequantised(g: Draw, op: Any) -> Any:
    m, n = g.shape(2)
    x = drawn(g, m, n, dtype=torch.int32)
    scale = positive(g.other(m)) if x.placement != REPLICATE else positive(g.tensor(m))
    bias = g.pick(None, whole(g, n, dtype=torch.float32))
    return x, positive(whole(g, n)), g.pick(scale, scale, None) if g.flag() else scale, bias


def quantize(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    x = of(g.tensor(*shape))
    divided = g.flag()
    axis = g.dim(3) if divided else g.pick(-2, -1, 1)
    size = shape[axis if divided or axis == -2 else -1]
    scale = positive(whole(g, g.pick(1, size)))
    zero = g.pick(None, whole(g, scale.tensor.shape[0], dtype=torch.int32))
    return x, scale, zero, 1, axis, divided


def anti_quant(g: Draw, op: Any) -> Any:
    x = of(g.tensor(*g.shape(3), kind="int"), torch.int8)
    scale = positive(whole(g, g.pick(1, x.tensor.shape[-1])))
    offset = Placed(torch.ones_like(scale.tensor))
    return (x, scale), {**optional(g, offset=offset), "dst_dtype": g.pick(5, 15)}


CASES: dict[str, Callable[[Draw, Any], Any]] = {
    "npu_quant_matmul": quant_matmul,
    "npu_quant_matmul_dequant": dequantised_matmul,
    "npu_quant_matmul_gelu": matmul_gelu,
    "npu_weight_quant_batchmatmul": weight_quant_matmul,
    **dict.fromkeys(("npu_dynamic_quant", "npu_dynamic_quant_asymmetric"), dynamic_quant),
    "npu_gelu_quant": activation,
    "npu_dequant_bias": dequantised,
    "npu_quantize": quantize,
    "npu_anti_quant": anti_quant,
}
