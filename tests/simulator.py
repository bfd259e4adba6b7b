"""Ranks in one process: the real compiler for each rank, collectives by exchange between threads.

What is simulated is the network only. Graphs are compiled by the real pipeline, ATen ops are run
by PyTorch. (`torch.distributed._local_tensor` would do this too, but fails on uneven slices.)
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.backend import context
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import PASSES, Pass, capture_attention, compile_aten
from ascend_sp.compiler.sharded import shard_parameters
from ascend_sp.compiler.strides import keep_strides
from ascend_sp.graph.border import border
from ascend_sp.graph.context import PassContext
from ascend_sp.passes.keep_weights import KeptWeights
from ascend_sp.runtime.ops import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, WAIT
from ascend_sp.runtime.topology import Topology
from ascend_sp.weights.shard import split_dim

SEPARATE = Config(strategy="separate")
Break = Callable[[int, Sequence[Tensor]], Tensor]


@dataclass
class Captured:
    """The ATen graph of one call of a model, attention opaque, and its inputs."""

    gm: fx.GraphModule
    inputs: list[Any]
    graphs: int = 1
    static: tuple[int, ...] = ()
    """Which inputs are parameters or buffers."""

    def copy(self) -> fx.GraphModule:
        return copied(self.gm)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    out = graph.graph_copy(gm.graph, {})
    node = graph.output(out)
    node.meta = dict(gm.graph.output_node().meta)
    return fx.GraphModule(gm, graph)


def _topology(rank: int, size: int) -> Topology:
    return Topology(rank, size, "simulated", tuple(range(size)))


def dynamo_graph(fn: Callable[..., Any], *args: Any) -> tuple[fx.GraphModule, Any]:
    """Dynamo's graph of ``fn(*args)``, attention captured for one rank, and what it returns."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        found.append(capture_attention(gm, PassContext()))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(fn, backend=backend)(*args)
    (gm,) = found
    return gm, out


def capture(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = False,
    ranks: int = 1,
    **kwargs: Any,
) -> Captured:
    """The graph that the backend would be given for ``fn(*args, **kwargs)``, one of `ranks`."""
    found: list[Captured] = []

    def run(captured: Captured) -> Any:
        found.append(captured)
        return keep_strides(captured.copy())(*captured.inputs)

    intercept(run, fn, *args, dynamic=dynamic, ranks=ranks, **kwargs)
    found[-1].graphs = len(found)
    return found[-1]


def intercept(
    run: Callable[[Captured], Any],
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = False,
    ranks: int = 1,
    **kwargs: Any,
) -> Any:
    """``fn(*args, **kwargs)``, each graph that the backend would be given run by `run`."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = capture_attention(gm, PassContext(_topology(0, ranks)))

        def compile_graph(aten: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            static = tuple(_pytorch.static_input_indices())
            return lambda values: run(Captured(aten, list(values), static=static))

        return _pytorch.to_aten(gm, example_inputs, compile_graph)

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return out


@dataclass
class Network:
    """The collectives of `size` ranks that are threads of one process."""

    size: int
    broken: Break | None = None
    """Replaces the all-to-all, for negative controls."""
    calls: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)
        self.slots: list[Any] = [None] * self.size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def run(self, rank: int, target: Any, args: Sequence[Any]) -> Tensor:
        seen = self.exchange(rank, (target, args[0].shape, args[0], args))
        assert len({v[0] for v in seen}) == 1, f"ranks disagree on the collective: {seen}"
        assert len({v[1] for v in seen}) == 1, f"ranks disagree on the size: {seen}"
        values = [v[2] for v in seen]
        if rank == 0:
            self.calls[target._opname] += 1
        if target is ALL_GATHER:
            return torch.cat(values)
        if target is ALL_REDUCE:
            return torch.stack(values).sum(0)
        assert target is ALL_TO_ALL
        if self.broken:
            return self.broken(rank, values)
        blocks = [v[2].split(v[3][2])[rank] for v in seen]
        assert [len(b) for b in blocks] == list(args[1]), "ranks disagree on the blocks"
        return torch.cat(blocks)


class RankInterpreter(fx.Interpreter):
    """Runs one rank's graph; collectives go through the network."""

    def __init__(self, gm: fx.GraphModule, rank: int, network: Network) -> None:
        super().__init__(gm)
        self.rank, self.network = rank, network

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in (ALL_TO_ALL, ALL_GATHER, ALL_REDUCE):
            return self.network.run(self.rank, target, args)
        if target is WAIT:
            return args[0]
        return super().call_function(target, args, kwargs)


