"""Matmuls with quantised weights, and their scales: each row of tokens by itself.

Known by name, since some are not in every PyTorch, and torchao's need not be there. What torchao
quantises with (``quantize_affine``, ``choose_qparams_affine``) is no op any more in the graphs that
a backend gets, but plain ATen; ``aten._int_mm`` is in `matmul`.

A scale of the activations has a value for each row, which is split as the rows are, or one for all,
which stays whole. Weights, and all that belongs to them, are whole.
"""

from __future__ import annotations

from ascend_sp.graph.layout import REPLICATE, Placement, Shard
from ascend_sp.graph.sizes import equal
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    inputs_of,
    named,
    rows,
    rule,
)

WEIGHT = "a quantised weight, or the channels that it multiplies, are sharded"
SCALES = "the scales of a quantised product are not one for each row"


def rows_lead(x: Operand) -> bool:
    """Whether `x` is split, and not along the channels that a weight multiplies."""
    return isinstance(x.placement, Shard) and x.shard.dim < x.ndim - 1


@rule(
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_weight_int4pack_mm_with_scales_and_zeros",
    "aten::_dyn_quant_matmul_4bit",
)
def packed(call: Call) -> Answer:
    """``([s, k], packed, ...) -> [s, n]``: activations that are not quantised, or row by row."""
    x = call.operands[0]
    return rows(call, x.shard, x) if rows_lead(x) else Reshard(WEIGHT)


@rule("aten::_scaled_mm")
def scaled_mm(call: Call) -> Answer:
    """``([s, k], [k, n], [s, 1], [1, n]) -> [s, n]``; a scale of one value is for all rows."""
    x, scale = named(call, "self", "scale_a")
    return _scaled(call, x, scale)


@rule("aten::_scaled_mm_v2")
def scaled_mm_v2(call: Call) -> Answer:
    """``([s, k], [k, n], [[s, 1], ...], [[1, n], ...]) -> [s, n]``, not swizzled."""
    x, scales, swizzles = named(call, "self", "scale_a", "swizzle_a")
    if any(swizzles):
        return Reshard("the scales of a quantised product are swizzled")
    return _scaled(call, x, *scales)


@rule("torchao::float8_linear_cpu", "torchao::int_scaled_matmul")
def scaled_linear(call: Call) -> Answer:
    """``([s, k], [s, 1], weight, ...) -> [s, n]``; `int_scaled_matmul` has the scales last."""
    which = ("a", "scales1") if "a" in _arguments(call) else ("input", "input_scales")
    return _scaled(call, *named(call, *which))


@rule("torchao::da8w4_linear_cpu")
def scaled_and_shifted_linear(call: Call) -> Answer:
    """``([s, k], [s], [s], weight, ...) -> [s, n]``: the rows have zero points, too."""
    return _scaled(call, *named(call, "input", "input_scales", "input_qzeros"))


@rule("torchao::int_matmul")
def integer_product(call: Call) -> Answer:
    """``([s, k], [k, n]) -> [s, n]``."""
    x = call.operands[0]
    return rows(call, x.shard, x) if rows_lead(x) else Reshard(WEIGHT)


@rule(
    "torchao::quantize_affine_float8_non_decomposed",
    "torchao::dequantize_affine_float8_non_decomposed",
)
def by_block(call: Call) -> Answer:
    """``([..., s, k], [..., s, k / block]) -> [..., s, k]``; the block may be longer than a row."""
    x, scale = named(call, "tensor", "scale")
    if not isinstance(x.placement, Shard):
        return Reshard("the scale of a quantised tensor is sharded")
    if equal(scale.numel, 1):
        return rows(call, x.shard, x)
    dim = x.shard.dim
    if scale.ndim == x.ndim and equal(scale.shape[dim], x.shape[dim]):
        return rows(call, x.shard, x, scale)
    if scale.ndim == x.ndim and equal(scale.shape[dim], 1):
        return rows(call, x.shard, x)
    return Reshard("a scale is for several positions of the sequence")


def _arguments(call: Call) -> list[str]:
    return [a.name for a in call.op._schema.arguments]


def _scaled(call: Call, x: Operand, *scales: Operand) -> Answer:
    if not rows_lead(x):
        return Reshard(WEIGHT)
    wanted: dict[int, Placement] = {x.index: x.shard}
    for scale in scales:
        placement = of_rows(x, scale)
        if placement is None:
            return Reshard(SCALES)
        wanted[scale.index] = placement
    return Local(inputs_of(call, wanted), tuple(x.shard for _ in call.outputs))


def of_rows(x: Operand, scale: Operand) -> Placement | None:
    """Where the scales of the rows of ``x: [..., s, k]`` lie: one for all, or one or more a row."""
    if equal(scale.numel, 1):
        return REPLICATE
    if not equal(scale.shape[0], x.shape[x.ndim - 2]):
        return None  # of blocks of rows, or in an order of their own
    # Dims in front of the rows have the same scales.
    return x.shard.moved(0) if x.shard.dim == x.ndim - 2 else REPLICATE
