"""Two graphs of one program side by side: the first node whose value differs.

One graph is the model's, on whole tensors; the other one rank's program after some pass. Nodes keep
their names through the passes, and placements say which part of a whole value a rank holds, so
most values can be compared without any communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ascend_sp.graph._pytorch import tree_leaves
from ascend_sp.graph.context import source_line
from ascend_sp.graph.layout import PLACEMENTS, REPLICATE, Partial, Placement, Shard
from ascend_sp.graph.origin import exchange_of, made_by
from ascend_sp.graph.sizes import Size, as_size
from ascend_sp.runtime.topology import Topology

TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Allowed `distance`, by the coarsest float dtype of the graph.

Far above what another order of summation does to a deep model, far below what a wrong row does.
"""
COARSEST = 0.2
"""The same for dtypes of eight bits and fewer."""
_SUSPECTS = 200


def tolerance(gm: fx.GraphModule) -> float:
    """What two ways to compute `gm` may differ by."""
    values = [v for n in gm.graph.nodes for v in _tensors(n.meta.get("val"))]
    found = {v.dtype for v in values if v.is_floating_point()}
    return max((TOLERANCES.get(d, COARSEST) for d in found), default=TOLERANCES[torch.float64])


def wide_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which errors of `value`, a float tensor, are computed."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def distance(got: Any, want: Any) -> float:
    """How far `got` is from `want`, relative to the size of `want`; inf where no number says it.

    The larger of the error in the L2 norm and a quarter of the largest error over the largest
    value. The first is blind to a few wrong rows of many, the second to small errors everywhere.
    What is not finite, or not a float, must be the same.
    """
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return 0.0 if got is want or got == want else float("inf")
    if got.shape != want.shape or got.is_complex() != want.is_complex():
        return float("inf")
    if want.numel() == 0:
        return 0.0
    if want.is_complex():
        got, want = torch.view_as_real(got.resolve_conj()), torch.view_as_real(want.resolve_conj())
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    wide = wide_dtype(want)
    got, want = got.to(wide), want.to(wide)
    finite = want.isfinite()
    strange = ~finite
    if not torch.equal(got.isfinite(), finite) or not torch.equal(
        got[strange].nan_to_num(), want[strange].nan_to_num()
    ):
        return float("inf")
    got, want = got.where(finite, 0), want.where(finite, 0)
    scale = want.abs().max().clamp_min(torch.finfo(wide).tiny)
    error, size = (got - want) / scale, want / scale
    l2 = error.norm() / size.norm().clamp_min(torch.finfo(wide).tiny)
    return max(l2.item(), error.abs().max().item() / 4)


@dataclass(frozen=True)
class Difference:
    """A node whose value is not what it is in the model's graph."""

    place: int
    """Its place in the program."""
    node: str
    error: float
    source: str
    suspects: tuple[str, ...]
    """What was computed between the last values that are right and this one, it included."""


@dataclass
class Stepper:
    """A graph that is run node by node; holds only the values that are still needed."""

    gm: fx.GraphModule
    values: Sequence[Any]
    env: dict[fx.Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._run = fx.Interpreter(self.gm)
        self._run.args_iter = iter(self.values)
        self._run.env = self.env
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.gm.graph.nodes):
            last = [x for x in dict.fromkeys(node.all_input_nodes) if x not in seen]
            seen.update(last)
            self._dying[node] = last

    def step(self, node: fx.Node) -> Any:
        """Run `node`, the next one of the graph."""
        value = self._run.run_node(node)
        if node.users:
            self.env[node] = value
        for x in self._dying[node]:
            self.env.pop(x, None)
        return value


def first_difference(
    original: fx.GraphModule,
    values: Sequence[Any],
    program: fx.GraphModule,
    local: Sequence[Any],
    topology: Topology,
    allowed: float,
) -> Difference | None:
    """Run both graphs to the end; the first node of `program` whose value differs on this rank.

    Args:
        original: the model's graph, on whole tensors.
        values: its inputs.
        program: one rank's program, with real collectives: all ranks call this alike.
        local: its inputs.
        topology: the rank.
        allowed: what `distance` may be.
    """
    theirs = {n.name: n for n in original.graph.nodes if n.op == "call_function"}
    pairs = {n: t for n in program.graph.nodes if (t := _counterpart(n, theirs)) is not None}
    wanted = set(pairs.values())
    symbols = _symbols(original, values)
    reference, ahead = Stepper(original, values), iter(original.graph.nodes)
    kept: dict[fx.Node, Any] = {}
    right: set[fx.Node] = set()
    found: Difference | None = None
    own = Stepper(program, local)
    for place, node in enumerate(program.graph.nodes):
        if node.op == "output":
            break
        got = own.step(node)  # to the end even after a difference: other ranks wait for ours
        twin = pairs.get(node)
        if twin is None or found is not None:
            continue
        while twin not in kept:
            other = next(ahead)
            value = reference.step(other)
            if other in wanted:
                kept[other] = value
        want = kept[twin]
        error = _error(got, want, node, topology, symbols)
        if error is None:
            continue
        if error <= allowed:
            right.add(node)
            continue
        found = Difference(
            place, _said(node), error, source_line(node) or source_line(twin), _way(node, right)
        )
        kept.clear()
    return found


