"""Propagation: one walk over the graph that gives every value its placement.

Nothing is sharded until an attention asks for it. When the walk meets one whose queries are whole,
it looks back for the values to cut (`seeds`), and goes on from the first of them. Convolutions ask,
too, where that pays (`pictures`). The graph is not changed; the result is a `Plan`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ascend_sp.graph._pytorch import OpOverload
from ascend_sp.graph.context import NoteKind, PassContext, own_line, source_line
from ascend_sp.graph.layout import (
    REPLICATE,
    Padded,
    Placement,
    Seam,
    Sequence,
    Shard,
)
from ascend_sp.passes.sharding import pictures
from ascend_sp.passes.sharding.pictures import Cut
from ascend_sp.passes.sharding.plan import (
    Plan,
    call_of,
    is_getitem,
    operand_nodes,
    picked,
    shapes,
)
from ascend_sp.passes.sharding.rules import Local, Reshard, Unsupported, answer, takes_padded
from ascend_sp.passes.sharding.seeds import find_seeds, why_whole
from ascend_sp.passes.sharding.unseen import IN_ONE_OP, unseen_attention
from ascend_sp.runtime.errors import UnshardedError
from ascend_sp.runtime.ops import attention as attention_op
from ascend_sp.runtime.unsplit import Unsplit

SHOWN = 4
"""Kinds of attention that a warning names."""
MAX_CUTS = 32
"""Segments that are made at most of what the model slices; each costs a walk over the graph."""


def propagate_sharding(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Decide every placement; the `Plan` is left for `materialise_sharding`."""
    nodes = list(gm.graph.nodes)
    plan = propagate(nodes, ctx.topology.size, ctx.static_inputs)
    plan = _with_pictures(nodes, plan, ctx)
    ctx.results.put(plan)
    _report(gm.graph, plan, ctx)
    return gm


def _with_pictures(nodes: list[fx.Node], plan: Plan, ctx: PassContext) -> Plan:
    """The best plan by estimate: the one without seeds of convolutions, or one with such."""
    costs = ctx.estimator()
    tried = [
        propagate(nodes, ctx.topology.size, ctx.static_inputs, cut) for cut in pictures.ways(nodes)
    ]
    if not tried:
        return plan
    now, *each = (pictures.seconds(nodes, p, costs) for p in (plan, *tried))
    taken = min(each)
    if taken < now:
        return tried[each.index(taken)]
    first = next(n for n in nodes if n.target is pictures.CONVOLUTION)
    ctx.note(
        NoteKind.UNSHARDED,
        first,
        "convolutions are not split along a picture, since by estimate that would take "
        f"{taken * 1e3:.3g} ms, and takes {now * 1e3:.3g} ms without",
    )
    return plan


def propagate(
    nodes: list[fx.Node],
    world: int,
    static_inputs: frozenset[str] = frozenset(),
    cut: Cut | None = None,
) -> Plan:
    """The placements of `nodes` over `world` ranks; with a `cut`, convolutions ask for it."""
    plan = Plan(world)
    position = {n: i for i, n in enumerate(nodes)}
    hopeless: set[fx.Node] = set()
    # Behind the last attention values are gathered anyway.
    last = max((n for n in nodes if n.target is attention_op), default=nodes[0])
    cuts = 0
    i = 0
    while i < len(nodes):
        node = nodes[i]
        visit(plan, node)
        if node.target is attention_op and not _sharded(plan, node) and node not in hopeless:
            new = {
                n: s
                for n, s in find_seeds(plan, node, static_inputs).items()
                if n not in plan.seeds
            }
            if new:
                plan.seeds.update((n, _named(n, s)) for n, s in new.items())
                i = min(position[n] for n in new)
                continue
            hopeless.add(node)
        if cut and node.target is pictures.CONVOLUTION and not _sharded(plan, node):
            seed = cut.seed(node)
            if seed and plan.placement(seed[0]) == REPLICATE:
                plan.seeds[seed[0]] = seed[1]
                i = position[seed[0]]
                continue
        seams = _seams(plan, node) if node < last else ()
        if seams and cuts < MAX_CUTS:
            cuts += 1
            i = min(position[_cut(plan, s)] for s in seams)
            continue
        i += 1
    return plan


def _named(seed: fx.Node, split: Shard) -> Shard:
    """`split` with every segment knowing which rows of `seed` it is."""
    lengths, offsets = split.seq.lengths, [0]
    for n in lengths[:-1]:
        if not isinstance(n, int):
            return split
        offsets.append(offsets[-1] + n)
    return replace(split, seq=Sequence(lengths, tuple(Seam(seed.name, o) for o in offsets)))


def _seams(plan: Plan, node: fx.Node) -> tuple[Seam, ...]:
    """Where seeds could be cut in two so that `node` runs on shards."""
    found = plan.refusals.get(node)
    if not isinstance(found, Reshard) or not found.seams:
        return ()
    names = {n.name for n in plan.seeds}
    return tuple(s for s in found.seams if s.seed in names)


def _cut(plan: Plan, seam: Seam) -> fx.Node:
    """Make two segments of one; the seed that it is in."""
    seed = next(n for n in plan.seeds if n.name == seam.seed)
    split = plan.seeds[seed]
    plan.seeds[seed] = replace(split, seq=split.seq.cut_at(seam))
    return seed


