"""What a graph computes on the CPU, taken out of it: Ascend's graphs hold the device's part only.

Models keep tables in host memory (rotary frequencies, for instance), slice them there, and copy
the slice to the device. A captured ACL graph would replay the copy of the first call, and GE would
take the copies for inputs of its own. So what depends on CPU tensors alone runs before the graph,
op by op, and what the device needs of it goes in as inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.targets.base import Runnable
from ascend_sp.graph._pytorch import tree_leaves
from ascend_sp.graph.emitter import Emitter
from ascend_sp.runtime.npu import DEVICE

aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """One graph as two."""

    host: fx.GraphModule | None
    """Takes all inputs, returns what the device needs and then `returned`; None if that is nothing.
    """
    device: fx.GraphModule
    """Takes the inputs of `kept`, then what `host` gives it."""
    inputs: list[Any]
    """Fake inputs of `device`."""
    kept: tuple[int, ...]
    returned: tuple[int, ...]
    """Positions of the results that the host computes."""

    def run_with(self, run: Callable[..., Sequence[Any]]) -> Runnable:
        """The whole, given `run` for the device's part."""

        def call(args: list[Any]) -> Sequence[Any]:
            values = list(args)
            args.clear()
            from_host = list(self.host(*values)) if self.host is not None else []
            crossing = len(from_host) - len(self.returned)
            out = list(run(*(values[i] for i in self.kept), *from_host[:crossing]))
            for i, value in zip(self.returned, from_host[crossing:], strict=True):
                out.insert(i, value)
            return out

        return call

    def static(self, indices: Sequence[int]) -> list[int]:
        """Positions of the original inputs as positions of the device's."""
        return [self.kept.index(i) for i in indices if i in self.kept]


def split_host(gm: fx.GraphModule, inputs: Sequence[Any]) -> Parts:
    """Take the CPU's part out of `gm`, whose operands and results are on the device or the CPU."""
    _copy_crossings(gm)
    device = _pytorch.copy_of(gm)
    crossings = [n for n in gm.graph.nodes if _crosses(n)]
    results = _results(gm)
    returned = tuple(i for i, n in enumerate(results) if _host_result(n))
    placeholders = device.graph.find_nodes(op="placeholder")
    _make_inputs(device.graph, crossings)
    _set_results(device, [x for i, x in enumerate(_results(device)) if i not in returned])
    kept = []
    for i, node in enumerate(placeholders):
        # With a sharded parameter comes its device mesh, which no graph engine knows.
        other = not isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt, int, float))
        if (_on_host(node) or other) and not node.users:
            device.graph.erase_node(node)
        else:
            kept.append(i)
    device.recompile()
    wanted = [*crossings, *(results[i] for i in returned)]
    if wanted:
        _set_results(gm, wanted)
    more = [n.meta["val"] for n in crossings]
    return Parts(
        gm if wanted else None,
        device,
        [inputs[i] for i in kept] + more,
        tuple(kept),
        returned,
    )


def _results(gm: fx.GraphModule) -> list[Any]:
    returned: Any = gm.graph.output_node().args[0]
    return list(returned)


def _set_results(gm: fx.GraphModule, values: list[Any]) -> None:
    gm.graph.output_node().args = (tuple(values),)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _make_inputs(graph: fx.Graph, crossings: list[fx.Node]) -> None:
    """What crosses becomes inputs of `graph`, a copy of theirs, behind the others."""
    by_name = {n.name: n for n in graph.nodes}
    where = next(n for n in graph.nodes if n.op != "placeholder")
    for node in crossings:
        old = by_name[node.name]
        with graph.inserting_before(where):
            new = graph.placeholder(f"{node.name}_on_device")
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)


def _host_result(node: Any) -> bool:
    return _on_host(node) and (node.op != "call_function" or stays_on_host(node))


def _on_host(node: Any) -> bool:
    values = tree_leaves(node.meta.get("val")) if isinstance(node, fx.Node) else []
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    return bool(tensors) and all(v.device.type == "cpu" for v in tensors)


def stays_on_host(node: fx.Node) -> bool:
    """Whether `node` is of the part that `split_host` takes out."""
    if _crosses(node):
        return True
    return _on_host(node) and all(_on_host(n) for n in _operands(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not _is_size(n)]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _crosses(node: fx.Node) -> bool:
    """Whether `node` brings host values to the device."""
    if node.op != "call_function" or _on_host(node):
        return False
    value = node.meta.get("val")
    operands = _operands(node)
    on_device = isinstance(value, torch.Tensor) and value.device.type == DEVICE
    return on_device and bool(operands) and all(_on_host(n) for n in operands)


def _copy_crossings(gm: fx.GraphModule) -> None:
    """Put a copy wherever an op on the device takes a CPU tensor as it is: a number, an index."""
    emit = Emitter(gm, "split_host")
    copies: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        operands = _operands(node)
        if node.op != "call_function" or _on_host(node) or all(_on_host(n) for n in operands):
            continue
        for x in operands:
            if _on_host(x):
                if x not in copies:
                    device = next(n.meta["val"].device for n in operands if not _on_host(n))
                    with emit.after(x, origin=node):
                        copies[x] = emit.call(aten._to_copy.default, x, device=device)
                node.replace_input_with(x, copies[x])
