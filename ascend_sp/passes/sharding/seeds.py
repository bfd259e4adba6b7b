"""Seeds: the values that are cut so that an attention's queries come out sharded.

From the queries the search walks back along the data, asking the rules: *if this operand were split
here, would the result be split as we want it?* It stops at an input, or before the first op that
says no (a patch-embedding convolution, say): that value is computed whole and cut for free.
"""

from __future__ import annotations

import math

from torch import fx

from ascend_sp.graph._pytorch import OpOverload
from ascend_sp.graph.layout import REPLICATE, Sequence, Shard
from ascend_sp.graph.sizes import Size, divide, equal, has_unbacked
from ascend_sp.passes.sharding.plan import Plan, call_of, is_getitem, operand_nodes, shapes
from ascend_sp.passes.sharding.rules import UNKNOWN, Local, answer
from ascend_sp.passes.sharding.rules.attention import SEQ


def why_whole(attention: fx.Node) -> str:
    """Why nobody can cut the queries of `attention`; else ``""``."""
    shape = shapes(operand_nodes(attention)[0])[0]
    if len(shape) != 4:
        return f"its queries have {len(shape)} dims"
    return UNKNOWN if any(map(has_unbacked, shape)) else ""


def find_seeds(
    plan: Plan, attention: fx.Node, static_inputs: frozenset[str]
) -> dict[fx.Node, Shard]:
    """The values to cut so that the queries of `attention` are sharded."""
    if why_whole(attention):
        return {}
    queries = operand_nodes(attention)[0]
    shape = shapes(queries)[0]
    seeds: dict[fx.Node, Shard] = {}
    seen: set[fx.Node] = set()
    stack = [(queries, Shard(SEQ, Sequence((shape[SEQ],))))]
    while stack:
        node, target = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(plan.placement(node), Shard):
            continue
        source, output = node, 0
        if node.op == "call_function" and is_getitem(node):
            source, output = node.args  # type: ignore[assignment]
        found = _sources(plan, source, target, output, static_inputs)
        stack.extend(found)
        if not found:
            seeds[node] = target
    return seeds


def _sources(
    plan: Plan, node: fx.Node, target: Shard, output: int, static_inputs: frozenset[str]
) -> list[tuple[fx.Node, Shard]]:
    """Operands of `node`, and how to split them so that result `output` is split as `target`."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    operands = operand_nodes(node)
    for i in _by_weight(operands, static_inputs):
        for guess in _guesses(shapes(operands[i])[0], target):
            call = call_of(
                node,
                lambda j, _, i=i, guess=guess: guess if j == i else REPLICATE,  # type: ignore[misc]
                plan.world,
            )
            found = answer(call)
            if not isinstance(found, Local) or not _matches(found.outputs[output], target):
                continue
            result = found.outputs[output]
            assert isinstance(result, Shard)
            if len(result.seq.lengths) > 1:  # a concatenation: every part is a segment
                return [
                    (x, p)
                    for x, p in zip(operands, found.inputs, strict=True)
                    if isinstance(p, Shard)
                ]
            return [(operands[i], guess)]
    return []


def _by_weight(operands: list[fx.Node], static_inputs: frozenset[str]) -> list[int]:
    """Large operands first: they carry the tokens; small ones are tables that cut themselves."""

    def key(i: int) -> tuple[float, bool, int]:
        numel = 1.0
        for s in shapes(operands[i])[0]:
            numel *= s if isinstance(s, int) else 1e6
        return (-numel, operands[i].name in static_inputs, i)

    return sorted(range(len(operands)), key=key)


def _guesses(shape: tuple[Size, ...], target: Shard) -> list[Shard]:
    """Every way in which `shape` could hold the target's sequence, or a segment of it."""
    out: list[Shard] = []
    for dim, size in enumerate(shape):
        rest = divide(size, target.seq.total)
        if rest is not None:
            for outer in _divisors(rest):
                inner = divide(rest, outer)
                assert inner is not None
                out.append(Shard(dim, target.seq, outer, inner))
        if rest is None or not equal(rest, 1):
            out.append(Shard(dim, Sequence((size,))))
    # Plain forms first, and the target's own dim: most ops keep it, so few questions are asked.
    return sorted(out, key=lambda s: (not s.whole_dim(), s.inner != 1, s.dim != target.dim))


def _divisors(n: Size) -> list[Size]:
    if not isinstance(n, int):
        return [1, n]
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _matches(found: object, target: Shard) -> bool:
    return (
        isinstance(found, Shard)
        and found.dim == target.dim
        and equal(found.outer, target.outer)
        and equal(found.inner, target.inner)
        and equal(found.seq.total, target.seq.total)
    )
