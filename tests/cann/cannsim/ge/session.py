"""What C++ calls for a ``ge::Session``: add a graph, run it, remove it."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from cannsim import library, memory, trace
from cannsim.ge.graph import Graph
from cannsim.ge.registry import GE_DTYPES, TO_GE, GeError

_graphs: dict[int, Graph] = {}
_shown: list[Graph] = []


def graphs() -> list[Graph]:
    """All graphs of this process since `forget`, in the order in which they were added."""
    return list(_shown)


def forget() -> None:
    """Start graphs() anew; graphs that were added before still run."""
    _shown.clear()


def _options(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {key: value for key, _, value in pairs if key}


def _view(c: Any) -> Tensor:
    shape = list(c.dims[: c.rank])
    return memory.at(c.data or 0, math.prod(shape), GE_DTYPES[c.dtype]).view(shape)


def _describe(c: Any, t: Tensor) -> None:
    c.rank, c.dtype = t.dim(), TO_GE[t.dtype]
    for i, n in enumerate(t.shape):
        c.dims[i] = n


def _add(number: int, model: int, nbytes: int, options: bytes, summary: Any) -> None:
    graph = Graph(ctypes.string_at(model, nbytes), _options(options.decode()))
    out = summary[0]
    out.is_static, out.outputs = int(graph.is_static), graph.output_count
    if out.outputs > len(out.output):
        raise GeError(f"{out.outputs} outputs, and the simulator has room for {len(out.output)}")
    if graph.is_static:
        for c, t in zip(out.output, graph.infer(), strict=False):
            _describe(c, t)
    _graphs[number] = graph
    _shown.append(graph)


def _run(number: int, stream: int, n_in: int, given: Any, n_out: int, wanted: Any) -> None:
    inputs = [_view(given[i]) for i in range(n_in)]
    graph = _graphs[number]
    outputs = graph.execute(inputs)
    if len(outputs) != n_out:
        raise GeError(f"the graph has {len(outputs)} outputs, and {n_out} are wanted")
    written = []
    for i, t in enumerate(outputs):
        c, nbytes = wanted[i], t.numel() * t.element_size()
        if not c.data:
            c.data, c.bytes = library.load().cannsim_allocate(nbytes), nbytes
            _describe(c, t)
        if nbytes > c.bytes:
            raise GeError(f"output {i} has {nbytes} bytes, and there is room for {c.bytes}")
        to = memory.at(c.data, t.numel(), t.dtype)
        # Through a copy: an output may be, or be a view of, memory that another output writes.
        written.append((to, t.detach().clone(memory_format=torch.contiguous_format).reshape(-1)))
    for to, value in written:
        to.copy_(value)
    if trace.active():
        reads, writes = trace.regions(inputs), trace.regions([to for to, _ in written])
        trace.emit(trace.Op(trace.KERNEL, f"GE graph {number}", stream, reads, writes))


def _remove(number: int) -> None:
    _graphs.pop(number, None)


def install() -> None:
    """Connect to the runtime."""
    library.set_hooks(
        "cannsim_set_ge_hooks",
        library.GE_ADD(library.reports_errors(_add)),
        library.GE_RUN(library.reports_errors(_run)),
        library.GE_REMOVE(library.reports_errors(_remove)),
    )
