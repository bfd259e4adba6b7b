"""Inductor on a finished graph, in the order of that graph.

`tests/test_pytorch_pins.py` and `tests/test_inductor_order.py` fail when PyTorch moves what this
stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.dependencies import WeakDep
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V

from ascend_sp.compiler._pytorch import own_tracing_context
from ascend_sp.runtime.ops import communicates

try:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass
except ImportError:  # PyTorch 2.10 to 2.12: its cache takes a pass of this class instead
    from torch._inductor.custom_graph_pass import (  # type: ignore[assignment]
        CustomGraphPass as CustomSchedulerPass,
    )


class KeepOrder(CustomSchedulerPass):
    """Each kernel that Inductor does not write itself runs after the one before it in the graph.

    Those are collectives, waits, products and attentions. Without it, fusion undoes an overlap:
    queries' and keys' rotary embedding read the same tables, and one kernel for both lets queries
    travel only when keys are computed. Ordered by the dependencies with which Inductor orders
    collectives among themselves (torch/_inductor/comms.py, decide_global_ordering_of_comms), so
    that a fusion which would need another order is a cycle to Inductor, and does not happen.
    """

    def __call__(self, nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        fixed = [n for n in nodes if n.is_extern() and n.get_buffer_names()]
        for before, after in pairwise(fixed):
            made = before.get_buffer_names()
            if not any(dep.name in made for dep in after.unmet_dependencies):
                writes = next(iter(after.get_buffer_names()))
                after.add_fake_dep(WeakDep(next(iter(made)), mutating_buf=writes, is_fake=True))
        V.graph.scheduler.compute_ancestors()
        return nodes

    def uuid(self) -> bytes:
        """Of this file's text, in the key of Inductor's cache."""
        return get_hash_for_files((__file__,))


# Inductor would also move waits up and work down, for memory and for locality.
KEEPS_ORDER: dict[str, Any] = {
    "reorder_for_peak_memory": False,
    "reorder_for_locality": False,
    "_pre_fusion_custom_pass": KeepOrder(),
}
# PyTorch 2.14 and newer: on by default, it moves collectives up and waits down among the kernels
# that Inductor writes, whatever the cost model said of them.
if hasattr(config.aten_distributed_optimizations, "enable_simple_overlap"):
    KEEPS_ORDER["aten_distributed_optimizations.enable_simple_overlap"] = False


def inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]
) -> Callable[[list[Any]], Sequence[Any]]:
    """Inductor on a finished ATen graph, with its own decompositions; boxed."""
    # What AOTAutograd reads to learn which inputs are parameters
    # (torch/_functorch/_aot_autograd/frontend_utils.py, _try_get_metadata_from_dynamo).
    gm.meta["dynamo_compile_id"] = torch._guards.CompileContext.current_compile_id()
    # Tensors that the graph itself holds (torch.tensor([...]) in the model) count as parameters.
    held = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
    gm._param_name_to_source = {n: ConstantSource(n) for n in held}  # type: ignore[assignment]
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node._dynamo_source = None
        if i in set(static_inputs):
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    with own_tracing_context(inputs):
        compiled = compile_fx(
            gm, list(inputs), config_patches=KEEPS_ORDER if _communicates(gm) else None
        )

    def run(args: list[Any]) -> Sequence[Any]:
        values = tuple(args)
        args.clear()
        return compiled(*values)  # type: ignore[operator]

    return run


def _communicates(gm: fx.GraphModule) -> bool:
    return any(communicates(n.target) for n in gm.graph.nodes)
