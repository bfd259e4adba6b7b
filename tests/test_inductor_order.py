"""Inductor's code starts, waits and computes in the order that the passes chose, and is right."""

from __future__ import annotations

import re
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

from ascend_sp.compiler import ladder
from ascend_sp.runtime.ops import STARTS, WAIT
from models import flux, flux_inputs, qwen, qwen_inputs, wan, z_image, z_image_inputs
from processes import run, values

COMPUTE = ("addmm", "mm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")
LINE = re.compile(
    r"(?P<out>buf\d+) = torch\.ops\._c10d_functional\.(?P<start>all\w+)\.default\("
    r"|torch\.ops\._c10d_functional\.wait_tensor\.default\((?P<wait>buf\d+)\)"
    r"|(?:extern_kernels\.|torch\.ops\.aten\.)(?P<compute>\w+)(?:\.default)?\("
)


def in_graph(gm: fx.GraphModule) -> list[str]:
    """Starts and waits by the number of their collective, and work that is never fused."""
    number: dict[fx.Node, int] = {}
    out = []
    for node in gm.graph.nodes:
        if node.target in STARTS:
            number[node] = len(number)
            out.append(f"start {number[node]}")
        elif node.target is WAIT:
            out.append(f"wait {number[node.args[0]]}")
        elif (
            node.op == "call_function" and "mm" in str(node.target)
        ) or "scaled_dot_product" in str(node.target):
            out.append("compute")
    return out


def in_code(code: str) -> list[str]:
    number: dict[str, int] = {}
    out = []
    for found in LINE.finditer(code[code.index("def call(") :]):
        if found["start"]:
            number[found["out"]] = len(set(number.values()))
            out.append(f"start {number[found['out']]}")
        elif found["wait"]:
            out.append(f"wait {number[found['wait']]}")
        elif found["compute"] in COMPUTE:
            out.append("compute")
    return out


Z_IMAGE = ("x", "t", "cap_feats")
MODELS = {
    "flux": lambda: (flux(1, 1, 4), flux_inputs(1, 33, 7)),
    "qwen": lambda: (qwen(layers=1), qwen_inputs()),
    "z_image": lambda: (z_image(layers=1), dict(zip(Z_IMAGE, z_image_inputs(), strict=True))),
    "wan": wan,
}
CASES = [
    ("flux", "separate"),
    ("flux", "pipelined:2"),
    ("qwen", "separate"),  # queries and keys share what Inductor reads: it would fuse the two
    ("qwen", "pipelined:2"),
    ("z_image", "separate"),
    ("wan", "separate"),
]
ALL_TO_ALLS = {("flux", "separate"): 8, ("flux", "pipelined:2"): 16}


def compiled(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    graphs: list[list[str]] = []

    def spy(compile_aten: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
        gm = compile_aten(*args, **kwargs)
        graphs.append(in_graph(gm))
        return gm

    out = {}
    with mock.patch.object(ladder, "compile_aten", partial(spy, ladder.compile_aten)):
        for name, strategy in CASES:
            torch._dynamo.reset()
            model, inputs = MODELS[name]()
            program = torch.compile(
                model, backend="ascend_sp", options={"strategy": strategy}, fullgraph=True
            )
            got, codes = run_and_get_code(partial(program, **inputs))
            pairs = zip(tree_leaves(got), tree_leaves(model(**inputs)), strict=True)
            errors = [((g - w).abs().max() / w.abs().max()).item() for g, w in pairs]
            out[name, strategy] = {
                "graph": graphs[-1],
                "code": in_code(codes[-1]),
                "error": max(errors),
            }
    return out


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return values(run(compiled, 2, timeout=300))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_inductor_keeps_the_order(
    case: tuple[str, str], ranks: list[dict[tuple[str, str], dict[str, Any]]]
) -> None:
    for rank in ranks:
        found = rank[case]
        assert len([x for x in found["graph"] if x.startswith("start")]) > 4
        if case in ALL_TO_ALLS:
            starts = [x for x in found["graph"] if x.startswith("start")]
            assert len(starts) == ALL_TO_ALLS[case] + 1  # and the gather of the result
        assert found["code"] == found["graph"]
        assert found["error"] <= 1e-5