def _sharded(plan: Plan, node: fx.Node) -> bool:
    return isinstance(plan.placement(node), Shard)


def visit(plan: Plan, node: fx.Node) -> None:
    """Place the results of one node, given the placements of its operands."""
    plan.answers.pop(node, None)
    plan.refusals.pop(node, None)
    if node.op == "output":
        return
    if node.op == "call_function" and is_getitem(node):
        out: tuple[Placement, ...] = (_pick(plan, node),)
    else:
        out = tuple(REPLICATE for _ in shapes(node))
    operands = operand_nodes(node) if node.op == "call_function" else []
    if any(isinstance(_seen(plan, node, x), Shard | Padded) for x in operands):
        found = _ask(plan, node)
        if isinstance(found, Local):
            plan.answers[node] = found
            out = found.outputs
        else:
            plan.refusals[node] = found
    if node in plan.seeds and out[0] == REPLICATE:
        out = (plan.seeds[node], *out[1:])
    else:
        plan.seeds.pop(node, None)
    plan.placements[node] = out


def _ask(plan: Plan, node: fx.Node) -> Local | Reshard | Unsupported:
    if not isinstance(node.target, OpOverload):
        return Unsupported(f"{node.target} is not an ATen op")
    return answer(call_of(node, lambda _, x: _seen(plan, node, x), plan.world))


def _seen(plan: Plan, node: fx.Node, x: fx.Node) -> Placement:
    # A partial sum is added up before anybody looks at it; rows around a picture few can use.
    p = plan.placement(x)
    if isinstance(p, Shard) or (isinstance(p, Padded) and takes_padded(node.target)):
        return p
    return REPLICATE


def _pick(plan: Plan, node: fx.Node) -> Placement:
    found = plan.placements.get(node.args[0], ())  # type: ignore[arg-type]
    i = picked(node)
    return REPLICATE if i is None or i >= len(found) else found[i]


def _report(graph: fx.Graph, plan: Plan, ctx: PassContext) -> None:
    """Say what stays unsharded and why; raise for it if that was asked for."""
    attentions = graph.find_nodes(op="call_function", target=attention_op)
    last = max(attentions, default=None)
    split = any(_sharded(plan, node) for node in attentions)
    unseen = {} if split else dict(unseen_attention(graph, ctx.static_inputs))
    bad: list[tuple[fx.Node, str]] = []
    for node in graph.nodes:
        refusal = plan.refusals.get(node)
        hidden = unseen.get(node) or IN_ONE_OP.get(node.target)
        if hidden:
            ctx.note(NoteKind.UNSHARDED, node, f"runs whole on every rank: {hidden}")
            bad.append((node, hidden))
            continue
        if node.target is attention_op:
            found = plan.answers.get(node)
            if found is None or not _sharded(plan, node):
                why = why_whole(node) or "no operand of its queries could be split"
                text = refusal.reason if refusal else why
                ctx.note(NoteKind.UNSHARDED, node, f"runs whole on every rank: {text}")
                bad.append((node, text))
            else:
                text = ", ".join(str(p) for p in found.inputs)
                ctx.note(NoteKind.ATTENTION, node, f"sharded; operands {text}")
            continue
        if refusal is None or not _must_travel(plan, node):
            continue
        ctx.note(NoteKind.UNSHARDED, node, f"runs on gathered operands: {refusal.reason}")
        if isinstance(refusal, Unsupported) or (last is not None and node < last):
            bad.append((node, refusal.reason))
    if not split and (attentions or unseen):
        ctx.results.put(_nothing_split(bad))
    if not bad or ctx.on_unsharded != "error":
        return
    nothing = ctx.results.get(Unsplit)
    if nothing is not None:
        raise nothing.error()
    raise UnshardedError(
        'on_unsharded="error", and these operations cannot run on shards:\n'
        + "\n".join(f"  {n.name} ({n.target}): {why}\n    at {source_line(n)}" for n, why in bad)
        + '\nUse on_unsharded="fallback" to run them on gathered tensors, or write a rule '
        "(docs/writing_a_rule.md)."
    )


def _nothing_split(bad: list[tuple[fx.Node, str]]) -> Unsplit:
    """What to tell of a graph whose attentions, and what keeps them whole, are `bad`."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for n, why in bad:
        kinds.setdefault((str(n.target), why, own_line(n)), []).append(n.name)
    lines = []
    for (target, why, source), names in list(kinds.items())[:SHOWN]:
        who = names[0] if len(names) == 1 else f"{len(names)} x {names[0]} .. {names[-1]}"
        lines.append(f"  {who} ({target}): {why}" + (f"\n    at {source}" if source else ""))
    if len(kinds) > SHOWN:
        lines.append(f"  and {len(kinds) - SHOWN} more, see summary.md of the dump (dump_dir)")
    return Unsplit(
        {f"nothing split: {why}" for _, why in bad},
        "nothing is split: this graph attends, and every rank runs all of it:\n"
        + "\n".join(lines)
        + "\ndocs/debugging.md says under 'Nothing is split' what helps.",
    )


def _must_travel(plan: Plan, node: fx.Node) -> bool:
    return any(
        isinstance(plan.placement(x), Shard | Padded) and x not in plan.seeds
        for x in operand_nodes(node)
    )
