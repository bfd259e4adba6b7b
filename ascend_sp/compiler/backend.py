"""``torch.compile(model, backend="ascend_sp")``: what PyTorch calls with each captured graph."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor

from ascend_sp.compiler import _pytorch, ladder, uncompiled
from ascend_sp.compiler.buckets.serve import serve
from ascend_sp.compiler.capacities import OFF, Buckets
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.gathered import first_collective, parts_gathered
from ascend_sp.compiler.numerics.check import NumericCheck
from ascend_sp.compiler.pieces import Pieces, pieces_of_running
from ascend_sp.compiler.pipeline import capture_attention, inexact_passes, optional_passes
from ascend_sp.compiler.progress import Progress
from ascend_sp.compiler.report.diagnostics import Dump
from ascend_sp.compiler.report.ranges import ranged
from ascend_sp.graph.context import Note, NoteKind, PassContext, source_line
from ascend_sp.passes.keep_weights import KeptWeights
from ascend_sp.runtime import guards, peers, replicas, stalls
from ascend_sp.runtime._pytorch import local_of
from ascend_sp.runtime.errors import AscendSPError, ConfigError, RankMismatchError
from ascend_sp.runtime.kept import room_in
from ascend_sp.runtime.npu import DEVICE, Ascend, ascend
from ascend_sp.runtime.topology import SINGLE, Topology, resolve
from ascend_sp.runtime.versions import software
from ascend_sp.text_encoder.apply import encoder_is_running

log = logging.getLogger(__name__)


def ascend_sp(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph into this rank's part of a sequence-parallel program.

    Every rank of the group calls the compiled model with the same inputs, and gets the same
    outputs: whole tensors in, whole tensors out.

    Args:
        gm: the graph, from Dynamo.
        example_inputs: its inputs.
        options: see `Config`; they win over ``ASCEND_SP_*`` environment variables.
        mode: not supported; Inductor's modes do not apply.

    Raises:
        ConfigError: an unknown option or a bad value, or a program that is to be saved.
        TopologyError: the process group or the mesh does not fit.
        RankMismatchError: the ranks do not compile the same program.
        UnshardedError: something cannot be sharded, or nothing is, or by estimate it does not pay,
            and ``on_unsharded="error"``.
        AscendSPError: the graph needs gradients, or has dropout in attention.
    """
    if mode not in (None, "default"):
        raise ConfigError(
            f"mode={mode!r} is not supported by backend 'ascend_sp'. Leave mode out and pass "
            "options={...} instead."
        )
    if _pytorch.to_be_saved():
        raise ConfigError(
            "aot_compile is not supported by backend 'ascend_sp': it writes programs to files, and "
            "these belong to a rank, its process group and its device. Call the compiled model "
            "instead."
        )
    config = Config.load(options)
    _refuse_gradients(example_inputs)
    topology = resolve(
        config.degree,
        config.mesh,
        _device_type(gm, example_inputs),
        config.sequence_parallel,
        strict=config.on_unsharded == "error",
    )
    parallel = encoder_is_running()
    sharded = [i for i, x in enumerate(example_inputs) if _is_sharded(x)]
    pieces = pieces_of_running(gm)
    room = room_in(_pytorch.running_module())
    start = time.perf_counter()
    captured = PassContext(topology)
    gm = capture_attention(gm, captured)
    sources = _pytorch.input_sources(gm)

    def compile_graph(aten: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # PyTorch may call this twice for one graph: all state of a compile is made here.
        own = context(aten, inputs, config, topology, captured.notes)
        parts = _pytorch.parts_of(aten, sharded)
        _leave_parallel_graph(aten, own, parallel or len(parts) < len(sharded), parts)
        held = {n: local_of(example_inputs[i]) for n, i in parts.items() if n in own.own_inputs}
        names = _pytorch.named_inputs(aten, sources)
        times = {"AOTAutograd": time.perf_counter() - start}

        def program(
            gm: fx.GraphModule, inputs: Sequence[Any], names: Sequence[str], notes: Sequence[Note]
        ) -> Callable[..., Any]:
            each = replace(own, notes=[*own.notes, *notes], results=own.results.copy())
            if not config.check_numerics:  # which runs the graph between passes on what it is given
                each.room = room.left
                each.kept_inputs = frozenset(n for n, part in held.items() if room.has(part))
            # Of other capacities it is one more compile, while a call waits.
            late = Progress(topology.ranks[topology.rank]) if progress.over() else None
            with late or nullcontext(progress) as shown:
                run, kept = _compile(gm, inputs, names, each, config, times, pieces, shown)
            for name, more in kept.parameters.items():
                room.take(held[name], more)
            return run

        replayed = own.device == DEVICE and config.target != "eager"
        buckets = config.buckets
        if own.own_inputs and not buckets.off():
            buckets = Buckets(OFF)  # until both together are tested
            own.note(
                NoteKind.CAPACITY,
                next(iter(aten.graph.nodes)),
                "lengths have no capacities: weights are sharded",
            )
        return serve(aten, inputs, names, buckets, replayed, program)

    with Progress(topology.ranks[topology.rank]) as progress:
        return _pytorch.to_aten(gm, example_inputs, compile_graph)


def context(
    aten: fx.GraphModule,
    inputs: Sequence[Any],
    config: Config,
    topology: Topology,
    notes: Sequence[Note],
) -> PassContext:
    """What the passes are told of a graph, but for its target."""
    device = _device_type(aten, inputs)
    return PassContext(
        topology,
        device=device,
        ascend=ascend() if device == DEVICE else Ascend(),
        attention=config.attention,
        on_unsharded=config.on_unsharded,
        overlap=config.async_,
        strategy=config.strategy,
        split_features=config.split_features,
        memory_budget=config.memory_budget,
        cost_model=config.cost_model,
        static_inputs=_names(aten, _pytorch.static_input_indices()),
        notes=list(notes),
    )


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    names: Sequence[str],
    ctx: PassContext,
    config: Config,
    times: dict[str, float],
    pieces: Pieces,
    progress: Progress,
) -> tuple[Callable[[list[Any]], Sequence[Any]], KeptWeights]:
    dump = Dump.create(config.dump_dir, ctx.topology.ranks[ctx.topology.rank])
    dump.begins = progress.phase
    dump.times |= times
    uncompiled.compiled(ctx.topology, config)
    placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    static = [i for i, n in enumerate(placeholders) if n in ctx.static_inputs]
    try:
        if config.check_ranks:
            with dump.timed("check_ranks"):
                facts, rows = _program(gm, names, config, ctx)
                guards.agree(ctx.topology, facts, config.check_timeout, rows=rows)
        check = _numeric_check(gm, ctx, config, dump) if config.check_numerics else None
        lowered = ladder.lower(gm, inputs, static, ctx, config, dump, pieces, check)
        dump.finish_times()
    except Exception as e:
        # Of what the ranks compared they know, or have been told.
        if ctx.topology.size > 1 and not isinstance(e, RankMismatchError):
            told = e.reason if isinstance(e, AscendSPError) else str(e)
            peers.announce(ctx.topology, (f"compiling graph {dump.number}", 0), told)
        if not isinstance(e, AscendSPError):  # ours say it themselves
            # Its traceback is PyTorch's to print.
            log.error("graph %d failed to compile with %s", dump.number, software())  # noqa: TRY400
        uncompiled.fails(e, ctx.topology)
        raise
    name = f"graph {dump.number}"
    run = check.wrap(lowered.run) if check else lowered.run
    run = ranged(run, f"ascend_sp: {name}, rank {ctx.topology.rank} of {ctx.topology.size}")
    run = stalls.guarded(run, ctx.topology, name, lowered.program)
    if not lowered.program.calls:
        # Its ranks have nothing to do with each other, so their inputs may differ.
        return run, lowered.kept
    mine = {i for i, n in enumerate(placeholders) if n in ctx.own_inputs}
    which = [replicas.Input(n, i in set(static), i in mine) for i, n in enumerate(names)]
    mode, timeout = config.check_inputs, config.check_timeout
    return replicas.checked(run, ctx.topology, name, which, mode, timeout), lowered.kept