def _counterpart(node: fx.Node, theirs: dict[str, fx.Node]) -> fx.Node | None:
    """The node of the model's graph that means the same: of the same name, or an attention's."""
    if node.op != "call_function":
        return None
    attention = exchange_of(node)
    if attention and PLACEMENTS in node.meta:
        return theirs.get(attention)
    return theirs.get(node.name)


def _symbols(gm: fx.GraphModule, values: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """Symbolic sizes of the graph as the numbers that they are on these inputs."""
    out: dict[sympy.Symbol, int] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=True):
        fake = node.meta.get("val")
        tensors = isinstance(fake, Tensor) and isinstance(value, Tensor)
        pairs = zip(fake.shape, value.shape, strict=True) if tensors else [(fake, value)]
        for symbol, number in pairs:
            if isinstance(symbol, torch.SymInt) and isinstance(as_size(symbol), sympy.Symbol):
                out[as_size(symbol)] = int(number)
    return out


def _error(
    got: Any, want: Any, node: fx.Node, topology: Topology, symbols: dict[sympy.Symbol, int]
) -> float | None:
    """`distance` of what this rank holds of a value; None if that cannot be told."""
    ours, theirs = _tensors(got), _tensors(want)
    places = node.meta.get(PLACEMENTS) or [REPLICATE] * len(ours)
    if not len(ours) == len(theirs) == len(places):
        return None
    errors = []
    for mine, whole, placement in zip(ours, theirs, places, strict=True):
        both = _held(mine, whole, placement, topology, symbols)
        if both is not None:
            errors.append(distance(*both))
    return max(errors) if errors else None


def _held(
    mine: Tensor,
    whole: Tensor,
    placement: Placement,
    topology: Topology,
    symbols: dict[sympy.Symbol, int],
) -> tuple[Tensor, Tensor] | None:
    """The real rows of `mine` and the same ones of `whole`; padding may hold anything."""
    if isinstance(placement, Partial) or mine.is_complex() != whole.is_complex():
        return None
    if not isinstance(placement, Shard):
        return (mine, whole) if mine.shape == whole.shape else None
    lengths = [_number(n, symbols) for n in placement.seq.lengths]
    chunks = [-(-n // topology.size) for n in lengths]
    outer, inner = _number(placement.outer, symbols), _number(placement.inner, symbols)
    d = placement.dim
    if (
        whole.shape[d] != outer * sum(lengths) * inner
        or mine.shape[d] != outer * sum(chunks) * inner
    ):
        return None
    mine = mine.reshape(*mine.shape[:d], outer, sum(chunks), inner, *mine.shape[d + 1 :])
    whole = whole.reshape(*whole.shape[:d], outer, sum(lengths), inner, *whole.shape[d + 1 :])
    ours, theirs, start, offset = [], [], 0, 0
    for n, c in zip(lengths, chunks, strict=True):
        first = min(topology.rank * c, n)
        rows = min(c, n - first)
        ours.append(mine.narrow(d + 1, offset, rows))
        theirs.append(whole.narrow(d + 1, start + first, rows))
        start, offset = start + n, offset + c
    return torch.cat(ours, d + 1), torch.cat(theirs, d + 1)


def _number(size: Size, symbols: dict[sympy.Symbol, int]) -> int:
    return int(size.subs(symbols)) if isinstance(size, sympy.Expr) else int(size)


def _way(node: fx.Node, right: set[fx.Node]) -> tuple[str, ...]:
    """`node` and what it was computed from, back to values that are right; the nearest ones."""
    out, queue = [node], [node]
    while queue and len(out) < _SUSPECTS:
        for x in queue.pop(0).all_input_nodes:
            if x.op == "call_function" and x not in right and x not in out:
                out.append(x)
                queue.append(x)
    return tuple(_said(n) for n in reversed(out[:_SUSPECTS]))


def _said(node: fx.Node) -> str:
    origin = made_by(node)
    return f"{node.name} ({node.target}{f', made by {origin}' if origin else ''})"


def _tensors(value: object) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]
