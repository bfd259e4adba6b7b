"""Every sharding rule, proved by brute force over random calls; and what the rules must know."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import Phase, given, settings
from torch.utils import _pytree as pytree

import view_cases  # noqa: F401
from ascend_sp.graph.layout import PARTIAL, REPLICATE, Padded, Placement, Sequence, Shard, Window
from ascend_sp.passes.sharding.rules import (
    Answer,
    Call,
    Local,
    Operand,
    Reshard,
    Unsupported,
    answer,
)
from ascend_sp.passes.sharding.rules.base import RULES
from ascend_sp.runtime.ops import attention as attention_op
from brute_force import Placed, check, cut
from pointwise_cases import POINTWISE, draw_pointwise
from rule_cases import CASES, TO_THE_END, Drawn, calls

aten = torch.ops.aten
WORLD = 4


def names(op: Any) -> str:
    return str(op)


def prove(op: Any, count: int, make: Any = None) -> list[Answer]:
    """The rule's answers about `count` random calls of `op`, all of them true."""
    answers: list[Answer] = []

    # Unlike elsewhere, a call that fails is made as small as it can be: they are quick here.
    @settings(
        max_examples=count,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(calls(op, make))
    def examples(c: Drawn) -> None:
        answers.append(check(op, c.args, c.kwargs, world=c.world, padding=c.padding))

    examples()
    return answers


def share_local(answers: list[Answer]) -> float:
    return sum(isinstance(a, Local) for a in answers) / len(answers)


def test_every_op_with_a_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("op", [op for op in CASES if op is not attention_op], ids=names)
def test_rule_is_right_on_every_rank(op: Any) -> None:
    answers = prove(op, 60)
    assert share_local(answers) > 0.2
    assert not any(isinstance(a, Unsupported) for a in answers)


@pytest.mark.parametrize("op", POINTWISE, ids=names)
def test_pointwise_rule_is_right_on_every_rank(op: Any) -> None:
    assert op not in RULES
    assert share_local(prove(op, 25, draw_pointwise)) > 0.4


def test_attention_rule_is_right_on_every_rank() -> None:
    assert {kind_of(a) for a in prove(attention_op, 500)} == {
        "refused",
        "whole",
        "batch",
        "queries",
        "all-to-all",
    }


def kind_of(found: Answer) -> str:
    """How an attention is sharded."""
    if not isinstance(found, Local):
        return "refused"
    q, k = found.inputs[:2]
    if not isinstance(q, Shard):
        return "whole"
    if q.dim == 0:
        return "batch"
    return "queries" if k == REPLICATE else "all-to-all"


# What the rules must know. Each line is proved too; segments of 5 and 4 tokens, unless said.


def split(dim: int, *shape: int, lengths: tuple[int, ...] = (5, 4), outer: int = 1) -> Placed:
    """A tensor whose dim `dim` holds the sequence, and `outer` major to it, else minor to it."""
    rest = shape[dim] // (sum(lengths) * outer)
    return Placed(torch.randn(shape), Shard(dim, Sequence(lengths), outer, rest))


def whole(*shape: int) -> Placed:
    return Placed(torch.randn(shape))


def tokens(dim: int, *lengths: int, outer: int = 1, inner: int = 1) -> Shard:
    return Shard(dim, Sequence(lengths or (5, 4)), outer, inner)


ONE = {"lengths": (1,)}
INDEX = Placed(torch.randint(0, 4, (2, 9)), tokens(1))

ORDINARY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
"""What a convolution with three taps has behind its bias."""
DOUBLING = ([2, 2], [1, 1], [1, 1], True, [0, 0], 1)

KNOWN: dict[str, tuple[Any, tuple, Placement | tuple[Placement, ...]]] = {
    "linear": (aten.addmm.default, (whole(6), split(0, 9, 3), whole(3, 6)), tokens(0)),
    "linear of a batch": (
        aten.mm.default,
        (split(0, 18, 3, outer=2), whole(3, 6)),
        tokens(0, outer=2),
    ),
    "weight first": (aten.mm.default, (whole(6, 3), split(1, 3, 9)), tokens(1)),
    "attention weights times values": (
        aten.bmm.default,
        (split(1, 2, 9, 3), whole(2, 3, 4)),
        tokens(1),
    ),
    "product over the sequence": (aten.mm.default, (split(1, 3, 9), split(0, 9, 2)), PARTIAL),
    "product over the sequence, one factor whole": (
        aten.mm.default,
        (split(1, 3, 9), whole(9, 2)),
        PARTIAL,
    ),
    "residual": (aten.add.Tensor, (split(1, 2, 9, 3), split(1, 2, 9, 3)), tokens(1)),
    "modulation": (aten.mul.Tensor, (split(1, 2, 9, 3), whole(2, 1, 3)), tokens(1)),
    "rotary table, whole": (aten.mul.Tensor, (split(2, 2, 4, 9, 6), whole(9, 6)), tokens(2)),
    "two splits meet": (aten.add.Tensor, (split(0, 9, 4), split(1, 9, 4, lengths=(4,))), tokens(0)),
    "layer norm": (
        aten.native_layer_norm.default,
        (split(1, 2, 9, 6), [6], whole(6), whole(6), 1e-5),
        (tokens(1), tokens(1), tokens(1)),
    ),
    "mean of channels": (aten.mean.dim, (split(1, 2, 9, 6), [-1]), tokens(1)),
    "mean before the sequence": (aten.mean.dim, (split(1, 2, 9, 6), [0]), tokens(0)),
    "sum over the sequence": (aten.sum.dim_IntList, (split(1, 2, 9, 6), [1]), PARTIAL),
    "softmax of channels": (aten._softmax.default, (split(1, 2, 9, 6), -1, False), tokens(1)),
    "batch into the sequence's dim": (
        aten.view.default,
        (split(1, 2, 9, 6), [18, 6]),
        tokens(0, outer=2),
    ),
    "and out of it": (aten.view.default, (split(0, 18, 6, outer=2), [2, 9, 6]), tokens(1)),
    "heads out of channels": (aten.view.default, (split(1, 2, 9, 6), [2, 9, 2, 3]), tokens(1)),
    "channels into the sequence's dim": (
        aten.view.default,
        (split(0, 9, 6), [54]),
        tokens(0, inner=6),
    ),
    "heads first": (aten.permute.default, (split(1, 2, 9, 2, 3), [0, 2, 1, 3]), tokens(2)),
    "text and image joined": (
        aten.cat.default,
        ([split(1, 2, 5, 3, lengths=(5,)), split(1, 2, 7, 3, lengths=(7,))], 1),
        tokens(1, 5, 7),
    ),
    "whole text and split image joined": (
        aten.cat.default,
        ([whole(2, 5, 3), split(1, 2, 9, 3)], 1),
        tokens(1, 5, 5, 4),
    ),
    "text cut off": (aten.slice.Tensor, (split(1, 2, 9, 3), 1, 5, TO_THE_END), tokens(1, 4)),
    "image cut off": (aten.slice.Tensor, (split(1, 2, 9, 3), 1, None, -4), tokens(1, 5)),
    "text and image parted": (
        aten.split_with_sizes.default,
        (split(1, 2, 9, 3), [5, 4], 1),
        (tokens(1, 5), tokens(1, 4)),
    ),
    "channels parted": (aten.split.Tensor, (split(1, 2, 9, 6), 3, -1), (tokens(1), tokens(1))),
    "channels joined": (aten.cat.default, ([split(1, 2, 9, 3), whole(2, 9, 3)], -1), tokens(1)),
    "rotary pairs": (aten.stack.default, ([split(1, 2, 9, 3), split(1, 2, 9, 3)], -1), tokens(1)),
    "q of a fused qkv": (aten.select.int, (split(1, 2, 9, 3, 4), 2, 0), tokens(1)),
    "unbound qkv": (aten.unbind.int, (split(2, 3, 2, 9, 4),), (tokens(1),) * 3),
    "a written row": (aten.select_scatter.default, (whole(3, 9), split(0, 9), 0, 1), tokens(1)),
    "one token stays": (aten.squeeze.dim, (split(1, 1, 1, 6, **ONE), 0), tokens(0, 1)),
    "one row a shard stays": (aten.squeeze.default, (split(1, 1, 3, lengths=(3,)),), tokens(0, 3)),
    "one row a shard stays if named": (
        aten.squeeze.dims,
        (split(1, 1, 3, 1, lengths=(3,)), [0, 1]),
        tokens(0, 3),
    ),
    "padded channels": (aten.constant_pad_nd.default, (split(1, 2, 9, 3), [0, 5]), tokens(1)),
    "embedding": (aten.embedding.default, (whole(4, 3), INDEX), tokens(1)),
    "a cumulated channel": (aten.cumsum.default, (split(1, 2, 9, 3), -1), tokens(1)),
    "repeated batch": (aten.repeat.default, (split(1, 1, 9, 3), [2, 1, 1]), tokens(1)),
    "expanded batch": (aten.expand.default, (split(1, 1, 9, 3), [2, -1, -1]), tokens(1)),
    "rows of neighbours": (
        aten.convolution.default,
        (split(2, 1, 2, 9, 6, lengths=(9,)), whole(4, 2, 3, 3), None, *ORDINARY),
        tokens(2, 9),
    ),
    "every second row": (
        aten.convolution.default,
        (split(2, 1, 2, 18, 6, lengths=(9,)), whole(4, 2, 3, 3), None, [2, 2], *ORDINARY[1:]),
        tokens(2, 9),
    ),
    "twice as many rows": (
        aten.convolution.default,
        (split(2, 1, 2, 9, 6, lengths=(9,)), whole(2, 4, 4, 4), None, *DOUBLING),
        tokens(2, 9, inner=2),
    ),
    "a margin of zeros around rows that are doubled": (
        aten.constant_pad_nd.default,
        (split(2, 1, 2, 18, 6, lengths=(9,)), [0, 0, 1, 1]),
        Padded(tokens(2, 9, inner=2), 1, 1),
    ),
    "a mirrored margin": (
        aten.reflection_pad2d.default,
        (split(2, 1, 2, 9, 6, lengths=(9,)), [1, 1, 2, 1]),
        Padded(tokens(2, 9), 2, 1, "reflect"),
    ),
    "rows out of a picture with a margin": (
        aten.slice.Tensor,
        (Placed(torch.randn(1, 2, 12, 3), Padded(tokens(2, 9), 1, 2)), 2, 2, 11),
        tokens(2, 9),
    ),
    "rows doubled": (
        aten.upsample_nearest2d.default,
        (split(2, 1, 2, 9, 6), [18, 12]),
        tokens(2, inner=2),
    ),
    "group norm of a picture": (
        aten.native_group_norm.default,
        (split(2, 1, 4, 9, 6), whole(4), None, 1, 4, 54, 2, 1e-5),
        (tokens(2), REPLICATE, REPLICATE),
    ),
    "attention of rows of a picture": (
        attention_op,
        (split(2, 1, 2, 18, 3, lengths=(9,)),) * 3,
        tokens(2, 9, inner=2),
    ),
    "cross attention": (attention_op, (split(2, 1, 2, 9, 3), *[whole(1, 2, 6, 3)] * 2), tokens(2)),
    "self attention": (attention_op, (split(2, 1, 2, 9, 3),) * 3, tokens(2)),
    "attention of each frame": (attention_op, (split(0, 9, 2, 4, 3),) * 3, tokens(0)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_operation_runs_on_shards(name: str) -> None:
    op, args, outputs = KNOWN[name]
    found = check(op, args, world=WORLD)
    assert isinstance(found, Local)
    assert found.outputs == (outputs if isinstance(outputs, tuple) else (outputs,))


REFUSED: dict[str, tuple[Any, ...]] = {
    "slice inside a segment": (aten.slice.Tensor, split(1, 2, 9, 3), 1, 0, 3),
    "slice with a step": (aten.slice.Tensor, split(1, 2, 9, 3), 1, 0, 9, 2),
    "slice of a merged dim": (aten.slice.Tensor, split(0, 18, 3, outer=2), 0, 0, 9),
    "nothing of the sequence": (aten.slice.Tensor, split(1, 2, 9, 3), 1, 5, 5),
    "split inside a segment": (aten.split_with_sizes.default, split(1, 2, 9, 3), [4, 5], 1),
    "split into equal sizes of unequal shards": (
        aten.split.Tensor,
        split(0, 7, 3, lengths=(4, 1, 1, 1)),
        4,
    ),
    "split of a merged dim": (aten.split.Tensor, split(0, 18, 3, outer=2), 9),
    "view that cuts the sequence": (aten.view.default, split(0, 9, 4), [3, 3, 4]),
    "view that regroups the sequence": (aten.view.default, split(0, 9, 4), [6, 6]),
    "softmax over the sequence": (aten._softmax.default, split(1, 2, 9, 3), -2, False),
    "mean over the sequence": (aten.mean.dim, split(1, 2, 9, 3), [1]),
    "mean over all": (aten.mean.dim, split(1, 2, 9, 3), None),
    "sum over padding in a merged dim": (aten.sum.dim_IntList, split(0, 18, outer=2), [0]),
    "maximum over all": (aten.amax.default, split(1, 2, 9, 3)),
    "argmax of the flattened": (aten.argmax.default, split(1, 2, 9, 3)),
    "norm over the sequence": (aten.rms_norm.default, split(1, 2, 9, 3), [9, 3]),
    "sharded weight of a norm": (aten.rms_norm.default, whole(2, 9), [9], split(0, 9)),
    "cumsum over the sequence": (aten.cumsum.default, split(1, 2, 9, 3), 1),
    "flipped sequence": (aten.flip.default, split(1, 2, 9, 3), [-2]),
    "rolled sequence": (aten.roll.default, split(1, 2, 9, 3), [1], [1]),
    "rolled as if flat": (aten.roll.default, split(1, 2, 9, 3), [1]),
    "sorted sequence": (aten.sort.default, split(1, 2, 9, 3), 1),
    "best tokens": (aten.topk.default, split(1, 2, 9, 3), 2, 1),
    "one position": (aten.select.int, split(1, 2, 9, 3), 1, 0),
    "each position": (aten.unbind.int, split(0, 9, 3)),
    "positions by index": (aten.index_select.default, split(0, 9, 3), 0, Placed(torch.arange(4))),
    "sharded table": (aten.embedding.default, split(0, 9, 3), Placed(torch.arange(4))),
    "unsafe index": (
        aten.embedding.default,
        whole(4, 3),
        Placed(torch.randint(0, 4, (18,)), tokens(0, outer=2)),
    ),
    "one token expanded": (aten.expand.default, split(1, 2, 1, 3, **ONE), [2, 4, 3]),
    "one token broadcast": (aten.add.Tensor, split(0, 1, 3, **ONE), whole(4, 3)),
    "one token squeezed": (aten.squeeze.dim, split(1, 2, 1, 3, **ONE), 1),
    "repeated sequence": (aten.repeat.default, split(0, 9, 3), [2, 1]),
    "sequence cut by negative padding": (
        aten.constant_pad_nd.default,
        split(0, 9, 3),
        [0, 0, 0, -1],
    ),
    "rows of neighbours in a merged dim": (
        aten.convolution.default,
        split(2, 1, 2, 18, 6, outer=2),
        *(whole(4, 2, 3, 3), None, *ORDINARY),
    ),
    "three rows for each two": (
        aten.upsample_nearest2d.default,
        split(2, 1, 2, 6, 6, lengths=(6,)),
        [9, 6],
    ),
    "overwritten rows": (aten.slice_scatter.default, split(0, 9, 3), whole(2, 3), 0, 0, 2),
    "overwritten row": (aten.select_scatter.default, split(0, 9, 3), whole(3), 0, 1),
    "joined along a merged dim": (aten.cat.default, [split(0, 18, 3, outer=2), whole(4, 3)]),
    "joined with another split": (
        aten.cat.default,
        [split(0, 9, 4), split(1, 2, 4, lengths=(4,))],
    ),
    "bias on a product over the sequence": (
        aten.addmm.default,
        whole(2),
        split(1, 3, 9),
        split(0, 9, 2),
    ),
    "only the bias is split": (aten.addmm.default, split(0, 9, 2), whole(9, 3), whole(3, 2)),
    "attention split over heads": (attention_op, *(split(1, 1, 9, 4, 3),) * 3),
    "keys and values split apart": (
        attention_op,
        split(2, 1, 2, 9, 3),
        split(2, 1, 2, 9, 3),
        split(2, 1, 2, 9, 3, lengths=(9,)),
    ),
    "an op without a rule": (aten.tril.default, split(0, 9, 3)),
    "an op in place": (aten.add_.Tensor, split(0, 9, 3), 1),
    "an op that draws": (aten.bernoulli.p, split(0, 9, 3), 0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operation_is_refused(name: str) -> None:
    op, *args = REFUSED[name]
    assert not isinstance(check(op, tuple(args), world=WORLD), Local)


# The proof itself must be able to fail.


def claim(output: Placement | None = None, **more: Any) -> Any:
    """A rule that says that its first operand stays, and that this comes out."""

    def rule(call: Any) -> Answer:
        x = call.operands[0].placement
        return Local((x, *(REPLICATE for _ in call.operands[1:])), (output or x,), **more)

    return rule


WRONG: dict[str, tuple[Any, tuple, Any]] = {
    "softmax over the sequence": (aten._softmax.default, (split(0, 9, 3), 0, False), claim()),
    "sum that counts padding": (aten.sum.dim_IntList, (split(0, 9, 3), [0]), claim(PARTIAL)),
    "mean as a sum": (aten.mean.dim, (split(0, 9, 3), [0]), claim(PARTIAL, mask_padding=True)),
    "maximum as if whole": (aten.amax.default, (split(0, 9, 3), [0]), claim(REPLICATE)),
    "flip": (aten.flip.default, (split(0, 9, 3), [0]), claim()),
    "sequence left where it was": (aten.t.default, (split(0, 9, 9),), claim()),
    "wrong rows": (
        aten.slice.Tensor,
        (split(0, 9, 3), 0, 5),
        claim(tokens(0, 4), args={2: 0, 3: 1}),
    ),
    "rows that nobody holds": (aten.mul.Tensor, (split(0, 9, 3), whole(9, 3)), claim()),
    "another output": (aten.neg.default, (split(0, 9, 3),), claim(tokens(0, 9))),
    "impossible output": (aten.neg.default, (split(0, 9, 3),), claim(tokens(1))),
    "rows of neighbours dropped": (
        aten.convolution.default,
        (split(2, 1, 2, 9, 6, lengths=(9,)), whole(4, 2, 3, 3), None, *ORDINARY),
        claim(),
    ),
    "rows of neighbours from one side": (
        aten.convolution.default,
        (split(2, 1, 2, 9, 6, lengths=(9,)), whole(4, 2, 3, 3), None, *ORDINARY),
        lambda call: Local((Window(2, 3, 0, 5), REPLICATE), (tokens(2, 9),), {4: [0, 1]}),
    ),
    "zeroed merged dim": (
        aten.sum.dim_IntList,
        (split(0, 18, outer=2), [0]),
        claim(PARTIAL, mask_padding=True),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_brute_force_finds_a_wrong_rule(name: str) -> None:
    op, args, rule = WRONG[name]
    with pytest.raises(AssertionError, match=rf"^{re.escape(str(op))} on \(.*, 4 ranks: Local \("):
        check(op, args, world=WORLD, rule=rule)


def test_a_rank_holds_its_chunk_of_every_segment() -> None:
    x = torch.arange(14).view(7, 2)
    placement = Shard(0, Sequence((5, 2)))
    assert cut(x, placement, 0, 2)[:, 0].tolist() == [0, 2, 4, 10]
    assert cut(x, placement, 1, 2, padding=0)[:, 0].tolist() == [6, 8, 0, 12]
    merged = Shard(0, Sequence((3,)), outer=2, inner=2)
    assert cut(torch.arange(12), merged, 1, 2, padding=0).tolist() == [4, 5, 0, 0, 10, 11, 0, 0]


# Sizes that are symbols: the answer must be right for every value of them.

B, S, T = (sympy.Symbol(n, integer=True, positive=True) for n in "bst")


def image(dim: int, *shape: Any, seq: tuple, outer: Any = 1) -> Operand:
    return Operand(shape, Shard(dim, Sequence(seq), outer))


SYMBOLIC: dict[str, Any] = {
    "view into one dim": lambda b, s, t: (
        aten.view.default,
        (image(1, b, s + t, 6, seq=(s, t)), [b * (s + t), 6]),
        [(b * (s + t), 6)],
    ),
    "view into heads": lambda b, s, t: (
        aten.view.default,
        (image(0, b * s, 6, seq=(s,), outer=b), [b, s, 2, 3]),
        [(b, s, 2, 3)],
    ),
    "linear": lambda b, s, t: (
        aten.addmm.default,
        (Operand((4,)), image(0, b * s, 6, seq=(s,), outer=b), Operand((6, 4))),
        [(b * s, 4)],
    ),
    "modulation": lambda b, s, t: (
        aten.mul.Tensor,
        (image(1, b, s, 6, seq=(s,)), Operand((b, 1, 6))),
        [(b, s, 6)],
    ),
    "expand": lambda b, s, t: (
        aten.expand.default,
        (image(1, 1, s, 6, seq=(s,)), [b, s, 6]),
        [(b, s, 6)],
    ),
    "join": lambda b, s, t: (
        aten.cat.default,
        ([Operand((b, t, 6)), image(1, b, s, 6, seq=(s,))], 1),
        [(b, t + s, 6)],
    ),
    "slice": lambda b, s, t: (
        aten.slice.Tensor,
        (image(1, b, 512 + s + t, 2, seq=(512, s, t)), 1, 512, 512 + s),
        [(b, s, 2)],
    ),
    "slice from the end": lambda b, s, t: (
        aten.slice.Tensor,
        (image(1, b, s + 7, 2, seq=(s, 7)), 1, -7, TO_THE_END),
        [(b, 7, 2)],
    ),
    "part": lambda b, s, t: (
        aten.split_with_sizes.default,
        (image(1, b, s + t, 2, seq=(s, t)), [s, t], 1),
        [(b, s, 2), (b, t, 2)],
    ),
    "squeeze": lambda b, s, t: (aten.squeeze.default, (image(1, 1, s, 2, seq=(s,)),), [(s, 2)]),
    "mean": lambda b, s, t: (aten.mean.dim, (image(1, b, s, 2, seq=(s,)), [0]), [(s, 2)]),
}


def at(x: Any, values: dict[sympy.Symbol, int]) -> Any:
    """`x` with numbers for symbols."""
    if isinstance(x, sympy.Expr):
        return int(x.subs(values))
    if isinstance(x, tuple | list):
        return type(x)(at(y, values) for y in x)
    if isinstance(x, dict):
        return {k: at(v, values) for k, v in x.items()}
    if isinstance(x, Local | Shard | Sequence):
        return replace(x, **{f.name: at(getattr(x, f.name), values) for f in fields(x)})
    return x


def numbered(args: Any) -> Any:
    count = iter(range(100))
    return pytree.tree_map_only(Operand, lambda x: replace(x, index=next(count)), args)


@pytest.mark.parametrize("sizes", [(2, 2, 5, 4), (4, 3, 2, 9), (3, 2, 3, 3), (4, 2, 4, 8)])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_rule_is_right_for_every_value_of_symbolic_sizes(name: str, sizes: tuple) -> None:
    world, b, s, t = sizes
    op, args, outputs = SYMBOLIC[name](B, S, T)
    found = answer(Call(op, numbered(args), {}, tuple(outputs), world))
    assert isinstance(found, Local)
    claimed = at(found, {B: b, S: s, T: t})
    real = pytree.tree_map_only(
        Operand, lambda x: Placed(torch.randn(x.shape), x.placement), SYMBOLIC[name](b, s, t)[1]
    )
    check(op, real, world=world, rule=lambda call: claimed)


def test_padding_of_unknown_length_is_not_asked_to_be_zeroed() -> None:
    x = image(0, S, 6, seq=(S,))
    for call in [
        Call(aten.sum.dim_IntList, (x, [0]), {}, ((6,),), WORLD),
        Call(
            aten.mm.default, (image(1, 6, S, seq=(S,)), replace(x, index=1)), {}, ((6, 6),), WORLD
        ),
        Call(
            aten.embedding.default, (Operand((9, 3)), image(0, S, seq=(S,))), {}, ((S, 3),), WORLD
        ),
    ]:
        assert isinstance(answer(call), Reshard)
