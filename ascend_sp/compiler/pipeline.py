"""The compiler, top to bottom: one ordered list of passes, and the runner that checks each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

from torch import fx

from ascend_sp.compiler.config import Config
from ascend_sp.compiler.contracts import EXCHANGED, JOINED, LOWERED, PLACED, PLANNED, Fact
from ascend_sp.compiler.report.diagnostics import Dump
from ascend_sp.compiler.verify import verify
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.emitter import Emitter
from ascend_sp.graph.origin import origin_of, set_origin
from ascend_sp.passes.capture_attention import capture_attention
from ascend_sp.passes.choose_strategy import choose_strategy
from ascend_sp.passes.decompose_complex import decompose_complex
from ascend_sp.passes.decompose_unsupported import decompose_unsupported
from ascend_sp.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from ascend_sp.passes.gather_keys import gather_keys
from ascend_sp.passes.join_statistics import join_statistics
from ascend_sp.passes.keep_weights import keep_weights
from ascend_sp.passes.lower_attention import lower_attention
from ascend_sp.passes.npu.attention import fuse_attention
from ascend_sp.passes.npu.norms import fuse_rms_norm
from ascend_sp.passes.npu.respell import respell_for_ge
from ascend_sp.passes.npu.rotary import fuse_rotary
from ascend_sp.passes.pack_gathers import pack_gathers
from ascend_sp.passes.raise_upsampling import raise_upsampling
from ascend_sp.passes.schedule_collectives import schedule_collectives
from ascend_sp.passes.sharding.materialise import materialise_sharding
from ascend_sp.passes.sharding.propagate import propagate_sharding
from ascend_sp.passes.split_features import split_features
from ascend_sp.passes.ulysses import ulysses
from ascend_sp.passes.unfuse_bias import unfuse_bias
from ascend_sp.runtime.errors import ConfigError, VerificationError
from ascend_sp.runtime.npu import DEVICE

__all__ = ["PASSES", "Pass", "capture_attention", "compile_aten", "optional_passes"]


def _always(_: PassContext) -> bool:
    return True


def _several_ranks(ctx: PassContext) -> bool:
    return ctx.topology.size > 1


def _op_by_op(ctx: PassContext) -> bool:
    """Inductor computes what is computed twice inside of the kernels that read it."""
    return _several_ranks(ctx) and not ctx.fuses


def _inductor_on_cpu(ctx: PassContext) -> bool:
    """One rank has just what Inductor makes of the model; for GPUs it does this itself."""
    return _several_ranks(ctx) and ctx.fuses and ctx.device == "cpu"


def _npu(ctx: PassContext) -> bool:
    return ctx.device == DEVICE


def _npu_graph(ctx: PassContext) -> bool:
    return ctx.npu_graph


def _ge_graph(ctx: PassContext) -> bool:
    return ctx.target == "torchair"


def _no_complex(ctx: PassContext) -> bool:
    """Sharding has no rules for complex values, and Ascend's graphs no type."""
    return _several_ranks(ctx) or _npu_graph(ctx)


def _fused_attention(ctx: PassContext) -> bool:
    return ctx.npu_graph and ctx.attention == "auto"


@dataclass(frozen=True)
class Pass:
    """A pass and its contract."""

    run: Callable[[fx.GraphModule, PassContext], fx.GraphModule]
    requires: tuple[Fact, ...] = ()
    """What must hold before."""
    ensures: tuple[Fact, ...] = ()
    """What holds after it, and after every later pass."""
    when: Callable[[PassContext], bool] = _always
    """Whether the pass is for this compile."""
    optional: bool = False
    """The program is right without it, so `skip_passes` may name it."""
    exact: bool = True
    """Results have the same bits without it, whatever the dtype."""
    users: bool = False
    """It is not ours."""

    @property
    def name(self) -> str:
        """The name of its function."""
        return getattr(self.run, "__name__", type(self.run).__name__)


