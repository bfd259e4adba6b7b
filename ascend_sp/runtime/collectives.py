"""PyTorch's functional collectives as nodes: start and wait apart, operands flat.

Operands of all-to-alls are flattened to one dim because both graph modes of torchair break on
others: GE infers 1-D results, npugraph_ex counts elements as rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ascend_sp.runtime.topology import Topology

if TYPE_CHECKING:
    from typing import Protocol

    class Emits(Protocol):
        """The part of a graph builder that this module needs."""

        def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node: ...  # noqa: D102
        def view(self, x: fx.Node, shape: Any) -> fx.Node: ...  # noqa: D102
        def contiguous(self, x: fx.Node) -> fx.Node: ...  # noqa: D102


_c10d = torch.ops._c10d_functional
ALL_TO_ALL = _c10d.all_to_all_single.default
ALL_GATHER = _c10d.all_gather_into_tensor.default
ALL_REDUCE = _c10d.all_reduce.default
WAIT = _c10d.wait_tensor.default
STARTS = (ALL_TO_ALL, ALL_GATHER, ALL_REDUCE)


def _flat(e: Emits, x: fx.Node) -> fx.Node:
    return e.view(e.contiguous(x), (x.meta["val"].numel(),))


def all_to_all(e: Emits, x: fx.Node, topology: Topology) -> fx.Node:
    """Start an even all-to-all of ``x [P, ...]``; block i goes to rank i. Yields a flat tensor."""
    flat = _flat(e, x)
    each = flat.meta["val"].numel() // topology.size
    splits = [each] * topology.size
    return e.call(ALL_TO_ALL, flat, splits, splits, topology.group_name)


def all_gather(e: Emits, x: fx.Node, topology: Topology) -> fx.Node:
    """Start an all-gather of `x`. Yields a flat tensor, rank 0's elements first."""
    return e.call(ALL_GATHER, _flat(e, x), topology.size, topology.group_name)


def all_reduce(e: Emits, x: fx.Node, topology: Topology) -> fx.Node:
    """Start the sum of `x` over the ranks. Keeps its shape."""
    return e.call(ALL_REDUCE, e.contiguous(x), "sum", topology.group_name)


def wait(e: Emits, started: fx.Node) -> fx.Node:
    """Wait for what a start yielded."""
    return e.call(WAIT, started)
