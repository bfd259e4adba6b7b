"""How much memory an order of nodes needs at most, by shapes and last uses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ascend_sp.passes.cost.estimate import bytes_of, owner_of, tensors_of


class Memory:
    """Sizes of what the nodes of a graph make."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.owner = {n: owner_of(n) for n in nodes}
        self.size = {
            n: sum(bytes_of(v) for v in tensors_of(n))
            for n in nodes
            if n.op == "call_function" and self.owner[n] is n
        }

    def peak(self, nodes: Sequence[fx.Node]) -> int:
        """Bytes of intermediate results that live at once, at most, by estimate.

        Inputs and parameters are not counted, nor is what a lowering saves by fusing or by reusing
        memory in place. A view keeps alive what it looks at.
        """
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(nodes):
            for x in node.all_input_nodes:
                last[self.owner[x]] = i
        ends: dict[int, int] = {}
        live = most = 0
        for i, node in enumerate(nodes):
            size = self.size.get(node, 0)
            live += size
            end = last.get(node, i)
            ends[end] = ends.get(end, 0) + size
            most = max(most, live)
            live -= ends.pop(i, 0)
        return most
