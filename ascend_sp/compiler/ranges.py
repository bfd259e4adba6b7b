"""Ranges in PyTorch's profiler, named so that a person knows what they are.

A range is opened only while a profiler runs. The whole program of a graph is one, whatever the
target; with the eager target so is each collective, each wait for one, and each attention. In the
other targets these are inside of what the target compiled: `torch.profiler` shows them by the names
of their ops (``_c10d_functional::all_to_all_single``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.profiler import record_function

from ascend_sp.compiler._pytorch import profiling
from ascend_sp.passes.context import caller_line
from ascend_sp.passes.emitter import ORIGIN
from ascend_sp.runtime.collectives import STARTS, WAIT
from ascend_sp.runtime.ops import attention

WORDS = {
    "all_to_all_single": "all-to-all",
    "all_gather_into_tensor": "all-gather",
    "all_reduce": "all-reduce",
}
"""What people call collectives."""
ATTENDS = ("scaled_dot_product_attention", "fusion_attention", "fused_infer_attention")


def ranged(
    run: Callable[[list[Any]], Sequence[Any]], name: str
) -> Callable[[list[Any]], Sequence[Any]]:
    """`run` as a range of the profiler."""

    def call(args: list[Any]) -> Sequence[Any]:
        if not profiling():
            return run(args)
        with record_function(name):
            return run(args)

    return call


def names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """What the nodes that one looks for in a profile are called."""
    out = {}
    for node in gm.graph.nodes:
        if node.target in STARTS:
            val = node.args[0].meta["val"]  # type: ignore[union-attr]
            size = f", {val.numel()} elements" if isinstance(val.numel(), int) else ""
            out[node] = f"{WORDS[node.target._opname]}{size}{_of(node)}"
        elif node.target is WAIT and isinstance(node.args[0], fx.Node):
            start = node.args[0]
            out[node] = f"wait for {WORDS[start.target._opname]}{_of(start)}"  # type: ignore[union-attr]
        elif node.target is attention or any(w in str(node.target) for w in ATTENDS):
            out[node] = f"attention{_of(node)}"
    return {node: f"ascend_sp: {name}" for node, name in out.items()}


def _of(node: fx.Node) -> str:
    origin = node.meta.get(ORIGIN, "")
    made = f" of {origin.partition('(')[2].removesuffix(')')}" if origin else ""
    place = caller_line(node).split(": ")[0].rsplit("/", 1)[-1]
    return made + (f" at {place}" if place else "")


class Interpreter(fx.Interpreter):
    """Runs a graph node by node, ranges around those that have a name."""

    def __init__(self, gm: fx.GraphModule, named: dict[fx.Node, str]) -> None:
        super().__init__(gm)
        self.named = named

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        name = self.named.get(n)
        if name is None:
            return super().run_node(n)
        with record_function(name):
            return super().run_node(n)
