"""Keys and values gathered: right for every kind of attention, heads fewer than ranks included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascend_sp.compiler.config import Config
from ascend_sp.passes.choose_strategy import Choice
from ascend_sp.runtime.ops import attention
from checks import error, masks, only, worst
from processes import run, values
from simulator import capture, compile_rank, simulate
from toy import JointAttention, SelfAttention, Sliced

GATHER = Config(strategy="gather")
KINDS = ("self", "causal", "grouped", "one group", "joint", "sliced")
MASKS = ("B11S", "B1SS", "BHSS", "SS", "B1S1", "BH1S", "1S", "HSS")


@settings(max_examples=3)
@given(
    kind=st.sampled_from(KINDS + MASKS),
    additive=st.booleans(),
    batch=st.integers(1, 2),
    length=st.integers(2, 30),
    text=st.integers(1, 9),
    heads=st.integers(1, 3),
    ranks=st.integers(2, 8),
)
def test_any_attention(
    kind: str, additive: bool, batch: int, length: int, text: int, heads: int, ranks: int
) -> None:
    dim = 4 * heads
    x, prompt = torch.randn(batch, length, dim), torch.randn(batch, text, dim)
    model: Callable = SelfAttention(dim, heads)
    args: tuple[Any, ...] = (x,)
    if kind == "causal":
        args = (x, None, True)
    elif kind == "grouped":
        model, args = (
            SelfAttention(2 * dim, 2 * heads, heads),
            (torch.randn(batch, length, 2 * dim),),
        )
    elif kind == "one group":
        model = SelfAttention(dim, heads, 1)
    elif kind == "sliced":
        model, args = Sliced(max(1, length // 3)), (torch.randn(batch, length, 12),)
    elif kind != "self":
        mask = None if kind == "joint" else masks(kind, batch, heads, length + text)
        if mask is not None and additive:
            mask = torch.where(mask, torch.rand(mask.shape), torch.tensor(-1e4))
        model, args = JointAttention(dim, heads), (x, prompt, mask)
    with torch.no_grad():
        want = model(*args)
    outputs, _, ctx, network = simulate(capture(model, *args), ranks, GATHER)
    assert worst(outputs, want) <= 1e-5
    attentions = sum(len(c.nodes) for c in ctx.results.all(Choice))
    assert attentions >= 2
    # Keys and values of each attention, and the result; nothing else travels.
    assert network.calls == {"all_gather_into_tensor": 2 * attentions + 1}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_one_value_that_is_queries_and_keys_and_other_lengths(dynamic: bool, causal: bool) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.unflatten(2, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, is_causal=causal)
        return y.transpose(1, 2).flatten(2)

    x = torch.randn(2, 7, 8)
    outputs, _, _, network = simulate(capture(fn, x, dynamic=dynamic), 3, GATHER)
    assert worst(outputs, fn(x)) <= 1e-5
    assert network.calls == {"all_gather_into_tensor": 2}


def test_keys_and_values_that_differ_in_heads_and_width() -> None:
    def fn(x: Tensor) -> Tensor:
        q, k, v = x[..., :32], 0.3 * x[..., :8], x[..., 8:32]
        q, k, v = (y.unflatten(2, (n, -1)).transpose(1, 2) for y, n in ((q, 4), (k, 1), (v, 4)))
        return F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2)

    x = torch.randn(2, 7, 32)
    for ranks in (2, 5):
        outputs, *_ = simulate(capture(fn, x), ranks, GATHER)
        assert worst(outputs, fn(x)) <= 1e-5


def test_a_rank_attends_its_own_queries_only() -> None:
    """With one head on eight ranks an exchange of heads leaves seven ranks with padding."""
    captured = capture(SelfAttention(8, 1), torch.randn(1, 24, 8))
    passes = only("propagate_sharding", "materialise_sharding", "choose_strategy", "ulysses")
    passes += only("gather_keys")
    gm, _ = compile_rank(captured, 3, 8, GATHER, passes)
    for node in gm.graph.find_nodes(op="call_function", target=attention):
        assert node.args[0].meta["val"].shape == (1, 1, 3, 8)
        assert node.args[1].meta["val"].shape == (1, 1, 24, 8)


@pytest.mark.parametrize("broken", ["own keys only", "padding kept"])
def test_what_would_be_wrong_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_sp.passes import exchange, gather_keys

    if broken == "padding kept":
        monkeypatch.setattr(
            exchange, "rows_before_padding", lambda seq, world: seq.local(world) * world
        )
    else:
        monkeypatch.setattr(
            gather_keys.Gathering,
            "_rows_of_mask",
            lambda self, mask: self.e.narrow(mask, 2, 0, self.queries.local(self.topology.size)),
        )
    x = torch.randn(1, 13, 12)
    args = (x,) if broken == "padding kept" else (x, masks("B1SS", 1, 3, 13))
    model = SelfAttention(12, 3)
    with torch.no_grad():
        want = model(*args)
    outputs, *_ = simulate(capture(model, *args), 3, GATHER)
    assert not worst(outputs, want) <= 1e-3


def on_gloo(rank: int, world: int, target: str) -> list[float]:
    torch.manual_seed(0)
    found = []
    for groups, causal in ((None, False), (1, True)):
        torch._dynamo.reset()
        model = SelfAttention(12, 3, groups)
        options = {"target": target, "strategy": "gather", "check_numerics": True}
        compiled = torch.compile(model, backend="ascend_sp", options=options)
        x = torch.randn(2, 13, 12)
        found.append(error(compiled(x, None, causal), model(x, None, causal)))
    return found


def test_on_gloo_with_numbers_checked() -> None:
    assert max(map(max, values(run(on_gloo, 2, "eager", timeout=120)))) <= 1e-5
