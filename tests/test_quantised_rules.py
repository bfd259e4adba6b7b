"""The rules of quantised ops that are known by name, proved by brute force over random calls.

Ops that no CPU has, and torchao's, are stood in for by what their documents say they compute.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ascend_sp.graph.layout import REPLICATE, Sequence, Shard
from ascend_sp.passes.sharding.rules import Answer, Local, Unsupported
from ascend_sp.passes.sharding.rules.base import BY_NAME
from brute_force import Placed, check
from rule_cases import Draw, Drawn, calls, two

aten = torch.ops.aten


class Op:
    """An op by its schema: what a rule sees of one, and what it computes."""

    tags: tuple = ()

    def __init__(self, schema: str, run: Callable[..., Any]) -> None:
        self._schema, self.run = torch._C.parse_schema(schema), run

    def name(self) -> str:
        return self._schema.name

    def __str__(self) -> str:
        return self._schema.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


OPS: dict[str, Op] = {}
CASES: dict[str, Callable[[Draw, Any], Any]] = {}


def op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        made = Op(schema, run)
        OPS[made.name()] = made
        return run

    return register


def case(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        CASES.update(dict.fromkeys(names, fn))
        return fn

    return register


# What PyTorch computes on a CPU

for _name in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"):
    _real = getattr(aten, _name).default
    OPS[f"aten::{_name}"] = Op(str(_real._schema), _real)


@op(str(aten._scaled_mm.default._schema))
def scaled_mm(
    x: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    # Eight bits only here: index_fill, which makes padding, has no kernel for them. The weight
    # lies column by column, as kernels want it. Scales of rows are PyTorch 2.12 and newer on CPUs.
    a, b = (t.to(torch.float8_e4m3fn) for t in (x, weight.t().contiguous()))
    one = torch.ones(())
    return aten._scaled_mm(a, b.t(), one, one, out_dtype=out_dtype) * scale_a * scale_b


# What the others compute


def unpacked(weight: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    """``[n, k]`` of 4-bit values by group, with scales and zeros ``[k / group, n]``."""
    k = weight.shape[1]
    scale, zero = (x.repeat_interleave(k // scale.shape[0], 0).t() for x in (scale, zero))
    return (weight - 8) * scale + zero


@op(
    "aten::_weight_int4pack_mm(Tensor self, Tensor mat2, int qGroupSize, Tensor qScaleAndZeros)"
    " -> Tensor"
)
def int4pack_mm(x: Tensor, weight: Tensor, group: int, scale: Tensor) -> Tensor:
    return x @ unpacked(weight, group, *scale.unbind(-1)).t()


@op(
    "aten::_weight_int4pack_mm_with_scales_and_zeros(Tensor self, Tensor mat2, int qGroupSize,"
    " Tensor qScale, Tensor qZeros) -> Tensor"
)
def int4pack_mm_apart(x: Tensor, weight: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    return x @ unpacked(weight, group, scale, zero).t()


@op(
    "aten::_dyn_quant_matmul_4bit(Tensor inp, Tensor packed_weights, int block_size,"
    " int in_features, int out_features) -> Tensor"
)
def dynamic_4bit(x: Tensor, weight: Tensor, block: int, k: int, n: int) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() @ weight.view(n, k).t() * scale


@op(
    "aten::_scaled_mm_v2(Tensor self, Tensor mat2, Tensor[] scale_a, int[] recipe_a,"
    " int[] swizzle_a, Tensor[] scale_b, int[] recipe_b, int[] swizzle_b, Tensor? bias,"
    " ScalarType? out_dtype, int[] contraction_dim=[], bool use_fast_accum=False) -> Tensor"
)
def scaled_mm_v2(
    x: Tensor,
    weight: Tensor,
    scale_a: list[Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    contraction_dim: Any = (),
    use_fast_accum: bool = False,
) -> Tensor:
    for scale in scale_a:
        if scale.numel() > 1:
            scale = scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
        x = x * scale
    y = x @ (weight * scale_b[0])
    return y if bias is None else y + bias


@op("torchao::int_matmul(Tensor a, Tensor b) -> Tensor")
def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a.int() @ b.int()


@op("torchao::int_scaled_matmul(Tensor a, Tensor b, Tensor scales1) -> Tensor")
def int_scaled_matmul(a: Tensor, b: Tensor, scales1: Tensor) -> Tensor:
    return (a.int() @ b.int()) * scales1


@op(
    "torchao::float8_linear_cpu(Tensor input, Tensor input_scales, Tensor weight,"
    " Tensor weight_scales, Tensor? bias, ScalarType output_dtype) -> Tensor"
)
def float8_linear(
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    y = (x * scale) @ (weight * weight_scales).t()
    return (y if bias is None else y + bias).to(output_dtype)


@op(
    "torchao::da8w4_linear_cpu(Tensor input, Tensor input_scales, Tensor input_qzeros,"
    " Tensor weight, Tensor weight_scales, Tensor weight_qzeros, Tensor compensation,"
    " Tensor? bias, ScalarType output_dtype) -> Tensor"
)
def da8w4_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    weight_qzeros: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    real = (x - zero[:, None]) * scale[:, None]
    y = real @ ((weight - weight_qzeros) * weight_scales).t()
    return (y if bias is None else y + bias).to(output_dtype)


def expanded(scale: Tensor, shape: torch.Size) -> Tensor:
    """torchao's `_maybe_expand_scale_to_tensor_shape`: a scale for each block."""
    if scale.numel() == 1:
        return scale
    if all(a == b or a == 1 for a, b in zip(scale.shape, shape, strict=False)):
        return scale
    assert scale.ndim == len(shape)
    for i, n in enumerate(shape):
        assert n % scale.shape[i] == 0
        scale = scale.repeat_interleave(n // scale.shape[i], i)
    return scale


@op(
    "torchao::quantize_affine_float8_non_decomposed(Tensor tensor, Tensor scale,"
    " ScalarType float8_dtype=24) -> Tensor"
)
def quantize_float8(x: Tensor, scale: Tensor, float8_dtype: torch.dtype | None = None) -> Tensor:
    # Not in eight bits, of which index_select and comparison have no kernels.
    return (x / expanded(scale, x.shape)).round()


@op(
    "torchao::dequantize_affine_float8_non_decomposed(Tensor tensor, Tensor scale,"
    " ScalarType output_dtype=6) -> Tensor"
)
def dequantize_float8(x: Tensor, scale: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
    return x * expanded(scale, x.shape)


# How to draw a call


def of(x: Placed, dtype: torch.dtype) -> Placed:
    return Placed(x.tensor.to(dtype), x.placement)


def whole(g: Draw, *shape: int, kind: str = "float") -> Placed:
    return of(g.tensor(*shape, kind=kind, whole=True), torch.float32)


def rows(g: Draw, k: int, kind: str = "float") -> Placed:
    """``[n, k]``, split along the rows most of the time."""
    m = g.pick(g.n, g.n, g.n, 1, 3)
    never = g.pick(False, False, False, False, True)
    return of(g.tensor(m, k, kind=kind, whole=never), torch.float32)


def weight(g: Draw, x: Placed, *shape: int, kind: str = "float") -> Placed:
    """Split where `x` is not; something has to be."""
    return of(g.tensor(*shape, kind=kind, whole=x.placement != REPLICATE), torch.float32)


def row_scales(g: Draw, x: Placed, keepdim: bool = True) -> Placed:
    """One a row, or one in all; or one a block of rows, if there is such a block."""
    m = x.tensor.shape[0]
    blocks = g.pick(m, m, m, *(b for b in (1, 2) if m % b == 0))
    scale = g.other(blocks, 1) if keepdim else g.other(m)
    return of(Placed(scale.tensor.abs() + 0.5, scale.placement), torch.float32)


@case("aten::_scaled_mm")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 16)
    scale = row_scales(g, x)
    if scale.tensor.shape[0] not in (1, x.tensor.shape[0]):
        scale = whole(g, 1, 1)
    one = scale.tensor.numel() == 1
    own = Placed(torch.ones(1, 1) if one else torch.rand(1, 16) + 0.5)
    return (x, weight(g, x, 16, 16), scale, own), {"out_dtype": torch.float32}


@case("aten::_scaled_mm_v2")
def _(g: Draw, op: Any) -> Any:
    m, k = g.pick(g.n, g.n, g.n, 1), 4
    x = of(g.tensor(m, k, whole=g.pick(False, False, False, True)), torch.float32)
    levels = [of(g.other(*g.pick([m, 2], [m, 1], [1, 1])), torch.float32)]
    if g.flag():
        levels.append(whole(g, 1, 1))
    swizzle = [g.pick(0, 0, 0, 0, 1) for _ in levels]
    bias = g.pick(None, whole(g, 3))
    w = weight(g, x, k, 3)
    own = [whole(g, 1, 3)]
    return x, w, levels, [1] * len(levels), swizzle, own, [1], [0], bias, torch.float32


@case("aten::_weight_int8pack_mm")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 16)
    return x, of(weight(g, x, 16, 16, kind="int"), torch.int8), whole(g, 16)