def compile_rank(
    captured: Captured,
    rank: int,
    size: int,
    config: Config | None = None,
    passes: tuple[Pass, ...] = PASSES,
) -> tuple[fx.GraphModule, PassContext]:
    """The program of one rank; unless `config` says otherwise, four all-to-alls an attention."""
    config = config or SEPARATE
    gm, topology = captured.copy(), _topology(rank, size)
    ctx = context(gm, captured.inputs, config, topology, ())
    inputs = gm.graph.find_nodes(op="placeholder")
    ctx.static_inputs = frozenset(inputs[i].name for i in captured.static)
    return compile_aten(gm, ctx, config, passes=passes), ctx


def run_ranks(
    programs: Sequence[fx.GraphModule],
    inputs: Sequence[Any] | Callable[[int], Sequence[Any]],
    broken: Break | None = None,
) -> tuple[list[Any], Network]:
    """Run one program a rank on the same inputs, or on its own; the outputs of all ranks."""
    network = Network(len(programs), broken)
    outputs: list[Any] = [None] * len(programs)
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            with torch.no_grad():
                gm = keep_strides(copied(programs[rank]))
                given = inputs(rank) if callable(inputs) else inputs
                outputs[rank] = RankInterpreter(gm, rank, network).run(*given)
        except BaseException as e:
            errors.append(e)
            network.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(r,)) for r in range(len(programs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if real or errors:
        raise (real or errors)[0]
    return outputs, network


def simulate(
    captured: Captured,
    size: int,
    config: Config | None = None,
    broken: Break | None = None,
) -> tuple[list[Any], list[fx.GraphModule], PassContext, Network]:
    """Compile for `size` ranks and run them.

    Every rank runs its own program, but the checks after each pass, which take most of the time,
    are made on the first and the last only: what differs in between are offsets.
    """
    config = config or SEPARATE
    unchecked = replace(config, verify=False)
    compiled = [
        compile_rank(captured, r, size, config if r in (0, size - 1) else unchecked)
        for r in range(size)
    ]
    programs = [gm for gm, _ in compiled]
    ctx = compiled[0][1]
    outputs, network = run_ranks(programs, border(ctx).real_inputs(captured.inputs), broken)
    outputs = [border(ctx).wrap(lambda _, out=out: out)(list(captured.inputs)) for out in outputs]
    return outputs, programs, ctx, network


def simulate_sharded(
    captured: Captured, size: int, config: Config | None = None, room: int = 0
) -> tuple[list[Any], list[fx.GraphModule], list[PassContext], Network]:
    """`simulate` with parts of all parameters, as `shard_weights` makes them.

    Args:
        captured: of whole weights.
        size: ranks.
        config: options.
        room: bytes of weights that programs may keep whole.
    """
    config = config or SEPARATE
    programs, contexts, given = [], [], []
    for rank in range(size):
        gm = captured.copy()
        own = config if rank in (0, size - 1) else replace(config, verify=False)
        ctx = context(gm, captured.inputs, own, _topology(rank, size), ())
        placeholders = gm.graph.find_nodes(op="placeholder")
        ctx.static_inputs = frozenset(placeholders[i].name for i in captured.static)
        weights = dict(zip(placeholders, captured.inputs, strict=True))
        names = [n.name for n in placeholders if isinstance(weights[n], torch.nn.Parameter)]
        shard_parameters(gm, ctx, names)
        ctx.room = room
        values = [
            _part(x, rank, size) if n.name in ctx.own_inputs else x for n, x in weights.items()
        ]
        whole = {n.name: x for n, x in weights.items()}
        programs.append(compile_aten(gm, ctx, own))
        kept = ctx.results.get(KeptWeights) or KeptWeights({}, ())
        given.append([*border(ctx).real_inputs(values), *(whole[n] for n in kept.parameters)])
        contexts.append(ctx)
    outputs, network = run_ranks(programs, lambda rank: given[rank])
    outputs = [
        border(contexts[0]).wrap(lambda _, out=out: out)(list(captured.inputs)) for out in outputs
    ]
    return outputs, programs, contexts, network


def _part(x: Tensor, rank: int, size: int) -> Tensor:
    dim = split_dim(x.shape, size)
    each = x.shape[dim] // size
    return x.detach()[(slice(None),) * dim + (slice(rank * each, (rank + 1) * each),)].clone()
