"""The private PyTorch that ascend_sp stands on is where it was, and is used where we say."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

import ascend_sp

PACKAGE = Path(ascend_sp.__file__).parent
# Modules that may import names of torch that start with an underscore.
ALLOWED = {
    "compiler/_dynamo.py",
    "compiler/_inductor.py",
    "compiler/_pytorch.py",
    "graph/_pytorch.py",
    "runtime/_pytorch.py",
}


def test_private_names_stay_in_their_modules() -> None:
    private = re.compile(
        r"^\s*(from|import) torch\S*\._|^\s*from torch\S* import _|\bc10d\._|torch\._(?!C\b|_)",
        re.M,
    )
    found = {
        str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if private.search(f.read_text())
    }
    assert found <= ALLOWED


def test_collectives_have_the_schemas_that_we_emit() -> None:
    ops = torch.ops._c10d_functional
    schemas = {
        "all_to_all_single": ["input", "output_split_sizes", "input_split_sizes", "group_name"],
        "all_gather_into_tensor": ["input", "group_size", "group_name"],
        "all_reduce": ["input", "reduce_op", "group_name"],
        "wait_tensor": ["tensor"],
    }
    for name, arguments in schemas.items():
        assert [a.name for a in getattr(ops, name).default._schema.arguments] == arguments


def test_compile_fx_and_the_metadata_that_it_reads() -> None:
    from torch._functorch._aot_autograd import frontend_utils
    from torch._inductor.compile_fx import compile_fx

    assert list(inspect.signature(compile_fx).parameters)[:2] == ["model_", "example_inputs_"]
    source = inspect.getsource(frontend_utils._try_get_metadata_from_dynamo)
    for name in ("dynamo_compile_id", "_param_name_to_source", "_dynamo_source", "tensor_dict"):
        assert name in source
    assert "_dynamo_static_input_type" in source


def test_whatever_inductor_moves_by_default_is_switched_off() -> None:
    from torch._inductor import config

    from ascend_sp.compiler._inductor import KEEPS_ORDER

    moves = re.compile(r"overlap|reorder")
    known = config.get_config_copy().items()
    on = {n for n, v in known if v is True and moves.search(n) and not n.startswith("triton.")}
    assert {"reorder_for_peak_memory", "reorder_for_locality"} <= on
    assert on == {n for n, v in KEEPS_ORDER.items() if v is False}


def test_static_inputs_reach_inductor() -> None:
    """Parameters are known as such behind both AOTAutograds."""
    import torch._inductor.compile_fx as module
    from torch._inductor.utils import fresh_cache

    seen: list[list[int]] = []
    original = module.get_static_input_idxs

    def spy(fixed: int) -> list[int]:
        seen.append(list(original(fixed)))
        return seen[-1]

    module.get_static_input_idxs = spy
    try:
        with torch.no_grad(), fresh_cache():
            model = torch.nn.Linear(3, 5)
            torch.compile(model, backend="ascend_sp")(torch.randn(2, 3))
    finally:
        module.get_static_input_idxs = original
    assert [sorted(s) for s in seen] == [[0, 1]]


def test_store_of_a_group_is_reachable() -> None:
    assert hasattr(torch.distributed.ProcessGroup, "get_group_store")
    assert hasattr(torch.distributed.distributed_c10d, "_resolve_process_group")


def test_dispatch_modes_can_be_left() -> None:
    """AOTAutograd runs each graph under one for the first time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from ascend_sp.runtime._pytorch import without_modes

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2)
        before = len(seen)
        with without_modes():
            torch.ones(2)
        assert before == len(seen) == 1


def test_nested_values() -> None:
    from ascend_sp.runtime._pytorch import tree_leaves, tree_map

    assert tree_map(str, ({"a": [1]}, 2)) == ({"a": ["1"]}, "2")
    assert tree_leaves(({"a": [1]}, 2)) == [1, 2]


