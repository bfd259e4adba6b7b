"""One pass for Ascend alone, on the graph that the backend would be given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import PASSES, compile_aten
from ascend_sp.compiler.targets import TARGETS
from ascend_sp.passes.context import PassContext
from simulator import capture


def fused(
    name: str, fn: Callable[..., Any], *args: Any, target: str = "npugraph_ex"
) -> tuple[Any, Counter]:
    """What `fn` computes on the device after the pass, and how often each op is called."""
    captured = capture(fn, *tree_map_only(torch.Tensor, lambda t: t.to("npu"), args))
    ctx = PassContext(device="npu", target=target, converts=TARGETS[target].converts)
    only = tuple(p for p in PASSES if p.name == name)
    assert only
    given = {n.name: list(n.meta["val"].stride()) for n in results(captured.gm)}
    gm = compile_aten(captured.gm, ctx, Config(), passes=only)
    assert [list(n.meta["val"].stride()) for n in results(gm)] == list(given.values())
    ops: Counter = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            ops[str(node.target).removesuffix(".default")] += 1
    out = gm(*captured.inputs)
    return out[0].cpu(), ops


def results(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return list(gm.graph.output_node().all_input_nodes)


def compiled(fn: Callable[..., Any], *args: Any, target: str, **options: Any) -> Any:
    """What `fn` computes on the device, compiled by name of the backend; no other target helps."""
    import warnings

    torch._dynamo.reset()
    args = tree_map_only(torch.Tensor, lambda t: t.to("npu"), args)
    options = {"target": target, **options}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "ascend_sp")
        return torch.compile(fn, backend="ascend_sp", options=options)(*args).cpu()
