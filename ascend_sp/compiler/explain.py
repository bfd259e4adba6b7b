"""``ascend_sp.explain``: what the backend would do, from one process that is a rank of many.

Dynamo and all passes run as they do in a real compile, on tensors that have no numbers. Nothing is
lowered and nothing is run, so the largest model fits a laptop.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ascend_sp.compiler import _pytorch, targets
from ascend_sp.compiler.backend import context
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.fakes import twins
from ascend_sp.compiler.ladder import Attempts
from ascend_sp.compiler.pieces import Pieces, pieces_of_running
from ascend_sp.compiler.pipeline import capture_attention
from ascend_sp.compiler.report.diagnostics import Dump, recompiles
from ascend_sp.compiler.report.explanation import Explanation
from ascend_sp.compiler.report.facts import Report
from ascend_sp.compiler.sharded import shard_parameters
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.cost.device import find
from ascend_sp.passes.keep_weights import KeptWeights
from ascend_sp.runtime._pytorch import not_compiled
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.npu import DEVICE, ascend
from ascend_sp.runtime.topology import Topology
from ascend_sp.weights.shard import bytes_held, room_for

KINDS = ("npu", "cpu", "cuda")
LEAST = "least"
"""The budget with which no weight stays whole that can be split."""


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,
    explain_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say what ``torch.compile(model, backend="ascend_sp")(*args, **kwargs)`` would do on a rank.

    Needs no process group, no second rank, no device and no memory for weights: `model` and its
    arguments may be on the ``meta`` device. They are copied without their data, and not changed.
    What Dynamo has compiled so far is dropped (`torch.compiler.reset`).

    Args:
        model: the module; if it is compiled already, what was compiled.
        args: what it is called with.
        explain_options: ``ranks`` (default 2), the number of ranks; ``rank`` (0), the one to look
            at; ``device``, what they are: ``"npu"``, ``"cpu"``, ``"cuda"``, the name of a card
            (``"910B4"``) or a file that ``python -m ascend_sp calibrate`` wrote, by default what
            the model is on, an NPU if that is ``meta``; ``budget``, with which `shard_weights`
            would have sharded the weights, ``"least"`` for none; and every option of the backend
            but ``degree`` and ``mesh``. ``verify`` is off unless asked for, since it takes time.
        kwargs: what it is called with.

    Raises:
        ConfigError: an option that does not exist, or a bad value.
        AscendSPError: what the compile would raise.
    """
    model = not_compiled(model)
    asked = Asked.of(explain_options or {}, _device_of(model, args, kwargs))
    watcher = _Watcher(asked, _room(model, asked))
    mode = _pytorch.FakeTensorMode(allow_non_fake_inputs=True)
    start = time.perf_counter()
    torch.compiler.reset()
    before, earlier = Counter(_pytorch.graph_breaks()), len(recompiles())
    try:
        with torch.no_grad():
            model, args, kwargs = twins(mode, watcher.label, model, args, kwargs)
            torch.compile(model, backend=watcher.backend, dynamic=False)(*args, **kwargs)
    except _pytorch.DataDependentOutputException as e:
        watcher.stopped = (
            f"Explained up to {_place(e)} only: there the model's Python reads a tensor's value, "
            "which explain does not have. A real run compiles what follows, too."
        )
    except _pytorch.BackendCompilerFailed as e:
        raise e.inner_exception from None
    finally:
        torch.compiler.reset()
    breaks = dict(Counter(_pytorch.graph_breaks()) - before)
    for r in watcher.reports:
        r.graph_breaks, r.recompiles = breaks, r.recompiles[earlier:]
    return Explanation(
        reports=watcher.reports,
        ranks=asked.ranks,
        device=asked.card,
        remarks=watcher.remarks(),
        seconds=time.perf_counter() - start,
    )


def _room(model: Any, asked: Asked) -> int | None:
    """Bytes that `shard_weights` would leave the programs; None if weights are not sharded."""
    if asked.budget is None or asked.ranks == 1:
        return None
    if not isinstance(model, nn.Module):
        raise ConfigError("explain's budget is for a module: pass the model, not a function.")
    total, least = bytes_held(model, asked.ranks)
    budget = None if asked.budget == LEAST else asked.budget
    return room_for(budget, total, least, asked.ranks)


@dataclass(frozen=True)
class Asked:
    """What somebody wants explained."""

    ranks: int
    rank: int
    kind: str
    """``npu``, ``cpu``, ``cuda``..."""
    card: str
    """Whose rates the estimates are from."""
    config: Config
    budget: Any = None
    """Of `shard_weights`; `LEAST` for none, None if weights are not sharded."""

    @staticmethod
    def of(given: Mapping[str, Any], there: str) -> Asked:
        """The options of `explain`, for a model that is on the device `there`.

        Raises:
            ConfigError: an unknown name or a bad value.
        """
        options = dict(given)
        for name in ("degree", "mesh"):
            if name in options:
                raise ConfigError(f"explain makes its own ranks: pass ranks=N instead of {name}.")
        ranks, rank = options.pop("ranks", 2), options.pop("rank", 0)
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise ConfigError(f"explain's ranks is {ranks!r}; it must be a whole number >= 1.")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ranks:
            raise ConfigError(f"explain's rank is {rank!r}; it must be 0 to {ranks - 1}.")
        device = options.pop("device", None) or there
        budget = options.pop("budget", None)
        config = Config.load({"verify": False} | options)
        kind = device if device in KINDS else DEVICE
        if device not in KINDS:
            config = replace(config, cost_model=device)
        card = find(config.cost_model, kind, ascend().soc).name
        targets.ladder(config.target, kind)  # raises if it is not for this kind
        return Asked(ranks, rank, kind, card, config, budget)


