"""RMS norms as they are written, through the pass and through whole compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cannsim
import pytest
import torch
import torch.nn.functional as F
from fusing import compiled, fused, on_device
from torch import Tensor

EPS = 1e-5
RMS = "npu.npu_rms_norm"
Form = Callable[[Tensor, Tensor], Tensor]


def hugging_face(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * wide.to(x.dtype)


def t5(x: Tensor, w: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    if w.dtype in (torch.float16, torch.bfloat16):
        x = x.to(w.dtype)
    return w * x


def cast_last(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, True) + EPS) * w).type_as(x)


def stays_wide(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w.float() * (torch.rsqrt(wide.square().mean([-1], keepdim=True) + EPS) * wide)


def no_casts(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(torch.mean(x**2, dim=2, keepdim=True) + EPS) * w


def shifted_weight(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + w.float())).type_as(x)


FORMS: dict[str, Form] = {
    "rms_norm": lambda x, w: F.rms_norm(x, (w.shape[0],), w, EPS),
    "hugging face": hugging_face,
    "t5": t5,
    "cast last": cast_last,
    "stays wide": stays_wide,
    "no casts": no_casts,
    "shifted weight": shifted_weight,
    "transposed": lambda x, w: cast_last(x.transpose(0, 1), w),
    "channels not last in memory": lambda x, w: no_casts(x.permute(0, 2, 1).clone().mT, w),
    "two in a row": lambda x, w: hugging_face(cast_last(x, w), w),
}
X, W = torch.randn(2, 5, 16), torch.rand(16) + 0.5


def exactly(fn: Form, x: Tensor, w: Tensor) -> Tensor:
    """`fn` in float32 from the first to the last op, on the same numbers."""
    return fn(x.float(), w.float())


@pytest.mark.parametrize("name", FORMS)
def test_norm_is_fused_in_float32(name: str) -> None:
    out, ops = fused("fuse_rms_norm", on_device(FORMS[name], X, W))
    assert ops[RMS] == (2 if name == "two in a row" else 1)
    assert ops["aten.rsqrt"] == ops["aten.mean.dim"] == ops["aten._to_copy"] == 0
    torch.testing.assert_close(out, FORMS[name](X, W), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_norm_is_fused_in_half_precision(name: str, weight: torch.dtype) -> None:
    fn, x, w = FORMS[name], X.bfloat16(), W.to(weight)
    expected = fn(x, w)
    out, ops = fused("fuse_rms_norm", on_device(fn, x, w))
    assert ops[RMS] == (2 if name == "two in a row" else 1)
    assert ops["aten.rsqrt"] == 0
    assert out.dtype == expected.dtype
    # One rounding of each norm, however many the model does; none where it stays in float32.
    error = (out.float() - exactly(fn, x, w)).abs()
    roundings = 0.0 if out.dtype == torch.float32 else 1 + 1e-4
    allowed = 2.2 * 2**-8 if name == "two in a row" else roundings * 2**-8 + 1e-6
    assert (error <= allowed * exactly(fn, x, w).abs() + 1e-6).all()
    if name in ("hugging face", "t5", "cast last", "rms_norm") and out.dtype == torch.bfloat16:
        assert ops["aten._to_copy"] == 0, "the op takes half precision as it is"


def twice_used(x: Tensor, w: Tensor) -> Tensor:
    root = torch.rsqrt(x.pow(2).mean(-1, True) + EPS)
    return x * root * w + root


def with_root(x: Tensor, w: Tensor, **changes: Any) -> Tensor:
    """`no_casts` but for one thing."""
    given: dict[str, Any] = {"of": x, "dims": [-1], "keep": True, "times": x, "eps": EPS}
    given |= changes
    mean = given["of"].pow(given.get("power", 2)).mean(given["dims"], given["keep"])
    return given["times"] * torch.rsqrt(mean + given["eps"]) * w


SQUARE = torch.randn(16, 16)
MISSES: dict[str, tuple[Form, Tensor, Tensor]] = {
    "two dims": (lambda x, w: with_root(x, w, dims=[1, 2]), X, W),
    "another dim": (lambda x, w: with_root(x, w, dims=[1]), X, W),
    "all dims": (lambda x, w: with_root(x, w, dims=None), X, W),
    "keepdim False": (lambda x, w: with_root(x, w, keep=False), SQUARE, W),
    "root used twice": (twice_used, X, W),
    "cubes": (lambda x, w: with_root(x.abs(), w, power=3), X, W),
    "no weight": (lambda x, w: with_root(x, 1.0), X, W),  # type: ignore[arg-type]
    "one weight": (with_root, X, W[:1]),
    "a weight a row": (with_root, X, W[:5, None]),
    "a weight a batch": (with_root, X, torch.rand(2, 1, 16)),
    "eps a tensor": (lambda x, w: with_root(x, w, eps=w[:1]), X, W),
    "another is squared": (lambda x, w: with_root(x, w, of=x + 1), X, W),
    "another is scaled": (lambda x, w: with_root(x, w, times=x + 1), X, W),
    "float64": (with_root, X.double(), W.double()),
    "scaled is used": (lambda x, w: (n := with_root(x, 1.0)) * w + n, X, W),  # type: ignore[arg-type]
    "integers": (lambda x, w: cast_last(x.to(torch.int32), w), X * 5, W),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_only_looks_like_a_norm_stays(name: str) -> None:
    fn, x, w = MISSES[name]
    out, ops = fused("fuse_rms_norm", on_device(fn, x, w))
    expected = fn(x, w)
    # float32 of integers is normalised all right, but only once they are floats.
    assert ops[RMS] == 0 or name == "integers"
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", ["npugraph_ex", "torchair", "eager"])
@pytest.mark.parametrize("skip", ["", "fuse_rms_norm"])
def test_norm_in_a_whole_compile(target: str, skip: str) -> None:
    cannsim.ge.forget()
    cannsim.trace.forget()
    norm = torch.nn.RMSNorm(16, eps=EPS).to("npu", torch.bfloat16)
    x = X.bfloat16()

    def model(x: Tensor) -> Tensor:
        return hugging_face(norm(x) + x, norm.weight)

    def exact(x: Tensor) -> Tensor:
        w = torch.ones(16)
        return hugging_face(F.rms_norm(x, (16,), w, EPS) + x, w)

    out = compiled(model, x, target=target, skip_passes=skip)
    assert ((out.float() - exact(x.float())).abs() <= 2**-6 * exact(x.float()).abs() + 1e-6).all()
    if target == "torchair":
        (graph,) = cannsim.ge.graphs()
        assert graph.types()["RmsNorm"] == (0 if skip else 2)
        assert graph.types()["Rsqrt"] == (2 if skip else 0)
    if target == "npugraph_ex":
        (trace,) = cannsim.trace.captured_graphs()
        assert len(trace.find("npu_rms_norm")) == (0 if skip else 2)
