"""What a pass is told, and what it tells back."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import fx

from ascend_sp.graph.attention import Attention
from ascend_sp.graph.cost.device import find
from ascend_sp.graph.cost.estimate import Estimator
from ascend_sp.graph.layout import PLACEMENTS, REPLICATE
from ascend_sp.graph.origin import exchange_of
from ascend_sp.runtime.npu import DEVICE, Ascend
from ascend_sp.runtime.topology import SINGLE, Topology

T = TypeVar("T")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>.+)')

_PYTORCH = os.path.dirname(torch.__file__) + os.sep


def source_line(node: fx.Node) -> str:
    """``file:line: code`` of the user's statement that `node` came from, or ``""``."""
    return line_of(node.meta.get("stack_trace"))


def line_of(stack_trace: str | None) -> str:
    """The same of what FX keeps in ``meta["stack_trace"]``."""
    frames = _FRAME.findall(stack_trace or "")
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f"{file}:{line}: {code.strip()}"


def caller_line(node: fx.Node) -> str:
    """`source_line` of the place that called the file of `source_line`; itself if nobody did."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line, code in reversed(frames):
        if file != frames[-1][0]:
            return f"{file}:{line}: {code.strip()}"
    return source_line(node)


def own_line(node: fx.Node) -> str:
    """`source_line` of the last statement on the way to `node` that is not PyTorch's."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_PYTORCH)]
    file, line, code = (own or frames or [("", "", "")])[-1]
    return f"{file}:{line}: {code.strip()}" if file else ""


def constant(value: Any) -> Any:
    """An argument of a Dynamo node as a number, where it is one.

    With ``dynamic=True`` floats arrive as symbols; this guards on them.
    """
    known = value.meta.get("example_value") if isinstance(value, fx.Node) else value
    if isinstance(known, torch.SymFloat):
        return float(known)
    return known if isinstance(known, (int, float)) else value


def is_random(target: Any) -> bool:
    """Whether an op draws random numbers, by PyTorch's own tag."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


class NoteKind(str, Enum):
    """What a note is about, in the order of the page, with the heading that it has there."""

    TARGET = "target", "Targets that could not take the graph"
    CAPACITY = "capacity", "Lengths and capacities"
    UNSHARDED = "unsharded", "Not split, and why"
    GATHER = "gather", "Gathered"
    PACKED = "packed", "Gathered in one, or not"
    FEATURES = "features", "Split by output features"
    RESHARD = "reshard", "Resharded"
    HALO = "halo", "Rows of neighbours"
    ALL_REDUCE = "all_reduce", "Sums over ranks"
    STRATEGY = "strategy", "Strategies that were not possible"
    COMPLEX = "complex", "Complex numbers left"
    ATTENTION = "attention", "Attention in detail"

    heading: str

    def __new__(cls, value: str, heading: str) -> NoteKind:
        """A member is a string, so that JSON can hold it."""
        made = str.__new__(cls, value)
        made._value_, made.heading = value, heading
        return made

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Note:
    """Something that a person should know about one node."""

    kind: NoteKind
    node: str
    op: str
    text: str
    source: str

    def __str__(self) -> str:
        where = f"\n    at {self.source}" if self.source else ""
        return f"{self.kind}: {self.node} ({self.op}): {self.text}{where}"


@dataclass(frozen=True)
class Implementation:
    """What became of an attention."""

    node: str
    exchange: str
    """Name of the attention of which it is a part, if rows and heads changed hands for that one."""
    local: bool
    """Whether it attends rows of this rank without an exchange, all that they attend to at hand."""
    runs_as: str
    heads: str
    """Number and width, ``24 x 128``."""
    mask: str
    queries: str
    keys: str
    source: str
    called_at: str

    @property
    def attention(self) -> str:
        """Name of the user's attention."""
        return self.exchange or self.node