@case("aten::_weight_int4pack_mm_for_cpu")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 32)
    values = g.values([16, 32], "int").int()
    w = Placed(aten._convert_weight_to_int4pack_for_cpu(values, 1))
    scale = whole(g, 1, 16, 2)
    if x.placement == REPLICATE:
        w = Placed(w.tensor, g.placement(list(w.tensor.shape)))
    return x, w, 32, scale


@case("aten::_weight_int4pack_mm")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4)
    return x, weight(g, x, 3, 4, kind="int"), 2, whole(g, 2, 3, 2)


@case("aten::_weight_int4pack_mm_with_scales_and_zeros")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4)
    return x, weight(g, x, 3, 4, kind="int"), 2, whole(g, 2, 3), whole(g, 2, 3)


@case("aten::_dyn_quant_matmul_4bit")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4)
    return x, weight(g, x, 12), 4, 4, 3


@case("torchao::int_matmul")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4, "int")
    return x, weight(g, x, 4, 3, kind="int")


@case("torchao::int_scaled_matmul")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4, "int")
    m = x.tensor.shape[0]
    return (
        x,
        weight(g, x, 4, 3, kind="int"),
        of(g.other(*g.pick([m, 1], [m, 3], [1, 1])), torch.float32),
    )


@case("torchao::float8_linear_cpu")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4)
    scale = row_scales(g, x)
    if scale.tensor.shape[0] not in (1, x.tensor.shape[0]):
        scale = whole(g, 1, 1)
    return x, scale, weight(g, x, 3, 4), whole(g, 3, 1), g.pick(None, whole(g, 3)), torch.float32


