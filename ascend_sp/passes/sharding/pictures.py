"""Seeds of convolutions: along which dim of a picture a graph is split, and whether that pays.

A graph whose convolutions read neighbours (a VAE, a U-Net) is split because they ask. Each way to
do it (a dim, and how finely) is planned as a whole, by the walk that attention uses too, and
compared by estimate with the graph as it is otherwise: the shortest wins. Collectives count fully
there, as nothing is hidden yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.arguments import argument_of
from ascend_sp.graph.cost.estimate import Estimator, bytes_of, tensors_of
from ascend_sp.graph.layout import PARTIAL, Padded, Placement, Shard, Window, same
from ascend_sp.graph.layout import Sequence as Axis
from ascend_sp.graph.windows import exchange
from ascend_sp.passes.sharding.plan import Plan, operand_nodes, shapes
from ascend_sp.passes.sharding.rules import pictures
from ascend_sp.runtime.ops import split_attention, split_group_norm

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
MARGINS = frozenset({aten.constant_pad_nd.default, *pictures.MARGINS})
"""What stands in front of a convolution that pads by hand."""


@dataclass(frozen=True)
class Cut:
    """A way to split pictures: a dim, counted from the end, and into how many rows."""

    dim: int
    rows: int
    """Global size of that dim where the picture is smallest; the split is one of so many rows."""

    def seed(self, node: fx.Node) -> tuple[fx.Node, Shard] | None:
        """What to split so that a convolution's operand, which is whole, is; None if nothing."""
        x = operand_nodes(node)[0]
        while x.target in MARGINS:
            x = operand_nodes(x)[0]
        shape = shapes(x)[0]
        dim = len(shape) + self.dim
        if dim < 2 or not all(isinstance(n, int) for n in shape):
            return None
        size: Any = shape[dim]
        if size < 2:
            return None
        fits = size % self.rows == 0
        rows = self.rows if fits else size
        return x, Shard(dim, Axis((rows,)), 1, size // rows)


def ways(nodes: Sequence[fx.Node]) -> Iterator[Cut]:
    """Every way to split the pictures of a graph; none if no convolution in it reads neighbours."""
    asking = [n for n in nodes if n.target is CONVOLUTION]
    found: dict[int, list[int]] = {}
    for node in asking:
        x, weight = (tensors_of(n)[0] for n in operand_nodes(node)[:2])
        if not all(isinstance(n, int) for n in x.shape):
            return
        for dim in range(2 - x.dim(), 0):
            if _reads_neighbours(node, weight, dim):
                found.setdefault(dim, [])
        for dim in found:
            if x.dim() + dim >= 2:
                found[dim] += [int(x.shape[dim]), int(tensors_of(node)[0].shape[dim])]
    for dim, sizes in sorted(found.items()):
        smallest, largest = min(sizes), max(sizes)
        for rows in sorted({smallest, largest}):
            if rows > 1:
                yield Cut(dim, rows)


def _reads_neighbours(node: fx.Node, weight: torch.Tensor, dim: int) -> bool:
    """Whether neighbouring results of a convolution are made of common positions along `dim`."""
    stride = argument_of(node, "stride")
    return int(weight.shape[dim]) > (stride[dim] if len(stride) > 1 else stride[0])


def seconds(nodes: Sequence[fx.Node], plan: Plan, costs: Estimator) -> float:
    """A rank's step as `plan` has it, by estimate, with all collectives exposed."""
    total = 0.0
    moved: dict[fx.Node, list[Placement]] = {}
    for node in nodes:
        if node.op == "output":
            wants = [(x, None) for x in operand_nodes(node)]
        elif node.op == "call_function":
            total += costs.seconds(node) * _share(node, plan)
            answer = plan.answers.get(node)
            operands = operand_nodes(node)
            given = answer.inputs if answer else (None,) * len(operands)
            wants = list(zip(operands, given, strict=True))  # type: ignore[arg-type]
            if answer is not None:
                total += _own_collectives(node, answer.op, costs)
        else:
            continue
        for x, want in wants:
            total += _moving(x, want, plan, costs, moved)
    return total


def _share(node: fx.Node, plan: Plan) -> float:
    """What a rank does of a node, padding included."""
    for shape, p in zip(shapes(node), plan.placements.get(node, ()), strict=False):
        if isinstance(p, Padded):
            p = p.split
        if isinstance(p, Shard):
            held, size = p.local_size(plan.world), shape[p.dim]
            known = isinstance(held, int) and isinstance(size, int) and size > 0
            return held / size if known else 1 / plan.world  # type: ignore[operator, return-value]
    return 1.0


def _own_collectives(node: fx.Node, op: Any, costs: Estimator) -> float:
    """Those that a later pass puts in the place of a node."""
    if op is split_group_norm:
        return costs.device.all_gather(
            2 * 4 * sum(v.numel() for v in tensors_of(node)[1:2]), costs.ranks
        ).seconds
    if op is split_attention:
        sizes = [bytes_of(v) for x in operand_nodes(node)[:3] for v in tensors_of(x)]
        sizes.append(sizes[0])
        return sum(costs.device.all_to_all(n / costs.ranks, costs.ranks).seconds for n in sizes)
    return 0.0


def _moving(
    x: fx.Node,
    want: Placement | None,
    plan: Plan,
    costs: Estimator,
    moved: dict[fx.Node, list[Any]],
) -> float:
    """What it takes to bring `x` to `want`, once; None is whole."""
    home = plan.placement(x)
    if x in plan.seeds or not (isinstance(home, Shard | Padded) or home == PARTIAL):
        return 0.0
    shape = shapes(x)[0]
    before = moved.setdefault(x, [home])
    if any(
        p is want or (p is not None and want is not None and same(shape, p, want)) for p in before
    ):
        return 0.0
    before.append(want)
    size = sum(bytes_of(v) for v in tensors_of(x))
    device, ranks = costs.device, costs.ranks
    if home == PARTIAL:
        return device.all_reduce(size, ranks).seconds
    if isinstance(want, Window):
        assert isinstance(home, Shard | Padded)
        rows: Any = shape[want.dim]
        blocks = exchange(want, home, rows, ranks).blocks(0)
        return (
            device.exchange([n * size / rows for n in blocks if n] or [0]).seconds
            if any(blocks)
            else 0.0
        )
    return device.all_gather(size / ranks, ranks).seconds
