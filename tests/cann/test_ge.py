"""GE graphs: what torchair builds is executed as GE would, and can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cannsim
import pytest
import simulated_npu
import torch
import torch.nn.functional as F
import torchair
from cannsim.ge.registry import KERNELS, Call, GeError
from torch import Tensor
from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef
from torchair.configs.compiler_config import CompilerConfig

npu = torch.ops.npu


def compile_ge(fn: Callable[..., Any], dynamic: bool = False, **config: Any) -> Callable[..., Any]:
    settings = CompilerConfig()
    for name, value in config.items():
        setattr(settings.experimental_config, name, value)
    backend = torchair.get_npu_backend(compiler_config=settings)
    return torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)


def check(fn: Callable[..., Any], *args: Tensor) -> Any:
    """`fn` as a GE graph gives what it gives on CPU; the graph."""
    cannsim.ge.forget()
    with torch.no_grad():
        expected = fn(*args)
        found = compile_ge(fn)(*(a.to("npu") for a in args))
    (graph,) = cannsim.ge.graphs()
    expected, found = (torch.utils._pytree.tree_leaves(v) for v in (expected, found))
    for i, (e, f) in enumerate(zip(expected, found, strict=True)):
        assert e.dtype == f.dtype, i
        torch.testing.assert_close(f.cpu(), e, atol=1e-5, rtol=1e-5, msg=lambda m, i=i: f"{i}: {m}")
    return graph


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.layer_norm(F.linear(x, w, b), (8,))
    return F.gelu(y, approximate="tanh") + x


def test_a_static_graph_can_be_looked_at() -> None:
    x, w, b = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(8)
    graph = check(_layer, x, w, b)
    assert graph.runs == 1 and graph.is_static
    assert graph.types()["LayerNormV4"] == 1 and graph.types()["Gelu"] == 1
    (gelu,) = graph.find("Gelu")
    (norm,) = graph.find("LayerNormV4")
    assert gelu.inputs == [f"{norm.name}:0"]
    assert gelu.outputs == [(torch.float32, (2, 3, 8))]
    assert norm.attrs["epsilon"] == pytest.approx(1e-5)
    assert "ge.exec.formatMode" in graph.options or graph.options


def test_one_dynamic_graph_serves_several_lengths() -> None:
    cannsim.ge.forget()
    w, b = torch.randn(8, 8), torch.randn(8)
    compiled = compile_ge(_layer, dynamic=True)
    for length in (5, 9, 12):
        x = torch.randn(2, length, 8)
        with torch.no_grad():
            out = compiled(x.to("npu"), w.to("npu"), b.to("npu"))
        torch.testing.assert_close(out.cpu(), _layer(x, w, b), atol=1e-5, rtol=1e-5)
    (graph,) = cannsim.ge.graphs()
    assert not graph.is_static and graph.runs == 3


def test_elementwise_ops() -> None:
    def fn(x: Tensor, y: Tensor, i: Tensor, m: Tensor) -> Any:
        p = x.abs() + 0.5
        return (
            x + y, x - y, x * y, x / p, x * 2.5, x - 1, 1 - x, -x, x.exp(), p.log(), p.sqrt(),
            p.rsqrt(), p.reciprocal(), x.sin(), x.cos(), x.tanh(), x.sigmoid(), F.silu(x),
            F.relu(x), torch.erf(x), x.floor(), x.ceil(), x.round(), x.pow(2), x.abs(),
            x.clamp(-0.5, 0.5), x.clamp_min(0.0), torch.maximum(x, y), torch.minimum(x, y),
            x > y, x >= y, x < y, x <= y, x == x, x != y, m & (x > 0), m | (x > 0), ~m,
            torch.logical_and(m, x > 0), torch.where(m, x, y), x.masked_fill(m, 3.0),
            i // 3, i % 3, i + 1, i.float(), x.to(torch.bfloat16).float(), i.bool(),
            torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2.0),
            F.leaky_relu(x, 0.1), torch.addcmul(x, y, y, value=0.5), torch.lerp(x, y, 0.25),
            F.gelu(x, approximate="tanh"),
        )  # fmt: skip

    x, y = torch.randn(4, 6), torch.randn(4, 6)
    check(fn, x, y, torch.arange(24).reshape(4, 6) - 7, torch.rand(4, 6) > 0.5)


def test_shape_ops() -> None:
    def fn(x: Tensor) -> Any:
        a, b = x.chunk(2, -1)
        c, d = x.split([1, 3], 1)
        return (
            x.transpose(1, 2) + 0, x.permute(2, 0, 1) + 0, x.reshape(2, -1), x.flatten(1),
            x.unsqueeze(1) + 0, x[:, :1].squeeze(1) + 0, torch.cat([x, x], 1), a * b, c + 1, d + 1,
            torch.stack([x, x], 1), x[:, 1:3] + 0, x[..., ::2] + 0, x[:, -1] + 0,
            x[:, 1:2].expand(2, 5, 6) + 0, x.repeat(1, 2, 1), F.pad(x, (1, 2, 0, 1)), x.flip(1),
            x.unbind(1)[2] + 0, x.select(2, 3) + 0,
            torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 3), torch.select_scatter(x, x[:, 0], 1, 2),
            torch.arange(5, device=x.device), torch.ones(2, 3, device=x.device).triu(1),
            torch.ones(3, 3, device=x.device).tril(),
        )  # fmt: skip

    check(fn, torch.randn(2, 4, 6))


def test_reductions_and_indexing() -> None:
    def fn(x: Tensor, i: Tensor, m: Tensor) -> Any:
        return (
            x.sum(), x.sum(1), x.mean((0, 2)), x.mean(-1, keepdim=True),
            x.max(1).values, x.softmax(-1), F.log_softmax(x, 1), x.cumsum(1), x.argmax(-1),
            m.all(), m.any(), m.any(1), x.index_select(1, i), x[:, i], x.gather(1, i[None, :, None]
            .expand(2, 3, 6)), F.embedding(i, x[0]), F.group_norm(x, 2), F.layer_norm(x, (6,)),
            F.rms_norm(x, (6,)), torch.topk(x, 2, -1).values,
        )  # fmt: skip

    check(fn, torch.randn(2, 4, 6), torch.tensor([3, 0, 1]), torch.rand(2, 4) > 0.5)


def test_products() -> None:
    def fn(x: Tensor, y: Tensor, b: Tensor, image: Tensor, kernel: Tensor) -> Any:
        return (
            x @ y, torch.bmm(x, y), x[0] @ y[0], torch.addmm(b, x[0], y[0]), F.linear(x, x[0]),
            torch.baddbmm(b, x, y), F.conv2d(image, kernel, None, 2, 1),
        )  # fmt: skip

    shapes = [(2, 3, 4), (2, 4, 5), (5,), (1, 3, 8, 8), (2, 3, 3, 3)]
    check(fn, *(torch.randn(*s) for s in shapes))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return (
        npu.npu_fusion_attention(q, k, v, 2, "BNSD", scale=0.25, atten_mask=mask)[0],
        npu.npu_prompt_flash_attention(
            q, k, v, num_heads=2, input_layout="BNSD", scale_value=0.25, atten_mask=mask
        ),
        *npu.npu_fused_infer_attention_score(
            q, k, v, num_heads=2, input_layout="BNSD_BSND", scale=0.25, softmax_lse_flag=True,
            actual_seq_lengths_kv=[3, 4],
        ),
        npu.npu_fused_infer_attention_score_v2(
            q, k, v, num_query_heads=2, input_layout="BNSD", softmax_scale=0.25, atten_mask=mask
        )[0],
    )  # fmt: skip


def _on_npu(fn: Callable[..., Any], *args: Tensor) -> Any:
    """`fn` as a GE graph gives what it gives in eager mode on npu; the graph."""
    cannsim.ge.forget()
    there = [a.to("npu") for a in args]
    with torch.no_grad():
        eager, compiled = fn(*there), compile_ge(fn)(*there)
    for e, c in zip(*(torch.utils._pytree.tree_leaves(x) for x in (eager, compiled)), strict=True):
        torch.testing.assert_close(c.cpu(), e.cpu())
    return cannsim.ge.graphs()[-1]


def test_fused_attention_is_the_same_as_in_eager_mode() -> None:
    q, k, v = (torch.randn(2, 2, 5, 16) for _ in range(3))
    graph = _on_npu(_attention, q, k, v, torch.zeros(5, 5, dtype=torch.bool))
    assert graph.types()["FusedInferAttentionScore"] == 2
    op = graph.find("FusedInferAttentionScore")[0]
    assert op.attrs["input_layout"] == "BNSD_BSND" and op.attrs["num_heads"] == 2


def test_other_fused_ops_are_the_same_as_in_eager_mode() -> None:
    def fn(x: Tensor, g: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return (
            npu.npu_rms_norm(x, g), npu.npu_add_rms_norm(x, x, g), npu.npu_swiglu(x),
            npu.npu_geglu(x), npu.npu_fast_gelu(x), npu.npu_rotary_mul(x, cos, sin),
        )  # fmt: skip

    x, table = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8)
    graph = _on_npu(fn, x, torch.randn(8), table, table + 1)
    assert graph.types()["RotaryMul"] == 1


def test_illegal_attention_is_refused_when_the_graph_is_built() -> None:
    q = torch.randn(1, 2, 5, 16).to("npu")
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool).to("npu")

    def fn(q: Tensor, mask: Tensor) -> Tensor:
        return npu.npu_fused_infer_attention_score(
            q, q, q, num_heads=2, input_layout="BNSD", atten_mask=mask
        )[0]

    with pytest.raises(Exception, match=r"FusedInferAttentionScore.*atten_mask of shape"):
        compile_ge(fn)(q, mask)


def test_an_op_without_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KERNELS, "Erf")
    with pytest.raises(Exception, match=r"Erf \(node Erf\)"):
        compile_ge(lambda x: torch.erf(x) + 1)(torch.ones(3).to("npu"))


def test_writing_to_an_input_writes_to_the_callers_memory() -> None:
    x, y = torch.zeros(3).to("npu"), torch.ones(3).to("npu")

    def fn(x: Tensor, y: Tensor) -> Tensor:
        x.copy_(y * 2)
        return x + 1

    with torch.no_grad():
        assert compile_ge(fn)(x, y).cpu().tolist() == [3.0] * 3
    assert x.cpu().tolist() == [2.0] * 3


def _model(*ops: tuple[str, str, list[str]]) -> bytes:
    model = ModelDef()
    graph = model.graph.add()
    for type_, name, inputs in ops:
        op = graph.op.add(type=type_, name=name, input=inputs)
        if type_ == "Data":
            op.attr["index"].i = 0
            op.output_desc.add(dtype=1).shape.dim.append(2)
    return model.SerializeToString()


def test_control_edges_order_ops() -> None:
    model = _model(
        ("Neg", "first", ["x:0", "last:-1"]),
        ("Neg", "last", ["x:0"]),
        ("Data", "x", []),
        ("NetOutput", "out", ["first:0", "last:0"]),
    )
    graph = cannsim.ge.Graph(model, {})
    assert [op.name for op in graph.ops].index("last") < [op.name for op in graph.ops].index(
        "first"
    )
    assert graph.find("first")[0].controls == ["last"]
    (a, b) = graph.execute([torch.ones(2)])
    assert a.tolist() == b.tolist() == [-1.0, -1.0]
    with pytest.raises(GeError, match="cycle"):
        cannsim.ge.Graph(
            _model(("Neg", "a", ["b:0"]), ("Neg", "b", ["a:0"]), ("NetOutput", "o", ["a:0"])), {}
        )


def test_inferring_shapes_sends_nothing() -> None:
    """No communicator of that name exists, so sending would fail."""
    x = torch.ones(4, 3)
    counts = torch.tensor([6, 6])
    starts = torch.tensor([0, 6])

    def call(dry: bool, **attrs: Any) -> Call:
        op = SimpleNamespace(attrs={"group": "nobody", "rank_size": 2, **attrs}, input_names=[])
        return Call(op, {}, dry)  # type: ignore[arg-type]

    run = KERNELS["HcomAllToAllV"]
    assert run(call(True), x, counts, starts, counts, starts).shape == (12,)
    assert KERNELS["HcomAllGather"](call(True), x).shape == (8, 3)
    assert KERNELS["HcomReduceScatter"](call(True), x).shape == (2, 3)
    assert KERNELS["HcomAllToAll"](call(True), x).shape == (4, 3)
    with pytest.raises(KeyError, match="nobody"):
        run(call(False), x, counts, starts, counts, starts)


def test_gelu_of_ge_is_always_the_tanh_one() -> None:
    """torchair's converter drops `approximate`: an exact gelu is computed as the other."""
    x = torch.linspace(-4, 4, 64)
    with torch.no_grad():
        out = compile_ge(lambda x: F.gelu(x) * 1)(x.to("npu")).cpu()
    torch.testing.assert_close(out, F.gelu(x, approximate="tanh"))
    assert (out - F.gelu(x)).abs().max() > 1e-5


