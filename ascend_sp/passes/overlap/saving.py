"""Whether splitting a graph pays: one rank's step against the same graph whole on one device.

By the estimates that the order of the program was made with, so it costs a look at each node, and
all ranks come to the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ascend_sp.graph.cost.estimate import Estimator, bytes_of, tensors_of
from ascend_sp.graph.layout import PLACEMENTS, REPLICATE, SHARE
from ascend_sp.graph.origin import exchange_of
from ascend_sp.passes.overlap.tasks import neutral_seconds
from ascend_sp.runtime.ops import ALL_GATHER, ALL_REDUCE, STARTS

JOIN = (ALL_GATHER, ALL_REDUCE)
"""Behind these every rank has the same."""


@dataclass(frozen=True)
class Saving:
    """Estimates of a step of one graph, in seconds."""

    whole: float
    """On one device."""
    step: float
    """On each of the ranks, what is not hidden of the collectives included."""
    gathers: float
    """What all-gathers of values that are needed whole take."""
    gathered: int
    """Bytes that a rank puts into them."""
    split: bool
    """Whether a rank computes only a part of anything."""


def saving(nodes: Iterable[fx.Node], step: float, neutral: Estimator) -> Saving:
    """What one rank's program gains.

    Args:
        nodes: the program, in any order in which it can run.
        step: the estimate of a step, without what only some ranks have.
        neutral: the costs that `step` stands on.
    """
    seconds = neutral_seconds(neutral)
    shared: dict[fx.Node, bool] = {}
    whole = gathers = 0.0
    gathered = 0
    for node in nodes:
        own = is_sharded(node) if node.target not in JOIN else False
        shared[node] = any(shared[x] for x in node.all_input_nodes) if own is None else own
        if node.target is ALL_GATHER and not exchange_of(node):
            gathers += neutral.transfer(node).seconds
            gathered += sum(bytes_of(v) for v in tensors_of(node.args[0]))
        elif node.target not in STARTS:
            taken = seconds(node)
            whole += taken
            if shared[node]:  # one device does all of it, in a kernel of one launch
                whole += (neutral.ranks - 1) * max(0.0, taken - neutral.device.launch)
    return Saving(whole, step, gathers, gathered, any(shared.values()))


def is_sharded(node: fx.Node) -> bool | None:
    """Whether this rank computes only its share of `node`; None where nobody said."""
    places = node.meta.get(PLACEMENTS)
    if places is not None:
        return not all(p == REPLICATE for p in places)
    # What an exchange is made of is a rank's own; the rest takes after what it reads.
    return True if exchange_of(node) or SHARE in node.meta else None
