"""Rotary embeddings as they are written, through the pass and through whole compiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cannsim
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from fusing import compiled, fused, on_device
from torch import Tensor

ROTARY = "npu.npu_rotary_mul"
B, S, N, D = 2, 6, 3, 8
BSND, BNSD = torch.randn(B, S, N, D), torch.randn(B, N, S, D)
ANGLES = torch.rand(S, D // 2) * 6
EACH = ANGLES.repeat_interleave(2, -1)
TWICE = torch.cat([ANGLES, ANGLES], -1)
BATCHED = torch.rand(B, S, 1, D) * 6
FREQUENCIES = torch.polar(torch.ones_like(ANGLES), ANGLES)
Form = Callable[..., Tensor]


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1)


def by_chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


def by_unbinding_halves(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([-second, first], dim=-1)


def by_pairs(x: Tensor) -> Tensor:
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-second, first], dim=-1).flatten(3)


def every_two(x: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((-second, first), dim=-1).flatten(-2)


def picked(x: Tensor) -> Tensor:
    pairs = x.view(*x.shape[:-1], D // 2, 2)
    return torch.stack((-pairs[..., 1], pairs[..., 0]), -1).view(x.shape)


def turn(x: Tensor, angles: Tensor, turned: Callable[[Tensor], Tensor] = rotate_half) -> Tensor:
    return x * angles.cos() + turned(x) * angles.sin()


def turn_wide(x: Tensor, angles: Tensor, turned: Callable[[Tensor], Tensor]) -> Tensor:
    return (x.float() * angles.cos() + turned(x).float() * angles.sin()).to(x.dtype)


def turn_first(x: Tensor, angles: Tensor, turned: Callable[[Tensor], Tensor]) -> Tensor:
    wide = x.float()
    return (turned(wide) * angles.sin() + angles.cos() * wide).type_as(x)


def as_complex(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(3).type_as(x)


def in_diffusers(**options: Any) -> Form:
    return lambda x, a: apply_rotary_emb(x, (a.cos(), a.sin()), **options)


FORMS: dict[str, tuple[Form, Tensor, Tensor, str]] = {
    "diffusers, interleaved": (in_diffusers(sequence_dim=1), BSND, EACH, "interleave"),
    "diffusers, heads first": (in_diffusers(), BNSD, EACH, "interleave"),
    "diffusers, halves": (in_diffusers(use_real_unbind_dim=-2), BNSD, TWICE, "half"),
    "diffusers, halves, rows first": (
        in_diffusers(use_real_unbind_dim=-2, sequence_dim=1),
        BSND,
        TWICE,
        "half",
    ),
    "slices": (turn, BNSD, TWICE, "half"),
    "slices, whole table": (turn, BSND, TWICE[None, :, None], "half"),
    "slices, transposed": (lambda x, a: turn(x.transpose(1, 2), a), BSND, TWICE, "half"),
    "chunks": (lambda x, a: turn_wide(x, a, by_chunks), BSND, TWICE[:, None], "half"),
    "chunks, batched": (lambda x, a: turn_first(x, a, by_chunks), BSND, BATCHED, "half"),
    "unbound": (lambda x, a: turn(x, a, by_unbinding_halves), BSND, BATCHED, "half"),
    "pairs": (lambda x, a: turn_wide(x, a, by_pairs), BSND, EACH[None, :, None], "interleave"),
    "pairs, batched": (lambda x, a: turn_first(x, a, by_pairs), BSND, BATCHED, "interleave"),
    "pairs, heads first": (lambda x, a: turn(x, a, by_pairs), BNSD, EACH, "interleave"),
    "every two": (lambda x, a: turn(x, a, every_two), BSND, EACH[:, None], "interleave"),
    "picked": (lambda x, a: turn(x, a, picked), BNSD, EACH[None, None], "interleave"),
    "a table a head": (turn, BSND, torch.rand(1, S, N, D), "half"),
    "rows that are not contiguous": (lambda x, a: turn(x[:, :, 1:], a), BNSD, TWICE[1:], "half"),
}


def counted(ops: Counter) -> tuple[int, int]:
    """Fused rotations, and negations, which only those that are left have."""
    return ops[ROTARY], ops["aten.neg"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_rotation_is_fused(name: str, dtype: torch.dtype) -> None:
    fn, x, angles, mode = FORMS[name]
    x = x.to(dtype)
    expected = fn(x, angles)
    captured = on_device(fn, x, angles)
    for target in ("npugraph_ex", "torchair"):
        # Without a cast in the model, the product is of half precision and float32: not fused.
        mixed = dtype != torch.float32 and expected.dtype != dtype
        fits = not mixed and (mode == "half" or target == "npugraph_ex")
        out, ops = fused("fuse_rotary", captured, target)
        assert counted(ops) == ((1, 0) if fits else (0, 1)), target
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_modes() -> None:
    """The op is told how to turn: with the other mode the numbers would be others."""
    for mode, fn, angles in (("half", by_chunks, TWICE), ("interleave", by_pairs, EACH)):
        out = torch.ops.npu.npu_rotary_mul(
            BNSD.npu(), angles.cos()[None, None].npu(), angles.sin()[None, None].npu(), mode
        )
        torch.testing.assert_close(out.cpu(), turn(BNSD, angles, fn), rtol=1e-6, atol=1e-6)
        other = by_pairs if fn is by_chunks else by_chunks
        assert not torch.allclose(out.cpu(), turn(BNSD, angles, other), atol=1e-2)


def turned_by(pieces: Callable[[Tensor, Tensor], list[Tensor]], join: Any) -> Form:
    def fn(x: Tensor, angles: Tensor) -> Tensor:
        def turned(x: Tensor) -> Tensor:
            if join is torch.cat:
                return torch.cat(pieces(*x.chunk(2, -1)), -1)
            return torch.stack(pieces(x[..., ::2], x[..., 1::2]), -1).flatten(-2)

        return turn(x, angles, turned)

    return fn


def with_other_tables(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos() + rotate_half(x) * angles.sin()[:1]


def odd_strides(x: Tensor, angles: Tensor) -> Tensor:
    parts = torch.stack((-x[..., ::4], x[..., ::4], -x[..., 1::4], x[..., 1::4]), -1)
    return x * angles.cos() + parts.flatten(-2) * angles.sin()


def overlapping(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos() + torch.cat([-x[..., 3:7], x[..., :4]], -1) * angles.sin()


def uneven(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos() + torch.cat([-x[..., 3:], x[..., :3]], -1) * angles.sin()


def subtracted(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos() - rotate_half(x) * angles.sin()


def rounded_before(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos() + rotate_half(x.bfloat16()).float() * angles.sin()


MISSES: dict[str, tuple[Form, Tensor, Tensor]] = {
    "turned the other way": (turned_by(lambda a, b: [b, -a], torch.cat), BNSD, TWICE),
    "pairs turned the other way": (turned_by(lambda a, b: [b, -a], torch.stack), BNSD, EACH),
    "halves in their place": (turned_by(lambda a, b: [-a, b], torch.cat), BNSD, TWICE),
    "pairs in their place": (turned_by(lambda a, b: [-a, b], torch.stack), BNSD, EACH),
    "no sign": (turned_by(lambda a, b: [b, a], torch.cat), BNSD, TWICE),
    "one half twice": (turned_by(lambda a, b: [-b, b], torch.cat), BNSD, TWICE),
    "pairs joined as halves": (
        lambda x, a: turn(x, a, lambda x: torch.cat([-x[..., 1::2], x[..., ::2]], -1)),
        BNSD,
        TWICE,
    ),
    "halves joined as pairs": (
        lambda x, a: turn(x, a, lambda x: torch.stack([-x[..., 4:], x[..., :4]], -1).flatten(3)),
        BNSD,
        EACH,
    ),
    "along another dim": (
        lambda x, a: turn(x, a, lambda x: torch.cat([-x[:, :, 3:], x[:, :, :3]], 2)),
        BNSD,
        TWICE,
    ),
    "tables unlike": (with_other_tables, BNSD, TWICE),
    "odd strides": (odd_strides, BNSD, EACH),
    "overlapping pairs": (
        lambda x, a: turn(x, a, lambda x: torch.stack([-x[..., 1:5], x[..., :4]], -1).flatten(3)),
        BNSD,
        EACH,
    ),
    "overlapping": (overlapping, BNSD, TWICE),
    "uneven parts": (uneven, BNSD, TWICE),
    "subtracted": (subtracted, BNSD, TWICE),
    "rounded before it is turned": (rounded_before, BNSD, TWICE),
    "another tensor is turned": (
        lambda x, a: x * a.cos() + rotate_half(x + 1) * a.sin(),
        BNSD,
        TWICE,
    ),
    "a table that makes it grow": (turn, BNSD[:1], torch.rand(B, 1, S, D)),
    "one angle for all channels": (turn, BNSD, torch.rand(S, 1)),
    "three dims": (turn, BNSD[0], TWICE),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_only_looks_like_a_rotation_stays(name: str) -> None:
    fn, x, angles = MISSES[name]
    out, ops = fused("fuse_rotary", on_device(fn, x, angles))
    assert ops[ROTARY] == 0
    torch.testing.assert_close(out, fn(x, angles), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("skip", ["", "fuse_rotary"])
@pytest.mark.parametrize("target", ["npugraph_ex", "torchair"])
def test_rotation_in_a_whole_compile(target: str, skip: str) -> None:
    cannsim.ge.forget()
    cannsim.trace.forget()
    x = BSND.bfloat16()

    def model(x: Tensor, angles: Tensor, twice: Tensor) -> Tensor:
        pairs = turn_wide(x, twice[:, None], by_pairs)
        return as_complex(turn_wide(pairs, twice[:, None], by_chunks) * 0.5, angles)

    expected = model(x, ANGLES, TWICE)
    out = compiled(model, x, ANGLES, TWICE, target=target, skip_passes=skip)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
    if target == "torchair":  # GE turns halves, whatever it is told
        (graph,) = cannsim.ge.graphs()
        assert graph.types()["RotaryMul"] == (0 if skip else 1)
    else:
        (trace,) = cannsim.trace.captured_graphs()
        assert len(trace.find("npu_rotary_mul")) == (0 if skip else 3)