class _Watcher:
    """A backend that looks on: it runs the passes and returns a program that only has shapes."""

    def __init__(self, asked: Asked, room: int | None) -> None:
        self.asked, self.room = asked, room
        self.label = asked.kind if _is_there(asked.kind) else "cpu"
        """Where the tensors are said to be; an op of a device that is not there has no meaning."""
        self.reports: list[Report] = []
        self.traced_on = self.label
        self.stopped = ""
        """Why the rest of the model was not seen."""
        self.little = ""
        """What is to be said of its pieces."""

    def backend(self, gm: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        """What `torch.compile` calls with each graph."""
        a = self.asked
        topology = Topology(a.rank, a.ranks, "fake" if a.ranks > 1 else "", tuple(range(a.ranks)))
        captured = PassContext(topology)
        pieces = pieces_of_running(gm)
        start = time.perf_counter()
        gm = capture_attention(gm, captured)

        def compile_graph(aten: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            values = [_value(x) for x in aten.graph.output_node().args[0]]  # type: ignore[union-attr]
            ctx = context(aten, inputs, a.config, topology, captured.notes)
            if ctx.cost_model == "auto":
                ctx.cost_model = a.card
            if self.room is not None:
                own = [i for i, x in enumerate(given) if _is_plain_parameter(x)]
                shard_parameters(aten, ctx, _pytorch.parts_of(aten, own))
                ctx.room = self.room
            self._passes(aten, ctx, pieces, {"AOTAutograd": time.perf_counter() - start})
            return lambda _: values

        return _pytorch.to_aten(gm, given, compile_graph)

    def _passes(
        self, gm: fx.GraphModule, ctx: PassContext, pieces: Pieces, times: dict[str, float]
    ) -> None:
        """What `ladder.lower` does, up to lowering; the report is kept."""
        config, self.traced_on = self.asked.config, ctx.device
        dump = Dump.create(config.dump_dir, self.asked.rank)
        dump.times |= times
        dump.wanted = True
        kind = self.asked.kind
        one_rank = {}  # by whether the target fuses, of the graph before the passes rewrite it
        for target in targets.ladder(config.target, kind):
            before = replace(ctx, target=target.name)
            if before.fuses not in one_rank:
                estimator = before.estimator()
                one_rank[before.fuses] = sum(estimator.seconds(n) for n in gm.graph.nodes)
        attempts = Attempts(gm, ctx, config, dump, kind=kind, warns=False)
        for attempt in attempts:
            if not attempt.refused:
                break
            attempts.refuse(attempt.target, attempt.refused)
        own = attempt.ctx
        kept = own.results.get(KeptWeights)
        if self.room is not None and kept is not None:
            self.room -= sum(kept.parameters.values())
        dump.finish(attempt.program, own, config.described())
        little = pieces.found(dump.number, own)
        if little is not None and own.on_unsharded == "error":
            raise little.error()
        told = " ".join(little.text.split()) if little is not None else ""
        self.little = told[:1].upper() + told[1:]  # what the last graph says stands for all
        assert dump.report is not None
        if self.asked.ranks > 1:
            dump.report.one_rank = one_rank[own.fuses]
            dump.finish_times()  # the page says it, too
        self.reports.append(dump.report)

    def remarks(self) -> list[str]:
        """What is not as it would be on the devices."""
        stopped = [text for text in (self.stopped, self.little) if text]
        if self.asked.kind == self.traced_on:
            return stopped
        if self.asked.kind == DEVICE:
            return [
                *stopped,
                "Traced without torch_npu, so its fused ops are missing: attention is shown as "
                "PyTorch's (sdpa), norms and rotary embeddings as single ops. What is split and "
                "sent is the same; the time of compute is overestimated.",
            ]
        return [*stopped, f"Traced for {self.traced_on}, since there is no {self.asked.kind}."]


def _place(e: BaseException) -> str:
    """The last line of code on the way to `e` that is not PyTorch's."""
    package = os.path.dirname(torch.__file__) + os.sep
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if not f.filename.startswith(package)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "a graph break"


def _is_plain_parameter(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and not _pytorch.has_parts(x)


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def _is_there(kind: str) -> bool:
    """Whether PyTorch knows the device here, so that a fake tensor can be said to be on it."""
    if kind == DEVICE:
        return "torch_npu" in sys.modules
    return kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())


def _device_of(*values: Any) -> str:
    """The type of the device that tensors in `values` are on; an NPU if all are ``meta``."""
    tensors = list(_tensors(values))
    types = {t.device.type for t in tensors} - {"meta"}
    return next(iter(sorted(types - {"cpu"})), "cpu" if types else DEVICE)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)
