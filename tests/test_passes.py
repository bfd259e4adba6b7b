"""Each pass alone, on small graphs: the expected graph, and the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import Pass, capture_attention, compile_aten
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.layout import REPLICATE, Shard
from ascend_sp.passes.sharding.plan import Plan
from ascend_sp.passes.sharding.propagate import propagate
from ascend_sp.runtime.errors import ConfigError, VerificationError
from ascend_sp.runtime.ops import ALL_TO_ALL, STARTS, WAIT, attention, split_attention
from checks import only, text
from simulator import capture, compile_rank, simulate
from toy import JointAttention, Modulated, Normed, SelfAttention

# capture_attention ------------------------------------------------------------------------------

QKV = [torch.randn(2, 4, 6, 8) for _ in range(3)]
MASK = torch.rand(2, 1, 6, 6) > 0.3
MASK[..., 0] = True
FORMS: dict[str, Callable[..., Tensor]] = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK, 0.0, False),
    "keyword": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, attn_mask=MASK),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, dropout_p=0.0),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], enable_gqa=True
    ),
    "additive": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK.float().log()),
    "alias": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.parametrize("form", FORMS)
def test_capture_takes_every_form_of_the_call(form: str) -> None:
    captured = capture(FORMS[form], *QKV)
    ops = [n.target for n in captured.gm.graph.nodes if n.op == "call_function"]
    assert ops.count(attention) == 1
    assert not any("scaled_dot_product" in str(op) for op in ops)
    outputs, *_ = simulate(captured, 1)
    torch.testing.assert_close(outputs[0][0], FORMS[form](*QKV))


def test_capture_leaves_other_ops_alone() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    before = str(gm.graph)
    assert str(capture_attention(gm, PassContext()).graph) == before


# propagate_sharding -----------------------------------------------------------------------------


def plan_of(model: nn.Module, *args: Tensor, world: int = 2) -> tuple[fx.GraphModule, object]:
    captured = capture(model, *args)
    nodes = list(captured.gm.graph.nodes)
    return captured.gm, propagate(nodes, world)


def test_seeds_are_the_inputs_of_both_streams() -> None:
    gm, plan = plan_of(JointAttention(12, 3), torch.randn(2, 10, 12), torch.randn(2, 3, 12))
    assert sorted(str(s) for s in plan.seeds.values()) == ["S(1: [10])", "S(1: [3])"]
    assert all(n.op == "placeholder" for n in plan.seeds)
    attentions = gm.graph.find_nodes(op="call_function", target=attention)
    assert [str(plan.placement(n)) for n in attentions] == ["S(2: [3+10])"] * 2
    assert not plan.refusals


def test_merged_dims_of_a_batch_stay_split() -> None:
    gm, plan = plan_of(SelfAttention(12, 3), torch.randn(2, 10, 12))
    rows = [plan.placement(n) for n in gm.graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert {str(p) for p in rows} == {"S(0: 2*[10])"}


class Patchify(nn.Module):
    """A convolution that no rule covers, then attention over its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(3, 12, 2, 2), SelfAttention(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        h, w = x.shape[2:]
        y = self.body(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, (h, w))


def test_seed_stands_behind_what_cannot_be_split() -> None:
    model, x = Patchify(), torch.randn(1, 3, 8, 6)
    gm, plan = plan_of(model, x)
    (seed,) = plan.seeds
    before = [n for n in gm.graph.nodes if n <= seed and n.op == "call_function"]
    assert torch.ops.aten.convolution.default in [n.target for n in before]
    assert all(plan.placement(n) == REPLICATE for n in before if n is not seed)
    captured = capture(model, x)
    outputs, _, ctx, network = simulate(captured, 3)
    torch.testing.assert_close(outputs[2][0], model(x).detach())
    assert network.calls == {"all_to_all_single": 8, "all_gather_into_tensor": 1}
    assert any(n.kind == "unsharded" and "cuts or regroups" in n.text for n in ctx.notes)


def test_nothing_is_split_without_an_attention() -> None:
    gm, plan = plan_of(nn.Linear(4, 4), torch.randn(2, 8, 4))
    assert not plan.seeds
    assert not any(isinstance(plan.placement(n), Shard) for n in gm.graph.nodes)


# materialise_sharding ---------------------------------------------------------------------------


class Tiny(nn.Module):
    """One attention without projections."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q * 2, q)
        return y.transpose(1, 2).flatten(2)


def test_materialised_graph() -> None:
    captured = capture(Tiny(), torch.randn(1, 5, 8))
    gm, ctx = compile_rank(
        captured, 1, 2, passes=only("propagate_sharding", "materialise_sharding")
    )
    # Rank 1 of 2 holds rows 3 and 4 of 5, and one row of padding.
    assert text(gm).splitlines() == [
        "slice.Tensor [1, 2, 8]",
        "constant_pad_nd [1, 3, 8]",
        "view [1, 3, 2, 4]",
        "transpose.int [1, 2, 3, 4]",
        "mul.Tensor [1, 2, 3, 4]",
        "split_attention [1, 2, 3, 4]",
        "transpose.int [1, 3, 2, 4]",
        "view [1, 3, 8]",
        "view [24]",
        "all_gather_into_tensor [48]",
        "wait_tensor [48]",
        "view [2, 1, 3, 8]",
        "view [1, 2, 3, 8]",  # the permute would only move a dim of one
        "view [1, 6, 8]",
        "slice.Tensor [1, 5, 8]",  # without padding
    ]
    assert [n.kind for n in ctx.notes] == ["attention", "gather"]


def test_a_program_with_split_attention_left_over_cannot_run() -> None:
    captured = capture(Tiny(), torch.randn(1, 4, 8))
    passes = only("propagate_sharding", "materialise_sharding")
    gm, _ = compile_rank(captured, 0, 2, passes=passes)
    with pytest.raises(NotImplementedError, match="a pass must expand it"):
        gm(*captured.inputs)


# ulysses ----------------------------------------------------------------------------------------


def test_ulysses_alone() -> None:
    captured = capture(Tiny(), torch.randn(1, 4, 8))
    gm, _ = compile_rank(
        captured, 0, 2, passes=only("propagate_sharding", "materialise_sharding", "ulysses")
    )
    communication = (*STARTS, WAIT, attention, split_attention)
    assert text(gm, lambda n: n.target in communication).splitlines() == [
        "all_to_all_single [16]",
        "all_to_all_single [16]",
        "all_to_all_single [16]",
        "wait_tensor [16]",
        "wait_tensor [16]",
        "wait_tensor [16]",
        "attention [1, 1, 4, 4]",
        "all_to_all_single [16]",
        "wait_tensor [16]",
        "all_gather_into_tensor [32]",
        "wait_tensor [32]",
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_even_lengths_take_one_copy_to_pack_and_none_to_unpack(world: int) -> None:
    captured = capture(Tiny(), torch.randn(1, 8, 8))
    gm, _ = compile_rank(captured, 0, world)
    copies = [n for n in gm.graph.nodes if n.target is torch.ops.aten.clone.default]
    # q, q * 2 and v are packed; the result of the attention is packed by its own layout, and
    # unpacked by one copy from heads to channels.
    assert len(copies) <= 4
    pads = [n for n in gm.graph.nodes if "pad" in str(n.target) or "cat" in str(n.target)]
    assert len(pads) == (3 if world == 4 else 0)  # two heads on four ranks are padded


# schedule_collectives ---------------------------------------------------------------------------


class Branch(nn.Module):
    """Work that does not need the attention stands between it and its use."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.attention, self.mlp, self.first = Tiny(), nn.Linear(8, 8), first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            z = F.gelu(self.mlp(x))
            return z + self.attention(x)
        y = self.attention(x)
        return y + F.gelu(self.mlp(x))


@pytest.mark.parametrize("first", [True, False])
def test_independent_work_stands_between_a_start_and_its_wait(first: bool) -> None:
    captured = capture(Branch(first), torch.randn(1, 4, 8))

    def between(gm: fx.GraphModule) -> bool:
        nodes = list(gm.graph.nodes)
        spans = [(nodes.index(n.args[0]), i) for i, n in enumerate(nodes) if n.target is WAIT]
        gelu = next(i for i, n in enumerate(nodes) if n.target is torch.ops.aten.gelu.default)
        return any(start < gelu < wait for start, wait in spans)

    assert between(compile_rank(captured, 0, 2)[0])
    skip = Config(skip_passes=("schedule_collectives",), strategy="separate")
    assert not between(compile_rank(captured, 0, 2, skip)[0])


def test_values_travel_first_where_queries_and_keys_have_more_to_do() -> None:
    captured = capture(Normed(), torch.randn(1, 7, 12))

    def products_before_starts(skip: tuple[str, ...]) -> list[int]:
        gm, _ = compile_rank(captured, 0, 2, Config(skip_passes=skip, strategy="separate"))
        before, products = [], 0
        for node in gm.graph.nodes:
            products += node.target is torch.ops.aten.addmm.default
            if node.target is ALL_TO_ALL:
                before.append(products)
        # The projection that stands before the first start is that of the values.
        weight = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.addmm.default)
        names.append(weight.args[0].name)
        return before

    names: list[str] = []
    assert products_before_starts(()) == [1, 2, 3, 3]
    assert products_before_starts(("schedule_collectives",)) == [3, 3, 3, 3]
    assert names[0] != names[1]  # the queries' is the first in the program


