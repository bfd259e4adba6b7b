"""CPU references of torch_npu's quantised ops, as its documents have them for Atlas A2 and A3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cannsim.attention import IllegalCallError

HALVES = (torch.float16, torch.bfloat16)
INT8 = (None, 1, 12)
"""What `int8` is among the numbers of types: itself, or the quantised type."""
TYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
"""What `output_dtype` may be, by the numbers of PyTorch's types."""
LONGEST = 65535


def refuse_unless(legal: bool, op: str, why: str) -> None:
    if not legal:
        raise IllegalCallError(f"{op}: {why}")


def not_simulated(op: str, **given: Any) -> None:
    """Raise for arguments that are set and not simulated."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{op}: argument {name}={value} is not simulated")


def to_int8(x: Tensor) -> Tensor:
    """Rounded to even, cut off at the ends; what is no number becomes one."""
    return x.nan_to_num().round().clamp(-128, 127).to(torch.int8)


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """``(x1 @ x2 + bias) * scale * pertoken_scale``; a bias of floats is added at the end."""
    op = "npu_quant_matmul"
    not_simulated(op, **kwargs)
    refuse_unless(x1.dtype == x2.dtype == torch.int8, op, f"{x1.dtype} with {x2.dtype}")
    refuse_unless(all(2 <= x.ndim <= 6 for x in (x1, x2)), op, "x1 and x2 need 2 to 6 dims")
    refuse_unless(max(x1.shape[-1], x2.shape[-1]) <= LONGEST, op, "a last dim above 65535")
    if scale.dtype == torch.int64:
        raise NotImplementedError(f"{op}: scales made by npu_trans_quant_param")
    n, out = x2.shape[-1], TYPES.get(1 if output_dtype is None else output_dtype)
    refuse_unless(out is not None, op, f"output_dtype {output_dtype}")
    assert out is not None
    floats = (torch.float32, torch.bfloat16) if out != torch.float16 else (torch.float32,)
    refuse_unless(scale.dtype in floats, op, f"{scale.dtype} scales for {out}")
    refuse_unless(scale.ndim == 1 and scale.numel() in (1, n), op, f"scale {tuple(scale.shape)}")
    if offset is not None:
        refuse_unless(out == torch.int8, op, f"an offset for {out}")
        refuse_unless(offset.shape in ((1,), (n,)), op, f"offset {tuple(offset.shape)}")
    if pertoken_scale is not None:
        refuse_unless(out in HALVES, op, f"pertoken_scale for {out}")
        legal = pertoken_scale.dtype == torch.float32 and pertoken_scale.shape == x1.shape[-2:-1]
        refuse_unless(legal, op, f"pertoken_scale {tuple(pertoken_scale.shape)}")
    total = x1.int() @ x2.int()
    if bias is not None:
        wide = pertoken_scale is not None or out == torch.bfloat16
        allowed = (torch.int32, out, torch.float32) if wide else (torch.int32,)
        refuse_unless(bias.dtype in allowed, op, f"a bias of {bias.dtype} for {out}")
        shapes = ((n,), (1, n)) if total.ndim == 2 else ((n,), (*total.shape[:-2], 1, n))
        refuse_unless(tuple(bias.shape) in shapes, op, f"bias {tuple(bias.shape)}")
        total = total + (bias if bias.dtype == torch.int32 else 0)
    if out == torch.int32:
        return total
    y = total.float() * scale.float()
    y = y if pertoken_scale is None else y * pertoken_scale[:, None]
    y = y if bias is None or bias.dtype == torch.int32 else y + bias.float()
    if out == torch.int8:
        return to_int8(y if offset is None else y + offset)
    return y.to(out)


def _smoothed(op: str, x: Tensor, smooth_scales: Tensor | None, dst_type: Any) -> Tensor:
    refuse_unless(x.dtype in HALVES, op, f"x of {x.dtype}")
    refuse_unless(x.ndim >= 2, op, "x needs 2 dims")
    if dst_type not in INT8:
        raise NotImplementedError(f"{op}: dst_type {dst_type} is not simulated")
    if smooth_scales is None:
        return x.float()
    legal = smooth_scales.shape == x.shape[-1:] and smooth_scales.dtype == x.dtype
    refuse_unless(legal, op, f"smooth_scales {tuple(smooth_scales.shape)} {smooth_scales.dtype}")
    return x.float() * smooth_scales.float()


def dynamic_quant(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Each row by its largest value."""
    op = "npu_dynamic_quant"
    mode = None if quant_mode == "pertoken" else quant_mode
    not_simulated(op, group_index=group_index, quant_mode=mode, dst_type_max=dst_type_max or None)
    wide = _smoothed(op, x, smooth_scales, dst_type)
    scale = wide.abs().amax(-1) / 127
    return to_int8(wide / scale[..., None]), scale


