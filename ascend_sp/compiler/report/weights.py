"""Where a graph's weights are: held between steps, gathered within one, and the peak of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ascend_sp.graph.context import PassContext
from ascend_sp.graph.cost.estimate import bytes_of, shape_of, tensors_of
from ascend_sp.passes.keep_weights import KeptWeights
from ascend_sp.passes.overlap.memory import Memory, made_of_weights
from ascend_sp.passes.overlap.timeline import Timelines
from ascend_sp.runtime.units import mib
from ascend_sp.weights.shard import split_dim


@dataclass(frozen=True)
class Weights:
    """Bytes and estimated seconds of one rank; parameters and buffers of one graph."""

    whole: int
    """Bytes of all of them."""
    resident: int
    """Bytes that this rank holds between steps."""
    least: int
    """The same if no weight stayed whole that can be split."""
    parts: int
    """How many of which it holds a part."""
    kept: int
    """How many of these programs keep whole."""
    gathers: int
    """All-gathers of weights in a step."""
    gathered: int
    """Bytes that these bring to each rank."""
    seconds: float
    """What they take."""
    exposed: float
    """Of that what the device stands still for."""
    at_once: int
    """Bytes of gathered weights that live at once, at most."""
    results: int
    """Bytes of intermediate results that live at once, those of gathered weights included."""
    inputs: int
    """Bytes of inputs that are no weights."""

    @property
    def peak(self) -> int:
        """Bytes at once, at most."""
        return self.resident + self.inputs + self.results

    def remedy(self, memory: int | None) -> str:
        """What to do if that did not fit in `memory` bytes; None if that is not known."""
        text = (
            f"By estimate this graph takes {mib(self.peak)} MiB on a rank, {mib(self.resident)} of "
            f"them weights, {mib(self.results)} what it makes at once."
        )
        if memory is None:
            return f"{text} ascend_sp.shard_weights(model, budget=...) has ranks share weights."
        budget = memory - self.inputs - self.results
        if budget < self.least:
            return (
                f"{text} Of {mib(memory)} MiB too little is left even for the least that a rank "
                f"can hold of the weights, {mib(self.least)}. Take more ranks, or smaller inputs."
            )
        if budget >= self.resident:
            return f"{text} That fits in {mib(memory)} MiB: something else takes the rest."
        return (
            f"{text} Of {mib(memory)} MiB {mib(budget)} are left for weights: "
            f"ascend_sp.shard_weights(model, budget={budget}) would have fitted."
        )


def weights(gm: fx.GraphModule, ctx: PassContext) -> Weights | None:
    """The facts about a program in its final order; None without an order, on one rank."""
    lines = ctx.results.get(Timelines)
    if lines is None:
        return None
    kept = ctx.results.get(KeptWeights) or KeptWeights({}, ())
    nodes = list(gm.graph.nodes)
    wholes = set(kept.nodes)
    whole = resident = least = inputs = 0
    for node in nodes:
        if node.op != "placeholder" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        size = bytes_of(node.meta["val"])
        if node in wholes:
            resident += size
            whole += size
        elif node.name in kept.parameters:
            least += size  # it lies in the whole
        elif node.name in ctx.own_inputs:
            resident += size
            least += size
            whole += size * ctx.topology.size
        elif node.name in ctx.static_inputs:
            resident, whole = resident + size, whole + size
            split = split_dim(shape_of(node.meta["val"]), ctx.topology.size) >= 0
            least += size // ctx.topology.size if split else size
        else:
            inputs += size
    from_weights = made_of_weights(nodes, ctx.static_inputs)
    own = [t for t in lines.after.transfers if t.node in from_weights]
    memory = Memory(nodes)
    return Weights(
        whole=whole,
        resident=resident,
        least=least,
        parts=len(ctx.own_inputs),
        kept=len(kept.nodes),
        gathers=len(own),
        gathered=sum(bytes_of(v) for t in own for v in tensors_of(t.node)),
        seconds=sum(t.seconds for t in own),
        exposed=sum(t.exposed for t in own),
        at_once=memory.peak(nodes, {t.node for t in own}),
        results=memory.peak(nodes),
        inputs=inputs,
    )
