"""What became of one graph on one rank: facts, of which `page.py` makes what a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import fx

from ascend_sp.compiler.report.weights import Weights, weights
from ascend_sp.graph.context import Implementation, Note, PassContext, source_line
from ascend_sp.graph.origin import exchange_of, made_by
from ascend_sp.passes.choose_strategy import Choice
from ascend_sp.passes.exchange import Exchange
from ascend_sp.passes.overlap.copies import Copies, copies
from ascend_sp.passes.overlap.saving import is_sharded
from ascend_sp.passes.overlap.timeline import Timelines, Totals, Transfer
from ascend_sp.runtime.ops import ALL_GATHER, STARTS
from ascend_sp.runtime.versions import Software, software

GATHERS = ALL_GATHER._opname


@dataclass(frozen=True)
class Collective:
    """A collective of one rank's program."""

    name: str
    op: str
    dtype: str
    numel: int | str
    """Elements that this rank sends; an expression where sizes are symbols."""
    bytes: int | str
    """The same in bytes, or ``"symbolic"``."""
    origin: str
    """What made it: ``pass(node)``."""
    attention: str
    """Name of the attention whose queries and keys it brings together; empty for others."""
    source: str
    seconds: float = 0.0
    """How long the link needs, by estimate."""
    exposed_seconds: float = 0.0
    """How long the device stands still for it."""
    why_exposed: str = ""


@dataclass(frozen=True)
class Split(Exchange):
    """An attention whose queries meet keys of other ranks, and what that costs."""

    collectives: int
    """How many it takes."""
    collective: str
    """Of which kind: ``all-to-all``, or ``all-gather`` where keys come to the queries."""
    runs_as: str
    called_at: str
    bytes: int
    """What a rank puts into them."""
    hidden: float
    """Share of their time that is hidden behind compute, by estimate."""
    copies: Copies | None


@dataclass
class Report:
    """Facts of one graph on one rank."""

    graph: int
    rank: int
    ranks: int
    target: str
    attentions: list[Split]
    local: list[Implementation]
    """Each attention of a rank's own rows, or batch, that needs no exchange: all keys are there."""
    whole: list[Implementation]
    """Each attention that runs on whole tensors, on every rank."""
    collectives: list[Collective]
    """In program order."""
    overlap: Totals | None
    """Estimates of a step; None on one rank."""
    weights: Weights | None
    """Where they are, and what gathering them takes; None on one rank."""
    strategies: list[Choice]
    """What was compared for the attentions of one kind."""
    notes: list[Note]
    ops: dict[str, int]
    """How many ops the program has that are sharded, and that every rank runs alike."""
    graph_breaks: dict[str, int]
    """Why Dynamo has broken graphs in this process, and how often."""
    recompiles: list[str]
    """Why code was recompiled in this process, up to this graph."""
    options: Mapping[str, str]
    software: Software
    """What it was compiled with."""
    one_rank: float | None = None
    """Estimated seconds of a step without ascend_sp on one device, if somebody asked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each pass and phase of the compile."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self) | {"strategies": [c.to_json() for c in self.strategies]}


def report(
    gm: fx.GraphModule,
    ctx: PassContext,
    graph: int,
    options: Mapping[str, str],
    breaks: dict[str, int],
    recompiles: list[str],
) -> Report:
    """Gather the facts about a finished graph.

    Args:
        gm: one rank's program, before it is lowered.
        ctx: what the passes left.
        graph: its number in this process.
        options: the configuration, as text.
        breaks: why Dynamo has broken graphs, and how often.
        recompiles: why code was recompiled.
    """
    lines = ctx.results.get(Timelines)
    around = copies(gm.graph.nodes, ctx.estimator()) if lines else {}
    rows = collectives(gm)
    if lines:
        of = {t.node.name: t for t in lines.after.transfers}
        rows = [_estimated(row, of[row.name]) if row.name in of else row for row in rows]
    became: dict[str, list[Implementation]] = {}
    for a in ctx.results.all(Implementation):
        became.setdefault(a.attention, []).append(a)
    attentions = []
    for exchange in ctx.results.all(Exchange):
        own = [r for r in rows if r.attention == exchange.name]
        # A pipelined one has become several; the first speaks for all.
        ran = next(iter(became.pop(exchange.name, ())), None)
        exposed = sum(r.exposed_seconds for r in own)
        travel = sum(r.seconds for r in own)
        attentions.append(
            Split(
                **vars(exchange),
                collectives=len(own),
                collective="all-gather" if any(r.op == GATHERS for r in own) else "all-to-all",
                runs_as=ran.runs_as if ran else "",
                called_at=ran.called_at if ran else exchange.source,
                bytes=sum(r.bytes for r in own if isinstance(r.bytes, int)),
                hidden=1 - exposed / travel if travel else 1.0,
                copies=around.get(exchange.name),
            )
        )
    rest = [a for same in became.values() for a in same]
    return Report(
        graph=graph,
        rank=ctx.topology.rank,
        ranks=ctx.topology.size,
        target=ctx.target,
        attentions=attentions,
        local=[a for a in rest if a.local],
        whole=[a for a in rest if not a.local],
        collectives=rows,
        overlap=lines.totals() if lines else None,
        weights=weights(gm, ctx),
        strategies=ctx.results.all(Choice),
        notes=list(ctx.notes),
        ops=_ops(gm),
        graph_breaks=breaks,
        recompiles=recompiles,
        options=options,
        software=software(),
    )


def collectives(gm: fx.GraphModule) -> list[Collective]:
    """Every collective in program order, without estimates."""
    rows = []
    for node in gm.graph.nodes:
        if node.target not in STARTS:
            continue
        value = node.args[0].meta["val"]
        numel = value.numel()
        known = isinstance(numel, int)
        rows.append(
            Collective(
                name=node.name,
                op=node.target._opname,
                dtype=str(value.dtype),
                numel=numel if known else str(numel),
                bytes=numel * value.element_size() if known else "symbolic",
                origin=made_by(node),
                attention=exchange_of(node),
                source=source_line(node),
            )
        )
    return rows


def _estimated(row: Collective, t: Transfer) -> Collective:
    return replace(row, seconds=t.seconds, exposed_seconds=t.exposed, why_exposed=t.why)


def _ops(gm: fx.GraphModule) -> dict[str, int]:
    found = {"sharded": 0, "whole": 0}
    known: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        own = is_sharded(node)
        known[node] = any(known[x] for x in node.all_input_nodes) if own is None else own
        if node.op == "call_function":
            found["sharded" if known[node] else "whole"] += 1
    return found
