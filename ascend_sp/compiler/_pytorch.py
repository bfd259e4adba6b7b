"""The private PyTorch that the compiler stands on, and nothing else does.

`tests/test_pytorch_pins.py` fails when PyTorch moves any of it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import sympy
import torch
import torch.distributed as dist
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import no_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters, get_debug_dir, get_metrics_context
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._logging import trace_structured
from torch._logging._internal import trace_log
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd import profiler
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, constrain_range
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ascend_sp.graph._pytorch import OptimizedPythonReferenceAnalysis, sympy_interp
from ascend_sp.runtime._pytorch import without_modes

__all__ = [
    "BackendCompilerFailed",
    "DataDependentOutputException",
    "FakeTensorMode",
    "FreshSizes",
    "behaves_as_tensor",
    "broken_by",
    "compiled_kernels",
    "copy_of",
    "count",
    "counted",
    "debug_dir",
    "frame",
    "graph_breaks",
    "has_parts",
    "input_sources",
    "join_group",
    "named_inputs",
    "of_parts",
    "profiling",
    "recompilation",
    "running_module",
    "static_input_indices",
    "to_aten",
    "to_be_saved",
    "trace_log",
    "trace_structured",
]


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with a graph of its own; tensors and fake values are shared."""
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    output = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0])
    graph.output_node().meta.update(output[1].meta)
    return fx.GraphModule(gm, graph)


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """A context in which ops on the meta device do what PyTorch's own C++ does when a graph runs.

    While a graph is traced, Python kernels stand in for it.
    """
    with without_modes(), no_python_dispatcher():
        yield


def has_parts(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is of a class that can be taken apart into tensors, and made of them."""
    return is_traceable_wrapper_subclass(tensor)


def of_parts(tensor: torch.Tensor, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A tensor of the same class, each part of it by `convert`; a parameter if `tensor` is one."""
    names, more = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: convert(getattr(tensor, name)) for name in names}
    rebuild = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
    made = rebuild(parts, more, tensor.shape, tensor.stride())
    if not isinstance(tensor, torch.nn.Parameter):
        return made
    # A mark on it, since its class is its own.
    return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)


def behaves_as_tensor(tensor: torch.Tensor) -> bool:
    """Whether PyTorch's ops do with `tensor` what they do with every other one."""
    kind = type(tensor)
    if issubclass(kind, FakeTensor):
        return True
    function, usual = (
        getattr(k.__torch_function__, "__func__", None) for k in (kind, torch.Tensor)
    )
    disabled = kind.__torch_function__ is torch._C._disabled_torch_function_impl
    own_function = not disabled and function is not usual
    return not own_function and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def graph_breaks() -> dict[str, int]:
    """Why Dynamo has broken graphs so far in this process, and how often."""
    return dict(counters["graph_break"])


def broken_by(gm: fx.GraphModule) -> str:
    """Why Dynamo ended a graph in the middle of a frame, and where; ``""`` if it did not.

    The place is the last line of code that is not PyTorch's.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    package = os.path.dirname(torch.__file__) + os.sep
    own = [f for f in reason.user_stack if not f.filename.startswith(package)]
    place = f"\n    at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
    return in_short(reason.reason) + place


def in_short(reason: str) -> str:
    """Dynamo's explanation of a graph break on one line, without the advice and addresses."""
    parts = [line.strip() for line in reason.splitlines() if line.strip()]
    context = "Developer debug context: "
    told = [p.removeprefix(context) for p in parts if p.startswith(context)]
    text = ": ".join([*parts[:1], *told]) or "unknown"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def frame() -> int | None:
    """The number of the code that is being compiled; the same if it is compiled once more."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return compile_id.frame_id if compile_id else None


def running_module() -> torch.nn.Module | None:
    """The outermost module that was given to `torch.compile` and is being called.

    If a function was, the outermost module that is being called, if there is one.
    """
    running: list[torch.nn.Module] = []
    at: Any = sys._getframe()
    while at is not None:
        caller = at.f_locals.get("self")
        if isinstance(caller, torch.nn.Module) and not isinstance(caller, fx.GraphModule):
            running.append(caller)
        at = at.f_back
    outermost = running[::-1]
    compiled = (
        m for m in outermost if isinstance(m, OptimizedModule) or m._compiled_call_impl is not None
    )
    return next(compiled, outermost[0] if outermost else None)


def recompilation() -> tuple[int, str]:
    """How often the code that is being compiled was compiled before, and why it is once more."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    times = int(compile_id.frame_compile_id or 0) if compile_id else 0
    reason = get_metrics_context()._metrics.get("recompile_reason") if times else None
    return times, str(reason or "")


