"""Quantised products, and what quantises activations; the references say which calls are legal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cannsim import quantised
from cannsim.ge.registry import Call, kernel

NUMBERS = {v: k for k, v in quantised.TYPES.items()}


def _not_transposed(call: Call, *names: str) -> None:
    for name in names:
        if call.attr(name, False):
            raise NotImplementedError(f"{call.op.type}: {name} is not simulated")


@kernel("DynamicQuant")
def dynamic_quant(call: Call, x: Tensor, *_: Tensor | None) -> Any:
    if call.dtype("dst_type", 2) != torch.int8:
        raise NotImplementedError("DynamicQuant: another dst_type than int8 is not simulated")
    return quantised.dynamic_quant(
        x, smooth_scales=call.get("smooth_scales"), group_index=call.get("group_index")
    )


@kernel("QuantBatchMatmulV3")
def quant_batch_matmul(call: Call, x1: Tensor, x2: Tensor, scale: Tensor, *_: Any) -> Tensor:
    _not_transposed(call, "transpose_x1", "transpose_x2")
    return quantised.quant_matmul(
        x1,
        x2,
        scale,
        offset=call.get("offset"),
        pertoken_scale=call.get("pertoken_scale"),
        bias=call.get("bias"),
        output_dtype=NUMBERS[call.dtype("dtype")],
    )


@kernel("WeightQuantBatchMatmulV2")
def weight_quant_batch_matmul(call: Call, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    _not_transposed(call, "transpose_x", "transpose_weight")
    names = ("antiquant_scale", "antiquant_offset", "quant_scale", "quant_offset", "bias")
    return quantised.weight_quant_batchmatmul(
        x,
        weight,
        *(call.get(name) for name in names),  # type: ignore[arg-type]
        antiquant_group_size=call.attr("antiquant_group_size", 0),
    )
