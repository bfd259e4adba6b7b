"""PyTorch's functional collectives as nodes: start and wait apart, operands flat.

Operands of all-to-alls are flattened to one dim because both graph modes of torchair break on
others: GE infers 1-D results, npugraph_ex counts elements as rows.
"""

from __future__ import annotations

from torch import fx

from ascend_sp.graph.emitter import Emitter
from ascend_sp.runtime.ops import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, WAIT
from ascend_sp.runtime.topology import Topology


def _flat(e: Emitter, x: fx.Node) -> fx.Node:
    return e.view(e.contiguous(x), (x.meta["val"].numel(),))


def all_to_all(e: Emitter, x: fx.Node, topology: Topology) -> fx.Node:
    """Start an even all-to-all of ``x [P, ...]``; block i goes to rank i. Yields a flat tensor."""
    flat = _flat(e, x)
    each = flat.meta["val"].numel() // topology.size
    splits = [each] * topology.size
    return e.call(ALL_TO_ALL, flat, splits, splits, topology.group_name)


def send_blocks(
    e: Emitter, blocks: list[fx.Node | None], received: list[int], t: Topology
) -> fx.Node:
    """Start an all-to-all of blocks of any sizes.

    Args:
        e: makes the nodes.
        blocks: what goes to each rank; None where nothing does.
        received: elements that come from each rank.
        t: the ranks.

    Returns:
        A flat tensor, what rank 0 sent first.
    """
    sent = [0 if x is None else x.meta["val"].numel() for x in blocks]
    flat = e.cat([_flat(e, x) for x in blocks if x is not None], 0)
    return e.call(ALL_TO_ALL, flat, received, sent, t.group_name)


def all_gather(e: Emitter, x: fx.Node, topology: Topology) -> fx.Node:
    """Start an all-gather of `x`. Yields a flat tensor, rank 0's elements first."""
    return e.call(ALL_GATHER, _flat(e, x), topology.size, topology.group_name)


def all_reduce(e: Emitter, x: fx.Node, topology: Topology) -> fx.Node:
    """Start the sum of `x` over the ranks. Keeps its shape."""
    return e.call(ALL_REDUCE, e.contiguous(x), "sum", topology.group_name)


def wait(e: Emitter, started: fx.Node) -> fx.Node:
    """Wait for what a start yielded."""
    return e.call(WAIT, started)
