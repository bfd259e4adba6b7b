"""Results have the strides that eager's have, so that what reads them is not compiled once more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from models import flux, qwen, qwen_inputs
from processes import run, values

UNEVEN = 17
"""Tokens of a text, which two ranks pad."""


def outputs(rank: int, world: int, target: str) -> list[Any]:
    """Of each result: the strides of eager, those of the program, and how far the values differ."""
    options = {"target": target}
    found = []
    with torch.no_grad():
        block = flux(double=1, single=0).transformer_blocks[0]
        c = block.norm1.linear.in_features
        g = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(1, 16, c, generator=g),
            "encoder_hidden_states": torch.randn(1, UNEVEN, c, generator=g),
            "temb": torch.randn(1, c, generator=g),
        }
        program = torch.compile(block, backend="ascend_sp", options=options, fullgraph=True)
        for want, got in zip(block(**inputs), program(**inputs), strict=True):
            found.append((want.stride(), got.stride(), (want - got).abs().max().item()))
    return found


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_block_returns_the_strides_of_eager(target: str) -> None:
    for found in values(run(outputs, 2, target)):
        for want, got, error in found:
            assert want == got
            assert error < 1e-4


def graphs_of_blocks(rank: int, world: int, target: str) -> tuple[int, float]:
    model = qwen(layers=3)
    inputs = qwen_inputs(text=UNEVEN)
    with torch.no_grad():
        want = model(**inputs)[0]
        model.compile_repeated_blocks(backend="ascend_sp", options={"target": target})
        counters.clear()
        got = model(**inputs)[0]
    return counters["stats"]["unique_graphs"], (want - got).abs().max().item()


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_share_one_graph(target: str) -> None:
    """The second block is called with what the first returned."""
    for graphs, error in values(run(graphs_of_blocks, 2, target)):
        assert graphs == 1
        assert error < 1e-4
