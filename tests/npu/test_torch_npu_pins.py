"""The private torch_npu that the targets stand on is where it was, and says what it said."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import ascend_sp
from ascend_sp.compiler.targets import _torch_npu
from ascend_sp.graph._pytorch import has_kernel
from ascend_sp.graph.npu_names import OPS
from ascend_sp.passes.npu.attention_table import KERNELS
from ascend_sp.runtime.npu import ascend, npu_op


def test_only_one_module_knows_torchair() -> None:
    package = Path(ascend_sp.__file__).parent
    imports = re.compile(r"^\s*(from|import) (torch_npu|torchair|npugraph_ex)|npu_define", re.M)
    found = {f.name for f in package.rglob("*.py") if imports.search(f.read_text())}
    assert found == {"_torch_npu.py"}


def test_entry_points_have_the_arguments_that_we_give() -> None:
    import torch_npu.dynamo  # noqa: F401
    import torchair
    from torchair.configs.compiler_config import CompilerConfig

    compile_fx = torch.npu.npugraph_ex.compile_fx
    assert list(inspect.signature(compile_fx).parameters) == ["gm", "example_inputs", "options"]
    assert list(inspect.signature(torchair.get_compiler).parameters) == ["compiler_config"]
    config = CompilerConfig()
    experimental = config.experimental_config
    experimental.topology_sorting_strategy = "StableRDFS"
    experimental.frozen_parameter = True
    with pytest.raises(ValueError, match="StableRDFS"):
        experimental.topology_sorting_strategy = "any other"


def test_parameters_are_known_by_the_mark_that_we_set() -> None:
    from npugraph_ex._acl_concrete_graph import fx2acl_converter
    from torchair._ge_concrete_graph import fx2ge_converter

    for module in (fx2acl_converter, fx2ge_converter):
        assert '"_torchair_is_parameter"' in inspect.getsource(module)


def test_converters_are_found_where_we_look() -> None:
    aten = torch.ops.aten
    assert _torch_npu.has_ge_converter(aten.add.Tensor)
    assert _torch_npu.has_ge_converter(npu_op("npu_rms_norm"))
    assert _torch_npu.has_ge_converter(torch.ops._c10d_functional.wait_tensor.default)
    # There, but it only raises.
    assert hasattr(aten.repeat_interleave.self_int, "_ge_converter")
    assert not _torch_npu.has_ge_converter(aten.repeat_interleave.self_int)
    assert not _torch_npu.has_ge_converter(aten.amax.default)


def test_ops_without_a_kernel_are_told_from_composed_ones() -> None:
    aten = torch.ops.aten
    for op in (aten.special_bessel_j0.default, aten.lgamma.default, aten.cholesky_inverse.default):
        assert not has_kernel(op, "PrivateUse1"), op
    for op in (
        aten.add.Tensor,
        aten.select_scatter.default,
        aten.new_zeros.default,
        aten.t.default,
    ):
        assert has_kernel(op, "PrivateUse1"), op


def test_all_to_all_of_torchair_has_our_arguments() -> None:
    from torchair._ge_concrete_graph.ge_converter.experimental import hcom_alltoall  # noqa: F401

    op = torch.ops.npu_define.all_to_all_single_npu.default
    assert [a.name for a in op._schema.arguments] == [
        *("input", "send_counts", "send_displacements", "recv_counts", "recv_displacements"),
        *("tag", "ranks", "group_size"),
    ]


def test_attention_ops_exist_with_the_arguments_that_we_read() -> None:
    for kernel in KERNELS:
        assert npu_op(kernel.op) is not None
    for name, names in OPS.items():
        arguments = {a.name for a in npu_op(name)._schema.arguments}
        wanted = {names.heads, names.scale, names.before, names.after, names.groups} - {""}
        assert wanted | {"query", "key", "value", "atten_mask", "input_layout"} <= arguments


def test_versions_are_read() -> None:
    found = ascend()
    assert found.torch_npu == metadata.version("torch_npu")  # what the wheel says of itself
    assert found.cann == "9.1.0"
    assert found.soc == "Ascend910B3"
