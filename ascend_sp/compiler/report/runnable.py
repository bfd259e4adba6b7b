"""A graph as a Python file that reads well and runs by itself, like `fx_graph_runnable`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_sp.runtime.npu import DEVICE
from ascend_sp.runtime.ops import ALL_GATHER, ALL_TO_ALL, STARTS, split_attention

MOST_VALUES = 64
"""Elements that a constant of the graph may have to be written out."""
PREAMBLE = '''
import _operator
import math
import operator
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import device, inf, nan

import ascend_sp  # has the ops of attention
from ascend_sp.compiler._pytorch import FakeTensorMode, join_group
{imports}
RANK, RANKS, GROUP = {rank}, {ranks}, {group!r}


def tensor(shape, stride, dtype, where):
    """Random numbers; zeros where they are integers, which may be positions."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if 0 not in shape else 0
    flat = torch.empty(size, dtype=dtype, device=where)
    if dtype.is_floating_point or dtype.is_complex:
        flat.copy_(torch.randn(size, device=where))
    else:
        flat.fill_(dtype == torch.bool)
    return flat.as_strided(shape, stride)

'''
MAIN = '''

def main():
    """Run the graph; with --fake on tensors without numbers, for which no memory is needed."""
    fake = "--fake" in sys.argv
    if RANKS > 1:
        # One process stands for this rank; collectives return numbers of no meaning.
        join_group(RANK, RANKS, GROUP)
    torch.manual_seed(0)
    with FakeTensorMode() if fake else nullcontext(), torch.no_grad():
        graph = Graph()
        constants(graph)
        for out in graph(*inputs()):
            print(tuple(out.shape) if isinstance(out, torch.Tensor) else out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
'''


def counts(gm: fx.GraphModule) -> Counter[str]:
    """How often each op is called."""
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def change(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What a pass did to the counts, the largest changes first."""
    differ = {op: after.get(op, 0) - before.get(op, 0) for op in {*before, *after}}
    order = sorted((op for op, n in differ.items() if n), key=lambda op: (-abs(differ[op]), op))
    return [f"{differ[op]:+5d}  {op}" for op in order]


def script(gm: fx.GraphModule, rank: int, head: list[str]) -> str:
    """The file.

    Args:
        gm: any graph between two passes.
        rank: whose it is.
        head: lines of comment for its top.
    """
    nodes = list(gm.graph.nodes)
    starts = [n for n in nodes if n.target in STARTS]
    sizes = [
        len(n.args[1]) if n.target is ALL_TO_ALL else n.args[1]
        for n in starts
        if n.target in (ALL_TO_ALL, ALL_GATHER)
    ]
    ranks = max(sizes, default=rank + 2) if starts else 1
    why = _cannot_run(gm)
    imports = ""
    if any(_device(n) == DEVICE for n in nodes):
        imports = "import torch_npu\n"
    gm.recompile()
    code = gm.print_readable(print_output=False, include_stride=True, expanded_def=True)
    for name in ("<lambda>", "GraphModule"):  # AOTAutograd's name for it, and FX's
        code = code.replace(f"class {name}(", "class Graph(", 1)
    made = [f"        {_input(n)},  # {n.name}" for n in nodes if n.op == "placeholder"]
    held = [line for n in nodes if n.op == "get_attr" for line in _constant(gm, n)]
    lines = [*(f"# {line}".rstrip() for line in head)]
    lines += [f"# It cannot run: {why}." if why else "# Run it: python THIS_FILE [--fake]"]
    group = str(starts[0].args[-1]) if starts else ""
    lines += [PREAMBLE.format(rank=rank, ranks=ranks, group=group, imports=imports)]
    lines += ["def inputs():", "    return [", *made, "    ]", "", ""]
    lines += ["def constants(graph):", *(held or ["    pass"]), "", "", code.strip(), ""]
    refuse = f"\n\nif __name__ == '__main__':\n    sys.exit({f'this graph cannot run: {why}'!r})\n"
    return "\n".join(lines) + (refuse if why else MAIN)


def _cannot_run(gm: fx.GraphModule) -> str:
    for node in gm.graph.nodes:
        if node.target is split_attention:
            return "split_attention stands for communication, which the pass ulysses writes out"
        if node.op == "get_attr" and isinstance(
            getattr(gm, str(node.target), None), fx.GraphModule
        ):
            return f"{node.target} is a graph of its own"
    return ""


def _device(node: fx.Node) -> str:
    val = node.meta.get("val")
    return val.device.type if isinstance(val, torch.Tensor) else ""


def _input(node: fx.Node) -> str:
    val = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(val, torch.Tensor):
        return repr(_number(val))
    return _tensor(val)


def _tensor(val: torch.Tensor) -> str:
    shape, stride = ([_number(n) for n in ns] for ns in (val.shape, val.stride()))
    return f"tensor({shape}, {stride}, {val.dtype}, {val.device.type!r})"


def _number(n: Any) -> Any:
    """A symbolic number as the one that it stood for in the call that was compiled."""
    hint = getattr(getattr(n, "node", None), "hint", None)
    return n if hint is None else hint


def _constant(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """What gives a graph a tensor that it holds itself."""
    target = str(node.target)
    value = getattr(gm, target, None)
    if not isinstance(value, torch.Tensor):
        return []
    text = _tensor(value)
    if type(value) is torch.Tensor and value.device.type == "cpu" and value.numel() <= MOST_VALUES:
        text = f"torch.tensor({value.tolist()}, dtype={value.dtype})"
    return [f"    graph.{target} = {text}"]
