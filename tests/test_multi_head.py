"""`nn.MultiheadAttention`, which Dynamo keeps as one call: the attention in it is captured, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import flex_attention

from ascend_sp.compiler.config import Config
from ascend_sp.runtime.errors import UnshardedError
from ascend_sp.runtime.ops import attention
from checks import worst
from simulator import capture, dynamo_graph, simulate

DIM, HEADS = 24, 3
X, TEXT = torch.randn(2, 13, DIM), torch.randn(2, 5, DIM)
PADDED = torch.arange(13)[None] >= torch.tensor([[13], [9]])
CAUSAL = torch.triu(torch.ones(13, 13, dtype=torch.bool), 1)


class Attends(nn.Module):
    """One of them between norms, called as `call` does."""

    def __init__(self, call: Callable[..., Tensor], **kwargs: Any) -> None:
        super().__init__()
        kwargs = {"batch_first": True} | kwargs
        self.attention = nn.MultiheadAttention(DIM, HEADS, **kwargs)
        self.norm, self.call = nn.LayerNorm(DIM), call

    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(self.attention, self.norm(x))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Attends(lambda a, x: a(x, x, x, need_weights=False)[0]),
    "weights that nobody reads": lambda: Attends(lambda a, x: a(x, x, x)[0]),
    "padding": lambda: Attends(lambda a, x: a(x, x, x, key_padding_mask=PADDED)[0]),
    "mask": lambda: Attends(lambda a, x: a(x, x, x, attn_mask=CAUSAL)[0]),
    "causal": lambda: Attends(
        lambda a, x: a(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0]
    ),
    "keys of their own": lambda: Attends(lambda a, x: a(x, TEXT, TEXT)[0]),
    "sequence first": lambda: Attends(
        lambda a, x: a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), batch_first=False
    ),
    "no bias": lambda: Attends(lambda a, x: a(x, x, x)[0], bias=False),
    "other widths": lambda: Attends(lambda a, x: a(x, x[..., :8], x[..., :6])[0], kdim=8, vdim=6),
    "encoder": lambda: nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True),
}


def test_one_rank_computes_what_the_model_says() -> None:
    """With the weights, which are asked for, attention is products and a softmax."""
    model = FORMS["weights that nobody reads"]().eval()
    _, out = dynamo_graph(model, X)
    with torch.no_grad():
        assert torch.equal(out, model(X))


class Flex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (1, DIM)).transpose(1, 2)
        return flex_attention(q, q, q).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (nn.TransformerEncoderLayer(DIM, 4, 32, batch_first=True), "set_fastpath_enabled(False)"),
        (Flex(), "F.scaled_dot_product_attention is"),
    ],
    ids=["fast path", "flex_attention"],
)
def test_other_ops_that_attend_run_whole_and_are_told(model: nn.Module, remedy: str) -> None:
    captured = capture(model.eval(), X, ranks=2)
    with torch.no_grad():
        outputs, _, ctx, network = simulate(captured, 2)
        assert worst(outputs, model(X)) <= 1e-5
    assert not network.calls
    (note,) = ctx.notes
    assert note.kind == "unsharded" and remedy in note.text
    with pytest.raises(UnshardedError, match=re.escape(remedy)):
        simulate(captured, 2, Config(on_unsharded="error"))


def test_without_the_fast_path_a_layer_is_captured() -> None:
    model = nn.TransformerEncoderLayer(DIM, 4, 32, batch_first=True).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        gm = capture(model, X, ranks=2).gm
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert gm.graph.find_nodes(op="call_function", target=attention)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_captured_and_split(form: str) -> None:
    torch.manual_seed(0)
    model = FORMS[form]().eval()
    captured = capture(model, X, ranks=2)
    assert len(captured.gm.graph.find_nodes(op="call_function", target=attention)) == 1
    with torch.no_grad():
        want = model(X)
    outputs, _, ctx, network = simulate(captured, 2)
    assert worst(outputs, want) <= 1e-5
    assert not any(n.kind == "unsharded" for n in ctx.notes)
    # Keys that every rank has travel nowhere.
    alone = form == "keys of their own"
    assert network.calls["all_to_all_single"] == (0 if alone else 4)


def test_a_mask_that_is_wrongly_said_to_be_causal_counts_as_before() -> None:
    """PyTorch looks at it as long as weights are asked for."""
    torch.manual_seed(0)
    model = Attends(lambda a, x: a(x, x, x, attn_mask=PADDED[1].expand(13, 13), is_causal=True)[0])
    with torch.no_grad():
        want = model.eval()(X)
    outputs, *_ = simulate(capture(model, X, ranks=2), 2)
    assert worst(outputs, want) <= 1e-5


def test_weights_that_are_read_are_computed_as_before() -> None:
    torch.manual_seed(0)
    model = Attends(lambda a, x: a(x, x, x)[1] @ x).eval()
    captured = capture(model, X, ranks=2)
    assert not captured.gm.graph.find_nodes(op="call_function", target=attention)
    with torch.no_grad():
        want = model(X)
    outputs, *_ = simulate(captured, 2)
    assert worst(outputs, want) <= 1e-5


def test_dropout_is_refused_with_its_line() -> None:
    model = Attends(lambda a, x: a(x, x, x, need_weights=False)[0], dropout=0.1).train()
    with pytest.raises(BackendCompilerFailed, match=r"dropout_p=0.1 at .*\.py.*model\.eval\(\)"):
        capture(model, X, ranks=2)
