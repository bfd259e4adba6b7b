"""The table of sharding rules, one file a family of ops."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from ascend_sp.graph._pytorch import is_pointwise, tree_leaves
from ascend_sp.graph.context import is_random
from ascend_sp.graph.layout import Padded, Shard
from ascend_sp.graph.sizes import Size, has_unbacked
from ascend_sp.passes.sharding.rules import (  # noqa: F401
    along,
    attention,
    convolution,
    lookup,
    matmul,
    norms,
    npu,
    npu_quantised,
    pictures,
    quantised,
    reductions,
    views,
)
from ascend_sp.passes.sharding.rules.base import (
    BY_NAME,
    RULES,
    TAKES_WINDOWS,
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    Unsupported,
    rule,
)
from ascend_sp.passes.sharding.rules.pointwise import pointwise

UNKNOWN = "one of its sizes is known only when the program runs"

__all__ = [
    "UNKNOWN",
    "Answer",
    "Call",
    "Local",
    "Operand",
    "Reshard",
    "Unsupported",
    "answer",
    "rule",
    "takes_padded",
]


def answer(call: Call) -> Answer:
    """Ask the rule of `call.op`. The call must have a sharded operand, or a padded one.

    An op without a rule of its own, but with PyTorch's pointwise tag, falls under `pointwise`.
    Ops that write in place or draw random numbers are refused: a shard is not the whole. So are
    those whose results, shards or arguments have a size that the data decide; whole operands may.
    """
    found = RULES.get(call.op) or BY_NAME.get(call.op.name())
    if found is None and is_pointwise(call.op):
        found = pointwise
    if found is None or call.op._schema.is_mutable:
        return Unsupported(f"no sharding rule for {call.op}")
    if is_random(call.op):
        return Unsupported(f"{call.op} draws random numbers")
    if any(map(has_unbacked, _sizes(call))):
        return Unsupported(UNKNOWN)
    return found(call)


def takes_padded(op: object) -> bool:
    """Whether the rule of `op` is to be told of an operand that is `Padded`."""
    return RULES.get(op) in TAKES_WINDOWS  # type: ignore[call-overload]


def _sizes(call: Call) -> Iterator[Size]:
    """What a shard of the call is calculated from."""
    for shape in call.outputs:
        yield from shape
    for x in tree_leaves((call.args, dict(call.kwargs))):
        if isinstance(x, Operand):
            yield from x.shape if isinstance(x.placement, Shard | Padded) else ()
        elif isinstance(x, sympy.Expr):
            yield x