def _collectives(rank: int, world: int) -> Any:
    import torch.distributed as dist
    import torch.distributed._functional_collectives as fc

    group = dist.group.WORLD

    def fn(x: Tensor) -> Any:
        uneven = ([rank + 1] * world, [1 + r for r in range(world)])
        return (
            fc.all_to_all_single(x.reshape(-1), None, None, group) + 0,
            fc.all_to_all_single(x.reshape(-1)[: sum(uneven[1])], *uneven, group) + 0,
            fc.all_gather_tensor(x, 0, group) + 0,
            fc.all_reduce(x, "max", group) + 0,
            fc.reduce_scatter_tensor(x, "sum", 0, group) + 0,
            fc.broadcast(x, 1, group) + 0,
        )

    torch.manual_seed(rank)
    x = torch.randn(4, 3).to("npu")
    eager = [t.cpu() for t in fn(x)]
    compiled = compile_ge(fn)
    for _ in range(2):
        for e, c in zip(eager, compiled(x), strict=True):
            torch.testing.assert_close(c.cpu(), e)
    graph = cannsim.ge.graphs()[-1]
    return sorted((op.type, op.attrs["group"][:8]) for op in graph.find("Hcom"))


def test_hcom_ops_use_the_hccl_communicator() -> None:
    found = simulated_npu.run(_collectives, 2)
    kinds = ("AllGather", "AllReduce", "AllToAll", "AllToAllV", "Broadcast", "ReduceScatter")
    assert found == [[(f"Hcom{k}", "cannsim_") for k in kinds]] * 2