@case("torchao::da8w4_linear_cpu")
def _(g: Draw, op: Any) -> Any:
    x = rows(g, 4, "int")
    scale, zero = (row_scales(g, x, keepdim=False) for _ in range(2))
    packed = (weight(g, x, 3, 4, kind="int"), whole(g, 3, 1), whole(g, 3, 1), whole(g, 3))
    return x, scale, zero, *packed, g.pick(None, whole(g, 3)), torch.float32


@case(
    "torchao::quantize_affine_float8_non_decomposed",
    "torchao::dequantize_affine_float8_non_decomposed",
)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    blocks = g.pick(
        *[[n if g.flag() else g.pick(*(b for b in (1, 2, 3) if n % b == 0)) for n in shape]] * 3,
        [],
        [1, 1],
    )
    x, scale = (of(t, torch.float32) for t in two(g, shape, blocks or [1]))
    return x, Placed(scale.tensor.abs() + 0.5, scale.placement)


OURS = {name for name in BY_NAME if not name.startswith("npu::")}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(OPS) == OURS


@pytest.mark.parametrize("name", CASES)
def test_rule_is_right_on_every_rank(name: str) -> None:
    answers: list[Answer] = []

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(calls(OPS[name], CASES[name]))
    def examples(c: Drawn) -> None:
        split = [x for x in _placed((c.args, c.kwargs)) if isinstance(x.placement, Shard)]
        if split:
            answers.append(check(OPS[name], c.args, c.kwargs, world=c.world, padding=c.padding))

    examples()
    assert sum(isinstance(a, Local) for a in answers) > 0.2 * len(answers)
    assert not any(isinstance(a, Unsupported) for a in answers)
    if name != "torchao::int_matmul":
        assert not all(isinstance(a, Local) for a in answers)


