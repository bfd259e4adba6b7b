"""Every sharding rule of an op of torch_npu, proved by brute force over random calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cannsim.npu_ops import REFERENCES
from hypothesis import given, settings
from quantised_cases import CASES as QUANTISED
from quantised_cases import KERNELS as QUANTISED_KERNELS
from torch import Tensor

from ascend_sp.graph.layout import Sequence, Shard
from ascend_sp.passes.sharding.rules import Answer, Local, Unsupported
from ascend_sp.passes.sharding.rules.base import BY_NAME
from brute_force import Placed, check
from rule_cases import Draw, Drawn, calls

npu: Any = torch.ops.npu
NAMES = {name for name in BY_NAME if name.startswith("npu::")}
"""The others are in test_quantised_rules.py."""


def gemma_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Any:
    return REFERENCES["npu::npu_rms_norm"](x, gamma + 1, epsilon)


def add_rms_norm_cast(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Any:
    y, rstd, total = REFERENCES["npu::npu_add_rms_norm"](x1, x2, gamma, epsilon)
    return y.float(), y, rstd, total


def gelu_mul(x: Tensor, *, approximate: str = "none") -> Tensor:
    first, second = x.chunk(2, -1)
    return F.gelu(first, approximate=approximate) * second


KERNELS: dict[str, Callable[..., Any]] = {
    **REFERENCES,
    **QUANTISED_KERNELS,
    "npu::npu_gemma_rms_norm": gemma_rms_norm,
    "npu::npu_add_rms_norm_cast": add_rms_norm_cast,
    "npu::npu_gelu_mul": gelu_mul,
    "npu::npu_silu": F.silu,
    "npu::npu_mish": F.mish,
}
"""What the ops compute, by their documents; the simulator has those that models call."""


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Any:
    """The ops on CPU tensors, for as long as this module runs."""
    library = torch.library.Library("npu", "IMPL")
    for name in NAMES:
        library.impl(name.removeprefix("npu::"), KERNELS[name], "CPU")
    yield
    library._destroy()


def single(x: Placed) -> Placed:
    """In float32, which is what the kernels compute in."""
    return Placed(x.tensor.float(), x.placement)


def weight(g: Draw, shape: list[int]) -> Placed:
    return single(g.tensor(*shape, whole=g.pick(True, True, True, False)))


def rms_norm(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    gamma = weight(g, shape[g.pick(1, 2, 2, 2) :])
    x = single(g.tensor(*shape, whole=g.pick(False, False, False, True)))
    if g.flag():
        return (x, gamma, 1e-5)
    return g.pick(((x,), {"gamma": gamma}), ((), {"gamma": gamma, "input": x}))


def add_norm(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    normalized = shape[g.pick(1, 2, 2, 2) :]
    terms = [single(g.other(*shape)) for _ in range(2)]
    beta = [weight(g, normalized)] if op is npu.npu_add_layer_norm.default else []
    more = {"additional_output": True} if beta else {}
    return (*terms, weight(g, normalized), *beta, 1e-5), more


def layer_norm_eval(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    normalized = shape[g.pick(1, 2, 2, 2) :]
    affine = [g.pick(None, weight(g, normalized)) for _ in range(2)]
    return single(g.tensor(*shape)), normalized, *affine, 1e-5


def gated(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    dim = -1 if op is npu.npu_gelu_mul.default else g.dim(3)
    shape[dim] += shape[dim] % 2
    x = single(g.tensor(*shape))
    if op is npu.npu_gelu_mul.default:
        return (x,), g.pick({}, {"approximate": "tanh"})
    if op is npu.npu_geglu.default and g.flag():
        return x, dim, g.pick(0, 1), g.flag()
    return (x, dim) if dim != 2 or g.flag() else (x,)


def activation(g: Draw, op: Any) -> Any:
    more = {"approximate": g.pick("none", "tanh")} if op is npu.npu_gelu.default else {}
    return (single(g.some()),), more


def linear(g: Draw, op: Any) -> Any:
    m, k, n = g.shape(3)
    x = single(g.tensor(m, k, whole=g.pick(False, False, False, True)))
    bias = g.pick((), (weight(g, [n]),), ((), {"bias": weight(g, [n])}))
    args = (x, weight(g, [n, k]))
    return (args, bias[1]) if bias and isinstance(bias[0], tuple) else (*args, *bias)


def rotary(g: Draw, op: Any) -> Any:
    *rows, channels = g.shape(4)
    channels += channels % 2
    table = [n if g.flag() else 1 for n in rows]
    x = single(g.tensor(*rows, channels))
    cos, sin = (single(g.other(*table, channels)) for _ in range(2))
    if op is npu.npu_interleave_rope.default:
        return x, cos, sin
    turn = weight(g, [channels, channels])
    by_name = (x, cos), {"rotate": turn, "r2": sin}
    return g.pick((x, cos, sin), (x, cos, sin, "interleave"), (x, cos, sin, "half", turn), by_name)


CASES: dict[str, Callable[[Draw, Any], Any]] = {
    **dict.fromkeys(("npu_rms_norm", "npu_gemma_rms_norm"), rms_norm),
    **dict.fromkeys(("npu_add_rms_norm", "npu_add_rms_norm_cast", "npu_add_layer_norm"), add_norm),
    "npu_layer_norm_eval": layer_norm_eval,
    **dict.fromkeys(("npu_swiglu", "npu_geglu", "npu_gelu_mul"), gated),
    **dict.fromkeys(("fast_gelu", "npu_fast_gelu", "npu_gelu", "npu_silu", "npu_mish"), activation),
    "npu_linear": linear,
    **dict.fromkeys(("npu_rotary_mul", "npu_interleave_rope"), rotary),
    **QUANTISED,
}


def test_every_rule_has_a_case() -> None:
    assert {f"npu::{name}" for name in CASES} == NAMES


@pytest.mark.parametrize("name", CASES)
def test_rule_is_right_on_every_rank(name: str) -> None:
    op = getattr(npu, name).default  # fails if torch_npu does not have it
    answers: list[Answer] = []

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(calls(op, CASES[name]))
    def examples(c: Drawn) -> None:
        answers.append(check(op, c.args, c.kwargs, world=c.world, padding=c.padding))

    examples()
    assert sum(isinstance(a, Local) for a in answers) > 0.2 * len(answers)
    assert not any(isinstance(a, Unsupported) for a in answers)


# What must be shardable: shapes of diffusion transformers.

SEQ = Sequence((5, 4))


def rows(*shape: int, dim: int = 1) -> Placed:
    return Placed(torch.randn(shape), Shard(dim, SEQ))


def whole(*shape: int) -> Placed:
    return Placed(torch.randn(shape))


KNOWN: dict[str, tuple[str, tuple, int]] = {
    "norm of q": ("npu_rms_norm", (rows(2, 9, 3, 4), whole(4)), 2),
    "norm of heads first": ("npu_rms_norm", (rows(2, 3, 9, 4, dim=2), whole(4)), 2),
    "norm of a residual": ("npu_add_rms_norm", (rows(2, 9, 4), whole(2, 9, 4), whole(4)), 3),
    "gated feed-forward": ("npu_geglu", (rows(2, 9, 6), -1, 1), 2),
    "rotary table, whole": (
        "npu_rotary_mul",
        (rows(2, 9, 3, 4), whole(1, 9, 1, 4), whole(1, 9, 1, 4)),
        1,
    ),
    "rotary table, heads first": (
        "npu_rotary_mul",
        (rows(2, 3, 9, 4, dim=2), whole(1, 1, 9, 4), whole(1, 1, 9, 4), "interleave"),
        1,
    ),
    "linear": ("npu_linear", (rows(9, 4, dim=0), whole(6, 4), whole(6)), 1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_operation_runs_on_shards(name: str) -> None:
    op, args, outputs = KNOWN[name]
    found = check(getattr(npu, op).default, args, world=4)
    assert isinstance(found, Local)
    assert found.outputs == (args[0].placement,) * outputs


REFUSED: dict[str, tuple[str, tuple]] = {
    "norm over the sequence": ("npu_rms_norm", (rows(2, 9), whole(9))),
    "sharded weight": ("npu_rms_norm", (whole(2, 9), rows(9, dim=0))),
    "turned channels": (
        "npu_rotary_mul",
        (Placed(torch.randn(1, 1, 2, 18), Shard(3, SEQ, 2)), *[whole(1, 1, 1, 18)] * 2),
    ),
    "gate along the sequence": (
        "npu_swiglu",
        (Placed(torch.randn(3, 18), Shard(1, SEQ, 2)), 1),
    ),
    "sum over the sequence": ("npu_linear", (rows(2, 9), whole(3, 9))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operation_is_refused(name: str) -> None:
    op, args = REFUSED[name]
    assert not isinstance(check(getattr(npu, op).default, args, world=4), Local)
