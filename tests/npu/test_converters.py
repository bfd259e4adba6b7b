"""Ops whose GE converter says something else than the op: torchair must get others to convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cannsim
import pytest
import torch
import torch.nn.functional as F
from fusing import compiled
from torch import Tensor

X, Y, WHOLE = torch.randn(4, 8), torch.randn(4, 8), torch.randint(1, 9, (4, 8))
BATCH = torch.randn(2, 3, 4)
HIDDEN = torch.zeros(4, 8)
HIDDEN[1], HIDDEN[2, 3:] = float("-inf"), float("-inf")
UNINITIALISED = torch.full((2, 3, 3), float("nan"))

CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "gelu": (F.gelu, (X,)),
    "gelu, none": (lambda x: F.gelu(x, approximate="none"), (X * 3,)),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), (X,)),
    "gelu, transposed": (lambda x: F.gelu(x.t()).flatten(), (X,)),
    "safe softmax": (lambda x, m: torch.ops.aten._safe_softmax.default(x + m, -1), (X, HIDDEN)),
    "safe softmax, rows": (lambda x, m: torch.ops.aten._safe_softmax(x + m, 0), (X, HIDDEN)),
    "safe softmax, wider": (
        lambda x, m: torch.ops.aten._safe_softmax.default(x + m, -1, torch.float32),
        (X.bfloat16(), HIDDEN.bfloat16()),
    ),
    "masked attention": (
        lambda q, m: F.scaled_dot_product_attention(q, q, q, m),
        (torch.randn(1, 2, 8, 8), HIDDEN.repeat(2, 1) == 0),
    ),
    "baddbmm that only multiplies": (
        lambda e, x: torch.baddbmm(e, x, x.mT, beta=0, alpha=0.3),
        (UNINITIALISED, BATCH),
    ),
    "baddbmm": (lambda e, x: torch.baddbmm(e, x, x.mT, beta=2), (torch.randn(2, 3, 3), BATCH)),
    "addmm that only multiplies": (
        lambda e, x: torch.addmm(e, x, x.mT, beta=0),
        (UNINITIALISED[0], BATCH[0]),
    ),
    "addmm that only multiplies, half": (
        lambda e, x: torch.addmm(e, x, x.mT, beta=0),
        (UNINITIALISED[0, 0].bfloat16(), BATCH[0].bfloat16()),
    ),
    "sub of integers": (lambda x, y: torch.sub(x, y, alpha=0.5), (X, WHOLE)),
    "sub": (lambda x, y: torch.sub(x, y, alpha=0.5), (X, Y)),
}


@pytest.mark.parametrize("name", CASES)
def test_ge_graph_means_what_the_op_means(name: str) -> None:
    fn, args = CASES[name]
    expected: Any = fn(*args)
    tolerance = 1e-2 if expected.dtype == torch.bfloat16 else 1e-6
    out = compiled(fn, *args, target="torchair")
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_gelu_is_one_op_in_both_forms() -> None:
    kinds = {}
    for form in ("none", "tanh"):
        cannsim.ge.forget()
        compiled(lambda x, form=form: F.gelu(x, approximate=form), X, target="torchair")
        (graph,) = cannsim.ge.graphs()
        kinds[form] = (graph.types()["GeluV2"], graph.types()["Gelu"])
    assert kinds == {"none": (1, 0), "tanh": (0, 1)}


def test_other_targets_keep_their_gelu() -> None:
    cannsim.trace.forget()
    compiled(F.gelu, X, target="npugraph_ex")
    (trace,) = cannsim.trace.captured_graphs()
    assert trace.find("aten::gelu")
    assert not trace.find("npu_gelu")
