"""Random calls, with broadcasting, of the ops that PyTorch tags as pointwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from brute_force import Placed
from rule_cases import Draw

aten = torch.ops.aten

Pointwise = dict[Any, tuple[str, Callable[[Draw], tuple[tuple, dict[str, Any]]]]]
"""For each op its tensor operands (f: float, i: int, b: bool), and what follows them."""


def plain(*args: Any, **kwargs: Any) -> Callable[[Draw], tuple[tuple, dict[str, Any]]]:
    return lambda g: (args, kwargs)


POINTWISE: Pointwise = {
    **dict.fromkeys(
        (
            *(aten.abs.default, aten.neg.default, aten.exp.default, aten.log.default),
            *(aten.sin.default, aten.cos.default, aten.tanh.default, aten.erf.default),
            *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default),
            *(aten.sigmoid.default, aten.silu.default, aten.relu.default, aten.mish.default),
            *(aten.floor.default, aten.round.default, aten.sign.default, aten.square.default),
            *(aten.isnan.default, aten.isinf.default, aten.isfinite.default),
            *(aten.log1p.default, aten.expm1.default, aten.hardsigmoid.default),
            *(aten.softplus.default, aten.elu.default, aten.leaky_relu.default),
            *(aten.nan_to_num.default, aten.frexp.Tensor),
        ),
        ("f", plain()),
    ),
    aten.gelu.default: ("f", lambda g: ((), g.pick({}, {"approximate": "tanh"}))),
    aten.bitwise_not.default: ("b", plain()),
    aten.logical_not.default: ("i", plain()),
    aten.clamp.default: ("f", lambda g: (g.pick((-0.5, 0.5), (None, 0.5), (-0.5,)), {})),
    aten.clamp_min.default: ("f", plain(0.1)),
    aten.add.Scalar: ("f", plain(2)),
    aten.mul.Scalar: ("f", plain(2)),
    aten.rsub.Scalar: ("f", plain(1)),
    aten.div.Scalar: ("f", plain(3)),
    aten.pow.Tensor_Scalar: ("f", plain(3)),
    aten.remainder.Scalar: ("f", plain(3)),
    aten.ge.Scalar: ("f", plain(0.0)),
    **dict.fromkeys(
        (
            *(aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Tensor, aten.maximum.default),
            *(aten.minimum.default, aten.atan2.default, aten.eq.Tensor, aten.ne.Tensor),
            *(aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor),
            *(aten.clamp_min.Tensor, aten.fmod.Tensor, aten.copysign.Tensor),
            *(aten.silu_backward.default, aten.tanh_backward.default),
        ),
        ("ff", plain()),
    ),
    aten.add.Tensor: ("ff", plain(alpha=2)),
    aten.sub.Tensor: ("ff", plain(alpha=2)),
    aten.div.Tensor_mode: ("ff", plain(rounding_mode="floor")),
    aten.bitwise_and.Tensor: ("bb", plain()),
    aten.bitwise_or.Tensor: ("ii", plain()),
    aten.bitwise_xor.Tensor: ("bb", plain()),
    aten.logical_and.default: ("ib", plain()),
    aten.logical_or.default: ("bb", plain()),
    aten.remainder.Tensor: ("ii", plain()),
    aten.masked_fill.Scalar: ("fb", plain(-1.5)),
    aten.lerp.Scalar: ("ff", plain(0.3)),
    aten.lerp.Tensor: ("fff", plain()),
    aten.rsub.Tensor: ("ff", plain()),
    aten.hardswish.default: ("f", plain()),
    aten.addcmul.default: ("fff", plain(value=0.5)),
    aten.addcdiv.default: ("fff", plain(value=0.5)),
    aten.clamp.Tensor: ("fff", plain()),
    aten.where.self: ("bff", plain()),
}

KINDS = {"f": "float", "i": "int", "b": "bool"}


def broadcast(g: Draw, shape: list[int]) -> list[int]:
    """A shape that broadcasts to `shape`."""
    small = [g.pick(n, n, 1) for n in shape]
    return small[g.pick(0, 0, g.integer(0, len(shape))) :]


def draw_pointwise(g: Draw, op: Any) -> tuple[tuple, dict[str, Any]]:
    """Operands of which the first may be the one that broadcasts, and the last may be the first."""
    kinds, following = POINTWISE[op]
    shape = g.shape(g.integer(1, 3))
    xs = [g.tensor(*shape, kind=KINDS[kinds[0]])]
    for kind in kinds[1:]:
        xs.append(g.other(*broadcast(g, shape), kind=KINDS[kind]))
    if len(set(kinds)) == 1:
        if g.pick(False, False, False, True):
            xs[-1] = xs[0]
        xs = xs[:: g.pick(1, -1)]
    elif kinds == "bff" and g.flag():
        xs[0], xs[1] = (
            Placed(xs[1].tensor > 0, xs[1].placement),
            Placed(xs[0].tensor.double(), xs[0].placement),
        )
    more, kwargs = following(g)
    return (*xs, *more), kwargs
