"""The result of propagation: where every value of the graph lies, and how every op runs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from ascend_sp.graph._pytorch import tree_leaves, tree_map
from ascend_sp.graph.layout import REPLICATE, Placement, Shard
from ascend_sp.graph.sizes import Size, as_shape, as_size
from ascend_sp.passes.sharding.rules import Call, Local, Operand, Reshard, Unsupported


@dataclass
class Plan:
    """Placements of all nodes, before the graph is changed."""

    world: int
    placements: dict[fx.Node, tuple[Placement, ...]] = field(default_factory=dict)
    """One for each tensor that the node yields."""
    answers: dict[fx.Node, Local] = field(default_factory=dict)
    """How each node with a sharded operand runs; absent: on whole tensors."""
    refusals: dict[fx.Node, Reshard | Unsupported] = field(default_factory=dict)
    seeds: dict[fx.Node, Shard] = field(default_factory=dict)
    """Whole values that are cut where they are first needed."""

    def placement(self, node: fx.Node) -> Placement:
        """Placement of a node that yields one tensor (the first one otherwise)."""
        found = self.placements.get(node)
        return found[0] if found else REPLICATE


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that `node` yields."""
    leaves = tree_leaves(node.meta.get("val"))
    return [x for x in leaves if isinstance(x, torch.Tensor)]


def shapes(node: fx.Node) -> tuple[tuple[Size, ...], ...]:
    """The shapes of the tensors that `node` yields."""
    return tuple(as_shape(t.shape) for t in tensors(node))


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes that are tensor arguments of `node`, in pytree order, repeats included."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [
        x for x in leaves if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)
    ]


def is_getitem(node: fx.Node) -> bool:
    """Whether `node` picks one result of a node that has several."""
    return node.target is operator.getitem and not isinstance(
        node.args[0].meta.get("val"),  # type: ignore[union-attr]
        torch.Tensor,
    )


def picked(node: fx.Node) -> int | None:
    """Which of the tensors of several results `node` picks; None if that result is no tensor."""
    source, index = node.args
    values = source.meta["val"]  # type: ignore[union-attr]
    if not isinstance(values[index], torch.Tensor):
        return None
    return sum(isinstance(v, torch.Tensor) for v in values[:index])


def call_of(node: fx.Node, placement: Callable[[int, fx.Node], Placement], world: int) -> Call:
    """`node` as the question that a rule answers; `placement(i, operand)` places its operands."""
    count = itertools.count()

    def argument(value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        val = value.meta.get("val")
        if isinstance(val, torch.Tensor):
            i = next(count)
            return Operand(as_shape(val.shape), placement(i, value), i)
        return as_size(val) if isinstance(val, (int, torch.SymInt)) else val

    args, kwargs = tree_map(argument, (node.args, node.kwargs))
    return Call(node.target, tuple(args), dict(kwargs), shapes(node), world)  # type: ignore[arg-type]
