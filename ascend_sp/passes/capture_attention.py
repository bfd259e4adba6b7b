"""Capture: every attention call of the Dynamo graph becomes one opaque `ascend_sp::attention`.

It has to happen before AOTAutograd, which would turn the call into one device's kernel. Captured
are `F.scaled_dot_product_attention`, however its arguments are passed, the one inside of
`F.multi_head_attention_forward` (`nn.MultiheadAttention`), which Dynamo keeps as a call, and the
attention ops of torch_npu that models written for Ascend call themselves (`passes/npu/calls.py`).
"""

from __future__ import annotations

import inspect
import operator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_sp.graph.context import PassContext, constant, source_line
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
                    _replace(module.graph, node, ctx)
            function: Any = F.multi_head_attention_forward
            for node in module.graph.find_nodes(op="call_function", target=function):
                _capture_inside(node, ctx)
            capture_npu_attention(module.graph, ctx)
            module.graph.lint()
            module.recompile()
    return gm


def _replace(graph: fx.Graph, node: fx.Node, ctx: PassContext) -> None:
    args = _arguments(source_line(node), *node.args, **node.kwargs)
    # ``[N, S, D]`` is N heads of one batch, which can be split over ranks. For one rank it stays as
    # the model has it, since PyTorch has other kernels for it.
    heads_only = (
        ctx.topology.size > 1
        and all(_dims(x) == 3 for x in args[:3])
        and (args[3] is None or _dims(args[3]) in (2, 3))
    )
    with graph.inserting_before(node):
        if heads_only:
            grown = [graph.call_function(torch.unsqueeze, (x, 0)) for x in args[:3]]
            mask = args[3]
            if _dims(mask) == 3:
                mask = graph.call_function(torch.unsqueeze, (mask, 0))
            args = (*grown, mask, *args[4:])
        new = graph.call_function(attention_op, args)
        new.meta.update(node.meta)
        if heads_only:
            new = graph.call_function(torch.squeeze, (new, 0))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _dims(value: Any) -> int | None:
    """How many dims the value of a Dynamo node has; None for what is no tensor."""
    known = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return known.dim() if isinstance(known, torch.Tensor) else None


def _arguments(where: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Those of `ascend_sp::attention`, of a call of `F.scaled_dot_product_attention`."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    dropout, a["scale"] = constant(a["dropout_p"]), constant(a["scale"])
    if dropout > 0:
        raise AscendSPError(
            f"attention with dropout_p={dropout} at {where}: ascend_sp compiles "
            "inference only, and needs dropout_p=0. Call model.eval() before compiling."
        )
    return (
        *(a[name] for name in ("query", "key", "value", "attn_mask", "is_causal", "scale")),
        a["enable_gqa"],
    )


def _capture_inside(node: fx.Node, ctx: PassContext) -> None:
    """Have the attention of a `F.multi_head_attention_forward` captured when it is traced."""
    bound = _MULTI_HEAD.bind(*node.args, **node.kwargs)
    unread = not any(_reads_weights(user) for user in node.users)
    if ctx.topology.size > 1 and unread and not bound.arguments.get("is_causal"):
        # Asked for, which is the default, they are made by products and a softmax. One rank has
        # what the model says, to the last bit; and with them a mask counts that is said to be
        # causal, without them only what is said of it.
        bound.arguments["need_weights"] = False
    node.target = multi_head_attention_forward
    node.args, node.kwargs = (source_line(node), *bound.args), bound.kwargs


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _reads_weights(user: fx.Node) -> bool:
    return not (user.target is operator.getitem and user.args[1] == 0)


def multi_head_attention_forward(where: str, *args: Any, **kwargs: Any) -> Any:
    """PyTorch's function of that name, with its attention captured; `where` is for errors."""

    def captured(*args: Any, **kwargs: Any) -> Any:
        return attention_op(*_arguments(where, *args, **kwargs))

    # The same code, in which two names mean something else. It must not be handed to a
    # TorchFunctionMode as a whole, ours or PyTorch's, which would then call the usual one.
    whole = F.multi_head_attention_forward
    names = {
        **vars(F),
        "scaled_dot_product_attention": captured,
        "has_torch_function": lambda _: False,
    }
    copy = FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__)
    copy.__kwdefaults__ = whole.__kwdefaults__
    return copy(*args, **kwargs)