PASSES: tuple[Pass, ...] = (
    # On an ATen graph of whole tensors, attention still opaque (capture_attention ran before):
    Pass(eliminate_common_subexpressions, when=_op_by_op, optional=True),
    Pass(decompose_complex, when=_no_complex),
    Pass(raise_upsampling, when=_several_ranks, optional=True),
    Pass(propagate_sharding, (), (PLANNED,), _several_ranks),
    # From here on the graph is one rank's program. Sums over the sequence are added up by rank.
    Pass(materialise_sharding, (PLANNED,), (PLACED,), _several_ranks, exact=False),
    # Keys that are gathered may be attended in another order of sums than those of an exchange.
    Pass(choose_strategy, (PLACED,), when=_several_ranks, optional=True, exact=False),
    Pass(ulysses, (PLACED,), when=_several_ranks),
    Pass(gather_keys, (PLACED,), (EXCHANGED,), _several_ranks, exact=False),
    Pass(join_statistics, (PLACED,), (JOINED,), _several_ranks, exact=False),
    # Ascend's fused ops, where they fit; before the order, which counts on what really runs.
    Pass(fuse_rms_norm, when=_npu, optional=True, exact=False),
    Pass(fuse_rotary, when=_npu, optional=True, exact=False),
    Pass(fuse_attention, (EXCHANGED,), when=_fused_attention, optional=True, exact=False),
    # A product rounds to half precision before a bias is added, and not after.
    Pass(unfuse_bias, when=_inductor_on_cpu, optional=True, exact=False),
    # Before the order, which is asked what it gains. Fewer features may have another kernel.
    Pass(split_features, (PLACED, EXCHANGED), when=_several_ranks, optional=True, exact=False),
    # Of what is left to gather; the order is asked what would be waited for.
    Pass(keep_weights, (PLACED, EXCHANGED), when=_several_ranks, optional=True),
    # Before the order, which is asked what it costs that values wait for each other.
    Pass(pack_gathers, (PLACED, EXCHANGED), when=_several_ranks, optional=True),
    Pass(schedule_collectives, (PLACED, EXCHANGED), when=_several_ranks, optional=True),
    Pass(lower_attention, (EXCHANGED,), (LOWERED,), exact=False),
    Pass(respell_for_ge, (LOWERED,), when=_ge_graph),
    Pass(decompose_unsupported, (LOWERED,), when=_npu_graph, exact=False),
)


def optional_passes(passes: Iterable[Pass] = PASSES) -> list[str]:
    """Names that `skip_passes` may hold."""
    return [p.name for p in passes if p.optional]


def compile_aten(
    gm: fx.GraphModule,
    ctx: PassContext,
    config: Config,
    dump: Dump | None = None,
    passes: tuple[Pass, ...] = PASSES,
    after: Callable[[str, fx.GraphModule], None] | None = None,
) -> fx.GraphModule:
    """Run the passes on an ATen graph, in place.

    Args:
        gm: functional ATen, every node with its fake ``meta["val"]``, attention opaque.
        ctx: the rank to compile for, and what passes report.
        config: skips and checks.
        dump: where to write the graph after each pass.
        passes: the list to run, in order.
        after: called after each pass, with its name and the graph.

    Raises:
        ConfigError: `skip_passes` names a pass that does not exist or may not be skipped.
        VerificationError: a pass broke the graph, or what it requires does not hold.
    """
    unknown = [n for n in config.skip_passes if n not in optional_passes(passes)]
    if unknown:
        raise ConfigError(
            f"skip_passes names {', '.join(unknown)}; it may hold {', '.join(optional_passes())}."
        )
    ensured: list[Fact] = []
    look = config.observer or _nothing
    passes = (*_of_user(config.pre_passes), *passes, *_of_user(config.post_passes))
    look("captured", gm, ctx)
    if dump:
        dump.options = config.described()
        dump.graph(gm, "captured", 0.0)
    for p in passes:
        if not p.when(ctx) or p.name in config.skip_passes:
            continue
        if dump:
            dump.begins(p.name)
        _hold(p.requires, gm, ctx, f"before {p.name}")
        start = time.perf_counter()
        gm = _run_users(p, gm, ctx) if p.users else p.run(gm, ctx)
        gm.graph.eliminate_dead_code()
        spent = time.perf_counter() - start
        if config.verify:
            with dump.timed("verify") if dump else nullcontext():
                _verify(gm, ctx, p)
        ensured += p.ensures
        _hold(ensured, gm, ctx, f"after {p.name}")
        look(p.name, gm, ctx)
        if dump:
            dump.graph(gm, p.name, spent)
        if after:
            after(p.name, gm)
    gm.recompile()
    return gm


def inexact_passes(passes: Iterable[Pass] = PASSES) -> list[str]:
    """Names of those that may change the last bits of results."""
    return [p.name for p in passes if not p.exact]


def _hold(facts: Iterable[Fact], gm: fx.GraphModule, ctx: PassContext, when: str) -> None:
    for fact in facts:
        why = fact.fails(gm, ctx)
        if why:
            raise VerificationError(f"{when} it must hold that {fact.text}, but {why}.")


def _nothing(*_: object) -> None:
    pass


def _of_user(functions: Iterable[Callable[..., fx.GraphModule]]) -> tuple[Pass, ...]:
    return tuple(Pass(f, users=True) for f in functions)


def _run_users(p: Pass, gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """A pass that somebody else wrote; nodes that it made get their fake values."""
    found = p.run(gm, ctx)
    if not isinstance(found, fx.GraphModule):
        raise ConfigError(
            f"{p.name} of pre_passes or post_passes returned {type(found).__name__}; it must "
            "return the graph module."
        )
    emit = Emitter(found, p.name)
    for node in found.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            emit.refresh(node)
            if origin_of(node) is None:
                set_origin(node, p.name, node)
    return found


def _verify(gm: fx.GraphModule, ctx: PassContext, p: Pass) -> None:
    try:
        verify(gm, ctx, p.name)
    except VerificationError as e:
        if not p.users:
            raise
        told = e.reason.partition(" This is a bug in ascend_sp")[0]
        raise VerificationError(f"{told} {p.name} is a pass of pre_passes or post_passes.") from e
