"""torchair: the graph is converted to one of GE, Ascend's graph engine, which compiles it whole.

GE has no futures: a wait is nothing there, and what runs beside a transfer is for GE's scheduler to
decide, along data edges. The order of operations is ours all the same (StableRDFS): with another,
ranks might start collectives in different orders, and hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ascend_sp.compiler.targets import _torch_npu
from ascend_sp.compiler.targets.base import Runnable, Target
from ascend_sp.compiler.targets.host import split_host, stays_on_host
from ascend_sp.graph._pytorch import tree_leaves
from ascend_sp.graph.context import source_line
from ascend_sp.runtime.ops import ALL_TO_ALL


def lower(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Convert the graph, and hand it to GE on the first call."""
    for node in gm.graph.find_nodes(op="call_function", target=ALL_TO_ALL):
        # torchair has a converter for its own op only.
        _torch_npu.use_torchair_all_to_all(gm.graph, node)
    parts = split_host(gm, inputs)
    return parts.run_with(
        _torch_npu.torchair(parts.device, parts.inputs, parts.static(static_inputs))
    )


def converts(op: Any) -> bool:
    """Whether torchair can write `op` into a GE graph."""
    if op is ALL_TO_ALL:
        return True
    return _torch_npu.has_ge_converter(op)


def refuses(gm: fx.GraphModule) -> list[str]:
    """Ops without a converter, complex values, and sizes that only the device knows."""
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or stays_on_host(node):
            continue
        op = node.target
        if hasattr(op, "_schema") and not converts(op):
            found.setdefault(f"{op} has no GE converter", source_line(node))
        leaves = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
        if any(x.is_complex() for x in leaves):
            found.setdefault(f"{op} is complex, and GE graphs are not", source_line(node))
    return [text + (f" (at {where})" if where else "") for text, where in found.items()]


TORCHAIR = Target("torchair", lower, converts, refuses=refuses)
