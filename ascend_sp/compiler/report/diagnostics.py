"""Dumps: what the compiler did, in files that a person reads.

A folder that cannot be written is a warning, never a failed compile.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import fx

from ascend_sp.compiler._pytorch import (
    count,
    debug_dir,
    graph_breaks,
    recompilation,
    trace_log,
    trace_structured,
)
from ascend_sp.compiler.report.facts import Report, collectives, report
from ascend_sp.compiler.report.page import summary
from ascend_sp.compiler.report.picture import picture
from ascend_sp.compiler.report.runnable import change, counts, script
from ascend_sp.graph.context import Implementation, PassContext, source_line
from ascend_sp.graph.layout import GLOBAL_SHAPES, PLACEMENTS
from ascend_sp.graph.origin import made_by
from ascend_sp.passes.exchange import Exchange
from ascend_sp.passes.overlap.timeline import Timelines, chrome_trace

log = logging.getLogger(__name__)
"""``TORCH_LOGS="ascend_sp"`` shows the page of each graph, ``"+ascend_sp"`` the graphs as well."""
FILES = {
    "summary.md": "read this first: its sections are below",
    "dataflow.svg": "the program from top to bottom: shares of the sequence, whole tensors, "
    "collectives; blocks that repeat are drawn once",
    "timeline.json": "estimated times on device and link, before and after ordering; open it in "
    "Perfetto or chrome://tracing",
    "NN_pass.py": "the graph after each pass, headed by the change in op counts; "
    "`python NN_pass.py` runs it in one process on random inputs, `--fake` without memory",
    "placements.txt": "the placement and the origin of every value, with your line",
    "collectives.json": "every collective in order, with elements and bytes",
    "compile_time.json": "seconds of each pass and phase",
    "numerics.txt": "the error of `check_numerics`",
    "suspects.txt": "the nodes that `check_numerics` could not compare, if they are many",
}
"""What the folder of a graph and rank holds."""
_numbers = itertools.count()
_recompiles: list[str] = []
"""Why code was recompiled, in this process."""


def recompiles() -> list[str]:
    """Why code was recompiled in this process so far."""
    return list(_recompiles)


@dataclass
class Dump:
    """The record of one compiled graph on one rank."""

    rank: int
    folder: Path | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    times: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each pass and phase."""
    report: Report | None = None
    """The facts about the finished graph, once there is one to write."""
    wanted: bool = False
    """Whether somebody asks for the report, folder or not."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The configuration as text, for the heads of files."""
    begins: Callable[[str], None] = lambda phase: None
    """Told each pass and phase when it begins."""
    _steps: int = 0
    _counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def create(cls, root: str | None, rank: int) -> Dump:
        """A record that writes to ``root/graph_N/rank_R``, if there is a root."""
        debug = debug_dir()
        if root is None and debug is not None:
            root = os.path.join(debug, "ascend_sp")
        dump = cls(rank)
        times, why = recompilation()
        if times:
            _recompiles.append(f"graph {dump.number}: {why or 'reason unknown'}")
        if root is not None:
            dump.folder = Path(root) / f"graph_{dump.number}" / f"rank_{rank}"
        return dump

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note how long a phase takes, besides the passes."""
        self.begins(phase)
        start = time.perf_counter()
        yield
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - start

    def graph(self, gm: fx.GraphModule, name: str, seconds: float) -> None:
        """Write the graph after a pass."""
        if seconds:
            self.times[name] = seconds
        step, self._steps = self._steps, self._steps + 1
        shown = log.isEnabledFor(logging.DEBUG)
        if self.folder is None and not trace_enabled() and not shown:
            return
        now = counts(gm)
        told = change(self._counts, now) or ["nothing"]
        if step == 0:
            told = [f"{n:5d}  {op}" for op, n in now.most_common()]
        head = [
            f"Graph {self.number} on rank {self.rank} after {name} ({seconds:.4f} s).",
            f"Options: {', '.join(f'{k}={v}' for k, v in self.options.items())}",
            f"{sum(now.values())} ops" + (f"; what {name} changed:" if step else ":"),
            *told,
        ]
        self._counts = now
        try:
            body = script(gm, self.rank, head)
        except Exception as e:
            warnings.warn(f"ascend_sp cannot write the graph after {name}: {e}", stacklevel=2)
            return
        self.write(f"{step:02d}_{name}.py", body)
        self._trace(f"ascend_sp_{step:02d}_{name}", body)
        log.debug("graph %d after %s:\n%s", self.number, name, body)

    def finish(self, gm: fx.GraphModule, ctx: PassContext, options: dict[str, str]) -> None:
        """Write the placements, the collectives, the timeline and the summary."""
        if not self.wanted:  # somebody only asks what would be compiled
            count_up(gm, ctx)
        shown = log.isEnabledFor(logging.INFO)
        if self.folder is None and not trace_enabled() and not self.wanted and not shown:
            return
        self.report = report(gm, ctx, self.number, options, graph_breaks(), recompiles())
        r, lines = self.report, ctx.results.get(Timelines)
        self._make("placements.txt", lambda: placement_table(gm))
        self._make(
            "collectives.json", lambda: json.dumps([asdict(c) for c in r.collectives], indent=1)
        )
        if lines is not None:
            self._make("timeline.json", lambda: json.dumps(chrome_trace(lines)))
        self._make("dataflow.svg", lambda: picture(gm, r, lines))
        text = summary(self.report)
        self.write("summary.md", text)
        self._trace("ascend_sp_summary", text)
        self._trace("ascend_sp_collectives", json.dumps([asdict(c) for c in r.collectives]), "json")
        log.info("%s", text)

    def finish_times(self) -> None:
        """Write what took how long, once lowering is done."""
        self.write("compile_time.json", json.dumps(self.times, indent=1))
        if self.report is not None:
            self.report.seconds = self.times
            self.write("summary.md", summary(self.report))

    def _make(self, name: str, text: Callable[[], str]) -> None:
        """Write one file; what cannot be told of a program is no reason not to run it."""
        if self.folder is None:
            return
        try:
            made = text()
        except Exception as e:
            warnings.warn(f"ascend_sp cannot make {name}: {type(e).__name__}: {e}", stacklevel=2)
            return
        self.write(name, made)

    def write(self, name: str, text: str) -> None:
        """Write one file of the folder, if there is a folder and it can be written."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)
        except OSError as e:
            warnings.warn(f"ascend_sp cannot dump to {self.folder}: {e}", stacklevel=2)
            self.folder = None

    def _trace(self, name: str, payload: str, encoding: str = "string") -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": encoding},
            payload_fn=lambda: payload,
        )


