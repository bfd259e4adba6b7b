"""Matrix products and convolutions. Half-precision products are summed in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cannsim.ge.registry import Call, kernel


def _product(x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        out = x.float() @ y.float()
        return (out if bias is None else out + bias.float()).to(x.dtype)
    out = x @ y
    return out if bias is None else out + bias


@kernel("MatMul", "MatMulV2")
def mat_mul(
    call: Call, x: Tensor, y: Tensor, bias: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    x = x.transpose(-1, -2) if call.attr("transpose_x1", False) else x
    y = y.transpose(-1, -2) if call.attr("transpose_x2", False) else y
    return _product(x, y, bias)


@kernel("BatchMatMul", "BatchMatMulV2")
def batch_mat_mul(
    call: Call, x: Tensor, y: Tensor, bias: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    x = x.transpose(-1, -2) if call.attr("adj_x1", False) else x
    y = y.transpose(-1, -2) if call.attr("adj_x2", False) else y
    return _product(x, y, bias)


@kernel("Dot")
def dot(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y)


@kernel("Conv2D")
def conv2d(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    layout = call.attr("data_format", "NHWC")
    if layout != "NCHW":
        raise NotImplementedError(f"data_format {layout!r} is not simulated")
    top, bottom, left, right = call.attr("pads")
    return F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        weight,
        bias,
        stride=call.attr("strides")[2:],
        dilation=call.attr("dilations", [1, 1, 1, 1])[2:],
        groups=call.attr("groups", 1),
    )