def _placed(value: Any) -> list[Placed]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, Placed)]


@pytest.mark.parametrize("name", OPS)
def test_the_schemas_are_those_of_the_ops(name: str) -> None:
    space, packet = name.split("::")
    if space == "torchao":
        # Its newest; some ops are there only with what it has compiled.
        pytest.importorskip("torchao")
        for module in ("ops", "kernel", "quantization.quant_primitives"):
            importlib.import_module(f"torchao.{module}")
    found = getattr(getattr(torch.ops, space), packet, None)
    if found is None:
        pytest.skip(f"no {name} here")
    named = [(a.name, str(a.type)) for a in found.default._schema.arguments]
    assert named == [(a.name, str(a.type)) for a in OPS[name]._schema.arguments]


# What must be on shards, and what must not.

SEQ = Sequence((5, 4))


def split(*shape: int, dim: int = 0) -> Placed:
    return Placed(torch.rand(shape) + 0.5, Shard(dim, SEQ))


def all_of(*shape: int) -> Placed:
    return Placed(torch.rand(shape) + 0.5)


def v2(*scales: Placed, swizzle: int = 0) -> tuple:
    recipes = [1] * len(scales)
    ours = (list(scales), recipes, [swizzle] * len(scales))
    return (split(9, 4), all_of(4, 3), *ours, [all_of(1, 3)], [1], [0], None, torch.float32)


KNOWN: dict[str, tuple[str, tuple]] = {
    "scales of tokens, whole": ("aten::_scaled_mm_v2", v2(all_of(9, 1))),
    "scales of tokens, split": ("aten::_scaled_mm_v2", v2(split(9, 2))),
    "a scale of all tokens": ("aten::_scaled_mm_v2", v2(all_of(1, 1))),
    "two levels of scales": ("aten::_scaled_mm_v2", v2(split(9, 2), all_of(1, 1))),
    "four bits": ("aten::_weight_int4pack_mm", (split(9, 4), all_of(3, 4), 2, all_of(2, 3, 2))),
    "scaled integers": (
        "torchao::int_scaled_matmul",
        (split(9, 4), all_of(4, 3), split(9, 1)),
    ),
    "zero points of tokens": (
        "torchao::da8w4_linear_cpu",
        (split(9, 4), split(9), split(9), all_of(3, 4), *[all_of(3, 1)] * 3, None, torch.float32),
    ),
    "blocks of channels": (
        "torchao::quantize_affine_float8_non_decomposed",
        (split(2, 9, 4, dim=1), split(2, 9, 2, dim=1)),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_operation_runs_on_shards(name: str) -> None:
    op, args = KNOWN[name]
    found = check(OPS[op], args, world=4)
    assert isinstance(found, Local)
    assert found.outputs == (args[0].placement,)


REFUSED: dict[str, tuple[str, tuple]] = {
    "channels": ("torchao::int_matmul", (split(2, 9, dim=1), all_of(9, 3))),
    "weight": ("aten::_weight_int4pack_mm", (all_of(2, 4), split(9, 4), 2, all_of(2, 9, 2))),
    "swizzled scales": ("aten::_scaled_mm_v2", v2(all_of(9, 1), swizzle=1)),
    "blocks of tokens": (
        "torchao::quantize_affine_float8_non_decomposed",
        (split(9, 4), all_of(3, 4)),
    ),
    "one zero point in the place of scales": (
        "torchao::dequantize_affine_float8_non_decomposed",
        (all_of(9, 4), split(9, 4)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operation_is_refused(name: str) -> None:
    op, args = REFUSED[name]
    assert not isinstance(check(OPS[op], args, world=4), Local)
