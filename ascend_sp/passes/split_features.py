"""Products without tokens are computed a share of their output features on each rank.

Modulation, and what embeds the time, has no sequence to split: ``[1, 3072] x [3072, 18432]``, for
which every rank would read the whole weight in every step. Here rank r reads the rows ``[r*n,
r*n + n)`` of the weight, n = ceil(N / P), a view of the parameter, and the shares are gathered.

Products that become ready together, behind equally many others, share one all-gather. None of them
needs another, so all can stand where the first does. The scheduler that will order the program is
asked what a group gains; every rank then has the same nodes, and only offsets differ: where P does
not divide N, the last shares begin earlier than at ``r*n``, and what is in two is dropped.

A weight of which a rank holds just those rows, and which nothing else reads, is not gathered then:
what is gathered is the result, which has few rows. That pays in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ascend_sp.graph import collectives
from ascend_sp.graph.context import NoteKind, PassContext, is_random
from ascend_sp.graph.cost.estimate import Estimator, bytes_of, product_flops, shape_of
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.families import is_product
from ascend_sp.graph.layout import PLACEMENTS, REPLICATE, SHARE
from ascend_sp.graph.parts import Gather, gather_of
from ascend_sp.graph.sizes import Size, ceil_div, has_unbacked, product, total
from ascend_sp.passes.overlap.memory import made_of_weights
from ascend_sp.passes.overlap.packing import Packed, Trial
from ascend_sp.passes.overlap.scheduler import Task
from ascend_sp.runtime.ops import STARTS
from ascend_sp.runtime.topology import Topology

aten = torch.ops.aten

WORTH = 0.001
"""Share of a step that a group must save, by estimate, for a collective more."""
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int, aten.numpy_T.default)


def split_features(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Give each rank its share of the output features of products that all would compute alike."""
    if ctx.split_features == "off":
        return gm
    groups = _groups(gm.graph, ctx)
    if not groups:
        return gm
    chosen = [(g, "") for g in groups] if ctx.split_features == "on" else _that_pay(gm, groups, ctx)
    emit = Emitter(gm, "split_features")
    for group, gain in chosen:
        size = sum(bytes_of(p.weight.meta["val"]) for p in group)
        spared = sum(_spares(p) for p in group)
        text = (
            f"{len(group)} products without tokens are split by output features: of "
            f"{size / 1e6:.1f} MB of weights each rank reads 1/{ctx.topology.size}"
            + (f", and {spared} are not gathered" if spared else "")
            + gain
        )
        ctx.note(NoteKind.FEATURES, _split(emit, group, ctx.topology), text)
    for p in (p for group, _ in chosen for p in group):
        if p.turned is not None and not p.turned.users:
            gm.graph.erase_node(p.turned)
        for gather in (p.part, p.bias_part):
            if gather is not None:
                gather.erase_unused(gm.graph)
    return gm


@dataclass(frozen=True)
class _Product:
    """``x [..., K] x weight [N, K] (+ bias [N])``."""

    node: fx.Node
    weight: fx.Node
    """The parameter, whole."""
    turned: fx.Node | None
    """The node that turns it for the product, if that does not do so itself."""
    bias: fx.Node | None
    part: Gather | None = None
    """How the weight is gathered, if a rank holds only its rows of it."""
    bias_part: Gather | None = None

    @property
    def x(self) -> fx.Node:
        """The operand that all ranks have."""
        x: Any = self.node.args[1 if self.node.target is aten.addmm.default else 0]
        return x

    @property
    def features(self) -> int:
        """N."""
        return int(self.weight.meta["val"].shape[0])

    @property
    def rows(self) -> tuple[Size, ...]:
        """The sizes in front of the features."""
        return as_shape_of(self.node)[:-1]


def _groups(graph: fx.Graph, ctx: PassContext) -> list[list[_Product]]:
    """Products that can be split, those together that become ready together."""
    estimator = ctx.estimator(fuses=False)
    weights = made_of_weights(list(graph.nodes), ctx.static_inputs)
    depth: dict[fx.Node, int] = {}
    random: set[fx.Node] = set()
    groups: dict[object, list[_Product]] = {}
    for node in graph.nodes:
        below = node.all_input_nodes
        depth[node] = max((depth[x] for x in below), default=0)
        if is_random(node.target) or any(x in random for x in below):
            random.add(node)  # numbers are drawn in the order of the program
        if node not in weights and (is_product(node) or node.target in STARTS):
            found = _splittable(node, ctx, estimator) if node not in random else None
            if found is not None:
                val = node.meta["val"]
                groups.setdefault((depth[node], val.dtype, val.device), []).append(found)
            depth[node] += 1
    return list(groups.values())


