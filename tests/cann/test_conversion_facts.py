"""Facts about the wheel that ascend_sp is built around.

Each test is about one trap, gap or difference. torch_npu 2.10.0.post7, 2.12.0.post3, 2.13.0 and
2.14.0 have every one of them: the Python files of torchair and npugraph_ex are the same in these
four, and so are the ``npu`` ops, except that the first two have named tensors too. 2.10.0.post4,
whose torchair is older, has them as well. A test that fails with a new torch_npu says that the
work-around of the product can go, or must change; not that the simulator is broken. It then gets
the versions that it holds for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cannsim
import programs
import pytest
import simulated_npu
import torch
import torch.nn.functional as F
import torchair
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torchair.configs.compiler_config import CompilerConfig

npu = torch.ops.npu


def _converter(op: Any) -> Callable[..., Any] | None:
    from torchair._ge_concrete_graph.fx2ge_converter import _get_converter

    return _get_converter(op)


def _compile(fn: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    backend = torchair.get_npu_backend(compiler_config=CompilerConfig())
    return torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)


def _ge(fn: Callable[..., Any], *args: Tensor) -> Any:
    """The GE graph of `fn`, and its result."""
    torch._dynamo.reset()
    cannsim.ge.forget()
    with torch.no_grad():
        out = _compile(fn)(*(a.to("npu") for a in args))
    return cannsim.ge.graphs()[-1], out


# ---- converters ----


@pytest.mark.parametrize(
    "name",
    [
        "npu_fusion_attention_v2",
        "npu_fusion_attention_v3",
        "npu_add_layer_norm",
        "npu_layer_norm_eval",
        "npu_transpose",
        "npu_gelu_mul",
        "npu_mrope",
        "npu_block_sparse_attention",
    ],
)
def test_fused_ops_without_converter(name: str) -> None:
    assert _converter(getattr(npu, name).default) is None


@pytest.mark.parametrize(
    "name",
    [
        "npu_fusion_attention",
        "npu_prompt_flash_attention",
        "npu_fused_infer_attention_score",
        "npu_fused_infer_attention_score_v2",
        "npu_rms_norm",
        "npu_add_rms_norm",
        "npu_rotary_mul",
        "npu_swiglu",
        "npu_geglu",
    ],
)
def test_fused_ops_with_converter(name: str) -> None:
    assert _converter(getattr(npu, name).default) is not None


@pytest.mark.parametrize(
    "name",
    ["npu_alltoall_matmul", "npu_all_gather_matmul", "npu_modulate", "npu_norm_rope_concat"],
)
def test_ops_that_do_not_exist(name: str) -> None:
    assert not hasattr(npu, name)


@pytest.mark.parametrize(
    ("what", "fn"),
    [
        ("repeat_interleave.self_int", lambda x: torch.repeat_interleave(x, 2, 1)),
        ("polar", lambda x: torch.view_as_real(torch.polar(x, x))),
        ("complex", lambda x: torch.view_as_real(torch.complex(x, x))),
        ("amax", lambda x: x.amax(1)),
        ("amin", lambda x: x.amin(1)),
        ("roll", lambda x: x.roll(1, 1)),
        ("var.correction", lambda x: x.var(1)),
        ("softplus", lambda x: F.softplus(x)),
    ],
)
def test_aten_ops_whose_converter_only_raises(what: str, fn: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match=rf"{what}.*converter is not implemented"):
        _ge(fn, torch.ones(2, 4))


def test_npu_fusion_attention_converts_in_two_layouts_only() -> None:
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(Exception, match="input_layout != BSH & BNSD"):
        _ge(lambda q: npu.npu_fusion_attention(q, q, q, 2, "BSND")[0], q)


def test_rotary_mode_is_dropped_on_the_way_to_ge() -> None:
    """Interleaved rotary embeddings would silently be rotated by halves."""
    x, cos, sin = (torch.randn(1, 3, 2, 8) for _ in range(3))
    graph, out = _ge(lambda x, c, s: npu.npu_rotary_mul(x, c, s, "interleave"), x, cos, sin)
    assert graph.types()["RotaryMul"] == 1
    there = [t.to("npu") for t in (x, cos, sin)]
    torch.testing.assert_close(out.cpu(), npu.npu_rotary_mul(*there, "half").cpu())
    assert not torch.allclose(out.cpu(), npu.npu_rotary_mul(*there, "interleave").cpu())


def test_complex_products_convert() -> None:
    x = torch.randn(2, 3, 2)

    def fn(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(x + 1))

    graph, out = _ge(fn, x)
    assert graph.types()["Complex"] == 2
    torch.testing.assert_close(out.cpu(), fn(x))


# ---- what sdpa becomes ----


def _aten(fn: Callable[..., Any], *args: Tensor) -> list[str]:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = tuple(torch.empty(a.shape, dtype=a.dtype, device="npu") for a in args)
        gm: fx.GraphModule = aot_export_joint_simple(lambda *a: (fn(*a),), fake, trace_joint=False)
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sdpa_is_the_third_fusion_attention_unless_its_mask_is_additive(
    dtype: torch.dtype,
) -> None:
    q = torch.empty(2, 4, 32, 64, dtype=dtype)
    fused = "npu.npu_fusion_attention_v3.default"

    def sdpa(q: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert fused in _aten(sdpa, q)
    found = _aten(sdpa, q, torch.empty(2, 1, 32, 32, dtype=torch.bool))
    assert fused in found and "aten.logical_not.default" in found
    assert fused not in _aten(sdpa, q, torch.empty(2, 1, 32, 32, dtype=dtype))


# ---- collectives ----


def _groups(rank: int, world: int) -> Any:
    import torch.distributed as dist

    both = dist.new_group(backend="cpu:gloo,npu:hccl")
    own = dist.new_group(backend="hccl")
    device = dist.distributed_c10d._get_pg_default_device
    return device(both).type, device(own).type


def _all_to_alls(rank: int, world: int) -> dict[str, Any]:
    import torch.distributed as dist
    import torch.distributed._functional_collectives as fc

    group = dist.group.WORLD
    sends, receives = [[1, 7], [3, 5]][rank], [[1, 3], [7, 5]][rank]
    x, w = torch.randn(8, 6), torch.randn(6, 6)

    def kinds(fn: Callable[..., Any], *args: Tensor) -> Any:
        try:
            return sorted(op.type for op in _ge(fn, *args)[0].find("Hcom"))
        except Exception as e:
            dist.barrier()
            return str(e)

    def flat(t: Tensor, w: Tensor) -> Tensor:
        got = fc.all_to_all_single(
            t.reshape(-1), [n * 6 for n in receives], [n * 6 for n in sends], group
        )
        return got.view(sum(receives), 6) @ w

    found = {
        "equal counts": kinds(lambda t: fc.all_to_all_single(t, None, None, group) + 1, x),
        "uneven, flat": kinds(flat, x, w),
        "reduce": kinds(lambda t: fc.all_reduce(t, "sum", group) * 2, x),
    }
    graph, _ = _ge(lambda t: fc.all_reduce(t, "sum", group) * 2, x)
    (reduce,) = graph.find("HcomAllReduce")
    found["waits"] = [op.type for op in graph.ops if op.inputs == [f"{reduce.name}:0"]]
    found["uneven, 2-D"] = kinds(
        lambda t: fc.all_to_all_single(t, receives, sends, group) @ torch.ones(6, 6).to(t), x
    )
    return found


@pytest.fixture(scope="module")
def all_to_alls() -> dict[str, Any]:
    return simulated_npu.run(_all_to_alls, 2)[0]


def test_a_group_of_two_backends_counts_as_a_cpu_group() -> None:
    """Then torchair writes a name that no HCCL communicator has: use backend="hccl"."""
    assert simulated_npu.run(_groups, 2) == [("cpu", "npu")] * 2


def test_equal_counts_are_the_plain_all_to_all(all_to_alls: dict[str, Any]) -> None:
    assert all_to_alls["equal counts"] == ["HcomAllToAll"]


def test_uneven_counts_work_on_flat_operands(all_to_alls: dict[str, Any]) -> None:
    assert all_to_alls["uneven, flat"] == ["HcomAllToAllV"]


def test_uneven_counts_break_on_operands_with_more_dims(all_to_alls: dict[str, Any]) -> None:
    assert "MatMul" in all_to_alls["uneven, 2-D"]
    assert "cannot be multiplied" in all_to_alls["uneven, 2-D"]


def test_a_wait_is_nothing_in_ge(all_to_alls: dict[str, Any]) -> None:
    assert all_to_alls["reduce"] == ["HcomAllReduce"]
    assert all_to_alls["waits"] == ["Identity"]


def _equal_counts(rank: int, world: int) -> Any:
    import torch.distributed._functional_collectives as fc
    from torch.distributed import group
    from torch_npu.npu.utils import get_cann_version

    graph, _ = _ge(lambda t: fc.all_to_all_single(t, None, None, group.WORLD) + 1, torch.ones(8))
    return get_cann_version("CANN"), [op.type for op in graph.find("Hcom")]


@pytest.mark.parametrize(
    ("version", "op"), [("8.1.RC1", "HcomAllToAllV"), ("9.1.0", "HcomAllToAll")]
)
def test_older_cann_has_only_the_uneven_all_to_all(version: str, op: str) -> None:
    method = "forkserver" if version == "9.1.0" else "spawn"
    found = simulated_npu.run(_equal_counts, 1, method=method, CANNSIM_VERSION=version)
    assert found == [(version, [op])]


def test_npugraph_ex_takes_element_counts_for_row_counts() -> None:
    """Whatever is imported first registers the kernel, so torchair must not be there."""
    found = simulated_npu.run(programs.all_to_all_of_rows, 1, method="spawn")
    assert all("Split sizes" in text for text in found), found


def test_npugraph_ex_alone_overwrites_earlier_results() -> None:
    """Why ascend_sp asks it for clones."""
    import torch_npu.dynamo  # noqa: F401

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * 2, backend="npugraph_ex", dynamic=False)
    first = compiled(torch.ones(3).to("npu"))
    compiled(torch.zeros(3).to("npu"))
    assert first.cpu().tolist() == [0, 0, 0]


def test_npugraph_ex_breaks_on_8_bit_weights() -> None:
    """It sets an option of torchair's configuration, which is not in its own."""

    def fn(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return npu.npu_weight_quant_batchmatmul(x, weight, scale)

    x, scale = (torch.ones(n, dtype=torch.float16) for n in ((4, 8), (6,)))
    args = [t.to("npu") for t in (x, torch.ones(8, 6, dtype=torch.int8), scale)]
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="npugraph_ex", dynamic=False, fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="experimental_config"):
        compiled(*args)
