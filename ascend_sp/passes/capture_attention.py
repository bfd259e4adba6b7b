"""Capture: every attention call of the Dynamo graph becomes one opaque `ascend_sp::attention`.

It has to happen before AOTAutograd, which would turn the call into one device's kernel. Captured
are `F.scaled_dot_product_attention`, however its arguments are passed, and the attention ops of
torch_npu that models written for Ascend call themselves (`passes/npu/calls.py`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_sp.passes.context import PassContext, constant, source_line
from ascend_sp.passes.npu.calls import capture_npu_attention
from ascend_sp.runtime.errors import AscendSPError
from ascend_sp.runtime.ops import attention as attention_op


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The signature of `F.scaled_dot_product_attention`, which as a builtin has none to inspect."""


_SIGNATURE = inspect.signature(_sdpa)
TARGETS = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def capture_attention(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace all attention calls that mean what `ascend_sp::attention` means.

    Raises:
        AscendSPError: dropout is not zero. Ranks would draw different masks.
    """
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for target in TARGETS:
                for node in module.graph.find_nodes(op="call_function", target=target):
                    _replace(module.graph, node)
            capture_npu_attention(module.graph, ctx)
            module.graph.lint()
            module.recompile()
    return gm


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    dropout, a["scale"] = constant(a["dropout_p"]), constant(a["scale"])
    if dropout > 0:
        raise AscendSPError(
            f"attention with dropout_p={dropout} at {source_line(node)}: ascend_sp compiles "
            "inference only, and needs dropout_p=0. Call model.eval() before compiling."
        )
    args = (
        *(a[name] for name in ("query", "key", "value", "attn_mask", "is_causal", "scale")),
        a["enable_gqa"],
    )
    with graph.inserting_before(node):
        new = graph.call_function(attention_op, args)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
