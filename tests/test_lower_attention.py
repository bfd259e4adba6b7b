"""The attention spelled out in matrix products against PyTorch's own."""

from __future__ import annotations

import pytest
import torch

import attention_cases
from ascend_sp.compiler.config import Config
from ascend_sp.runtime.ops import attention
from attention_cases import CASES
from simulator import capture, compile_rank

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_spelled_out(dtype: torch.dtype) -> None:
    operands = attention_cases.inputs(dtype)
    captured = capture(attention_cases.run, operands)
    gm, _ = compile_rank(captured, 0, 1, Config(attention="math"))
    ops = [n.target for n in gm.graph.nodes]
    assert ops.count(aten.matmul.default) == 2 * len(CASES)
    assert attention not in ops
    assert aten.scaled_dot_product_attention.default not in ops
    got = gm(*captured.inputs)
    assert not attention_cases.wrong(got, attention_cases.expected(operands), dtype)
    results = dict(zip(CASES, got, strict=True))
    for name in ("empty rows B1ST", "float mask, empty rows", "three dims, masked"):
        assert (results[name][..., (1, 3), :] == 0).all(), name
        assert (results[name][..., (0, 2), :] != 0).any(), name
    assert (results["an item without keys"][1] == 0).all()