def _splittable(node: fx.Node, ctx: PassContext, estimator: Estimator) -> _Product | None:
    """`node` as a product that every rank would compute alike, of a parameter that it waits for."""
    if node.meta.get(PLACEMENTS) != (REPLICATE,):
        return None
    # Values in host memory are no business of the devices' link.
    if node.meta["val"].device.type != ctx.device or any(map(has_unbacked, as_shape_of(node))):
        return None
    args: Any = node.args
    match node.target, args:
        case aten.mm.default, (_, w):
            found = _of_turned(node, w, None)
        case aten.addmm.default, (bias, _, w) if not node.kwargs:
            found = _of_turned(node, w, bias)
        case aten.linear.default, (_, w, *rest):
            found = _Product(node, w, None, rest[0] if rest else None)
        case _:
            return None
    if found is None or found.weight.meta["val"].dim() != 2:
        return None
    part = gather_of(found.weight, ctx)
    if part is None and not _is_parameter(found.weight, ctx):
        return None
    weight, bias = found.weight.meta["val"], found.bias
    sizes = (*weight.shape, *(bias.meta["val"].shape if bias is not None else ()))
    if not (
        all(isinstance(n, int) for n in sizes)
        and weight.is_contiguous()
        and weight.is_floating_point()
        and (bias is None or tuple(bias.meta["val"].shape) == (found.features,))
        and found.features >= ctx.topology.size
    ):
        return None
    # With many rows arithmetic is what takes the time, and what is gathered is no less than it.
    flops = product_flops(node) or 0.0
    d = estimator.device
    few = flops / d.product_rate(weight.dtype) <= bytes_of(weight) / d.memory
    return replace(found, part=part, bias_part=gather_of(bias, ctx)) if few else None


def _of_turned(node: fx.Node, w: Any, bias: Any) -> _Product | None:
    if w.target not in TURNS or w.meta["val"].dim() != 2:
        return None
    weight = w.args[0]
    # A permute may leave the dims as they are.
    turned = as_shape_of(w) == as_shape_of(weight)[::-1]
    same = w.meta["val"].stride() == weight.meta["val"].stride()
    return _Product(node, weight, w, bias) if turned and not same else None


def _is_parameter(node: fx.Node, ctx: PassContext) -> bool:
    return node.op == "placeholder" and node.name in ctx.static_inputs


def _spares(p: _Product) -> bool:
    """Whether a weight need not be gathered if `p` is split, and what is gathered then is less."""
    if p.part is None or bytes_of(p.node.meta["val"]) >= bytes_of(p.weight.meta["val"]):
        return False
    readers = set(p.weight.users)
    if p.turned is not None:
        return readers == {p.turned} and set(p.turned.users) == {p.node}
    return readers == {p.node}


# What it gains


def _that_pay(
    gm: fx.GraphModule, groups: Sequence[list[_Product]], ctx: PassContext
) -> list[tuple[list[_Product], str]]:
    """Groups that make the step shorter, and how much, by the scheduler's estimate."""
    trial = Trial(gm, ctx)
    chosen: list[Packed] = []
    out = []
    for group in groups:
        worth = [p for p in group if _spares(p) or _gain(p, trial.estimator, ctx) > 0]
        if any(map(_spares, worth)):
            chosen.append(_packed(worth, trial, ctx))
            out.append((worth, ""))
            continue
        saved = sum(_gain(p, trial.estimator, ctx) for p in worth)
        if saved <= trial.estimator.device.all_gather(0, ctx.topology.size).work:
            continue
        before = trial.step(chosen)[0] if chosen else trial.apart[0]
        packed = _packed(worth, trial, ctx)
        after = trial.step([*chosen, packed])[0]
        if after < before * (1 - WORTH):
            chosen.append(packed)
            out.append((worth, f" (estimated step: {after / before - 1:+.2%})"))
    return out


def _share_seconds(p: _Product, e: Estimator, ctx: PassContext) -> float:
    """What the share of a product takes."""
    launch = e.device.launch
    share = (e.seconds(p.node) - launch) / ctx.topology.size + launch
    if ctx.target == "torchair" and p.part is None:  # GE has no views: it copies the rows
        share += e.copy_seconds(bytes_of(p.weight.meta["val"]) / ctx.topology.size)
    return share


def _gain(p: _Product, e: Estimator, ctx: PassContext) -> float:
    """Seconds that a share takes less than the whole, without what the gather costs."""
    moved = 2 * bytes_of(p.node.meta["val"]) / e.device.memory
    return e.seconds(p.node) - _share_seconds(p, e, ctx) - moved


