"""Ops on elements: arithmetic, comparison, activations, casts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cannsim import npu_ops
from cannsim.ge.registry import Call, kernel, plain

plain(
    {
        "Abs": torch.abs,
        "Acos": torch.acos,
        "Asin": torch.asin,
        "Atan": torch.atan,
        "Atan2": torch.atan2,
        "BitwiseAnd": torch.bitwise_and,
        "BitwiseOr": torch.bitwise_or,
        "BitwiseXor": torch.bitwise_xor,
        "Ceil": torch.ceil,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Equal": torch.eq,
        "Erf": torch.erf,
        "Erfc": torch.erfc,
        "Exp": torch.exp,
        "Expm1": torch.expm1,
        "Floor": torch.floor,
        "Greater": torch.gt,
        "GreaterEqual": torch.ge,
        "Identity": lambda x: x,
        "Invert": torch.bitwise_not,
        "IsFinite": torch.isfinite,
        "IsInf": torch.isinf,
        "IsNan": torch.isnan,
        "Less": torch.lt,
        "LessEqual": torch.le,
        "Log1p": torch.log1p,
        "LogicalAnd": torch.logical_and,
        "LogicalNot": torch.logical_not,
        "LogicalOr": torch.logical_or,
        "Maximum": torch.maximum,
        "Minimum": torch.minimum,
        "Mish": F.mish,
        "Neg": torch.neg,
        "NotEqual": torch.ne,
        "Pow": torch.pow,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": torch.round,
        "Rsqrt": torch.rsqrt,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Softplus": F.softplus,
        "Sqrt": torch.sqrt,
        "Square": torch.square,
        "Sub": torch.sub,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "TensorMove": torch.clone,
        "Trunc": torch.trunc,
        "Xlogy": torch.xlogy,
        "ZerosLike": torch.zeros_like,
        "OnesLike": torch.ones_like,
        # GE knows one Gelu, the tanh one; torchair emits it for both kinds of aten.gelu.
        "Gelu": lambda x: F.gelu(x, approximate="tanh"),
        "FastGelu": npu_ops.fast_gelu,
        "Complex": torch.complex,
        "Real": lambda x: x.real.contiguous(),
        "Imag": lambda x: x.imag.contiguous(),
        "ClipByValue": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
        "ClipByValueV2": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
        "SelectV2": torch.where,
        "Select": torch.where,
        "MaskedFill": lambda x, mask, value: torch.where(mask, value.to(x.dtype), x),
        "AxpyV2": lambda x, y, alpha: x + y * alpha,
        "Addcmul": lambda x, a, b, value: x + value * a * b,
        "Addcdiv": lambda x, a, b, value: x + value * a / b,
        "Lerp": torch.lerp,
        "SquaredDifference": lambda a, b: (a - b).square(),
    }.items()
)


@kernel("Add", "AddV2")
def add(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y)


@kernel("AddN")
def add_n(call: Call, *xs: Tensor) -> Tensor:
    return sum(xs[1:], xs[0])


@kernel("Mul")
def mul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.mul(x, y)


@kernel("Muls")
def muls(call: Call, x: Tensor) -> Tensor:
    return x * call.attr("value")


@kernel("Adds")
def adds(call: Call, x: Tensor) -> Tensor:
    return x + call.attr("value")


@kernel("Axpy")
def axpy(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return x + y * call.attr("alpha")


@kernel("Sxpy")
def sxpy(call: Call, x: Tensor, y: Tensor, alpha: Tensor | None = None) -> Tensor:
    return x - y if alpha is None else x - y * alpha


@kernel("RealDiv", "Div")
def real_div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point() and not x.is_complex():
        return torch.div(x, _nonzero(call, y), rounding_mode="trunc")
    return torch.div(x, y)


@kernel("FloorDiv")
def floor_div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, _nonzero(call, y), rounding_mode="floor")


@kernel("TruncateDiv")
def truncate_div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, _nonzero(call, y), rounding_mode="trunc")


@kernel("FloorMod")
def floor_mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(x, _nonzero(call, y))


@kernel("Mod")
def mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, _nonzero(call, y))


def _nonzero(call: Call, y: Tensor) -> Tensor:
    """In an execution on zeros, which only finds shapes, integers may not divide by them."""
    if call.dry and not y.is_floating_point():
        return torch.where(y == 0, torch.ones_like(y), y)
    return y


@kernel("Log")
def log(call: Call, x: Tensor) -> Tensor:
    scaled = torch.log(call.attr("scale", 1.0) * x + call.attr("shift", 0.0))
    base = call.attr("base", -1.0)
    return scaled if base <= 0 else scaled / torch.log(torch.tensor(base))


@kernel("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    return x.to(call.dtype("dst_type"))


@kernel("Bitcast")
def bitcast(call: Call, x: Tensor) -> Tensor:
    return x.contiguous().view(call.dtype("type"))


@kernel("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x * call.attr("scale", 1.0))


@kernel("GeluV2")
def gelu_v2(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.attr("approximate", "none"))


@kernel("SwiGlu")
def swiglu(call: Call, x: Tensor) -> Tensor:
    return npu_ops.swiglu(x, call.attr("dim", -1))


@kernel("GeGluV2")
def geglu_v2(call: Call, x: Tensor) -> Any:
    left = call.attr("activate_left", False)
    return npu_ops.geglu(x, call.attr("dim", -1), call.attr("approximate", 1), bool(left))


@kernel("GLU")
def glu(call: Call, x: Tensor) -> Tensor:
    return F.glu(x, call.attr("dim", -1))


@kernel("SoftplusV2")
def softplus_v2(call: Call, x: Tensor) -> Tensor:
    return F.softplus(x, call.attr("beta", 1.0), call.attr("threshold", 20.0))


@kernel("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.attr("negative_slope", 0.0))


@kernel("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    return torch.ops.aten.elu(
        x, call.attr("alpha", 1.0), call.attr("scale", 1.0), call.attr("input_scale", 1.0)
    )


@kernel("Assign")
def assign(call: Call, ref: Tensor, value: Tensor) -> Tensor:
    """Writes to its first input, which is the caller's memory if it is a graph input."""
    return ref.copy_(value)
