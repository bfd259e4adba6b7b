"""One pass for Ascend alone, on the graph that the backend would be given."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import PASSES, compile_aten
from ascend_sp.compiler.targets import TARGETS
from ascend_sp.graph.context import PassContext
from simulator import Captured, capture


def on_device(fn: Callable[..., Any], *args: Any) -> Captured:
    """The graph of `fn` on the device."""
    return capture(fn, *tree_map_only(torch.Tensor, lambda t: t.to("npu"), args))


def fused(name: str, captured: Captured, target: str = "npugraph_ex") -> tuple[Tensor, Counter]:
    """What the graph computes after the pass, and how often each op is called.

    Strides must be those that were recorded: views behind a value rely on them.
    """
    ctx = PassContext(device="npu", target=target, converts=TARGETS[target].converts)
    only = tuple(p for p in PASSES if p.name == name)
    assert only
    gm = captured.copy()
    strides = [n.meta["val"].stride() for n in results(gm)]
    gm = compile_aten(gm, ctx, Config(), passes=only)
    assert [n.meta["val"].stride() for n in results(gm)] == strides
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    out = gm(*captured.inputs)
    return out[0].cpu(), Counter(str(op).removesuffix(".default") for op in calls)


def results(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.output_node().all_input_nodes)


def compiled(fn: Callable[..., Any], *args: Any, target: str, **options: Any) -> Tensor:
    """What `fn` computes on the device, compiled by name of the backend; no other target helps."""
    torch._dynamo.reset()
    args = tree_map_only(torch.Tensor, lambda t: t.to("npu"), args)
    options = {"target": target, **options}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "ascend_sp")
        return torch.compile(fn, backend="ascend_sp", options=options)(*args).cpu()
