"""What became of one graph on one rank: facts, of which `page.py` makes what a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from ascend_sp.passes.choose_strategy import CHOICES
from ascend_sp.passes.context import IMPLEMENTATIONS, PassContext, source_line
from ascend_sp.passes.emitter import ORIGIN
from ascend_sp.passes.overlap.copies import copies
from ascend_sp.passes.overlap.saving import is_sharded
from ascend_sp.passes.overlap.timeline import TIMELINES, Timelines
from ascend_sp.passes.ulysses import EXCHANGES
from ascend_sp.runtime.collectives import STARTS
from ascend_sp.runtime.versions import Software, software


@dataclass
class Report:
    """Facts of one graph on one rank; plain values, so that JSON can hold them."""

    graph: int
    rank: int
    ranks: int
    target: str
    attentions: list[dict[str, Any]]
    """Each attention whose rows and heads change hands."""
    local: list[dict[str, Any]]
    """Each attention of a rank's own rows, or batch, that needs no exchange: all keys are there."""
    whole: list[dict[str, Any]]
    """Each attention that runs on whole tensors, on every rank."""
    collectives: list[dict[str, Any]]
    """In program order; see `collectives`."""
    overlap: dict[str, Any]
    """Estimates of a step; empty on one rank."""
    strategies: list[dict[str, Any]]
    """What was compared for the attentions of one kind."""
    notes: list[dict[str, str]]
    ops: dict[str, int]
    """How many ops the program has that are sharded, and that every rank runs alike."""
    graph_breaks: dict[str, int]
    """Why Dynamo has broken graphs in this process, and how often."""
    recompiles: list[str]
    """Why code was compiled once more in this process, up to this graph."""
    options: Mapping[str, str]
    software: Software
    """What it was compiled with."""
    one_rank: float | None = None
    """Estimated seconds of a step without ascend_sp on one device, if somebody asked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each pass and phase of the compile."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


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
        recompiles: why code was compiled once more.
    """
    lines: Timelines | None = ctx.analysis.get(TIMELINES)
    around = copies(gm.graph.nodes, ctx.estimator()) if lines else {}
    rows = collectives(gm)
    if lines:
        told = {row["name"]: row for row in lines.after.rows()}
        rows = [row | told.get(row["name"], {}) for row in rows]
    became: dict[str, list[dict[str, Any]]] = {}
    for a in ctx.analysis.get(IMPLEMENTATIONS, ()):
        became.setdefault(a["node"], []).append(a)
    attentions = []
    for exchange in ctx.analysis.get(EXCHANGES, ()):
        origin = f"ulysses({exchange.name})"
        own = [r for r in rows if r["origin"] == origin]
        # A pipelined one has become several; the first speaks for all.
        ran = next(iter(became.pop(origin, ())), {})
        exposed = sum(r.get("exposed_seconds", 0.0) for r in own)
        travel = sum(r.get("seconds", 0.0) for r in own)
        attentions.append(
            asdict(exchange)
            | {
                "all_to_alls": len(own),
                "runs_as": ran.get("runs_as", ""),
                "called_at": ran.get("called_at", exchange.source),
                "bytes": sum(r["bytes"] for r in own if isinstance(r["bytes"], int)),
                "hidden": 1 - exposed / travel if travel else 1.0,
                "copies": asdict(around[exchange.name]) if exchange.name in around else {},
            }
        )
    rest = [a for same in became.values() for a in same]
    return Report(
        graph=graph,
        rank=ctx.topology.rank,
        ranks=ctx.topology.size,
        target=ctx.target,
        attentions=attentions,
        local=[a for a in rest if a["local"]],
        whole=[a for a in rest if not a["local"]],
        collectives=rows,
        overlap=lines.totals() if lines else {},
        strategies=[c.to_json() for c in ctx.analysis.get(CHOICES, ())],
        notes=[asdict(n) for n in ctx.notes],
        ops=_ops(gm),
        graph_breaks=breaks,
        recompiles=recompiles,
        options=options,
        software=software(),
    )


def collectives(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """Every collective in program order: op, elements and bytes that this rank sends."""
    rows = []
    for node in gm.graph.nodes:
        if node.target not in STARTS:
            continue
        value = node.args[0].meta["val"]
        numel = value.numel()
        rows.append(
            {
                "name": node.name,
                "op": node.target._opname,
                "dtype": str(value.dtype),
                "numel": int(numel) if isinstance(numel, int) else str(numel),
                "bytes": (numel * value.element_size() if isinstance(numel, int) else "symbolic"),
                "origin": node.meta.get(ORIGIN, ""),
                "source": source_line(node),
            }
        )
    return rows


def _ops(gm: fx.GraphModule) -> dict[str, int]:
    found = {"sharded": 0, "whole": 0}
    known: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        own = is_sharded(node)
        known[node] = any(known[x] for x in node.all_input_nodes) if own is None else own
        if node.op == "call_function":
            found["sharded" if known[node] else "whole"] += 1
    return found
