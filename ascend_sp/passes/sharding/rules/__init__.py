"""The table of sharding rules, one file a family of ops."""

from __future__ import annotations

import torch

from ascend_sp.passes.context import is_random
from ascend_sp.passes.sharding.rules import attention, matmul, npu, reductions, views  # noqa: F401
from ascend_sp.passes.sharding.rules.base import (
    BY_NAME,
    RULES,
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    Unsupported,
    rule,
)
from ascend_sp.passes.sharding.rules.pointwise import UNTAGGED, pointwise

__all__ = ["Answer", "Call", "Local", "Operand", "Reshard", "Unsupported", "answer", "rule"]


def answer(call: Call) -> Answer:
    """Ask the rule of `call.op`. The call must have a sharded operand.

    An op without a rule of its own, but with PyTorch's pointwise tag, falls under `pointwise`.
    Ops that write in place or draw random numbers are refused: a shard is not the whole.
    """
    found = RULES.get(call.op) or BY_NAME.get(call.op.name())
    if found is None and (torch.Tag.pointwise in call.op.tags or call.op in UNTAGGED):
        found = pointwise
    if found is None or call.op._schema.is_mutable:
        return Unsupported(f"no sharding rule for {call.op}")
    if is_random(call.op):
        return Unsupported(f"{call.op} draws random numbers")
    return found(call)