def test_fake_values_of_symbolic_sizes() -> None:
    """Padding by a symbolic amount needs the Python meta kernels."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from ascend_sp.graph._pytorch import FakeTensorMode, enable_python_dispatcher

    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(5, 3))
    with mode, enable_python_dispatcher():
        n = x.shape[0]
        assert torch.ops.aten.constant_pad_nd(x, [0, 0, 0, -n % 4]).shape[1] == 3


def test_inputs_have_the_names_that_the_user_gave_them() -> None:
    """Dynamo's sources, and AOTAutograd's word of which input is which."""
    from ascend_sp.compiler import _pytorch

    names: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> object:
        sources = _pytorch.input_sources(gm)

        def compile_graph(aten: torch.fx.GraphModule, inputs: object) -> object:
            names[:] = _pytorch.named_inputs(aten, sources)
            return lambda values: aten(*values)

        return _pytorch.to_aten(gm, inputs, compile_graph)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(2))
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

        def forward(self, hidden_states: torch.Tensor, more: dict) -> torch.Tensor:
            return self.layers[0](hidden_states * self.table + more["mask"])

    with torch.no_grad():
        model = torch.compile(Model(), backend=backend, dynamic=True)
        model(torch.ones(3, 2), {"mask": torch.ones(3, 1)})
    assert {"hidden_states", "more['mask']", "self.table", "self.layers.0.weight"} <= set(names)


def test_what_diagnostics_stand_on() -> None:
    """Counters, the profiler's switch, recompile reasons, and loggers that TORCH_LOGS finds."""
    from torch._dynamo.utils import get_debug_dir, get_metrics_context
    from torch.autograd import profiler

    from ascend_sp.compiler import _pytorch

    assert _pytorch.profiling() is False is profiler._is_profiler_enabled
    with torch.profiler.profile():
        assert _pytorch.profiling() is True
    assert isinstance(get_metrics_context()._metrics, dict)
    assert callable(get_debug_dir)
    told: list[tuple[int, str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        told.append(_pytorch.recompilation())
        return gm

    f = torch.compile(lambda x, n: x * n, backend=backend, dynamic=False)
    f(torch.ones(2), 2)
    f(torch.ones(2), 3)
    assert told[0] == (0, "")
    assert told[1][0] == 1 and "== 2" in told[1][1]


def test_pieces_of_a_model_are_known_as_such() -> None:
    from ascend_sp.compiler import _pytorch

    seen: list[tuple[str, torch.nn.Module | None, int | None]] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        seen.append((_pytorch.broken_by(gm), _pytorch.running_module(), _pytorch.frame()))
        return gm

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            torch._dynamo.graph_break()
            return y * 2

    compiled = torch.compile(torch.nn.Sequential(Broken()), backend=backend)
    compiled(torch.ones(2))
    (why, model, first), (last, same, second) = seen
    assert model is compiled is same
    assert "graph_break" in why and f"{__file__}:" in why and not last
    assert isinstance(first, int) and isinstance(second, int) and first != second
    # Compiled in place, within a model that is not.
    block = Broken()
    block.compile(backend=backend)
    torch.nn.Sequential(block)(torch.ones(3))
    assert seen[-1][1] is block
    assert _pytorch.in_short("Why\n  Hint: x\n Developer debug context: <f at 0x7f>") == "Why: <f>"


def test_dynamo_tells_of_code_that_it_gives_up() -> None:
    """The facts that `_dynamo.py` reads off Dynamo's own frame are there, under these names."""
    from torch._dynamo import convert_frame
    from torch._dynamo.cache_size import exceeds_recompile_limit
    from torch._dynamo.utils import get_hook_for_recompile_user_context

    from ascend_sp.compiler._dynamo import Frame, before_each_compile

    known = {"code", "compiler_fn", "one_graph", "cache_size", "frame", "compile_id"}
    compile_ = inspect.unwrap(convert_frame._compile)
    assert known <= set(inspect.signature(compile_).parameters)
    assert compile_.__code__.co_name == "_compile"
    assert list(inspect.signature(exceeds_recompile_limit).parameters) == [
        "cache_size",
        "compile_id",
    ]
    frames: list[Frame] = []
    before_each_compile(frames.append)
    try:
        torch._dynamo.reset()
        double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            for n in (3, 4):
                double(torch.ones(n))
    finally:
        (get_hook_for_recompile_user_context() or []).pop()
    assert [(f.times, f.sizes["x"], bool(f.limit)) for f in frames] == [
        (0, "[3]", False),
        (1, "[4]", True),
    ]
    assert "size mismatch" in frames[1].reason


def test_outputs_of_diffusers_as_arguments_are_no_error() -> None:
    """They are registered as trees, but do not name their parts."""
    from diffusers.models.autoencoders.vae import DecoderOutput

    from ascend_sp.compiler._dynamo import _sizes

    x = torch.zeros(2, 3)
    assert _sizes({"x": x, "out": DecoderOutput(sample=x)}) == {"x": "[2, 3]", "out[0]": "[2, 3]"}


def test_a_fake_for_dynamo_is_asked_by_dynamo_only() -> None:
    """Where a kernel of a device reads sizes as numbers, Dynamo can be told what an op yields."""
    from ascend_sp.graph._pytorch import NOT_KNOWN, fake_for_dynamo

    asked = []

    def fake(x: torch.Tensor) -> object:
        asked.append(x)
        return torch.empty_like(x) if len(asked) == 1 else NOT_KNOWN

    op = torch.ops.aten.special_bessel_j0.default
    fake_for_dynamo(op, "AutogradCPU", fake)
    try:
        run = torch.compile(torch.special.bessel_j0, backend="aot_eager")
        with torch.no_grad():
            torch.special.bessel_j0(torch.ones(2))
            assert not asked
            torch.testing.assert_close(run(torch.ones(2)), torch.special.bessel_j0(torch.ones(2)))
        assert len(asked) >= 1
    finally:
        del op.py_kernels[torch._C.DispatchKey.AutogradCPU]
        op._dispatch_cache.clear()


def test_what_a_rank_holds_of_a_dtensor_is_the_tensor_itself() -> None:
    """Not a view of it: what is kept of a weight is found again by this tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ascend_sp.runtime._pytorch import local_of

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        part = torch.ones(3, 2)
        mesh = init_device_mesh("cpu", (2,))
        whole = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        assert whole.shape == (6, 2)
        assert local_of(whole) is whole._local_tensor
        assert local_of(whole).data_ptr() == part.data_ptr()
    finally:
        torch.distributed.destroy_process_group()


def test_fresh_sizes_are_no_constants_and_know_what_was_assumed_of_them() -> None:
    from ascend_sp.compiler._pytorch import FreshSizes
    from ascend_sp.graph.sizes import as_size

    fresh = FreshSizes([1, 1])  # neither the same symbol, nor the number 1
    a, b = fresh.symbols
    assert a != b and fresh.size(3) == 3
    with fresh.mode:
        x = torch.empty([fresh.size(16 * a), fresh.size(b)])
    assert [as_size(n) for n in x.shape] == [16 * a, b]
    assert fresh.holds([5, 7])
    assert x.shape[0] < 40
    assert fresh.holds([2, 7]) and not fresh.holds([3, 7])
