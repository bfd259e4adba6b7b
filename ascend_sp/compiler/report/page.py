"""The page that a person reads first: one graph on one rank, as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace

from ascend_sp.compiler.report.facts import Report, Split
from ascend_sp.compiler.report.ranges import WORDS
from ascend_sp.graph.context import Implementation, Note, NoteKind
from ascend_sp.passes.choose_strategy import Choice

SECTIONS = {
    "Attention": "each kind of attention: rows, heads, mask, strategy, what it runs as, your line",
    NoteKind.TARGET.heading: "why a fallback target runs it",
    NoteKind.CAPACITY.heading: "lengths that run with a capacity, and those that cannot",
    NoteKind.UNSHARDED.heading: "ops that every rank runs on whole tensors, why, and your line",
    NoteKind.GATHER.heading: "where a shard becomes a whole tensor; a model's output always does",
    NoteKind.FEATURES.heading: "products of which each rank computes a share of the features",
    NoteKind.PACKED.heading: "which of the values that are needed together share a gather",
    NoteKind.RESHARD.heading: "where a value changes from one split to another",
    NoteKind.HALO.heading: "what convolutions read of other ranks' rows",
    NoteKind.ALL_REDUCE.heading: "sums over the sequence, added up over ranks",
    NoteKind.STRATEGY.heading: "a strategy that was asked for, and why another one is used",
    NoteKind.COMPLEX.heading: "ops that still run on complex tensors",
    "Weights": "with sharded weights: what is resident, gathered and exposed, and the peak",
    "Graph breaks": "why Dynamo broke the model into several graphs; the best is none",
    "Recompiled": "why a graph was compiled again",
    "Estimated time": "compute, collectives, what is not hidden and why, memory, copies",
    "Exchange strategies": "the strategies that were compared, by estimated step time",
    NoteKind.ATTENTION.heading: "the fused op of each attention, or why none takes it",
    "Compile time": "shares of each pass and phase",
    "Options": "every option's value",
}
"""What each section of the page holds, in order; one with nothing to say is left out."""
COLUMNS = (
    *("n", "rows", "heads", "mask", "strategy", "collectives", "sent", "hidden", "runs as"),
    "called at",
)

LOCAL, WHOLE = "local", "not split"
"""The strategy of an attention without an exchange: each rank has all keys of its own queries, or
every rank computes all of it."""


def summary(r: Report, *, short: bool = False) -> str:
    """The page; `short`: only what fits a screen."""
    lines = [
        f"# Graph {r.graph} on rank {r.rank} of {r.ranks}, for {r.target}",
        "",
        str(r.software),
        "",
        *_headline(r),
        "",
        *_attentions(r, short),
        *_notes(r.notes, [k for k in NoteKind if k is not NoteKind.ATTENTION]),
        *_weights(r),
        *_breaks(r),
    ]
    if short:
        return "\n".join(lines)
    lines += [*_time(r), *_strategies(r.strategies), *_notes(r.notes, [NoteKind.ATTENTION])]
    if r.seconds:
        slowest = sorted(r.seconds.items(), key=lambda item: -item[1])
        total = sum(r.seconds.values())
        lines += [f"## Compile time ({total:.1f} s)", ""]
        lines += [", ".join(f"{name} {s / total:.0%}" for name, s in slowest if s / total > 0.005)]
        lines += [""]
    told = ", ".join(f"{k}={v}" for k, v in r.options.items())
    return "\n".join([*lines, "## Options", "", told, ""])


def many(n: int, what: str) -> str:
    """A number of things."""
    return f"{n} {what}" + "s" * (n != 1)


def size(n: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def _percent(share: float) -> str:
    """A share for people; one just below zero, by rounding, is zero."""
    return f"{max(0.0, share):.0%}"


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _headline(r: Report) -> list[str]:
    """What was sharded and how, in three sentences."""
    n, whole = len(r.attentions) + len(r.local), len(r.whole)
    count = Counter(WORDS.get(row.op, row.op) for row in r.collectives)
    known = sum(row.bytes for row in r.collectives if isinstance(row.bytes, int))
    if r.ranks == 1:
        first = f"One rank: nothing is split. {many(whole, 'attention')}."
    elif n + whole == 0:
        first = "**No attention in this graph that can be split**: every rank runs all of it."
    else:
        share = r.ops["sharded"] / max(1, sum(r.ops.values()))
        first = (
            f"**{n} of {n + whole} attentions are split** over {r.ranks} ranks; {share:.0%} of the "
            "ops work on a rank's share of the sequence, the others on whole tensors."
        )
    lines = [first]
    if r.collectives:
        told = ", ".join(many(k, op) for op, k in count.items())
        lines.append(f"Collectives: {told}; each rank passes {size(known)} to them.")
    o = r.overlap
    if o:
        lines.append(
            f"Estimated for {o.device}: a step takes {duration(o.step_after)}, of which the "
            f"device waits {o.waits_after:.1%}; collectives take {duration(o.travel_after)}, "
            f"of which {_percent(o.hidden_after)} is hidden behind compute."
        )
        if r.one_rank:
            lines.append(
                f"On one device it would take {duration(r.one_rank)}: "
                f"{r.one_rank / o.step_after:.2f} times as long."
            )
    return ["  \n".join(lines)]


def _attentions(r: Report, short: bool) -> list[str]:
    """A table with a line for each kind of attention; `short`: sentences, for narrow screens."""
    kinds: dict[str, list[Split]] = {}
    for row in r.attentions:
        kinds.setdefault(str(replace(row, name="", hidden=0.0)), []).append(row)
    rows = [_split(same) for same in kinds.values()]
    for text, n in Counter(_unsent(a, r.ranks) for a in (*r.local, *r.whole)).items():
        rows.append((str(n), *text))
    if not rows:
        return []
    if short:
        return ["## Attention", "", *map(_sentence, rows), ""]
    lines = [
        "## Attention",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    if r.local:
        lines += [
            f"Strategy {LOCAL}: every rank has all keys of its own queries, so nothing is sent; "
            "the rows are those of one rank.",
            "",
        ]
    if r.attentions:
        lines += [
            "Rows: queries (and keys, if these differ), a number for each segment of the sequence. "
            "Collectives, and the bytes that a rank puts into them, are those of one attention.",
            "",
        ]
    return lines


def _split(same: list[Split]) -> tuple[str, ...]:
    a = same[0]
    heads = a.heads if a.heads == a.kv_heads else f"{a.heads}/{a.kv_heads}"
    rows = a.queries if a.queries == a.keys else f"{a.queries}, {a.keys}"
    hidden = sorted(s.hidden for s in same)
    told = _percent(hidden[0])
    if hidden[-1] - hidden[0] >= 0.005:
        told += f" .. {_percent(hidden[-1])}"
    return (
        *(str(len(same)), rows, f"{heads} x {a.width}"),
        "causal" if a.causal else a.mask,
        *(a.strategy, many(a.collectives, a.collective), size(a.bytes), told),
        *(a.runs_as, place(a.called_at)),
    )


def _sentence(row: tuple[str, ...]) -> str:
    n, rows, heads, mask, strategy, exchanges, sent, hidden, runs_as, where = row
    told = [f"{n} x {rows} rows", f"{heads} heads"]
    if mask not in ("", "no"):
        told.append(f"mask {mask}")
    if strategy in (LOCAL, WHOLE):
        told += [strategy]
    elif strategy != "-":
        told += [strategy, f"{exchanges} of {sent} in all, {hidden} hidden"]
    return f"- {', '.join(told)}; runs as {runs_as}; called at {where}"


def _unsent(a: Implementation, ranks: int) -> tuple[str, ...]:
    rows = a.queries if a.queries == a.keys else f"{a.queries}, {a.keys}"
    where = place(a.called_at)
    strategy = "-" if ranks == 1 else LOCAL if a.local else WHOLE
    return (rows, a.heads, a.mask, strategy, "0", "", "", a.runs_as, where)


def _time(r: Report) -> list[str]:
    """What the estimate says: the order, why the device waits, copies."""
    o = r.overlap
    if not o:
        return []
    lines = [
        "## Estimated time",
        "",
        f"- compute {duration(o.compute_after)}, collectives {duration(o.travel_after)}, of "
        f"which {_percent(o.hidden_after)} is hidden; in the model's own order it would be "
        f"{_percent(o.hidden_before)}",
        f"- the step takes {o.step_after / o.step_before:.3f} of its time in the model's own "
        f"order, and {o.peak_after / max(1, o.peak_before):.2f} of the memory for "
        f"intermediate results ({size(o.peak_after)})"
        + (f"; a faster order was over the budget of {1 + o.budget:g}" if o.limited else ""),
    ]
    total: dict[str, float] = defaultdict(float)
    number: Counter = Counter()
    for row in r.collectives:
        if row.exposed_seconds > 0:
            why = row.why_exposed.split(":")[0]
            total[why] += row.exposed_seconds
            number[why] += 1
    lines += [
        f"- not hidden: {many(number[why], 'collective')}, {s / o.step_after:.1%} of the step: "
        f"{why}"
        for why, s in sorted(total.items(), key=lambda item: -item[1])
    ]
    copies: Counter = Counter()
    for a in r.attentions:
        copies.update(asdict(a.copies) if a.copies else {})
    if copies:
        lines.append(
            f"- copies for exchanges: {copies['packing']} to pack, {copies['packing_alone']} of "
            f"them kernels that do nothing else; {copies['unpacking']} to unpack, "
            f"{copies['unpacking_alone']} of them kernels that do nothing else"
        )
    return [*lines, ""]


def _weights(r: Report) -> list[str]:
    """Where the weights are, if a rank holds parts of some."""
    w = r.weights
    if w is None or not w.parts:
        return []
    step = r.overlap.step_after if r.overlap else 0.0
    exposed = f", {w.exposed / step:.1%} of the step" if step else ""
    return [
        "## Weights",
        "",
        f"- resident: {size(w.resident)} of {size(w.whole)} between steps; the least is "
        f"{size(w.least)}. Of {many(w.parts, 'parameter')} a rank has a part, of which {w.kept} "
        "are kept whole",
        f"- gathered: {size(w.gathered)} a step in {many(w.gathers, 'all-gather')}, at most "
        f"{size(w.at_once)} at once; they take {duration(w.seconds)}",
        f"- exposed: {duration(w.exposed)}{exposed}",
        f"- peak: {size(w.peak)} by estimate, with {size(w.inputs)} of inputs, and "
        f"{size(w.results)} of what a step makes",
        "",
    ]


def _strategies(rows: list[Choice]) -> list[str]:
    """What was compared, a line for each kind of attention."""
    lines = []
    for row in rows:
        if len(row.estimates) + len(row.refused) < 2:
            continue
        best = min(row.estimates.values(), default=0.0)
        told = [f"{name} {t / best - 1:+.1%}" for name, t in row.estimates.items() if best]
        why: dict[str, list[str]] = {}
        for name, reason in row.refused.items():
            why.setdefault(reason, []).append(name)
        told += [f"not {' or '.join(names)} ({reason})" for reason, names in why.items()]
        how = "asked for" if row.forced else "chosen"
        lines.append(f"- {len(row.nodes)} x {row.strategy}, {how}; the step with {', '.join(told)}")
    return ["## Exchange strategies", "", *lines, ""] if lines else []


def _notes(notes: list[Note], kinds: Iterable[NoteKind]) -> list[str]:
    lines = []
    for kind in kinds:
        same: dict[tuple[str, str], list[str]] = {}
        for n in notes:
            # Of what is split, the table has said it all.
            if n.kind == kind and not n.text.startswith("sharded;"):
                same.setdefault((f"({n.op}): {n.text}", n.source), []).append(n.node)
        if same:
            lines += [f"## {kind.heading} ({sum(map(len, same.values()))})", ""]
            for (text, source), nodes in same.items():
                who = nodes[0] if len(nodes) == 1 else f"{len(nodes)} x {nodes[0]} .. {nodes[-1]}"
                lines.append(f"- {who} {text}" + (f"\n    at {known(source)}" if source else ""))
            lines.append("")
    return lines


def _breaks(r: Report) -> list[str]:
    lines = []
    if r.graph_breaks:
        lines += [f"## Graph breaks ({sum(r.graph_breaks.values())})", ""]
        lines += ["Code between two graphs runs in Python, on whole tensors.", ""]
        lines += [f"- {n} x {_reason(why)}" for why, n in r.graph_breaks.items()]
        lines += [""]
    if r.recompiles:
        lines += [f"## Recompiled ({len(r.recompiles)})", ""]
        lines += [*(f"- {why}" for why in r.recompiles), ""]
    return lines


def place(source: str) -> str:
    """``file:line`` without its folders."""
    return source.split(": ")[0].rsplit("/", 1)[-1]


def known(source: str) -> str:
    """A source line without the way to the installed packages."""
    return source.rsplit("site-packages/", 1)[-1]


def _reason(text: str) -> str:
    """Dynamo's explanation of a graph break on one line, without the advice."""
    parts = [line.strip() for line in text.splitlines() if line.strip()]
    told = [p for p in parts if p.startswith(("Explanation:", "Developer debug context:"))]
    return " ".join([parts[0] + ".", *told]) if parts else "unknown"
