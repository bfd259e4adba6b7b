"""How much memory an order of nodes needs at most, by shapes and last uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import fx

from ascend_sp.graph.cost.estimate import bytes_of, is_free, tensors_of


def _all(_: fx.Node) -> bool:
    return True


def made_of_weights(nodes: Sequence[fx.Node], static_inputs: Collection[str]) -> set[fx.Node]:
    """The nodes that only parameters and buffers decide: gathers of sharded weights, mostly."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            static = node.name in static_inputs
        else:
            static = bool(node.all_input_nodes) and found.issuperset(node.all_input_nodes)
        if static:
            found.add(node)
    return found


class Memory:
    """Sizes of what the nodes of a graph make.

    Args:
        nodes: all of it, in an order in which it can run.
        counts: whether a node makes something. One that does not (a pad or a copy that other ranks
            may not have, where all ranks have to come to one number) keeps what it is given alive,
            as a view does.
    """

    def __init__(self, nodes: Sequence[fx.Node], counts: Callable[[fx.Node], bool] = _all) -> None:
        self.owners: dict[fx.Node, frozenset[fx.Node]] = {}
        self.size: dict[fx.Node, int] = {}
        for node in nodes:
            given = [self.owners[x] for x in node.all_input_nodes]
            if node.op == "call_function" and counts(node) and not is_free(node):
                self.owners[node] = frozenset({node})
                self.size[node] = sum(bytes_of(v) for v in tensors_of(node))
            else:
                self.owners[node] = frozenset[fx.Node]().union(*given)

    def peak(self, nodes: Sequence[fx.Node], only: Collection[fx.Node] | None = None) -> int:
        """Bytes of intermediate results, or of `only` some, that live at once, by estimate.

        Inputs and parameters are not counted, nor is what a lowering saves by fusing or by reusing
        memory in place. A view keeps alive what it looks at.
        """
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(nodes):
            for x in node.all_input_nodes:
                for owner in self.owners[x]:
                    last[owner] = i
        ends: dict[int, int] = {}
        live = most = 0
        for i, node in enumerate(nodes):
            size = self.size.get(node, 0) if only is None or node in only else 0
            live += size
            end = last.get(node, i)
            ends[end] = ends.get(end, 0) + size
            most = max(most, live)
            live -= ends.pop(i, 0)
        return most
