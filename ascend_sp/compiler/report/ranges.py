"""Ranges in PyTorch's profiler, named so that a person knows what they are.

A range is opened only while a profiler runs. The whole program of a graph is one, whatever the
target; with the eager target and Inductor so is each collective, each wait for one, and each
attention. In Ascend's graphs these are inside of what the target compiled: its own profiler shows
them by the names of their ops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import fx
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function

from ascend_sp.compiler._pytorch import profiling
from ascend_sp.graph.context import caller_line
from ascend_sp.graph.origin import origin_of
from ascend_sp.runtime.ops import STARTS, WAIT, attention

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
    origin = origin_of(node)
    made = f" of {origin.of}" if origin else ""
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


class Calls(TorchFunctionMode):
    """Ranges around the calls of ops in compiled Python code, by their order in the program.

    Inductor keeps the order of collectives, and of attentions; a wait is known by what it waits
    for. What is compiled into a kernel, or called besides, gets no range. A mode of functions sees
    the calls of Python code before they are dispatched; one of dispatch would have the profiler
    count each op twice.

    Args:
        gm: the program, before it is lowered.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        named = names(gm)
        self.order: dict[str, list[tuple[str, str]]] = defaultdict(list)
        """For each kind of call the names of the call and of the wait for its result."""
        for node, name in named.items():
            if node.target is not WAIT:
                wait = next((named[user] for user in node.users if user in named), "")
                self.order[_kind(node.target)].append((name, wait))
        self.left: dict[str, Iterator[tuple[str, str]]] = {}
        self.waits: dict[int, str] = {}

    def __enter__(self) -> Calls:
        """Begin at the first call."""
        self.left = {kind: iter(calls) for kind, calls in self.order.items()}
        self.waits = {}
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one op."""
        kind, wait = _kind(func), ""
        if kind == WAIT._opname:
            name = self.waits.pop(id(args[0]), "")
        else:
            name, wait = next(self.left.get(kind, iter(())), ("", ""))
        with record_function(name) if name else nullcontext():
            out = func(*args, **(kwargs or {}))
        if wait:
            self.waits[id(out)] = wait
        return out


def _kind(op: Any) -> str:
    """What calls of one sort have in common, whatever variant the target makes of an op."""
    name = getattr(op, "_opname", "")
    kinds = (*WORDS, WAIT._opname)
    return next(
        (k for k in kinds if name.startswith(k)), "attention" if "attention" in name else ""
    )
