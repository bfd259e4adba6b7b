"""Ways to write "an all-to-all of K, overlapped with the Q projection", for ACL graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified


def projections(x: torch.Tensor, wk: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    k = x @ wk
    kk = fc.all_to_all_single(k.reshape(-1), None, None, dist.group.WORLD)
    q = torch.nn.functional.gelu(x @ wq)
    return q @ kk.view(8, 6).t()


def _find(gm: fx.GraphModule, part: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if part in str(n.target)]


def sink_waits(gm: fx.GraphModule) -> None:
    """wait_tensor, and the view after it, right before the first use."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for wait in _find(gm, "wait_tensor"):
        user = min(wait.users, key=order.__getitem__)
        if "view" in str(user.target):
            min(user.users, key=order.__getitem__).prepend(user)
        user.prepend(wait)
    gm.recompile()


def side_stream(gm: fx.GraphModule, ops: Any, ready: bool = True) -> None:
    """A scope with a stream of its own: as documented, with record and wait behind it, or both
    behind and before it (`ready`)."""
    (start,), last = _find(gm, "all_to_all"), _find(gm, "matmul")[-1]
    graph = gm.graph
    with graph.inserting_before(start):
        before = graph.call_function(ops.record.default, ()) if ready else None
        graph.call_function(ops.scope_enter.default, (["_user_stream_label"], ["comm"]))
        if before is not None:
            graph.call_function(ops.wait.default, ([before],))
    with graph.inserting_after(start):
        done = graph.call_function(ops.record.default, ())
    with graph.inserting_after(done):
        graph.call_function(ops.scope_exit.default, ())
    with graph.inserting_before(last):
        graph.call_function(ops.wait.default, ([done],))
    gm.recompile()


def tagged_events(gm: fx.GraphModule, ops: Any) -> None:
    """The same scope, with events that have names, which npugraph_ex makes by a private call."""
    from npugraph_ex._acl_concrete_graph.graph_pass import _create_event_by_name

    (start,), last = _find(gm, "all_to_all"), _find(gm, "matmul")[-1]
    graph = gm.graph
    ready, done = (f"{word} {id(gm)}" for word in ("ready", "done"))
    for name in (ready, done):
        _create_event_by_name(name)
    with graph.inserting_before(start):
        graph.call_function(ops.tagged_event_record.default, (ready, True))
        graph.call_function(ops.scope_enter.default, (["_user_stream_label"], ["comm"]))
        graph.call_function(ops.tagged_event_wait.default, (ready, True))
    with graph.inserting_after(start):
        recorded = graph.call_function(ops.tagged_event_record.default, (done, True))
    with graph.inserting_after(recorded):
        graph.call_function(ops.scope_exit.default, ())
    with graph.inserting_before(last):
        graph.call_function(ops.tagged_event_wait.default, (done, True))
    gm.recompile()


def _npugraph_ex() -> Any:
    return torch.ops.npugraph_ex


def _scope_and_sink(gm: fx.GraphModule) -> None:
    side_stream(gm, _npugraph_ex(), ready=False)
    sink_waits(gm)


@dataclass(frozen=True)
class Variant:
    """One way to write it."""

    rewrite: Callable[[fx.GraphModule], None] = lambda gm: None
    decomposed: bool = True
    """Whether the functional all-to-all becomes npugraph_ex's own, which waits at once."""
    torchair: bool = False
    """Compiled by torchair in its npugraph_ex mode."""


VARIANTS = {
    "as traced": Variant(),
    "undecomposed": Variant(decomposed=False),
    "sunk wait": Variant(sink_waits, decomposed=False),
    "scope as documented": Variant(lambda gm: side_stream(gm, _npugraph_ex(), ready=False)),
    "undecomposed scope, sunk wait": Variant(_scope_and_sink, decomposed=False),
    "npugraph_ex scope": Variant(lambda gm: side_stream(gm, _npugraph_ex())),
    "tagged events": Variant(lambda gm: tagged_events(gm, _npugraph_ex())),
    "air scope": Variant(lambda gm: side_stream(gm, torch.ops.air), torchair=True),
    "torchair, sunk wait": Variant(sink_waits, decomposed=False, torchair=True),
}


def captured(variant: str, rank: int) -> dict[str, Any]:
    """Compile and run one variant; what is ordered, what overlaps, what races."""
    import cannsim
    import torch_npu.dynamo  # noqa: F401
    from npugraph_ex._utils import get_npu_default_decompositions

    torch.manual_seed(rank)
    x, wk, wq = (torch.randn(n, 6).to("npu") for n in (8, 6, 6))

    how = VARIANTS[variant]

    def compile_graph(gm: fx.GraphModule, inputs: Any) -> Any:
        how.rewrite(gm)
        if how.torchair:
            import torchair
            from torchair.configs.compiler_config import CompilerConfig

            config = CompilerConfig()
            config.mode = "npugraph_ex"
            return torchair.get_compiler(config)(gm, inputs)
        return torch.npu.npugraph_ex.compile_fx(gm, inputs, {})

    decompositions = get_npu_default_decompositions() if how.decomposed else {}

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(
            gm, inputs, fw_compiler=compile_graph, decompositions=decompositions
        )

    torch._dynamo.reset()
    cannsim.trace.forget()
    compiled = torch.compile(projections, backend=backend, dynamic=False, fullgraph=True)
    right = []
    for i in range(3):
        expected = projections(x + i, wk, wq).cpu()
        right.append(torch.allclose(compiled(x + i, wk, wq).cpu(), expected, atol=1e-5))
    trace = cannsim.trace.captured_graphs()[-1]
    (sent,), (gelu,) = trace.find("hccl"), trace.find("gelu")
    products = trace.find("matmul")
    return {
        "right": right,
        "overlaps": trace.overlaps(sent, gelu),
        "K first": trace.before(products[0], sent),
        "arrives": trace.before(sent, products[-1]),
        "races": [(r.names, r.what) for r in trace.races()],
    }


def all_to_all_of_rows(rank: int, world: int) -> str:
    """An all-to-all with more than one dim, by npugraph_ex alone; the error that it gives."""
    import torch_npu.dynamo  # noqa: F401

    x = torch.ones(8, 6).to("npu")
    compiled = torch.compile(
        lambda t: fc.all_to_all_single(t, None, None, dist.group.WORLD) + 1,
        backend="npugraph_ex",
        dynamic=False,
        fullgraph=True,
    )
    try:
        compiled(x)
    except Exception as e:
        return str(e)
    return ""
