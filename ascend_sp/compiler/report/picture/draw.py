"""The condensed program as an SVG: shares of the sequence in the middle, whole tensors at the left.

Time goes down. Boxes are as long as their text; a bar in each says what share of the step it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from ascend_sp.compiler.report.facts import Report
from ascend_sp.compiler.report.page import duration, size
from ascend_sp.compiler.report.picture.condense import (
    ATTENTION,
    SHARDED,
    WHOLE,
    Part,
    Run,
    Traffic,
)

FILL = {SHARDED: "#cfe3f7", WHOLE: "#fbdfbd", ATTENTION: "#9cc5ec"}
EDGE = {SHARDED: "#2f6fb0", WHOLE: "#c77a1a", ATTENTION: "#1b4f86"}
SENT, WAITED, CUT = "#3a7d44", "#c0392b", "#9a8f80"
LEFT, WIDE, MIDDLE, BOX, RIGHT = 30, 250, 400, 400, 130
"""Left column: where, how wide; middle column: where, how wide; room at the right."""
WIDTH = MIDDLE + BOX + RIGHT
ARROW = MIDDLE + 60
"""Where arrows between boxes of the middle column are."""
SPINE = LEFT + WIDE + 22
"""Where whole values go down."""
GAP = 46
"""Room for an arrow and what it says."""
LINE = 16


def draw(runs: Sequence[Run], r: Report) -> str:
    """The picture."""
    return _Drawing(runs, r).svg()


class _Drawing:
    def __init__(self, runs: Sequence[Run], r: Report) -> None:
        self.runs, self.r = runs, r
        self.y = 0.0
        self.back: list[str] = []
        """What lies behind the rest."""
        self.out: list[str] = []
        self.cuts: list[float] = []
        parts = [p for run in runs for s in run.every for p in s.parts.values()]
        self.step = (r.overlap.step_after if r.overlap else 0) or sum(p.seconds for p in parts)

    def svg(self) -> str:
        self._head()
        whole = self._first_whole()
        came: Traffic | None = None
        for run in self.runs:
            top = self.y
            for i, stage in enumerate(run.stages):
                every = run.every[i :: len(run.stages)]
                sharded = _sum([s.parts[SHARDED] for s in every if SHARDED in s.parts])
                if sharded.nodes:
                    if came is not None:
                        self._arrow(came)
                    box = self.y
                    height = self._box(sharded, stage.parts[SHARDED])
                    if stage.reads_start and whole:
                        self._cut(box + height / 2)
                    self._whole(stage.gathers, stage is self.runs[0].stages[0], every, box, height)
                    came = None
                if stage.attentions:
                    self._arrow(_mean([s.there for s in every]))
                    attends = _sum([s.parts[ATTENTION] for s in every])
                    self._attention(stage.attentions, attends)
                    came = _mean([s.back for s in every])
            if run.times > 1:
                self._times(top, run)
        if self.cuts:
            self._spine()
        height = self.y + 24
        style = (
            "text{font-family:-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;"
            "font-size:12px;fill:#222}.b{font-weight:600}.s{font-size:11px;fill:#555}"
            ".t{font-size:17px;font-weight:600}"
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}"><style>{style}</style>'
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
            + "".join([*self.back, *self.out])
            + "</svg>\n"
        )

    # Pieces, from the top.

    def _head(self) -> None:
        r, o = self.r, self.r.overlap
        n = len(r.attentions)
        split = f"{n} attentions split over {r.ranks} ranks" if n else "Nothing is split"
        self._text(LEFT, 32, f"{split}, seen from rank {r.rank}", "t")
        if o:
            told = f"estimated for {o.device}: {duration(o.step_after)} a step, of which the "
            told += f"device waits {o.waits_after:.1%}; of the collectives' time "
            self._text(LEFT, 52, f"{told}{o.hidden_after:.0%} is hidden behind compute", "s")
        for x, kind, text in (
            (LEFT, WHOLE, "whole tensors, alike on every rank"),
            (LEFT + 235, SHARDED, "this rank's share of the sequence"),
            (LEFT + 465, ATTENTION, "all rows, this rank's heads"),
        ):
            self.out.append(_rect(x, 66, 14, 14, FILL[kind], EDGE[kind], 2))
            self._text(x + 20, 78, text, "s")
        for x, color, text in (
            (LEFT, SENT, "collective, mostly hidden"),
            (LEFT + 235, WAITED, "collective, mostly waited for"),
        ):
            self.out.append(_path(f"M{x} 94h14", color, 3))
            self._text(x + 20, 98, text, "s")
        x = LEFT + 465
        self.out.append(_rect(x, 92, 14, 5, EDGE[SHARDED], "none", 2))
        self._text(x + 20, 98, "share of the step's time", "s")
        self.y = 122

    def _first_whole(self) -> bool:
        """What every rank computes whole from the start."""
        first = self.runs[0].stages[0].parts.get(WHOLE)
        if first is None or not first.nodes:
            return False
        lines = self._lines(first, first, WIDE)
        self._frame(LEFT, WIDE, WHOLE, self.y, lines, first.seconds)
        return True

    def _box(self, every: Part, one: Part) -> float:
        lines = self._lines(every, one, BOX)
        height = self._height(lines)
        self._frame(MIDDLE, BOX, SHARDED, self.y, lines, every.seconds)
        self.y += height
        return height

    def _attention(self, texts: Counter, part: Part) -> None:
        lines = [
            line
            for text, n in texts.items()
            for line in (f"{n} x {text}" if n > 1 else text).split("\n")
        ]
        lines[0] = f"attention, {lines[0]}"
        self._frame(MIDDLE, BOX, ATTENTION, self.y, lines, part.seconds)
        self.y += self._height(lines)

    def _whole(
        self, gathers: Traffic, first: bool, every: Sequence, top: float, height: float
    ) -> None:
        """What is gathered in this stage, and what runs on it."""
        whole = _sum([s.parts[WHOLE] for s in every if WHOLE in s.parts])
        if not gathers.count and (first or not whole.nodes):
            return
        one = every[0].parts.get(WHOLE, whole)
        lines = ["runs whole", *self._lines(whole, one, WIDE)] if one.ops else ["result"]
        y = top + height + 30 if gathers.count else top
        if gathers.count:
            color, text = _said(gathers)
            down = f"M{ARROW} {top + height}V{y + 18}H{LEFT + WIDE + 6}"
            self.out.append(_path(down, color, 3, arrow=True))
            self._text(ARROW + 12, y + 14, text)
        self._frame(LEFT, WIDE, WHOLE, y, lines, whole.seconds)
        self.y = max(self.y, y + self._height(lines))

    def _arrow(self, traffic: Traffic) -> None:
        color, text = _said(traffic)
        self.out.append(_path(f"M{ARROW} {self.y}V{self.y + GAP - 8}", color, 3, arrow=True))
        self._text(ARROW + 12, self.y + GAP / 2 + 2, text)
        self.y += GAP

    def _cut(self, y: float) -> None:
        """An arrow from the whole values of the start into a box whose middle is at `y`."""
        self.cuts.append(y)
        begin = f"M{SPINE} {y}H{MIDDLE - 8}"
        self.out.append(_path(begin, CUT, 1.5, arrow=True, dashed=True))

    def _spine(self) -> None:
        """What the arrows of `_cut` come from."""
        first, last = self.cuts[0], self.cuts[-1]
        self.back.append(_path(f"M{LEFT + WIDE} {first}H{SPINE}V{last}", CUT, 1.5, dashed=True))
        self._text(SPINE + 6, first + 16, "cut, not sent", "s")

    def _times(self, top: float, run: Run) -> None:
        """A frame around stages that repeat."""
        y, height = top + 5, self.y - top + 5
        self.back.append(_rect(MIDDLE - 14, y, BOX + 28, height, "#f3f6f9", "#b8c7d6", 10))
        self._text(MIDDLE + BOX + 26, y + height / 2 + 6, f"x {run.times}", "t")

    # Text.

    def _lines(self, every: Part, one: Part, width: float) -> list[str]:
        """Where the nodes of a box are from, and what they do; the dearest first."""
        room = int(width / 7.4)
        names: dict[str, set[int]] = {}
        for name, n in every.modules:
            names.setdefault(name, set()).add(n)
        lines = []
        for name, numbers in sorted(names.items(), key=lambda item: -len(item[1])):
            low, high = min(numbers), max(numbers)
            lines.append(f"{name} {low}" + (f" to {high}" if high > low else ""))
        if len(lines) > 3:
            lines = [*lines[:2], f"and {len(lines) - 2} more"]
        dear = sorted(one.ops, key=lambda op: (-one.costs.get(op, 0.0), -one.ops[op]))
        told = [f"{one.ops[op]} {op}" if one.ops[op] > 1 else op for op in dear[:5]]
        if len(dear) > 5:
            told[4:] = [f"{len(dear) - 4} other kinds"]
        return [*lines, *_wrapped(", ".join(told) or "only views", room)]

    def _height(self, lines: Sequence[str]) -> float:
        return LINE * len(lines) + 24

    def _frame(
        self, x: float, width: float, kind: str, y: float, lines: Sequence[str], seconds: float
    ) -> None:
        height = self._height(lines)
        self.out.append(_rect(x, y, width, height, FILL[kind], EDGE[kind], 6))
        for i, line in enumerate(lines):
            room = int(width / (6.7 if i else 7.6))  # the first is bold
            short = line if len(line) <= room else line[: room - 1] + "…"
            self._text(x + 10, y + 18 + i * LINE, short, "" if i else "b")
        share = seconds / self.step if self.step else 0.0
        if share:
            bar = max(1.0, (width - 70) * min(1.0, share))
            self.out.append(_rect(x + 10, y + height - 12, width - 70, 5, "white", "none", 2))
            self.out.append(_rect(x + 10, y + height - 12, bar, 5, EDGE[kind], "none", 2))
            self._text(x + width - 54, y + height - 6, f"{share:.1%}", "s")

    def _text(self, x: float, y: float, text: str, style: str = "") -> None:
        css = f' class="{style}"' if style else ""
        self.out.append(f'<text x="{x:.1f}" y="{y:.1f}"{css}>{escape(text)}</text>')


def _said(t: Traffic) -> tuple[str, str]:
    """The color of an arrow, and what stands beside it."""
    if not t.count:
        return EDGE[SHARDED], ""
    many = f"{t.count} {t.kind}s" if t.count > 1 else t.kind
    text = f"{many}, {size(t.bytes)}"
    if t.seconds:
        text += f", {max(0.0, 1 - t.exposed / t.seconds):.0%} hidden"
    return WAITED if t.exposed > 0.5 * t.seconds else SENT, text


def _sum(parts: Sequence[Part]) -> Part:
    out = Part()
    for p in parts:
        out.ops.update(p.ops)
        out.nodes += p.nodes
        out.seconds += p.seconds
        out.modules |= p.modules
    return out


def _mean(all_: Sequence[Traffic]) -> Traffic:
    """The first one, with the times of all."""
    n = len(all_)
    return Traffic(
        all_[0].count,
        all_[0].bytes,
        sum(t.seconds for t in all_) / n,
        sum(t.exposed for t in all_) / n,
        all_[0].kind,
    )


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines[:2]


def _rect(
    x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: float
) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def _path(d: str, color: str, width: float, *, arrow: bool = False, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    head = ""
    if arrow:
        mark = f"h{color[1:]}{int(width)}"
        head = f' marker-end="url(#{mark})"'
        defs = (
            f'<defs><marker id="{mark}" viewBox="0 0 10 10" refX="5" refY="5" markerWidth="9" '
            f'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L10 5L0 10z"'
            f' fill="{color}"/></marker></defs>'
        )
    else:
        defs = ""
    return f'{defs}<path d="{d}" fill="none" stroke="{color}" stroke-width="{width}"{dash}{head}/>'
