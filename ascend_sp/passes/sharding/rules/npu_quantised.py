"""Quantised ops of torch_npu: each row of tokens by itself, as in `quantised`.

Signatures are those of torch_npu 2.10 to 2.14. What has no rule runs on whole tensors: the ``mx``
formats, whose scales come in blocks, and ops for groups of rows (experts).
"""

from __future__ import annotations

from ascend_sp.graph.layout import Placement, Shard
from ascend_sp.graph.sizes import equal
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    inputs_of,
    named,
    normal_dim,
    rows,
    rule,
)
from ascend_sp.passes.sharding.rules.quantised import SCALES, WEIGHT, of_rows, rows_lead

GROUPS = "rows are quantised in groups"
CHANNELS = "the channels of what is quantised are sharded"


@rule("npu::npu_quant_matmul", "npu::npu_quant_matmul_gelu")
def quant_matmul(call: Call) -> Answer:
    """``([b, s, k], [k, n], [n], pertoken_scale=[s]) -> [b, s, n]``."""
    scales = "x1_scale" if "gelu" in call.op.name() else "pertoken_scale"
    x, weight, bias, scale = named(call, "x1", "x2", "bias", scales)
    if not rows_lead(x):
        return Reshard(WEIGHT)
    if x.shard.dim < x.ndim - 2 and (weight.ndim > 2 or (bias is not None and bias.ndim > 1)):
        return Reshard("a batch of quantised products is sharded, of which each has its own weight")
    return _product(call, x, scale, len(call.outputs[0]) - x.ndim)


@rule("npu::npu_quant_matmul_dequant")
def quant_matmul_dequant(call: Call) -> Answer:
    """``([s, k], [n, k], [n]) -> [s, n]``: rows are quantised inside, or by ``x_scale: [s]``."""
    x, scale, offset, mode = named(call, "x", "x_scale", "x_offset", "quant_mode")
    if not rows_lead(x):
        return Reshard(WEIGHT)
    if offset is not None or (scale is None and mode not in (None, "pertoken")):
        return Reshard("all rows share a scale that is computed from them")
    return _product(call, x, scale)


@rule("npu::npu_weight_quant_batchmatmul")
def weight_quant_matmul(call: Call) -> Answer:
    """``([s, k], [k, n], [n] or [groups, n]) -> [s, n]``; activations are not quantised."""
    (x,) = named(call, "x")
    return rows(call, x.shard, x) if rows_lead(x) else Reshard(WEIGHT)


@rule("npu::npu_dequant_bias")
def dequant_bias(call: Call) -> Answer:
    """``([s, n], [n], [s], [n]) -> [s, n]``: the result of an integer matmul becomes a float."""
    x, scale = named(call, "x", "activation_scale")
    return _product(call, x, scale) if rows_lead(x) else Reshard(CHANNELS)


@rule("npu::npu_dynamic_quant", "npu::npu_dynamic_quant_asymmetric")
def dynamic_quant(call: Call) -> Answer:
    """``[b, s, k] -> [b, s, k], [b, s]``, and the offsets ``[b, s]`` where it is asymmetric."""
    x, groups, mode = named(call, "input", "group_index", "quant_mode")
    if not rows_lead(x):
        return Reshard(CHANNELS)
    if groups is not None:
        return Reshard(GROUPS)
    if mode not in (None, "pertoken"):
        return Reshard("all rows share a scale that is computed from them")
    return rows(call, x.shard, x)


@rule("npu::npu_gelu_quant")
def gelu_quant(call: Call) -> Answer:
    """``[b, s, k] -> [b, s, k], [b, s]``: the scales of the rows, if it finds them itself."""
    (x,) = named(call, "input")
    return rows(call, x.shard, x) if rows_lead(x) else Reshard(CHANNELS)


@rule("npu::npu_quantize", "npu::npu_anti_quant")
def by_given_scale(call: Call) -> Answer:
    """``([b, s, k], [k] or [1]) -> [b, s, k]`` by scales that are known; packed, `k` changes."""
    x, *scales = call.operands
    if not rows_lead(x):
        return Reshard(CHANNELS)
    along = call.argument("axis") if "quantize" in call.op.name() else -1
    for scale in scales:
        if scale.ndim > 1 and not equal(scale.numel, 1):
            return Reshard("a scale of several dims")
        if normal_dim(along, x.ndim) == x.shard.dim and not equal(scale.numel, 1):
            return Reshard("the scales of what is quantised run along the sequence")
    return rows(call, x.shard, x)


def _product(call: Call, x: Operand, scale: Operand | None, added: int = 0) -> Answer:
    """Rows of `x` split, and their scales; the result has `added` dims more in front."""
    wanted: dict[int, Placement] = {x.index: x.shard}
    if scale is not None:
        placement = of_rows(x, scale)
        if placement is None:
            return Reshard(SCALES)
        wanted[scale.index] = placement
    out: Shard = x.shard.moved(x.shard.dim + added)
    return Local(inputs_of(call, wanted), tuple(out for _ in call.outputs))
