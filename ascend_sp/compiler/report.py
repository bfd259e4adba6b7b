"""What became of one graph on one rank: facts, and the page that a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from ascend_sp.passes.choose_strategy import CHOICES
from ascend_sp.passes.context import PassContext, source_line
from ascend_sp.passes.emitter import ORIGIN
from ascend_sp.passes.overlap.copies import copies
from ascend_sp.passes.overlap.timeline import TIMELINES, Timelines
from ascend_sp.passes.ulysses import EXCHANGES
from ascend_sp.runtime.collectives import STARTS

NOTES = {
    "target": "Targets that could not take the graph",
    "unsharded": "Not sharded",
    "gather": "Gathers",
    "reshard": "Moved between splits",
    "all_reduce": "Sums over ranks",
    "strategy": "Strategies that were not possible",
    "attention": "Attention, in detail",
    "complex": "Complex numbers left",
}
"""Kinds of notes, in the order of the page."""
COLUMNS = (
    *("n", "rows, keys", "heads", "width", "mask", "travels", "all-to-alls", "hidden"),
    *("copies alone", "source"),
)


@dataclass
class Report:
    """Facts of one graph on one rank; plain values, so that JSON can hold them."""

    rank: int
    ranks: int
    target: str
    attentions: list[dict[str, Any]]
    """Each attention whose rows and heads change hands."""
    collectives: list[dict[str, Any]]
    """In program order; see `collectives`."""
    overlap: dict[str, Any]
    """Estimates of a step; empty on one rank."""
    strategies: list[dict[str, Any]]
    """What was compared for the attentions of one kind."""
    notes: list[dict[str, str]]
    graph_breaks: dict[str, int]
    options: Mapping[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each pass and phase of the compile."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def report(
    gm: fx.GraphModule, ctx: PassContext, options: Mapping[str, str], breaks: dict[str, int]
) -> Report:
    """Gather the facts about a finished graph."""
    lines: Timelines | None = ctx.analysis.get(TIMELINES)
    around = copies(gm.graph.nodes, ctx.estimator()) if lines else {}
    rows = collectives(gm)
    if lines:
        told = {row["name"]: row for row in lines.after.rows()}
        rows = [row | told.get(row["name"], {}) for row in rows]
    attentions = []
    for exchange in ctx.analysis.get(EXCHANGES, ()):
        own = [r for r in rows if r["origin"] == f"ulysses({exchange.name})"]
        exposed = sum(r.get("exposed_seconds", 0.0) for r in own)
        travel = sum(r.get("seconds", 0.0) for r in own)
        attentions.append(
            asdict(exchange)
            | {
                "all_to_alls": len(own),
                "hidden": 1 - exposed / travel if travel else 1.0,
                "copies": asdict(around[exchange.name]) if exchange.name in around else {},
            }
        )
    return Report(
        rank=ctx.topology.rank,
        ranks=ctx.topology.size,
        target=ctx.target,
        attentions=attentions,
        collectives=rows,
        overlap=lines.totals() if lines else {},
        strategies=[c.to_json() for c in ctx.analysis.get(CHOICES, ())],
        notes=[asdict(n) | {"text": n.text} for n in ctx.notes],
        graph_breaks=breaks,
        options=options,
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


def summary(r: Report) -> str:
    """The page to read first, as Markdown."""
    count = Counter(row["op"] for row in r.collectives)
    known = sum(row["bytes"] for row in r.collectives if isinstance(row["bytes"], int))
    lines = [
        f"# ascend_sp: rank {r.rank} of {r.ranks}",
        "",
        f"Lowered by: {r.target}.",
        "",
        f"Collectives: {', '.join(f'{n} {op}' for op, n in count.items()) or 'none'}; "
        f"{known} bytes put in by this rank.",
        "",
        *_overlap(r.overlap),
        *_attentions(r.attentions),
        *_strategies(r.strategies),
        *_exposed(r.collectives, r.overlap),
        *_notes(r.notes),
    ]
    if r.graph_breaks:
        lines += [f"## Graph breaks before this graph ({sum(r.graph_breaks.values())})", ""]
        lines += [
            "The model's Python was cut here. What lies between two graphs is whole on all ranks.",
            "",
            *(f"- {n} x {_reason(why)}" for why, n in r.graph_breaks.items()),
            "",
        ]
    if r.seconds:
        slowest = sorted(r.seconds.items(), key=lambda item: -item[1])
        total = sum(r.seconds.values())
        lines += [f"## Compile time ({total:.1f} s)", ""]
        lines += [", ".join(f"{name} {s / total:.0%}" for name, s in slowest if s), ""]
    return "\n".join(
        [*lines, "## Options", "", ", ".join(f"{k}={v}" for k, v in r.options.items()), ""]
    )


def _overlap(o: Mapping[str, Any]) -> list[str]:
    if not o:
        return []
    order = "as the program has them" if not o["async"] else "in the order chosen"
    lines = [
        f"Estimated with the rates of {o['device']}: of the time that collectives take, "
        f"{o['hidden_before']:.0%} is hidden behind compute as the program has them, "
        f"{o['hidden_after']:.0%} {order}; the device waits {o['waits_after']:.1%} of a step. The "
        f"step takes {o['step_after'] / o['step_before']:.3f} of what it would; intermediate "
        f"results take {o['peak_after'] / max(1, o['peak_before']):.2f} of the memory"
        + (
            f" (a faster order was over the budget of {1 + o['budget']:g})."
            if o["limited"]
            else "."
        ),
        "",
    ]
    return lines


def _attentions(rows: list[dict[str, Any]]) -> list[str]:
    """A table with a line for each kind of attention."""
    if not rows:
        return []
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = {k: v for k, v in row.items() if k not in ("name", "hidden")}
        kinds.setdefault((str(key),), []).append(row)
    lines = [
        f"## Attention ({len(rows)})",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for same in kinds.values():
        a = same[0]
        heads = str(a["heads"]) if a["heads"] == a["kv_heads"] else f"{a['heads']}/{a['kv_heads']}"
        rows_keys = a["queries"] if a["queries"] == a["keys"] else f"{a['queries']}, {a['keys']}"
        hidden = sorted(s["hidden"] for s in same)
        told = (
            f"{hidden[0]:.0%}"
            if hidden[-1] - hidden[0] < 0.005
            else (f"{hidden[0]:.0%} .. {hidden[-1]:.0%}")
        )
        c = a["copies"]
        alone = (
            f"{c['packing_alone']} of {c['packing']} + {c['unpacking_alone']} of {c['unpacking']}"
            if c
            else ""
        )
        mask = "causal" if a["causal"] else a["mask"]
        lines.append(
            f"| {len(same)} | {rows_keys} | {heads} | {a['width']} | {mask} | {a['strategy']} | "
            f"{a['all_to_alls']} | {told} | {alone} | {_short(a['source'])} |"
        )
    lines += [
        "",
        "Rows and keys are segments of the split sequence, each cut for itself. Copies alone are "
        "kernels that do nothing but pack + unpack; the others fold into what computes.",
        "",
    ]
    return lines


def _strategies(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if len(row["estimates"]) + len(row["refused"]) > 1:
            lines.append(f"- {row['n']} x {row['text']}")
    return [f"## How they travel ({len(lines)})", "", *lines, ""] if lines else []


def _exposed(rows: list[dict[str, Any]], o: Mapping[str, Any]) -> list[str]:
    """Why the device waits, the most of it first."""
    total: Counter = Counter()
    number: Counter = Counter()
    for row in rows:
        if row.get("exposed_seconds", 0.0) > 0:
            why = row["why_exposed"].split(":")[0]
            total[why] += row["exposed_seconds"]
            number[why] += 1
    if not total:
        return []
    lines = [
        f"- {number[why]} collectives, {seconds / o['step_after']:.1%} of the step: {why}"
        for why, seconds in total.most_common()
    ]
    return ["## What is not hidden", "", *lines, ""]


def _notes(notes: list[dict[str, str]]) -> list[str]:
    lines = []
    for kind, title in NOTES.items():
        same: dict[tuple[str, str], list[str]] = {}
        for n in notes:
            if n["kind"] == kind:
                same.setdefault((f"({n['op']}): {n['text']}", n["source"]), []).append(n["node"])
        if same:
            lines += [f"## {title} ({sum(map(len, same.values()))})", ""]
            for (text, source), nodes in same.items():
                who = nodes[0] if len(nodes) == 1 else f"{len(nodes)} x {nodes[0]} .. {nodes[-1]}"
                lines.append(f"- {who} {text}" + (f"\n    at {source}" if source else ""))
            lines.append("")
    return lines


def _short(source: str) -> str:
    """``file:line`` without its folders."""
    place = source.split(": ")[0]
    return place.rsplit("/", 1)[-1]


def _reason(text: str) -> str:
    """Dynamo's explanation of a graph break on one line, without the advice."""
    parts = [line.strip() for line in text.splitlines() if line.strip()]
    told = [p for p in parts if p.startswith(("Explanation:", "Developer debug context:"))]
    return " ".join([parts[0] + ".", *told]) if parts else "unknown"
