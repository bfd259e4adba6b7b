"""Families of ops: what several parts of the compiler ask about an op, said once.

Ops of packages that may be absent (torch_npu, torchao) are known by their name, without overload.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)
"""Views in the order of memory, which depend on all sizes."""
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
MOVES = frozenset(
    {
        *VIEWS,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.clone.default,
        aten.cat.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.constant_pad_nd.default,
    }
)
"""Ops that only rearrange what they are given."""
DENSE = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution")
)
"""Matrix products and convolutions."""
QUANTISED = frozenset(
    {
        *("aten::_int_mm", "aten::_scaled_mm", "aten::_scaled_mm_v2", "aten::_weight_int8pack_mm"),
        *("aten::_weight_int4pack_mm", "aten::_weight_int4pack_mm_for_cpu"),
        *("aten::_weight_int4pack_mm_with_scales_and_zeros", "aten::_dyn_quant_matmul_4bit"),
        *("torchao::float8_linear_cpu", "torchao::int_scaled_matmul", "torchao::int_matmul"),
        *("torchao::da8w4_linear_cpu", "npu::npu_quant_matmul", "npu::npu_quant_matmul_gelu"),
        *("npu::npu_quant_matmul_dequant", "npu::npu_weight_quant_batchmatmul"),
    }
)
"""Products of ``[..., s, k]``, the first operand, with a weight of fewer bits: ``[..., s, n]``."""
ATTENDS = frozenset(
    {"ascend_sp::attention", "ascend_sp::split_attention", "aten::scaled_dot_product_attention"}
)


def name_of(node: fx.Node) -> str:
    """``namespace::op`` of the op that a node calls, without overload; empty if it calls none."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else ""


def is_product(node: fx.Node) -> bool:
    """Whether a node is a matrix product or a convolution, quantised or not."""
    name = name_of(node)
    return name in DENSE or name in QUANTISED
