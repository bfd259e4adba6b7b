"""Copies that an exchange needs, on each side of it, and which of them are kernels of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ascend_sp.graph.cost.estimate import Estimator, is_free
from ascend_sp.graph.families import MOVES
from ascend_sp.graph.origin import exchange_of
from ascend_sp.runtime.ops import STARTS


@dataclass
class Copies:
    """Of one attention. Those that fold into a kernel that computes something cost nothing more."""

    packing: int = 0
    packing_alone: int = 0
    """Kernels that only pack."""
    unpacking: int = 0
    unpacking_alone: int = 0
    """Kernels that only unpack."""


def copies(nodes: Iterable[fx.Node], estimator: Estimator) -> dict[str, Copies]:
    """By the name of the attention, the copies around its collectives."""
    found: dict[str, Copies] = defaultdict(Copies)
    nodes = list(nodes)
    packs: set[fx.Node] = set()  # what only a start is made of
    for node in reversed(nodes):
        if node.target in MOVES and node.users and all(_sends(u, packs) for u in node.users):
            packs.add(node)
    for node in nodes:
        attention = exchange_of(node)
        if not attention or node.target not in MOVES or is_free(node):
            continue
        # The last node of a kernel stands for it.
        kernel = estimator.kernel(node)
        alone = bool(kernel) and all(n.target in MOVES for n in kernel)
        own = found[attention]
        if node in packs:
            own.packing += 1
            own.packing_alone += alone
        else:
            own.unpacking += 1
            own.unpacking_alone += alone
    return dict(found)


def _sends(user: fx.Node, packs: set[fx.Node]) -> bool:
    return user.target in STARTS or user in packs