def _packed(group: Sequence[_Product], trial: Trial, ctx: PassContext) -> Packed:
    e, ranks = trial.estimator, ctx.topology.size
    alike = _alike(group)
    sent = [_numel(k) * ceil_div(k[0].features, ranks) for k in alike]
    width = group[0].node.meta["val"].element_size()
    copies = []
    for kind in alike:
        moved = e.copy_seconds(sum(bytes_of(p.node.meta["val"]) for p in kind))
        uneven = kind[0].features % ranks != 0
        free = len(group) == 1 and _numel(kind) == 1 and not uneven
        copies.append(0.0 if free else 2 * moved if uneven else moved)
    size = float(sum(map(int, sent)) * width)
    cost = e.device.all_gather(size, ranks)
    return Packed(
        tuple(sorted(trial.index[p.node] for p in group)),
        (
            Task("shares", sum(_share_seconds(p, e, ctx) for p in group), fills=True),
            Task("pack", e.copy_seconds(size) if len(group) > 1 else 0.0),
            Task("all_gather", cost.seconds, transfer=True, work=cost.work),
            Task("unpack", sum(copies)),
        ),
    )


def _numel(kind: Sequence[_Product]) -> int:
    """Rows of all of `kind` together, as a number."""
    out = len(kind)
    for n in shape_of(kind[0].node.meta["val"])[:-1]:
        out *= n
    return out


# The rewrite


def _alike(group: Sequence[_Product]) -> list[list[_Product]]:
    """`group` by the shape of results: those of one shape are put in order by one copy."""
    kinds: dict[object, list[_Product]] = {}
    for p in group:
        kinds.setdefault((product(p.rows), p.features, p.part is None), []).append(p)
    return list(kinds.values())


def _split(emit: Emitter, group: Sequence[_Product], topology: Topology) -> fx.Node:
    """Shares of `group`, gathered, in place of it; the start of the all-gather."""
    first = _hoist(emit.graph, [p.node for p in group])
    alike = _alike(group)
    with emit.at(first):
        shares = [_share(emit, p, topology) for kind in alike for p in kind]
        start = collectives.all_gather(emit, emit.cat(shares, 0), topology)
        flat = collectives.wait(emit, start)
        table = emit.view(flat, (topology.size, total(as_shape_of(s)[0] for s in shares)))
        offset: Size = 0
        wholes: list[tuple[_Product, fx.Node]] = []
        for kind in alike:
            n = ceil_div(kind[0].features, topology.size)
            size = len(kind) * product(kind[0].rows) * n
            part = emit.narrow(table, 1, offset, offset + size)
            offset = offset + size
            wholes += _wholes(emit, part, kind, topology)
    for p, whole in wholes:
        emit.replace(p.node, whole)
    return start


def _hoist(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node:
    """Put what `nodes` need in front of the first of them, which is returned."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    first = min(nodes, key=place.__getitem__)
    needed, stack = set[fx.Node](), list(nodes)
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in needed and place[x] > place[first]:
                needed.add(x)
                stack.append(x)
    for x in sorted(needed, key=place.__getitem__):
        first.prepend(x)
    return first


def _share(emit: Emitter, p: _Product, topology: Topology) -> fx.Node:
    """This rank's features of `p`, flat."""
    n = ceil_div(p.features, topology.size)
    start, bias = min(topology.rank * n, p.features - n), p.bias
    own: dict[Any, fx.Node] = {
        p.weight: p.part.parameter
        if p.part is not None
        else emit.narrow(p.weight, 0, start, start + n)
    }
    if p.turned is not None:
        turn: Any = p.turned.target
        own[p.turned] = emit.call(turn, own[p.weight], *p.turned.args[1:])
    if p.bias is not None and bias is not None:
        held = p.bias_part.parameter if p.part is not None and p.bias_part is not None else None
        own[p.bias] = held or emit.narrow(bias, 0, start, start + n)
    target: Any = p.node.target
    args: Any = p.node.args
    share = emit.call(target, *(a if a is p.x else own.get(a, a) for a in args))
    share.meta[SHARE] = True
    return emit.view(share, (share.meta["val"].numel(),))


def _wholes(
    emit: Emitter, part: fx.Node, kind: Sequence[_Product], topology: Topology
) -> list[tuple[_Product, fx.Node]]:
    """The results of products of one shape, from ``part [P, count * rows * n]``."""
    p, features = topology.size, kind[0].features
    rows, n = product(kind[0].rows), ceil_div(features, topology.size)
    by_rank = emit.view(part, (p, len(kind), rows, n))
    by_product = emit.permute(by_rank, (1, 2, 0, 3))
    full, rest = divmod(features, n)
    ends = emit.view(emit.narrow(by_product, 2, 0, full), (len(kind), rows, full * n))
    if rest:
        # The share of the next rank is not full, so it began earlier: its last features are new.
        last = emit.narrow(emit.narrow(by_product, 2, full, full + 1), 3, n - rest, n)
        ends = emit.cat([ends, emit.view(last, (len(kind), rows, rest))], 2)
    out = []
    for i, one in enumerate(kind):
        whole = emit.view(emit.narrow(ends, 0, i, i + 1), as_shape_of(one.node))
        out.append((one, whole))
    return out
