"""CPU references of torch_npu's own ops, by the name they are registered with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cannsim import attention, quantised
from cannsim.attention import IllegalCallError

REFERENCES: dict[str, Callable[..., Any]] = {}


def reference(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function is the CPU reference of these ``npu::`` ops."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            REFERENCES[f"npu::{name}"] = fn
        return fn

    return register


# ---- norms ----


@reference("npu_rms_norm")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalised over the dims of gamma; also the reciprocal of the root mean square."""
    if tuple(x.shape[x.dim() - gamma.dim() :]) != tuple(gamma.shape):
        raise IllegalCallError(
            f"npu_rms_norm: gamma {tuple(gamma.shape)} does not match the last dims of "
            f"{tuple(x.shape)}"
        )
    dims = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@reference("npu_add_rms_norm")
def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of the sum, the reciprocal root mean square, the sum."""
    total = x1 + x2
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


@reference("npu_add_layer_norm")
def add_layer_norm(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float = 1e-5,
    additional_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm of the sum, mean, reciprocal deviation, and the sum if it is asked for."""
    wide = x1.float() + x2.float()
    y, mean, rstd = torch.native_layer_norm(
        wide, list(gamma.shape), gamma.float(), beta.float(), epsilon
    )
    total = wide.to(x1.dtype) if additional_output else x1.new_empty(0)
    return y.to(x1.dtype), mean, rstd, total


@reference("npu_layer_norm_eval")
def layer_norm_eval(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)


# ---- rotary embeddings ----


def rotate_half(x: Tensor) -> Tensor:
    """Halves swapped, the new first one negated."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_interleaved(x: Tensor) -> Tensor:
    """Neighbours swapped, the new first one negated."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """``x * cos + rotate(x) * sin`` in fp32."""
    rotate = {"half": rotate_half, "interleave": rotate_interleaved}.get(mode)
    if rotate is None:
        raise NotImplementedError(f"npu_rotary_mul: rotary_mode {mode!r} is not simulated")
    wide = x.float()
    return (wide * cos.float() + rotate(wide) * sin.float()).to(x.dtype)


@reference("npu_rotary_mul")
def rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    op = "npu_rotary_mul"
    if not x.dim() == r1.dim() == r2.dim() == 4:
        raise IllegalCallError(f"{op}: x, r1 and r2 must have 4 dims")
    if r1.shape != r2.shape or r1.shape[-1] != x.shape[-1]:
        shapes = f"r1 {tuple(r1.shape)} and r2 {tuple(r2.shape)}"
        raise IllegalCallError(f"{op}: {shapes} must be alike, with head size {x.shape[-1]}")
    if x.shape[-1] % 2:
        raise IllegalCallError(f"{op}: odd head size {x.shape[-1]}")
    if any(r not in (1, n) for r, n in zip(r1.shape, x.shape, strict=True)):
        raise IllegalCallError(f"{op}: r1 {tuple(r1.shape)} does not broadcast to {tuple(x.shape)}")
    if rotate is not None:
        wide = x.float()
        return (wide * r1.float() + (wide @ rotate.float()) * r2.float()).to(x.dtype)
    return rotary(x, r1, r2, rotary_mode)


@reference("npu_interleave_rope")
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The even elements first, then the odd ones, then rotated by halves."""
    apart = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return rotary(apart, cos, sin, "half")


# ---- activations ----


@reference("npu_swiglu")
def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.float().chunk(2, dim)
    return (F.silu(first) * second).to(x.dtype)


