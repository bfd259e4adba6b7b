"""Attention that a model calls in torch_npu's own words, as `ascend_sp::attention`.

diffusers does so with ``set_attention_backend("_native_npu")``. These ops have more arguments than
PyTorch's attention; a call is captured when all that are given mean what PyTorch's attention does.
One that is not stays as it is, runs on whole tensors, and is reported.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ascend_sp.graph._pytorch import tree_leaves
from ascend_sp.graph.context import NoteKind, PassContext, constant, source_line
from ascend_sp.graph.npu_names import OPS, UNLIMITED, Names
from ascend_sp.runtime.errors import AscendSPError
from ascend_sp.runtime.npu import npu_op
from ascend_sp.runtime.ops import attention as attention_op

LAYOUTS = ("BSND", "BNSD", "BSH", "SBH")


IRRELEVANT = frozenset({"sync", "gen_mask_parallel", "inner_precise", "softmax_layout"})
"""Arguments that change how the op runs, not what it computes."""


def capture_npu_attention(graph: fx.Graph, ctx: PassContext) -> None:
    """Replace the calls of `graph`, a Dynamo graph, that PyTorch's attention can say.

    Raises:
        AscendSPError: ``keep_prob`` is not one: dropout.
    """
    for name, names in OPS.items():
        packet = getattr(torch.ops.npu, name, None)
        for target in (packet, npu_op(name)):
            if target is None:
                continue
            for node in graph.find_nodes(op="call_function", target=target):
                why = _capture(graph, node, npu_op(name), names)
                if why:
                    ctx.note(NoteKind.UNSHARDED, node, f"attention not captured: {why}")


def _capture(graph: fx.Graph, node: fx.Node, op: Any, names: Names) -> str | None:
    """Replace one call; the reason if PyTorch's attention cannot say it."""
    given: dict[str, Any] = {}
    for i, a in enumerate(op._schema.arguments):
        default = a.default_value if a.has_default_value() else None
        x = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, default)
        given[a.name] = constant(x)
    if given.get("keep_prob", 1.0) != 1.0:
        raise AscendSPError(
            f"attention with keep_prob={given['keep_prob']} at {source_line(node)}: ascend_sp "
            "compiles inference only, and needs keep_prob=1. Call model.eval() before compiling."
        )
    why = _refusal(node, op, names, given)
    if why:
        return why
    with graph.inserting_before(node):
        new = _emit(graph, node, names, given)
    new.meta["example_value"] = _value(node)
    if names.tuple_result:
        for user in list(node.users):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(new)
    graph.erase_node(node)
    return None


def _refusal(node: fx.Node, op: Any, names: Names, given: dict[str, Any]) -> str | None:
    understood = {
        *("query", "key", "value", "atten_mask", "input_layout", "keep_prob"),
        *(names.heads, names.scale, names.before, names.after, names.groups),
    }
    for a in op._schema.arguments:
        if a.name in understood or a.name in IRRELEVANT:
            continue
        if given[a.name] not in (None, a.default_value if a.has_default_value() else None):
            return f"{a.name} is given"
    if given["input_layout"] not in LAYOUTS:
        return f"layout {given['input_layout']}; captured are {', '.join(LAYOUTS)}"
    if not isinstance(given[names.scale], (int, float)):
        return "the scale is not a constant"
    if not all(isinstance(n, int) for n in (given[names.heads], _heads_of_keys(names, given))):
        return "the number of heads is not known at compile time"
    if names.tuple_result and not all(_is_first(user) for user in node.users):
        return "more than the first result is used"
    return None if given["atten_mask"] is None else _refusal_of_mask(names, given)


def _refusal_of_mask(names: Names, given: dict[str, Any]) -> str | None:
    """Why a mask means something else here. Without one, the ops ignore the window."""
    mask = _value(given["atten_mask"])
    if mask.dtype not in (torch.bool, torch.uint8, torch.int8):
        return f"a mask of {mask.dtype}"
    along = given["input_layout"].index("S")
    lengths = [_shape(given[x])[along] for x in ("query", "key")]
    for have, want in zip(mask.shape[-2:], lengths, strict=True):
        # Symbolic lengths are compared by PyTorch's attention, which would broadcast a 1.
        if isinstance(have, int) and isinstance(want, int) and have != want:
            return f"a mask of {tuple(mask.shape)} for {lengths[0]} queries and {lengths[1]} keys"
    for side in (names.before, names.after):
        if not isinstance(given[side], int):
            return f"{side} is not a constant"
        if given[side] < UNLIMITED and any(given[side] < n for n in lengths):
            return f"{side}={given[side]} is a window shorter than the sequence {lengths}"
    return None


def _is_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[1:] == (0,)


def _heads_of_keys(names: Names, given: dict[str, Any]) -> Any:
    heads, layout, key = given[names.heads], given["input_layout"], _shape(given["key"])
    if names.groups:
        return given[names.groups] or heads
    if "N" in layout:
        return key[layout.index("N")]
    return key[2] * heads // _shape(given["query"])[2]


def _emit(graph: fx.Graph, node: fx.Node, names: Names, given: dict[str, Any]) -> fx.Node:
    meta = {k: v for k, v in node.meta.items() if k != "example_value"}

    def call(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        new.meta.update(meta)
        return new

    layout, heads = given["input_layout"], given[names.heads]
    groups = _heads_of_keys(names, given)

    def to_bnsd(x: fx.Node, n: int) -> fx.Node:
        if layout in ("BSH", "SBH"):
            if layout == "SBH":
                x = call(torch.transpose, x, 0, 1)
            x = call(torch.unflatten, x, 2, (n, -1))
        return x if layout == "BNSD" else call(torch.transpose, x, 1, 2)

    q = to_bnsd(given["query"], heads)
    k, v = to_bnsd(given["key"], groups), to_bnsd(given["value"], groups)
    mask = given["atten_mask"]
    if mask is not None:
        mask = call(torch.logical_not, mask)
        if len(_shape(given["atten_mask"])) == 3:
            mask = call(torch.unsqueeze, mask, 1)
    out = call(attention_op, q, k, v, mask, False, float(given[names.scale]), groups != heads)
    if layout == "BNSD":
        return out
    out = call(torch.transpose, out, 1, 2)
    if layout in ("BSH", "SBH"):
        out = call(torch.flatten, out, 2)
    return call(torch.transpose, out, 0, 1) if layout == "SBH" else out


def _value(node: Any) -> Any:
    found = tree_leaves(node.meta.get("example_value"))
    return found[0]


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(_value(node).shape)