def _numeric_check(
    gm: fx.GraphModule, ctx: PassContext, config: Config, dump: Dump
) -> NumericCheck:
    return NumericCheck(
        _pytorch.copy_of(gm),
        ctx.topology,
        f"graph {dump.number}",
        config.target,
        optional_passes(),
        inexact_passes(),
        config.check_timeout,
        dump,
    )


def _is_sharded(x: Any) -> bool:
    return isinstance(x, DTensor) and not all(p.is_replicate() for p in x.placements)


def _leave_parallel_graph(
    gm: fx.GraphModule, ctx: PassContext, parallel: bool, parts: Collection[str]
) -> None:
    """Compile for one rank what is one rank's program already: its values differ between ranks.

    A graph that a graph break cut out of a tensor-parallel model need not hold a collective
    itself; hence `parallel`, and `parts`, the inputs that are a rank's own. Where those are
    parameters that the graph gathers, it is split like any other.
    """
    first = first_collective(gm.graph)
    if ctx.topology.size == 1 or not (parallel or parts or first is not None):
        return
    own = None
    if not parallel:
        own = parts_gathered(gm.graph, ctx.static_inputs, parts, ctx.topology.ranks)
    if own is not None:
        ctx.own_inputs = own
        return
    # Its groups may be others than ours, so our ranks have nothing to compare either.
    ctx.topology = replace(SINGLE, ranks=(ctx.topology.ranks[ctx.topology.rank],))
    ctx.note(
        NoteKind.UNSHARDED,
        next(iter(gm.graph.nodes)) if first is None else first,
        "the model is tensor-parallel already: the graph is compiled for one rank, and its "
        "sequence is not split",
    )


