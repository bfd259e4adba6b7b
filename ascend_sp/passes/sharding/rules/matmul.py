"""Matmuls. The sequence may be any letter; summed over, it leaves a term on each rank: Partial."""

from __future__ import annotations

import torch

from ascend_sp.graph.layout import PARTIAL, REPLICATE, Placement, Shard, same
from ascend_sp.graph.sizes import equal
from ascend_sp.passes.sharding.rules.base import (
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    can_zero_padding,
    rule,
)

aten = torch.ops.aten


@rule(aten.mm.default, aten._int_mm.default)
def mm(call: Call) -> Answer:
    """``([m, k], [k, n]) -> [m, n]``."""
    return _product(call, "mk", "kn", "mn")


@rule(aten.bmm.default)
def bmm(call: Call) -> Answer:
    """``([b, m, k], [b, k, n]) -> [b, m, n]``."""
    return _product(call, "bmk", "bkn", "bmn")


@rule(aten.addmm.default)
def addmm(call: Call) -> Answer:
    """``([n] or [m, n], [m, k], [k, n]) -> [m, n]``."""
    return _product(call, "mk", "kn", "mn", bias="mn")


@rule(aten.baddbmm.default)
def baddbmm(call: Call) -> Answer:
    """``([b, m, n], [b, m, k], [b, k, n]) -> [b, m, n]``."""
    return _product(call, "bmk", "bkn", "bmn", bias="bmn")


@rule(aten.mv.default)
def mv(call: Call) -> Answer:
    """``([m, k], [k]) -> [m]``."""
    return _product(call, "mk", "k", "m")


@rule(aten.matmul.default)
def matmul(call: Call) -> Answer:
    """``([..., m, k], [..., k, n]) -> [..., m, n]``, batch dims broadcast.

    Devices that split it later than CPUs do (Ascend) leave it whole in the graph.
    """
    a, b = call.operands
    if min(a.ndim, b.ndim) < 2:
        return Reshard("a matrix is multiplied with a vector")
    batch = call.outputs[0][:-2]
    if len(batch) > len(_BATCH):
        return Reshard(f"a matmul of {len(batch) + 2} dims")

    def letters(x: Operand) -> str:
        skipped = len(batch) - (x.ndim - 2)
        names = zip(_BATCH[skipped:], x.shape[:-2], batch[skipped:], strict=False)
        # A dim of one that is broadcast has nothing to do with the one it is broadcast against.
        return "".join(i if equal(n, out) else _ALONE for i, n, out in names)

    left, right = letters(a) + "mk", letters(b) + "kn"
    for x, names in ((a, left), (b, right)):
        if isinstance(x.placement, Shard) and names[x.shard.dim] == _ALONE:
            return Reshard("a sequence of one token is broadcast in a matmul")
    return _product(call, left, right, _BATCH[: len(batch)] + "mn")


_BATCH, _ALONE = "abcdefgh", "-"


def _product(call: Call, left: str, right: str, out: str, bias: str | None = None) -> Answer:
    *added, a, b = call.operands
    # The factor that carries the sequence: the larger sharded matrix says which.
    matrices = [x for x in (a, b) if isinstance(x.placement, Shard)]
    if not matrices:
        return Reshard("only the bias of a matmul is sharded")
    lead = matrices[-1] if len(matrices) == 2 and _larger(matrices[1], matrices[0]) else matrices[0]
    names = left if lead.index == a.index else right
    split = lead.shard
    factor = names[split.dim]

    if factor not in out:
        return _contraction(call, split, a, b, left.index(factor), right.index(factor), bool(added))

    def want(x: Operand, letters: str) -> Placement:
        if factor not in letters:
            return REPLICATE
        wanted = split.moved(letters.index(factor))
        return x.placement if same(x.shape, x.placement, wanted) else wanted

    inputs = [want(a, left), want(b, right)]
    result = split.moved(out.index(factor))
    if added and bias is not None:
        c = added[0]
        dim = result.dim - (len(bias) - c.ndim)
        broadcast = dim < 0 or (
            equal(c.shape[dim], 1) and not equal(call.outputs[0][result.dim], 1)
        )
        inputs.insert(0, REPLICATE if broadcast else result.moved(dim))
    return Local(tuple(inputs), (result,))


def _larger(x: Operand, y: Operand) -> bool:
    a, b = x.numel, y.numel
    return isinstance(a, int) and isinstance(b, int) and a > b


def _contraction(
    call: Call, split: Shard, a: Operand, b: Operand, i: int, j: int, added: bool
) -> Answer:
    if added:
        return Reshard("a bias is added to a matmul that sums over the sequence")
    if not split.whole_dim():
        return Reshard("a matmul sums over a dim that merges the sequence with another axis")
    if not can_zero_padding(split, call.world):
        return Reshard("a matmul sums over a sequence of unknown length")
    return Local((split.moved(i), split.moved(j)), (PARTIAL,), mask_padding=True)
