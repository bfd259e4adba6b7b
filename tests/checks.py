"""What tests of whole programs compare: numbers, nodes, collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ascend_sp.compiler.pipeline import PASSES, Pass
from ascend_sp.graph.cost.device import DEVICES


def worst(outputs: Sequence, reference: object) -> float:
    """Largest difference over all ranks, relative to the largest value; NaN if there is one."""
    flat = reference if isinstance(reference, (tuple, list)) else (reference,)
    found = [
        (got - want).abs().max() / want.abs().max()
        for out in outputs
        for got, want in zip(out, flat, strict=True)
    ]
    return torch.stack(found).max().item()  # Python's max would lose a NaN


def free_links(folder: Path) -> str:
    """A file for `cost_model`: a CPU whose collectives cost nothing, so that all is split."""
    device = replace(
        DEVICES["cpu"],
        name="free",
        link_latency=1e-15,
        link_bandwidth=1e20,
        link_launch=0.0,
        link_work=0.0,
    )
    file = folder / "free.json"
    file.write_text(device.to_json())
    return str(file)


def masks(kind: str, batch: int, heads: int, length: int) -> Tensor:
    shape = {
        "B11S": (batch, 1, 1, length),
        "B1SS": (batch, 1, length, length),
        "BHSS": (batch, heads, length, length),
        "SS": (length, length),
        "1HSS": (1, heads, length, length),
        "B1S1": (batch, 1, length, 1),
        "BH1S": (batch, heads, 1, length),
        "1S": (1, length),
        "HSS": (heads, length, length),
    }[kind]
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    return mask


def swapped(rank: int, values: Sequence[Tensor]) -> Tensor:
    """An all-to-all that hands out the blocks in the wrong order."""
    size = len(values)
    return torch.cat([v.chunk(size)[rank] for v in reversed(values)])


def missing(rank: int, values: Sequence[Tensor]) -> Tensor:
    """An all-to-all that does nothing."""
    return values[rank]


def text(gm: fx.GraphModule, keep: Callable[[fx.Node], bool] = lambda n: True) -> str:
    """A line a node: target and shape."""
    lines = []
    for n in gm.graph.nodes:
        if n.op == "call_function" and keep(n):
            name = str(n.target).removesuffix(".default").split("::")[-1]
            name = name.removeprefix("aten.").removeprefix("_c10d_functional.")
            name = name.removeprefix("ascend_sp.")
            # What PyTorch 2.15 puts behind the product of a linear layer.
            name = {"_unsafe_view": "view"}.get(name, name)
            val = n.meta["val"]
            shape = list(val.shape) if isinstance(val, Tensor) else ""
            lines.append(f"{name} {shape}".strip())
    return "\n".join(lines)


def only(*names: str) -> tuple[Pass, ...]:
    return tuple(p for p in PASSES if p.name in names)


def complex_nodes(gm: fx.GraphModule) -> list[str]:
    values = [(n.name, n.meta.get("val")) for n in gm.graph.nodes]
    return [name for name, v in values if isinstance(v, Tensor) and v.is_complex()]


def collectives_of(call: Callable[[], Any]) -> dict[str, int]:
    """The collectives that really run in a call, and anything that reads a value off a tensor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = Counter(e.name for e in profile.events())
    return {
        name.split("::")[1]: count
        for name, count in names.items()
        if name.startswith(("_c10d_functional::", "c10d::")) or "aten::item" in name
    }


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()
