"""Fused ops on npu tensors: their values, and the calls that their documents forbid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cannsim.attention import IllegalCallError
from torch import Tensor

B, N, S, T, D = 2, 4, 6, 10, 16
SCALE = D**-0.5
npu = torch.ops.npu


def _qkv(heads: int = N, kv_heads: int = N, size: int = D) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(B, heads, S, size).to("npu"),
        torch.randn(B, kv_heads, T, size).to("npu"),
        torch.randn(B, kv_heads, T, size).to("npu"),
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    keep = None if hidden is None else ~hidden
    q, k, v = (t.cpu() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, keep, scale=SCALE, enable_gqa=True)


def _as(t: Tensor, layout: str) -> Tensor:
    t = t if layout == "BNSD" else t.transpose(1, 2)
    if layout in ("BSH", "SBH"):
        t = t.flatten(2)
    return (t.transpose(0, 1) if layout == "SBH" else t).contiguous()


def _hidden(*shape: int) -> Tensor:
    mask = torch.rand(*shape) < 0.3
    mask[..., 0] = False
    return mask


def _v1(q: Tensor, k: Tensor, v: Tensor, layout: str, **kw: Any) -> Tensor:
    mask = kw.pop("mask", None)
    return npu.npu_fusion_attention(q, k, v, N, layout, atten_mask=mask, **kw)[0]


def _v2(q: Tensor, k: Tensor, v: Tensor, layout: str, **kw: Any) -> Tensor:
    mask = kw.pop("mask", None)
    return npu.npu_fusion_attention_v2(q, k, v, N, layout, atten_mask=mask, **kw)[0]


def _v3(q: Tensor, k: Tensor, v: Tensor, layout: str, **kw: Any) -> Tensor:
    mask = kw.pop("mask", None)
    return npu.npu_fusion_attention_v3(q, k, v, N, layout, atten_mask=mask, **kw)[0]


def _prompt(q: Tensor, k: Tensor, v: Tensor, layout: str, **kw: Any) -> Tensor:
    kw = {"next_tokens": 2147483647, **kw}
    return npu.npu_prompt_flash_attention(
        q, k, v, num_heads=N, input_layout=layout, scale_value=kw.pop("scale", 1.0),
        atten_mask=kw.pop("mask", None), **kw,
    )  # fmt: skip


def _infer(q: Tensor, k: Tensor, v: Tensor, layout: str, **kw: Any) -> Tensor:
    return npu.npu_fused_infer_attention_score(
        q, k, v, num_heads=N, input_layout=layout, atten_mask=kw.pop("mask", None), **kw
    )[0]


def _infer_v2(q: Tensor, k: Tensor, v: Tensor, layout: str, **kw: Any) -> Tensor:
    kw["softmax_scale"] = kw.pop("scale", 1.0)
    return npu.npu_fused_infer_attention_score_v2(
        q, k, v, num_query_heads=N, input_layout=layout, atten_mask=kw.pop("mask", None), **kw
    )[0]


TRAINING = {"v1": _v1, "v2": _v2, "v3": _v3}
INFERENCE = {"prompt": _prompt, "infer": _infer, "infer_v2": _infer_v2}
ALL = {**TRAINING, **INFERENCE}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD", "BNSD_BSND"])
def test_values_in_every_layout(name: str, layout: str) -> None:
    q, k, v = _qkv()
    of_input, _, of_output = layout.partition("_")
    args = [_as(t, of_input) for t in (q, k, v)]
    if layout == ("BNSD_BSND" if name in TRAINING else "SBH"):
        with pytest.raises(NotImplementedError, match="layout"):
            ALL[name](*args, layout, scale=SCALE)
        return
    out = ALL[name](*args, layout, scale=SCALE)
    torch.testing.assert_close(out.cpu(), _as(_sdpa(q, k, v), of_output or of_input))


_SHAPES = {
    "SS": (S, T),
    "1SS": (1, S, T),
    "BSS": (B, S, T),
    "11SS": (1, 1, S, T),
    "B1SS": (B, 1, S, T),
    "BNSS": (B, N, S, T),
    "B11S": (B, 1, 1, T),
    "11S_to_Q": (1, 1, 1, T),
}
_LEGAL = {
    "v1": {"SS", "11SS", "B1SS", "BNSS"},
    "v2": {"SS", "11SS", "B1SS", "BNSS"},
    "v3": {"SS", "11SS", "B1SS", "BNSS"},
    "prompt": {"SS", "1SS", "BSS", "11SS", "B1SS"},
    "infer": {"SS", "1SS", "11SS", "B1SS"},
    "infer_v2": {"SS", "1SS", "11SS", "B1SS"},
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", _SHAPES)
def test_true_hides_and_only_some_shapes_are_legal(name: str, shape: str) -> None:
    q, k, v = _qkv()
    hidden = _hidden(*_SHAPES[shape])
    if shape not in _LEGAL[name]:
        with pytest.raises(IllegalCallError, match="atten_mask of shape"):
            ALL[name](q, k, v, "BNSD", scale=SCALE, mask=hidden.to("npu"))
        return
    out = ALL[name](q, k, v, "BNSD", scale=SCALE, mask=hidden.to("npu"))
    full = hidden.unsqueeze(1) if hidden.dim() == 3 else hidden
    torch.testing.assert_close(out.cpu(), _sdpa(q, k, v, full))


@pytest.mark.parametrize("name", ALL)
def test_the_default_scale_is_one(name: str) -> None:
    q, k, v = _qkv()
    expected = F.scaled_dot_product_attention(q.cpu(), k.cpu(), v.cpu(), scale=1.0)
    torch.testing.assert_close(ALL[name](q, k, v, "BNSD").cpu(), expected)


def test_prompt_attention_is_causal_by_default_if_a_mask_is_given() -> None:
    q, k, v = _qkv()
    none = torch.zeros(S, T, dtype=torch.bool)

    def run(mask: Tensor | None) -> Tensor:
        return npu.npu_prompt_flash_attention(
            q, k, v, num_heads=N, input_layout="BNSD", scale_value=SCALE, atten_mask=mask
        ).cpu()

    causal = torch.ones(S, T, dtype=torch.bool).triu(1)
    torch.testing.assert_close(run(none.to("npu")), _sdpa(q, k, v, causal))
    torch.testing.assert_close(run(None), _sdpa(q, k, v))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", [2, 3])
def test_compressed_causal_modes(name: str, mode: int) -> None:
    q, k, v = _qkv()
    with pytest.raises(IllegalCallError, match="2048"):
        ALL[name](q, k, v, "BNSD", scale=SCALE, sparse_mode=mode)
    compressed = torch.ones(2048, 2048, dtype=torch.bool).triu(1).to("npu")
    out = ALL[name](q, k, v, "BNSD", scale=SCALE, sparse_mode=mode, mask=compressed)
    causal = torch.ones(S, T, dtype=torch.bool).triu(1 if mode == 2 else 1 + T - S)
    torch.testing.assert_close(out.cpu(), _sdpa(q, k, v, causal))


@pytest.mark.parametrize("name", INFERENCE)
def test_lengths_of_keys_hide_what_is_behind_them(name: str) -> None:
    q, k, v = _qkv()
    key = "actual_seq_kvlen" if name == "infer_v2" else "actual_seq_lengths_kv"
    out = INFERENCE[name](q, k, v, "BNSD", scale=SCALE, **{key: [3, 7]})
    hidden = torch.arange(T)[None, :] >= torch.tensor([3, 7])[:, None]
    torch.testing.assert_close(out.cpu(), _sdpa(q, k, v, hidden[:, None, None, :]))
    with pytest.raises(IllegalCallError, match="does not fit"):
        INFERENCE[name](q, k, v, "BNSD", **{key: [3, T + 1]})
    with pytest.raises(IllegalCallError, match="entries"):
        INFERENCE[name](q, k, v, "BNSD", **{key: [3, 3, 3]})


@pytest.mark.parametrize("name", ["prompt", "infer", "infer_v2"])
def test_fewer_key_heads(name: str) -> None:
    q, k, v = _qkv(kv_heads=2)
    out = ALL[name](q, k, v, "BNSD", scale=SCALE, num_key_value_heads=2)
    torch.testing.assert_close(out.cpu(), _sdpa(q, k, v))


def test_lse_joins_parts_of_the_keys() -> None:
    q, k, v = _qkv()
    parts = [
        npu.npu_fused_infer_attention_score(
            q, k[:, :, s].contiguous(), v[:, :, s].contiguous(), num_heads=N,
            input_layout="BNSD", scale=SCALE, softmax_lse_flag=True,
        )
        for s in (slice(0, 4), slice(4, T))
    ]  # fmt: skip
    assert parts[0][1].shape == (B, N, S, 1) and parts[0][1].dtype == torch.float32
    lse = torch.cat([p[1] for p in parts], -1).cpu()
    weights = lse.softmax(-1)
    out = sum(p[0].cpu() * weights[..., i : i + 1] for i, p in enumerate(parts))
    torch.testing.assert_close(out, _sdpa(q, k, v))


@pytest.mark.parametrize(
    ("name", "size", "illegal"),
    [
        ("infer", 20, "16-byte"),
        ("infer_v2", 520, "above 512"),
        ("prompt", 520, "above 512"),
        ("prompt", 136, "unaligned"),
        ("v1", 776, "1..768"),
    ],
)
def test_head_sizes(name: str, size: int, illegal: str) -> None:
    with pytest.raises(IllegalCallError, match=illegal):
        ALL[name](*_qkv(size=size), "BNSD")


def test_number_of_heads() -> None:
    q, k, v = (torch.zeros(1, 257, 2, 16).to("npu") for _ in range(3))
    with pytest.raises(IllegalCallError, match="at most 256"):
        npu.npu_fused_infer_attention_score(q, k, v, num_heads=257, input_layout="BNSD")
    with pytest.raises(IllegalCallError, match="declared"):
        npu.npu_fused_infer_attention_score(q, k, v, num_heads=4, input_layout="BNSD")


def test_rows_with_everything_hidden() -> None:
    q, k, v = _qkv()
    hidden = torch.zeros(S, T, dtype=torch.bool)
    hidden[2] = True
    mask = hidden.to("npu")
    with pytest.raises(IllegalCallError, match="every key masked"):
        _prompt(q, k, v, "BNSD", mask=mask)
    assert _infer(q, k, v, "BNSD", mask=mask)[:, :, 2].isnan().all().item()
    assert (_infer(q, k, v, "BNSD", mask=mask, inner_precise=2)[:, :, 2] == 0).all().item()


def test_strict_dtypes_refuse_what_the_device_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = _qkv()
    monkeypatch.setenv("CANNSIM_STRICT_DTYPES", "1")
    for name in INFERENCE:
        with pytest.raises(IllegalCallError, match="float32"):
            INFERENCE[name](q, k, v, "BNSD")
        INFERENCE[name](q.bfloat16(), k.bfloat16(), v.bfloat16(), "BNSD")


def test_other_arguments_are_not_ignored() -> None:
    q, k, v = _qkv()
    table = torch.zeros(1, 1, dtype=torch.int32).to("npu")
    with pytest.raises(NotImplementedError, match="block_table"):
        _infer(q, k, v, "BNSD", block_table=table)
    with pytest.raises(NotImplementedError, match="keep_prob"):
        _v1(q, k, v, "BNSD", keep_prob=0.9)
    with pytest.raises(IllegalCallError, match="float32"):
        _infer(q, k, v, "BNSD", mask=torch.zeros(S, T).to("npu"))


def test_results_have_the_shapes_that_the_wheel_promises() -> None:
    """Meta kernels of the wheel are what the compiler believes."""
    q, k, v = _qkv()

    def shapes(device: str) -> list[Any]:
        a, b, c = (t.to(device) for t in (q, k, v))
        x = torch.ones(2, 4, 8, device=device)
        gamma = torch.ones(8, device=device)
        found = [
            npu.npu_fusion_attention(a, b, c, N, "BNSD"),
            npu.npu_fusion_attention_v3(a, b, c, N, "BNSD"),
            npu.npu_prompt_flash_attention(a, b, c, num_heads=N, input_layout="BNSD_BSND"),
            npu.npu_fused_infer_attention_score(a, b, c, num_heads=N, input_layout="BNSD"),
            npu.npu_fused_infer_attention_score(
                a, b, c, num_heads=N, input_layout="BNSD", softmax_lse_flag=True
            ),
            npu.npu_fused_infer_attention_score_v2(
                a, b, c, num_query_heads=N, input_layout="BNSD_BSND"
            ),
            npu.npu_rms_norm(x, gamma),
            npu.npu_add_rms_norm(x, x, gamma),
            npu.npu_add_layer_norm(x, x, gamma, gamma, 1e-5, True),
            npu.npu_swiglu(x),
            npu.npu_geglu(x),
            npu.npu_fast_gelu(x),
        ]
        return [
            [(tuple(t.shape), t.dtype) for t in torch.utils._pytree.tree_leaves(f)
             if isinstance(t, Tensor)]
            for f in found
        ]  # fmt: skip

    for ours, promised in zip(shapes("npu"), shapes("meta"), strict=True):
        assert ours == promised


def test_norms_activations_and_rotary() -> None:
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    there = [t.to("npu") for t in (x, gamma, beta)]
    close = torch.testing.assert_close
    close(npu.npu_rms_norm(there[0], there[1], 1e-6)[0].cpu(), F.rms_norm(x, (8,), gamma, 1e-6))
    close(
        npu.npu_add_rms_norm(there[0], there[0], there[1], 1e-6)[0].cpu(),
        F.rms_norm(2 * x, (8,), gamma, 1e-6),
    )
    close(
        npu.npu_add_layer_norm(*[there[0]] * 2, *there[1:], 1e-5)[0].cpu(),
        F.layer_norm(2 * x, (8,), gamma, beta, 1e-5),
    )
    a, b = x.chunk(2, -1)
    close(npu.npu_swiglu(there[0]).cpu(), F.silu(a) * b)
    close(npu.npu_geglu(there[0])[0].cpu(), a * F.gelu(b, approximate="tanh"))
    close(npu.npu_fast_gelu(there[0]).cpu(), x * torch.sigmoid(1.702 * x))

    x = torch.randn(1, 5, 2, 8)
    angle = torch.randn(1, 5, 1, 4)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    cos, sin = (f(angle).repeat_interleave(2, -1).to("npu") for f in (torch.cos, torch.sin))
    close(npu.npu_rotary_mul(x.to("npu"), cos, sin, "interleave").cpu(), turned)
    first, second = x.chunk(2, -1)
    halves = torch.cat([-second, first], -1)
    close(npu.npu_rotary_mul(x.to("npu"), cos, sin).cpu(), x * cos.cpu() + halves * sin.cpu())
    with pytest.raises(IllegalCallError, match="4 dims"):
        npu.npu_rotary_mul(x[0].to("npu"), cos, sin)
