"""Attention that a graph holds in another form than `ascend_sp::attention`, so that none is split.

Told by what an op is or by how ops hang together, never by whose model it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from ascend_sp.graph._pytorch import (
    HigherOrderOperator,
    OpOverload,
    encoder_layer,
    flex_attention,
    is_pointwise,
)
from ascend_sp.graph.cost.estimate import is_free, tensors_of
from ascend_sp.graph.families import DENSE, name_of
from ascend_sp.passes.sharding.plan import operand_nodes, shapes
from ascend_sp.runtime.ops import attention as attention_op

aten = torch.ops.aten
IN_ONE_OP = {
    encoder_layer: "it is a whole encoder layer in one op. Call "
    "torch.backends.mha.set_fastpath_enabled(False) before compiling, and it is split",
    flex_attention: "flex_attention is not split. F.scaled_dot_product_attention is, with any mask",
}
"""Ops that attend, but are not `ascend_sp::attention`, and what to do about them."""
_NAMED = re.compile("attention|attn")
_SOFTMAX = (aten._softmax.default, aten.softmax.int, aten._safe_softmax.default)
_COPIES = (aten.clone.default, aten._to_copy.default)


def unseen_attention(
    graph: fx.Graph, static_inputs: frozenset[str]
) -> Iterator[tuple[fx.Node, str]]:
    """Nodes that attend though none of them is `ascend_sp::attention`, and what to do about them.

    Args:
        graph: functional ATen.
        static_inputs: names of the placeholders that are parameters or buffers.
    """
    of_data = _made_of_data(graph, static_inputs)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in IN_ONE_OP:
            yield node, IN_ONE_OP[node.target]
        elif isinstance(node.target, HigherOrderOperator) and _holds_attention(node):
            yield (
                node,
                f"it attends in a graph of its own, inside of {node.target.name()}, and such are "
                "not split. Call that code without it",
            )
        elif _is_named_so(node):
            yield (
                node,
                "this op is said to attend by its name, and is not split. "
                "F.scaled_dot_product_attention is, with any mask",
            )
        elif node.target in _SOFTMAX and _is_written_out(node, of_data):
            yield (
                node,
                "it is the softmax of an attention that is written out in products, and such are "
                "not split. F.scaled_dot_product_attention is, with any mask",
            )


def _holds_attention(node: fx.Node) -> bool:
    """Whether a graph that a higher-order op is given holds an attention."""
    owner = node.graph.owning_module
    for x in node.all_input_nodes:
        inner = getattr(owner, str(x.target), None) if x.op == "get_attr" else None
        for module in inner.modules() if isinstance(inner, torch.nn.Module) else ():
            if isinstance(module, fx.GraphModule):
                for n in module.graph.nodes:
                    if n.target is attention_op or n.target in IN_ONE_OP:
                        return True
    return False


def _is_named_so(node: fx.Node) -> bool:
    """Whether a library's op is called attention, and given three tensors that could be Q, K, V."""
    # An op that writes into what it is given stands in such a higher-order op.
    named = node.args[0] if isinstance(node.target, HigherOrderOperator) and node.args else None
    op = named if isinstance(named, OpOverload) else node.target
    if not isinstance(op, OpOverload) or op is attention_op or not _NAMED.search(op.name().lower()):
        return False
    return sum(len(shapes(x)[0]) >= 3 for x in operand_nodes(node)) >= 3


def _made_of_data(graph: fx.Graph, static_inputs: frozenset[str]) -> set[fx.Node]:
    """The tensors that not only weights decide."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and node.name not in static_inputs
        if tensors_of(node) and (given or any(x in found for x in node.all_input_nodes)):
            found.add(node)
    return found


def _is_written_out(softmax: fx.Node, of_data: set[fx.Node]) -> bool:
    """Whether the softmax of a product of two values that the data decide goes into a product.

    With one that only weights decide, it is a router or the like.
    """
    scores = (x for x in _walk(softmax, lambda n: n.all_input_nodes) if name_of(x) in DENSE)
    # In front of the two factors may stand what is added to their product.
    if not any(all(x in of_data for x in s.args[:3][-2:]) for s in scores):
        return False
    return any(name_of(n) in DENSE for n in _walk(softmax, lambda n: n.users))


def _walk(start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """What hangs together with `start` elementwise, and the ops that end it."""
    stack, seen = list(neighbours(start)), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if _passes(node):
                stack += neighbours(node)


def _passes(node: fx.Node) -> bool:
    """Whether a node only moves numbers or computes each from those in its place."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return is_pointwise(node.target) or node.target in _COPIES or is_free(node)