def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """``x @ ((weight + antiquant_offset) * antiquant_scale) + bias``."""
    op = "npu_weight_quant_batchmatmul"
    not_simulated(op, quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    refuse_unless(x.dtype in HALVES and x.ndim == weight.ndim == 2, op, f"x {x.dtype} {x.shape}")
    refuse_unless(weight.dtype == torch.int8, op, f"weight of {weight.dtype}")
    k, n = weight.shape
    refuse_unless(x.shape[1] == k and max(k, n) <= LONGEST, op, f"{x.shape} and {weight.shape}")
    refuse_unless(antiquant_scale.dtype == x.dtype, op, f"antiquant_scale {antiquant_scale.dtype}")
    shapes = [(1,), (1, 1), (n,), (1, n)]
    if antiquant_group_size:
        group = antiquant_group_size
        refuse_unless(32 <= group < k and group % 32 == 0, op, f"groups of {group} of {k}")
        shapes = [(-(-k // group), n)]

    def spread(t: Tensor) -> Tensor:
        refuse_unless(tuple(t.shape) in shapes, op, f"{tuple(t.shape)} for {tuple(weight.shape)}")
        wide = t.float()
        return wide.repeat_interleave(antiquant_group_size, 0)[:k] if antiquant_group_size else wide

    real = weight.float()
    if antiquant_offset is not None:
        refuse_unless(antiquant_offset.shape == antiquant_scale.shape, op, "offset unlike scale")
        real = real + spread(antiquant_offset)
    y = x.float() @ (real * spread(antiquant_scale))
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        legal = bias.dtype == wanted and tuple(bias.shape) in ((1,), (n,), (1, n))
        refuse_unless(legal, op, f"bias {tuple(bias.shape)} of {bias.dtype}")
        y = y + bias.float()
    return y.to(x.dtype)


def quantize(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """``x / scales + zero_points``, or ``x * scales + ...``, along `axis`."""
    op = "npu_quantize"
    if dtype not in INT8:
        raise NotImplementedError(f"{op}: dtype {dtype} is not simulated")
    if not div_mode:  # then it only tells the last dim from the one before
        axis = -2 if axis == -2 else -1
    size = x.shape[axis]
    for t in (scales, *([] if zero_points is None else [zero_points])):
        refuse_unless(tuple(t.shape) in ((1,), (size,)), op, f"{tuple(t.shape)} along {size}")
    shape = [1] * x.ndim
    shape[axis] = -1
    scale = scales.float().view(shape)
    y = x.float() / scale if div_mode else x.float() * scale
    return to_int8(y if zero_points is None else y + zero_points.float().view(shape))


def anti_quant(
    x: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    dst_dtype: int | None = None,
    src_dtype: int | None = None,
) -> Tensor:
    """``(x + offset) * scale``."""
    op = "npu_anti_quant"
    if x.dtype != torch.int8 or src_dtype not in INT8:
        raise NotImplementedError(f"{op}: {x.dtype} as {src_dtype} is not simulated")
    out = TYPES.get(5 if dst_dtype is None else dst_dtype)
    refuse_unless(out in HALVES, op, f"dst_dtype {dst_dtype}")
    for t in (scale, *([] if offset is None else [offset])):
        legal = t.shape in ((1,), x.shape[-1:]) and t.dtype in (torch.float32, torch.bfloat16)
        refuse_unless(legal, op, f"{tuple(t.shape)} of {t.dtype} for {tuple(x.shape)}")
    wide = x.float() if offset is None else x.float() + offset.float()
    return (wide * scale.float()).to(out)
