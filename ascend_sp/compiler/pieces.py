"""Whether splitting a model pays, over all graphs that Dynamo has made of it so far.

A graph takes and returns whole tensors. Where Dynamo breaks a model into many, each gathers what it
hands on, and those without an attention are not split at all. That is told once there is a graph
that is split and the estimates say that little comes of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import fx, nn

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.report.page import duration, known, size
from ascend_sp.graph.context import PassContext
from ascend_sp.passes.overlap.saving import Saving
from ascend_sp.runtime._pytorch import not_compiled
from ascend_sp.runtime.unsplit import Unsplit

WORTH = 0.5
"""Share of what a perfect split would save, below which a model in pieces is told of."""
LARGE = 10e-3
"""Seconds of a step on one device from which a model in one graph is told that it loses by the
split: a smaller one is a test."""
SMALL = 1e-3
"""Seconds below which a step is launches and latency, in pieces or not."""
SHOWN = 4
"""Reasons for breaks that are told."""


@dataclass
class Pieces:
    """The graphs of one model."""

    name: str = "the model"
    savings: dict[int, Saving] = field(default_factory=dict)
    """By the number of the graph."""
    broken: Counter[str] = field(default_factory=Counter)
    """Why Dynamo broke graphs off, with the places, and how often."""
    others: Counter[str] = field(default_factory=Counter)
    """Why Dynamo broke what had no graph yet."""
    frames: set[int | None] = field(default_factory=set)
    """The pieces of code that graphs are from."""
    told: bool = False
    """Whether that little comes of the split has been said."""

    def tell(self, graph: int, ctx: PassContext) -> None:
        """Warn, or raise, if in a compiled graph nothing is split, or if it does not pay.

        Args:
            graph: its number.
            ctx: what the passes left.

        Raises:
            UnshardedError: ``on_unsharded="error"``.
        """
        error = ctx.on_unsharded == "error"
        found = ctx.results.get(Unsplit)
        if found is not None:
            found.tell(error=error)
        found = self.found(graph, ctx)
        if found is None or (self.told and not error):
            return
        if error:
            self.savings.clear()  # what is compiled after somebody has caught it begins anew
        found.tell(error=error)
        self.told = True

    def found(self, graph: int, ctx: PassContext) -> Unsplit | None:
        """What there is to say of the graphs so far, one more included."""
        own = ctx.results.get(Saving)
        if own is None:
            return None
        self.savings[graph] = own
        whole = sum(s.whole for s in self.savings.values())
        step = sum(s.step for s in self.savings.values())
        # Where code in front of a break made no graph, there is none that was broken off.
        in_pieces = bool(self.broken) or (len(self.frames) > 1 and bool(self.others))
        if in_pieces:
            perfect = whole * (1 - 1 / ctx.topology.size)
            enough = whole - step > WORTH * perfect
        else:
            enough = step < whole or whole < LARGE
        if enough or not any(s.split for s in self.savings.values()):
            return None
        gain = f"splitting {self.name} " + (
            "costs more than it saves" if step >= whole else "saves little"
        )
        estimate = self._estimate(whole, step, ctx)
        if in_pieces:
            return self._in_pieces(gain, estimate, whole)
        return Unsplit(
            ["costs more than it saves"],
            f"{gain}. {estimate} What is gathered, and why, is in summary.md of the dump "
            "(dump_dir). Fewer ranks (degree) lose less; if the estimate is wrong for this "
            "machine, cost_model takes a file that `ascend_sp calibrate` wrote.",
        )

    def _estimate(self, whole: float, step: float, ctx: PassContext) -> str:
        seconds = sum(s.gathers for s in self.savings.values())
        sent = sum(s.gathered for s in self.savings.values())
        gathers = f"; all-gathers, of {size(sent)} from each rank, take {duration(seconds)}"
        return (
            f"By estimate for {ctx.estimator().device.name}, a step takes {duration(step)} on each "
            f"of {ctx.topology.size} ranks and {duration(whole)} on one device"
            f"{gathers if sent else ''}."
        )

    def _in_pieces(self, gain: str, estimate: str, whole: float) -> Unsplit:
        reasons = self.broken or self.others
        told = [f"  {n} x {_shown(why)}" for why, n in reasons.most_common(SHOWN)]
        if len(reasons) > SHOWN:
            told.append(f"  and {len(reasons) - SHOWN} more, see summary.md of the dump (dump_dir)")
        small = " So small a model may not gain in one graph either." if whole < SMALL else ""
        return Unsplit(
            {f"in pieces: {why.splitlines()[0]}" for why in reasons},
            f"{gain}, since Dynamo has broken it into pieces ({len(self.savings)} graphs so far). "
            "Each gathers what it returns, and in those without an attention nothing is split. "
            f"{estimate}{small} Broken by:\n"
            + "\n".join(told)
            + "\nCompile the model as one graph: switch off what breaks it (hooks that offload or "
            "cast single layers, caches), or use a form of it that does not. docs/combinations.md "
            "says what goes with what; torch.compile(..., fullgraph=True) stops at each place.",
        )


def _shown(why: str) -> str:
    """A reason for a break, its place without the way to the installed packages."""
    text, at, place = why.partition("\n    at ")
    return text + at + known(place)


_models: WeakKeyDictionary[nn.Module, Pieces] = WeakKeyDictionary()
_breaks: Counter[str] = Counter()
"""Dynamo's, up to the last graph that we were given."""


def pieces_of_running(gm: fx.GraphModule) -> Pieces:
    """The record of the model that is being called, with a further graph, `gm`, of Dynamo's."""
    model = _pytorch.running_module()
    if model is None:
        pieces = Pieces()
    elif model in _models:
        pieces = _models[model]
    else:
        pieces = _models[model] = Pieces(type(not_compiled(model)).__name__)
    now: Counter[str] = Counter()
    for why, n in _pytorch.graph_breaks().items():
        now[_pytorch.in_short(why)] += n
    pieces.others.update(now - _breaks)
    _breaks.clear()
    _breaks.update(now)
    broken = _pytorch.broken_by(gm)
    if broken:
        pieces.broken[broken] += 1
    pieces.frames.add(_pytorch.frame())
    return pieces