def count(name: str, by: int = 1) -> None:
    """Add to ``torch._dynamo.utils.counters["ascend_sp"][name]``."""
    counters["ascend_sp"][name] += by


def counted(name: str) -> int:
    """What was added there."""
    return int(counters["ascend_sp"][name])


def profiling() -> bool:
    """Whether a profiler is running; costs nothing to ask."""
    return profiler._is_profiler_enabled


def debug_dir() -> str | None:
    """Where PyTorch puts what it writes with ``TORCH_COMPILE_DEBUG=1``; None without that."""
    return get_debug_dir() if os.environ.get("TORCH_COMPILE_DEBUG", "0") == "1" else None


def join_group(rank: int, ranks: int, name: str) -> None:
    """Be one of `ranks` in a group `name` that sends nothing; for files of `runnable.py`."""
    import torch.testing._internal.distributed.fake_pg  # registers the backend

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=dist.HashStore())
    world = dist.group.WORLD
    assert world is not None
    if name != world.group_name:
        torch._C._distributed_c10d._register_process_group(name, world)  # type: ignore[arg-type]


def to_aten(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """Trace a Dynamo graph to functional ATen for inference, of its ops none decomposed.

    Decomposed is ``out_dtype``, as Inductor does it: a higher-order op by which torchao multiplies
    8-bit integers on all but CPUs, and for which no rule could stand.

    `compile_graph` gets the ATen graph and its fake inputs, and returns a boxed callable. Aliased
    and mutated inputs are taken care of around it. It runs once more if PyTorch restarts the trace
    (with ``dynamic=True``).
    """

    def training(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        raise AssertionError("a graph that needs gradients got past the check in front")

    boxed = _boxed(compile_graph)
    trace = aot_autograd(
        fw_compiler=training,
        inference_compiler=boxed,
        decompositions=get_decompositions([torch.ops.higher_order.out_dtype]),
    )
    return trace(gm, _of_one_mode(inputs))


def _of_one_mode(inputs: Sequence[Any]) -> list[Any]:
    """`inputs`, the fake ones in the mode of this trace; they may be of the mode of `explain`.

    PyTorch 2.10 refuses the latter; 2.11 and newer do just this by themselves, and from 2.12 on
    for the parts of a tensor, too.
    """
    mode = TracingContext.get().fake_mode
    assert mode is not None

    def of_this(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and has_parts(x):
            inner = {name: getattr(x, name) for name in x.__tensor_flatten__()[0]}  # type: ignore[attr-defined]
            return x if all(of_this(t) is t for t in inner.values()) else of_parts(x, of_this)
        foreign = isinstance(x, FakeTensor) and x.fake_mode is not mode
        return mode.from_tensor(x) if foreign else x

    return [of_this(x) for x in inputs]


def _boxed(
    compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    def compile_boxed(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = compile_graph(gm, inputs)
        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile_boxed


def input_sources(gm: fx.GraphModule) -> list[str]:
    """What the user calls each input of a Dynamo graph: ``hidden_states``, ``self.proj.weight``."""
    out = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        text = str(source.name) if source is not None else node.name
        text = re.sub(r"^[LG]\['(\w+)'\]", r"\1", text)
        text = re.sub(r"^kwargs\['(\w+)'\]", r"\1", text)  # of a decorator around the model's own
        out.append(re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", text))
    return out


def named_inputs(aten: fx.GraphModule, sources: Sequence[str]) -> list[str]:
    """What the user calls each input of an ATen graph traced from a graph with `sources`."""
    out = []
    for node in aten.graph.find_nodes(op="placeholder"):
        place = _place(node)
        known = isinstance(place, int) and place < len(sources)
        out.append(sources[place] if known else node.name)  # type: ignore[index]
    return out


def _place(node: fx.Node) -> int | None:
    """Which input of the traced function a placeholder is, or is a part of."""
    found: Any = node.meta.get("desc")
    while hasattr(found, "base"):  # a part of a tensor that is made of parts
        found = found.base
    place = getattr(found, "idx", None)
    return place if isinstance(place, int) else None


def parts_of(aten: fx.GraphModule, inputs: Collection[int]) -> dict[str, int]:
    """The placeholders that are tensors in which the traced function's `inputs` are held."""
    return {
        node.name: place
        for node in aten.graph.find_nodes(op="placeholder")
        if (place := _place(node)) is not None
        and place in inputs
        and isinstance(node.meta.get("val"), torch.Tensor)
    }


def to_be_saved() -> bool:
    """Whether PyTorch compiles for a file (``aot_compile``), so that a function is not enough."""
    # PyTorch 2.10 has the first of them only, and sets it nowhere else.
    forced = getattr(functorch_config, "force_autograd_cache", True)
    return bool(functorch_config.bundled_autograd_cache and forced)


def static_input_indices() -> list[int]:
    """Which inputs of the ATen graph being compiled are parameters or buffers."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    return list(metadata.static_input_indices or []) if metadata else []


@contextmanager
def own_tracing_context(inputs: Sequence[Any]) -> Iterator[None]:
    """A second AOTAutograd must not write into the context of the one that is running."""
    own = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    running = detect_fake_mode(inputs) if own is None else own
    context = TracingContext.try_get()
    # A program that was traced anew is none of the mode of the trace that is running.
    anew = own is not None and context is not None and context.fake_mode is not own
    modes = without_modes() if anew else nullcontext()
    with tracing(TracingContext(running or FakeTensorMode())), modes:
        yield


class FreshSizes:
    """Symbols of at least 1 that no graph has yet, and fake values that have them in their sizes.

    Args:
        hints: the value of each in the call that is compiled.

    Raises:
        ValueError: one of these is less than 1.
    """

    def __init__(self, hints: Sequence[int]) -> None:
        if min(hints, default=1) < 1:
            raise ValueError(f"a size of 0 among {list(hints)}")
        # Not the same symbol for equal hints, and none made a constant for being 1.
        self._env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self.symbols: list[sympy.Symbol] = []
        self.sizes: list[torch.SymInt] = []
        for i, hint in enumerate(hints):
            source = ConstantSource(f"fresh_{i}")
            symbol = self._env.create_symbol(
                hint, source, DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True
            )
            size = self._env.create_symintnode(symbol, hint=hint, source=source)
            constrain_range(size, min=1)  # type: ignore[arg-type]
            self.symbols.append(symbol)  # type: ignore[arg-type]
            self.sizes.append(size)  # type: ignore[arg-type]

    def size(self, expr: int | sympy.Expr) -> int | torch.SymInt:
        """A size that is calculated from these symbols."""
        if isinstance(expr, int):
            return expr
        env = dict(zip(self.symbols, self.sizes, strict=True))
        return sympy_interp(OptimizedPythonReferenceAnalysis, env, expr)

    def holds(self, values: Sequence[int]) -> bool:
        """Whether all that was assumed of the symbols since is so for other values, too."""
        given = dict(zip(self.symbols, map(sympy.Integer, values), strict=True))
        return min(values, default=1) >= 1 and all(
            g.expr.xreplace(given) == sympy.true for g in self._env.guards
        )