@reference("npu_geglu")
def geglu(
    x: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    """Product and the activated half; approximate 1 is tanh, 0 is exact."""
    left, right = x.float().chunk(2, dim)
    gate, other = (left, right) if activate_left else (right, left)
    active = F.gelu(gate, approximate="tanh" if approximate else "none")
    return (other * active).to(x.dtype), active.to(x.dtype)


@reference("npu_gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@reference("npu_fast_gelu", "fast_gelu")
def fast_gelu(x: Tensor) -> Tensor:
    """x / (1 + exp(-1.702 |x|)) * exp(0.851 (x - |x|)), which is x * sigmoid(1.702 x)."""
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


# ---- quantised ----

reference("npu_quant_matmul")(quantised.quant_matmul)
reference("npu_dynamic_quant")(quantised.dynamic_quant)
reference("npu_weight_quant_batchmatmul")(quantised.weight_quant_batchmatmul)
reference("npu_quantize")(quantised.quantize)
reference("npu_anti_quant")(quantised.anti_quant)


# ---- others ----


@reference("npu_linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@reference("npu_transpose")
def transpose(x: Tensor, perm: Sequence[int], require_contiguous: bool = True) -> Tensor:
    return x.permute(list(perm)).contiguous()


@reference("npu_format_cast", "npu_format_cast_.acl_format", "_npu_format_cast")
def format_cast(x: Tensor, acl_format: int, *args: Any, **kwargs: Any) -> Tensor:
    """Formats are about where bytes lie on the device; values do not change."""
    return x


@reference("npu_dtype_cast", "_npu_dtype_cast")
def dtype_cast(x: Tensor, dtype: Any, input_dtype: int | None = None) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise NotImplementedError(f"npu_dtype_cast: dtype {dtype} is not simulated")
    return x.to(dtype)


@reference("npu_attention_update")
def attention_update(
    lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int
) -> tuple[Tensor, Tensor]:
    """Join attention over parts of the keys by their log-sum-exps."""
    each = torch.stack([x.float() for x in lse])
    total = each.logsumexp(0)
    weights = (each - total).exp().unsqueeze(-1)
    out = (weights * torch.stack([x.float() for x in local_out])).sum(0)
    return out.to(local_out[0].dtype), total if update_type else total.new_empty(0)


# ---- attention ----


@reference("npu_fusion_attention")
def fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = attention.MAX_TOKENS,
    next_tockens: int = attention.MAX_TOKENS,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, ...]:
    _unsupported("npu_fusion_attention", padding_mask=padding_mask, prefix=prefix, sink=sink,
                 actual_seq_qlen=actual_seq_qlen, actual_seq_kvlen=actual_seq_kvlen)  # fmt: skip
    out, largest, total = attention.fusion_attention(
        query,
        key,
        value,
        head_num,
        input_layout,
        pse=pse,
        atten_mask=atten_mask,
        scale=scale,
        keep_prob=keep_prob,
        pre_tokens=pre_tockens,
        next_tokens=next_tockens,
        sparse_mode=sparse_mode,
    )
    return out, largest, total, query.new_empty(0), 0, 0, 0


@reference("npu_fusion_attention_v2")
def fusion_attention_v2(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **kwargs: Any
) -> tuple[Any, ...]:
    _unsupported("npu_fusion_attention_v2", query_rope=kwargs.pop("query_rope", None),
                 key_rope=kwargs.pop("key_rope", None))  # fmt: skip
    kwargs["pre_tockens"] = kwargs.pop("pre_tokens", attention.MAX_TOKENS)
    kwargs["next_tockens"] = kwargs.pop("next_tokens", attention.MAX_TOKENS)
    return fusion_attention(query, key, value, head_num, input_layout, **kwargs)


@reference("npu_fusion_attention_v3")
def fusion_attention_v3(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    found = fusion_attention(*args, **kwargs)
    seed, offset = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return *found[:4], seed, offset


@reference("npu_prompt_flash_attention")
def prompt_flash_attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    names = ("num_heads", "num_key_value_heads", "input_layout", "atten_mask", "pse_shift",
             "actual_seq_lengths", "actual_seq_lengths_kv", "scale_value", "pre_tokens",
             "next_tokens", "sparse_mode")  # fmt: skip
    known = {k: kwargs.pop(k) for k in names if k in kwargs}
    _unsupported("npu_prompt_flash_attention", **kwargs)
    return attention.prompt_flash_attention(query, key, value, **known)


@reference("npu_fused_infer_attention_score")
def fused_infer_attention(
    query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    names = ("num_heads", "num_key_value_heads", "input_layout", "atten_mask", "pse_shift",
             "actual_seq_lengths", "actual_seq_lengths_kv", "scale", "pre_tokens", "next_tokens",
             "sparse_mode", "inner_precise", "softmax_lse_flag")  # fmt: skip
    known = {k: kwargs.pop(k) for k in names if k in kwargs}
    _unsupported("npu_fused_infer_attention_score", **kwargs)
    return attention.fused_infer_attention(query, key, value, **known)


@reference("npu_fused_infer_attention_score_v2")
def fused_infer_attention_v2(
    query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    renamed = {
        "num_query_heads": "num_heads",
        "softmax_scale": "scale",
        "actual_seq_qlen": "actual_seq_lengths",
        "actual_seq_kvlen": "actual_seq_lengths_kv",
        "return_softmax_lse": "softmax_lse_flag",
    }
    return fused_infer_attention(
        query, key, value, **{renamed.get(k, k): v for k, v in kwargs.items()}
    )


def _into_out(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The ``.out`` form of an op whose `out` is a list of tensors."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out")
        kwargs.pop("workspace", None)
        for to, value in zip(out, fn(*args, **kwargs), strict=False):
            to.copy_(value.reshape(to.shape))
        return tuple(out)

    return run


for _name in ("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"):
    REFERENCES[f"npu::{_name}.out"] = _into_out(REFERENCES[f"npu::{_name}"])


@reference(
    "_npu_fused_infer_attention_score_get_max_workspace",
    "_npu_fused_infer_attention_score_v2_get_max_workspace",
)
def max_workspace(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty(512, dtype=torch.uint8)


def _unsupported(op: str, **given: Any) -> None:
    """Raise for arguments that are set and not simulated."""
    for name, value in given.items():
        if value is None or (not isinstance(value, Tensor) and value == 0):
            continue
        raise NotImplementedError(f"{op}: argument {name} is not simulated")


__all__ = ["REFERENCES", "IllegalCallError", "reference"]