def count_up(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Add a compiled graph to PyTorch's counters of compiles."""
    became = ctx.results.all(Implementation)
    exchanged = {e.name for e in ctx.results.all(Exchange)}
    # Of those that have all keys where the queries are, nothing travels.
    local = {a.attention for a in became if a.local} - exchanged
    count("graphs")
    count("attentions_split", len(exchanged) + len(local))
    count("attentions", len({a.attention for a in became}))
    for row in collectives(gm):
        count(row.op)


def trace_enabled() -> bool:
    """Whether PyTorch writes a structured trace (TORCH_TRACE)."""
    return bool(trace_log.handlers)


def placement_table(gm: fx.GraphModule) -> str:
    """A line a node: name, placement, global and local shape, origin, source line."""
    lines = []
    for node in gm.graph.nodes:
        if PLACEMENTS not in node.meta:
            lines.append(f"{node.name:40} {'-':28} {made_by(node)} {source_line(node)}")
            continue
        places = ", ".join(str(p) for p in node.meta[PLACEMENTS])
        sizes = ", ".join(str(list(s)) for s in node.meta[GLOBAL_SHAPES])
        lines.append(f"{node.name:40} {places:28} {sizes} {made_by(node)} {source_line(node)}")
    return "\n".join(lines) + "\n"
