"""A program as stages: what is computed between two attentions, and the attention behind it.

A node's stage is the number of attentions in front of it. In each stage lie the nodes that work on
a rank's share of the sequence, those that every rank runs on whole tensors, and attentions.
Stages that repeat, as the blocks of a model do, become one with a number.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ascend_sp.compiler.report.facts import GATHERS, Collective, Report, Split
from ascend_sp.graph.cost.estimate import is_free
from ascend_sp.graph.origin import origin_of
from ascend_sp.passes.overlap.saving import is_sharded
from ascend_sp.passes.overlap.timeline import Timelines
from ascend_sp.runtime.ops import STARTS, WAIT

SHARDED, WHOLE, ATTENTION = "sharded", "whole", "attention"
WORDS = {
    "addmm": "linear",
    "mm": "linear",
    "native_layer_norm": "layer norm",
    "_to_copy": "cast",
    "constant_pad_nd": "pad",
    "scaled_dot_product_attention": "attention",
}
"""What people call ops."""


@dataclass
class Part:
    """Nodes of one kind in one stage."""

    ops: Counter = field(default_factory=Counter)
    """What takes time, by the name of the op."""
    costs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Estimated seconds, by the name of the op."""
    nodes: int = 0
    seconds: float = 0.0
    modules: set[tuple[str, int]] = field(default_factory=set)
    """The user's modules that they are of: where they lie, and their number in a list."""


@dataclass
class Traffic:
    """Collectives between two parts."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    kind: str = "all-to-all"

    def add(self, row: Collective) -> None:
        """One more, a row of the report."""
        self.count += 1
        self.kind = "all-gather" if row.op == GATHERS else "all-to-all"
        self.bytes += row.bytes if isinstance(row.bytes, int) else 0
        self.seconds += row.seconds
        self.exposed += row.exposed_seconds


@dataclass
class Stage:
    """What lies between two attentions."""

    parts: dict[str, Part] = field(default_factory=lambda: defaultdict(Part))
    attentions: Counter = field(default_factory=Counter)
    """Texts about them."""
    there: Traffic = field(default_factory=Traffic)
    """To the attentions."""
    back: Traffic = field(default_factory=Traffic)
    """From them."""
    gathers: Traffic = field(default_factory=Traffic)
    """From shares to whole tensors."""
    cuts: int = 0
    """Whole values of which a rank takes its share."""
    reads_start: bool = False
    """Whether shares are computed from whole values of the first stage."""

    def signature(self) -> object:
        """What stages that are drawn as one have in common."""
        return (
            sorted((k, sorted(p.ops.items())) for k, p in self.parts.items()),
            sorted(self.attentions.items()),
            [(t.count, t.bytes) for t in (self.there, self.back, self.gathers)],
        )


@dataclass
class Run:
    """Stages that follow each other `times` times."""

    stages: list[Stage]
    times: int = 1
    every: list[Stage] = field(default_factory=list)
    """All of them."""


def stages_of(gm: fx.GraphModule, r: Report, lines: Timelines | None) -> list[Stage]:
    """The stages of a finished program, in order."""
    rows = {row.name: row for row in r.collectives}
    texts = {a.name: _attention(a) for a in r.attentions}
    stages: dict[int, Stage] = defaultdict(Stage)
    level: dict[fx.Node, int] = {}
    kind: dict[fx.Node, str] = {}
    group: dict[fx.Node, str] = {}
    arrived: set[fx.Node] = set()  # behind a wait of its own attention
    seen: set[str] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        own = _group(node)
        # An attention without all-to-alls is one rank's own affair, and no border.
        level[node] = max((level[x] + (x in group and not own) for x in inputs), default=0)
        stage = stages[level[node]]
        if own:
            group[node], kind[node] = own, ATTENTION
            if node.target is WAIT or any(x in arrived and group[x] == own for x in inputs):
                arrived.add(node)
            if own not in seen and own in texts:
                stage.attentions[texts[own]] += 1
            seen.add(own)
            if node.name in rows:
                (stage.back if node in arrived else stage.there).add(rows[node.name])
        else:
            placed = is_sharded(node)
            shares = any(kind[x] != WHOLE for x in inputs) if placed is None else placed
            kind[node] = SHARDED if shares else WHOLE
            if node.name in rows:
                stage.gathers.add(rows[node.name])
            if shares:
                whole = [x for x in inputs if kind[x] == WHOLE and x.op != "placeholder"]
                stage.cuts += len(whole)
                stage.reads_start |= any(level[x] == 0 for x in whole)
        if node.op == "call_function":
            _count(node, stage.parts[kind[node]])
    _times(lines, {n.name: (level[n], kind[n]) for n in level}, stages, group)
    return [stages[i] for i in sorted(stages)]


def fold(stages: Sequence[Stage], longest: int = 4) -> list[Run]:
    """Stages that repeat, one by one or up to `longest` together, as runs."""
    signatures = [s.signature() for s in stages]
    runs: list[Run] = []
    i = 0
    while i < len(stages):
        best, times = 1, 1
        for period in range(1, longest + 1):
            n = 1
            first = signatures[i : i + period]
            while signatures[i + n * period : i + (n + 1) * period] == first:
                n += 1
            if n > 1 and n * period > best * times:
                best, times = period, n
        every = list(stages[i : i + best * times])
        runs.append(Run(every[:best], times, every))
        i += best * times
    return runs


def _group(node: fx.Node) -> str:
    """The attention that `node` was made for."""
    origin = origin_of(node)
    return origin.attention if origin else ""


def _count(node: fx.Node, part: Part) -> None:
    part.nodes += 1
    if node.target not in STARTS and node.target is not WAIT and not is_free(node):
        part.ops[_name(node)] += 1
    where = _module(node)
    if where:
        part.modules.add(where)


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return WORDS.get(name, name.strip("_"))


def _module(node: fx.Node) -> tuple[str, int] | None:
    """The list of the user's modules that `node` comes from, and the place in it."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        words = [w for w in re.findall(r"\w+", path) if w not in ("__dict__", "_modules")]
        words = words[2:] if words[:1] in (["L"], ["G"]) else words  # L['self']
        n = next((i for i, w in enumerate(words) if w.isdecimal()), None)
        if n:
            return ".".join(words[:n]), int(words[n])
    return None


def _times(
    lines: Timelines | None,
    where: dict[str, tuple[int, str]],
    stages: dict[int, Stage],
    group: dict[fx.Node, str],
) -> None:
    """Estimated seconds of each part; attentions have other nodes now than in the timeline."""
    if lines is None:
        return
    levels = {name: where[n.name][0] for n, name in group.items()}
    for task, node in zip(lines.after.tasks, lines.after.nodes, strict=True):
        if task.transfer:
            continue
        place = where.get(node.name)
        if place is None:
            own = _group(node)
            if own not in levels:
                continue
            place = levels[own], ATTENTION
        part = stages[place[0]].parts[place[1]]
        part.seconds += task.seconds
        part.costs[_name(node)] += task.seconds


def _attention(a: Split) -> str:
    rows = a.queries if a.queries == a.keys else f"{a.queries} to {a.keys}"
    mask = ", causal" if a.causal else f", mask {a.mask}" if a.mask != "no" else ""
    head = f"{rows} rows, {a.heads} heads x {a.width}"
    return f"{head}\n{a.strategy}; {a.runs_as}{mask}"
