"""Inductor's code starts, waits and computes in the order that the passes chose."""

from __future__ import annotations

import re
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._inductor.utils import run_and_get_code

from ascend_sp.compiler import ladder
from ascend_sp.runtime.collectives import STARTS, WAIT
from models import flux, flux_inputs
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


def compiled(rank: int, world: int, strategy: str) -> dict[str, Any]:
    graphs: list[list[str]] = []

    def spy(compile_aten: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
        gm = compile_aten(*args, **kwargs)
        graphs.append(in_graph(gm))
        return gm

    model, inputs = flux(1, 1, 4), flux_inputs(1, 33, 7)
    with mock.patch.object(ladder, "compile_aten", partial(spy, ladder.compile_aten)):
        program = torch.compile(
            model, backend="ascend_sp", options={"strategy": strategy}, fullgraph=True
        )
        _, codes = run_and_get_code(lambda: program(**inputs))
    return {"graph": graphs[-1], "code": in_code(codes[-1])}


@pytest.mark.parametrize("strategy", ["separate", "pipelined:2"])
def test_inductor_keeps_the_order(strategy: str) -> None:
    for rank in values(run(compiled, 2, strategy, timeout=200)):
        starts = [x for x in rank["graph"] if x.startswith("start")]
        assert len(starts) == (9 if strategy == "separate" else 17)
        assert rank["code"] == rank["graph"]
