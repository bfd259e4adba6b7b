"""What a pass is told, and what it tells back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_sp.passes.cost.device import find
from ascend_sp.passes.cost.estimate import Estimator
from ascend_sp.passes.sharding.layout import PLACEMENTS, REPLICATE
from ascend_sp.runtime.npu import DEVICE, Ascend
from ascend_sp.runtime.ops import attention_arguments
from ascend_sp.runtime.topology import SINGLE, Topology

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \S+\n\s*(?P<code>.+)')

IMPLEMENTATIONS = "implementations"
"""Key of ``ctx.analysis``: what became of each attention; see `PassContext.runs_as`."""


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


@dataclass(frozen=True)
class Note:
    """Something that a person should know about one node."""

    kind: str
    """``target``, ``attention``, ``unsharded``, ``gather``, ``packed``, ``reshard``,
    ``all_reduce``, ``strategy`` or ``complex``."""
    node: str
    op: str
    text: str
    source: str

    def __str__(self) -> str:
        where = f"\n    at {self.source}" if self.source else ""
        return f"{self.kind}: {self.node} ({self.op}): {self.text}{where}"


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
    memory_budget: float = 0.1
    """Share by which an order may raise the peak of memory."""
    cost_model: str = "auto"
    """The device whose rates estimates are from; see `cost.device.find`."""
    static_inputs: frozenset[str] = frozenset()
    """Names of the placeholders that are parameters or buffers."""
    notes: list[Note] = field(default_factory=list)
    analysis: dict[str, Any] = field(default_factory=dict)
    """Results that one pass leaves for a later one, by name."""

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
        given = attention_arguments(attention)
        q, k = (given[x].meta["val"].shape for x in ("q", "k"))
        mask = given["attn_mask"]
        shape = "no" if mask is None else str(list(mask.meta["val"].shape))
        self.analysis.setdefault(IMPLEMENTATIONS, []).append(
            {
                # What an earlier pass made of one of the user's nodes is called after that pass.
                "node": attention.meta.get("ascend_sp_origin", attention.name),
                # Placed is what runs without an exchange: rows of this rank, or all of them.
                "local": any(p != REPLICATE for p in attention.meta.get(PLACEMENTS, ())),
                "runs_as": implementation,
                "heads": f"{q[-3] if len(q) > 2 else 1} x {q[-1]}",
                "mask": "causal" if given["is_causal"] else shape,
                "queries": str(q[-2]),
                "keys": str(k[-2]),
                "source": source_line(attention),
                "called_at": caller_line(attention),
            }
        )

    def note(self, kind: str, node: fx.Node, text: str) -> None:
        """Put a line about `node` in the report."""
        self.notes.append(Note(kind, node.name, str(node.target), text, source_line(node)))
