"""What a model computes twice from the same values is computed once.

Models prepare the same tables in every block: rotary angles get a dim more, and modulations their
activation. Done once, they are also cut for this rank once.
"""

from __future__ import annotations

from torch import fx

from ascend_sp.graph._pytorch import free_unbacked_symbols, fx_graph_cse, tree_leaves
from ascend_sp.graph.context import PassContext, is_random


def eliminate_common_subexpressions(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Merge equal calls on equal operands, with PyTorch's own pass over functional graphs.

    A graph that draws random numbers stays as it is, since each draw is another one; so does one
    with sizes that are known only when it runs, since each call that finds one names it anew.
    """
    if not any(map(_is_one_of_a_kind, gm.graph.nodes)):
        gm.graph = fx_graph_cse(gm.graph)
    return gm


def _is_one_of_a_kind(node: fx.Node) -> bool:
    if is_random(node.target):
        return True
    return any(free_unbacked_symbols(v) for v in tree_leaves(node.meta.get("val")))