class Results:
    """What passes leave for later ones and for the report, by its type."""

    def __init__(self, found: Mapping[type, list[Any]] | None = None) -> None:
        self._found = {kind: list(all_) for kind, all_ in (found or {}).items()}

    def add(self, result: object) -> None:
        """Leave one more of its kind."""
        self._found.setdefault(type(result), []).append(result)

    def put(self, result: object) -> None:
        """Leave the only one of its kind."""
        self._found[type(result)] = [result]

    def all(self, kind: type[T]) -> list[T]:
        """All of a kind, in the order in which they were left."""
        return list(self._found.get(kind, ()))

    def get(self, kind: type[T]) -> T | None:
        """The one that was left last; None if there is none."""
        return self._found[kind][-1] if self._found.get(kind) else None

    def copy(self) -> Results:
        """The same results; what is added to one is not in the other."""
        return Results(self._found)


@dataclass
class PassContext:
    """State that the passes of one compile share."""

    topology: Topology = SINGLE
    device: str = "cpu"
    """Type of the device that the graph runs on."""
    target: str = "eager"
    """Name of the lowering target."""
    ascend: Ascend = field(default_factory=Ascend)
    """The Ascend software, if `device` is ``"npu"``."""
    converts: Callable[[Any], bool] | None = None
    """Whether the target can take an op; None if it takes all."""
    attention: str = "auto"
    on_unsharded: str = "fallback"
    overlap: bool = True
    """Whether collectives are hidden behind compute."""
    strategy: str = "auto"
    """How attentions exchange rows for heads; see `overlap.strategies.parse`."""
    split_features: str = "auto"
    """Whether products without tokens are split by output features: ``auto``, ``on``, ``off``."""
    memory_budget: float = 0.1
    """Share by which an order may raise the peak of memory."""
    cost_model: str = "auto"
    """The device whose rates estimates are from; see `cost.device.find`."""
    static_inputs: frozenset[str] = frozenset()
    """Names of the placeholders that are parameters or buffers."""
    own_inputs: frozenset[str] = frozenset()
    """Names of those of which each rank has a part of its own, which the graph gathers."""
    room: int = 0
    """Bytes of gathered weights that the program may keep whole, besides the ranks' parts."""
    kept_inputs: frozenset[str] = frozenset()
    """Names of those of `own_inputs` whose wholes another program keeps already."""
    notes: list[Note] = field(default_factory=list)
    results: Results = field(default_factory=Results)

    @property
    def npu_graph(self) -> bool:
        """Whether the graph becomes one of Ascend's graphs, not calls of single ops."""
        return self.device == DEVICE and self.target in ("torchair", "npugraph_ex")

    @property
    def fuses(self) -> bool:
        """Whether the target merges ops into kernels of its own."""
        return self.target == "inductor"

    def estimator(self, *, fuses: bool | None = None) -> Estimator:
        """Costs of the nodes of a graph, as the target runs them, or with or without fusing."""
        device = find(self.cost_model, self.device, self.ascend.soc)
        return Estimator(device, self.topology.size, self.fuses if fuses is None else fuses)

    def runs_as(self, attention: fx.Node, implementation: str) -> None:
        """Put in the report what a node that attends has become."""
        given = Attention.of(attention)
        q, k = (x.meta["val"].shape for x in (given.q, given.k))
        mask = given.attn_mask
        shape = "no" if mask is None else str(list(mask.meta["val"].shape))
        self.results.add(
            Implementation(
                node=attention.name,
                exchange=exchange_of(attention),
                # Placed is what runs without an exchange: rows of this rank, or all of them.
                local=any(p != REPLICATE for p in attention.meta.get(PLACEMENTS, ())),
                runs_as=implementation,
                heads=f"{q[-3] if len(q) > 2 else 1} x {q[-1]}",
                mask="causal" if given.is_causal else shape,
                queries=str(q[-2]),
                keys=str(k[-2]),
                source=source_line(attention),
                called_at=caller_line(attention),
            )
        )

    def note(self, kind: NoteKind, node: fx.Node, text: str) -> None:
        """Put a line about `node` in the report."""
        self.notes.append(Note(kind, node.name, str(node.target), text, source_line(node)))
