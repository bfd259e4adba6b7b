"""torchair: the graph is converted to one of GE, Ascend's graph engine, which compiles it whole.

GE has no futures: a wait is nothing there, and what runs beside a transfer is for GE's scheduler to
decide, along data edges. The order of operations is ours all the same (StableRDFS): with another,
ranks might start collectives in different orders, and hang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ascend_sp.compiler.strides import known
from ascend_sp.compiler.targets import _torch_npu
from ascend_sp.compiler.targets.base import Runnable, Target
from ascend_sp.compiler.targets.host import split_host, stays_on_host
from ascend_sp.graph._pytorch import tree_leaves
from ascend_sp.graph.context import source_line
from ascend_sp.graph.emitter import Emitter
from ascend_sp.runtime.ops import ALL_TO_ALL


def lower(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Convert the graph, and hand it to GE on the first call."""
    for node in gm.graph.find_nodes(op="call_function", target=ALL_TO_ALL):
        # torchair has a converter for its own op only.
        _torch_npu.use_torchair_all_to_all(gm.graph, node)
    parts = split_host(gm, inputs)
    turned_back = _return_in_memory_order(parts.device)
    run = _torch_npu.torchair(parts.device, parts.inputs, parts.static(static_inputs))
    return parts.run_with(turned_back(run))


def _return_in_memory_order(
    gm: fx.GraphModule,
) -> Callable[[Callable[..., Sequence[Any]]], Callable[..., Sequence[Any]]]:
    """Have `gm` return results with their dims as they lie in memory; yields what turns them back.

    What GE returns is row-major, whatever strides the graph promises. So a model's last
    ``transpose`` is better a view of the result than a kernel.
    """
    emit = Emitter(gm, "return_in_memory_order")
    output = gm.graph.output_node()
    results: Any = output.args[0]
    values = list(results)
    dims: dict[int, list[int]] = {}
    for i, x in enumerate(values):
        value = x.meta.get("val") if isinstance(x, fx.Node) else None
        strides = known(value.stride()) if isinstance(value, torch.Tensor) else None
        if strides is None or 0 in strides or list(strides) == sorted(strides, reverse=True):
            continue
        order = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
        with emit.at(output):
            values[i] = emit.permute(x, order)
        dims[i] = [order.index(d) for d in range(len(order))]
    output.args = (tuple(values),)
    gm.graph.eliminate_dead_code()
    gm.recompile()

    def wrap(run: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        def call(*args: Any) -> Sequence[Any]:
            out = list(run(*args))
            for i, order in dims.items():
                out[i] = out[i].permute(order)
            return out

        return call if dims else run

    return wrap


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