def test_order_of_collectives_is_that_of_the_other_ranks() -> None:
    for model, lengths in ((JointAttention(12, 3), (9, 2)), (Normed(), (7,))):
        captured = capture(model, *(torch.randn(1, n, 12) for n in lengths))
        orders = set()
        for rank in range(4):
            gm, _ = compile_rank(captured, rank, 4)
            orders.add(tuple(n.name for n in gm.graph.nodes if n.target in STARTS))
        assert len(orders) == 1
        assert list(orders.pop()) != []


# the runner -------------------------------------------------------------------------------------


def break_shape(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    node.meta["val"] = node.meta["val"].new_empty(3)
    return gm


def break_placement(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    node.meta["ascend_sp_placements"] = (REPLICATE,)
    return gm


def break_count(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    node.meta["val"] = (node.meta["val"], node.meta["val"])
    del node.meta["ascend_sp_placements"]
    return gm


def break_placements(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    node.meta["ascend_sp_placements"] *= 2
    return gm


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (break_shape, "is recorded as"),
        (break_count, "is recorded as 2 tensors and yields 1"),
        (break_placement, "so each of 2 ranks holds"),
        (break_placements, "has 2 placements and 1 tensors"),
    ],
)
def test_verification_names_the_pass_and_the_node(bad: Callable, words: str) -> None:
    captured = capture(Tiny(), torch.randn(1, 5, 8))
    passes = (*only("propagate_sharding", "materialise_sharding"), Pass(bad))
    with pytest.raises(VerificationError, match=rf"after {bad.__name__}: %mul.*{words}") as e:
        compile_rank(captured, 0, 2, passes=passes)
    assert re.search(r"test_passes\.py:\d+: y = F\.scaled|q \* 2", str(e.value))


def test_passes_are_not_run_before_what_they_require() -> None:
    captured = capture(Tiny(), torch.randn(1, 5, 8))
    with pytest.raises(VerificationError, match=r"before ulysses .* has no placement"):
        compile_rank(captured, 0, 2, passes=only("ulysses"))


def test_what_a_pass_ensures_holds_after_every_later_one() -> None:
    captured = capture(Tiny(), torch.randn(1, 5, 8))

    def undo(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
        for node in gm.graph.find_nodes(op="call_function", target=attention):
            node.target = split_attention
        return gm

    names = ("propagate_sharding", "materialise_sharding", "ulysses", "gather_keys")
    passes = (*only(*names), Pass(undo))
    with pytest.raises(VerificationError, match="after undo it must hold that no attention needs"):
        compile_rank(captured, 0, 2, Config(verify=False), passes=passes)


def test_only_optional_passes_may_be_skipped() -> None:
    captured = capture(Tiny(), torch.randn(1, 5, 8))
    with pytest.raises(ConfigError, match="skip_passes names ulysses"):
        compile_aten(captured.copy(), PassContext(), Config(skip_passes=("ulysses",)))


def test_plan_is_left_for_the_next_pass() -> None:
    captured = capture(Tiny(), torch.randn(1, 5, 8))
    _, ctx = compile_rank(captured, 0, 2, passes=only("propagate_sharding"))
    plan = ctx.results.get(Plan)
    assert plan is not None and plan.seeds


@pytest.mark.parametrize("skip", [(), ("schedule_collectives",)])
def test_a_product_that_is_free_fills_the_time_before_a_wait(skip: tuple[str, ...]) -> None:
    captured = capture(Modulated(), torch.randn(1, 13, 12), torch.randn(1, 6))
    gm, _ = compile_rank(captured, 0, 2, Config(skip_passes=skip, strategy="separate"))
    nodes = list(gm.graph.nodes)
    scales = [
        i for i, n in enumerate(nodes) if "mm" in str(n.target) and n.meta["val"].shape[0] == 1
    ]
    spans = [(nodes.index(n.args[0]), i) for i, n in enumerate(nodes) if n.target is WAIT]
    inside = [any(start < i < wait for start, wait in spans) for i in scales]
    # The first is needed at once; each block's wait is filled with the next ones.
    assert inside == ([False, True, True] if not skip else [False, False, False])