def _program(
    gm: fx.GraphModule, names: Sequence[str], config: Config, ctx: PassContext
) -> tuple[dict[str, Any], Callable[[], list[guards.Row]]]:
    """Facts that must be the same on all ranks, from the graph before it is cut for one of them.

    And the lines of the program, of which one of the facts is a hash.
    """
    inputs = []
    for name, node in zip(names, gm.graph.find_nodes(op="placeholder"), strict=True):
        val = node.meta.get("val")
        if node.name in ctx.own_inputs:  # ranks may hold different numbers of rows
            inputs.append(f"{name}: a part, {str(val.dtype)[6:]} {val.device.type}")
        elif isinstance(val, torch.Tensor):
            sizes = ", ".join(_size(n) for n in val.shape)
            inputs.append(f"{name}: {str(val.dtype)[6:]}[{sizes}] {val.device.type}")
        else:
            inputs.append(f"{name}: {_size(val)}")
    # Every rank has a device of its own; "npu:1" here is "npu:0" there.
    own = re.compile(rf"\b{ctx.device}:\d+")
    lines = [own.sub(ctx.device, n.format_node() or "") for n in gm.graph.nodes]
    private = ("dump_dir", "mesh", "observer")
    options = {k: v for k, v in config.described().items() if k not in private}
    versions = f"torch {software().torch}"
    if ctx.device == DEVICE:
        a = ctx.ascend
        versions += f", torch_npu {a.torch_npu}, CANN {a.cann}, {a.soc}"
    facts = {
        "versions": versions,
        "cost model": asdict(ctx.estimator().device),
        "options": options,
        "inputs": inputs,
        "operations": len(gm.graph.nodes),
        "program": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
    }
    # What FX shows of the nodes behind them is of no use to a user.
    shown = [re.sub(r" : \[num_users=\d+\]", "", line) for line in lines]
    return facts, lambda: [
        guards.Row(line, source_line(n)) for line, n in zip(shown, gm.graph.nodes, strict=True)
    ]


def _size(value: Any) -> str:
    """A size as text; a symbolic one with the value that it has in this call."""
    if isinstance(value, torch.SymInt):
        return f"{value}={value.node.hint}"
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    return type(value).__name__  # a device mesh, say, which has an address in its text


def _names(gm: fx.GraphModule, indices: Sequence[int]) -> frozenset[str]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return frozenset(placeholders[i].name for i in indices)


def _device_type(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Where `gm` runs: on the device of an input or, without one, of what it makes itself."""
    made = (n.meta.get("val", n.meta.get("example_value")) for n in gm.graph.nodes)
    for value in (*inputs, *made):
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.device.type
    return "cpu"


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    ):
        raise AscendSPError(
            "backend 'ascend_sp' compiles inference only, and this graph needs gradients. Call "
            "the model under torch.no_grad() or torch.inference_mode()."
        )
