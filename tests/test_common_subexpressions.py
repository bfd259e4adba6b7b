"""What is computed twice is computed once; what only looks so is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.origin import made_by
from ascend_sp.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from checks import worst
from models import flux, flux_inputs
from simulator import capture, compile_rank, simulate


def calls(gm: fx.GraphModule) -> Counter:
    return Counter(n.target.__name__ for n in gm.graph.nodes if n.op == "call_function")


def merged(fn: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph before and after."""
    before = capture(fn, *args).gm
    after = fx.GraphModule(before, fx.Graph())
    after.graph.output(after.graph.graph_copy(before.graph, {}))
    after.graph.output_node().meta = dict(before.graph.output_node().meta)
    return before, eliminate_common_subexpressions(after, PassContext())


def twice(x: Tensor) -> Tensor:
    one = (x[:, 1:].unsqueeze(0) * 2).cos()
    two = (x[:, 1:].unsqueeze(0) * 2).cos()
    return torch.cat([one, two, (x[:, 1:].unsqueeze(0) * 3).cos()])


def test_equal_calls_on_equal_operands_are_one() -> None:
    x = torch.randn(3, 5)
    before, after = merged(twice, x)
    assert calls(before)["cos.default"] == 3 and calls(before)["slice.Tensor"] == 3
    assert calls(after) == {
        **{"slice.Tensor": 1, "unsqueeze.default": 1, "mul.Tensor": 2, "cos.default": 2},
        "cat.default": 1,
    }
    assert all("val" in n.meta for n in after.graph.nodes if n.op == "call_function")
    assert torch.equal(after(x)[0], twice(x))


def draws(x: Tensor) -> Tensor:
    return torch.cat([twice(x), torch.randn_like(x)[None, :, 1:], torch.randn_like(x)[None, :, 1:]])


def finds(x: Tensor) -> Tensor:
    return torch.cat([x.nonzero(), x.nonzero()])


@pytest.mark.parametrize("fn", [draws, finds])
def test_what_only_looks_equal_is_left_alone(fn: Callable[..., Any]) -> None:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    try:
        before, after = merged(fn, torch.randn(3, 5))
    finally:
        torch._dynamo.config.capture_dynamic_output_shape_ops = False
    assert calls(after) == calls(before)
    op = "randn_like.default" if fn is draws else "nonzero.default"
    assert calls(after)[op] == 2


def cats(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def test_tables_that_every_block_prepares_are_cut_once() -> None:
    model, inputs = flux(1, 2, 2), flux_inputs(1, 17, 7)
    captured = capture(model, **inputs)
    gm, _ = compile_rank(captured, 0, 2)
    made = Counter(made_by(n).partition("(")[0] for n in cats(gm))
    # Cosines and sines; each of three attentions drops the padding rows of keys and values.
    assert made["materialise_sharding"] == 2 and made["ulysses"] == 6
    with torch.no_grad():
        want = model(**inputs)[0]
    outputs, *_ = simulate(captured, 2)
    assert worst([[out[0]] for out in outputs], want) <= 1e-5
