"""The simulated device as torch_npu sees it, and what is not simulated."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import build
import cannsim
import pytest
import simulated_npu
import torch
import torch_npu
from cannsim import library, memory


def test_round_trips_keep_values_and_strides() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for t in (x, x.t(), x[:, 1:], x.bfloat16(), x.long(), x > 2, x[:0]):
        there = t.to("npu")
        assert there.device.type == "npu" and there.stride() == t.clone().stride()
        assert torch.equal(there.cpu(), t)


def test_an_alias_is_the_same_memory() -> None:
    x = torch.zeros(2, 3).to("npu")
    memory.alias(x[:, 1]).fill_(7.0)
    assert x.cpu().tolist() == [[0.0, 7.0, 0.0]] * 2


def test_eager_ops() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    x, y = a.to("npu"), b.to("npu")
    assert torch.allclose((x @ y).cpu(), a @ b)
    assert (x.add_(1) is x) and torch.allclose(x.cpu(), a + 1)
    out = torch.empty(0, device="npu")
    torch.mul(y, 2, out=out)
    assert torch.allclose(out.cpu(), b * 2)
    assert torch.cat([x, y]).shape == (8, 4)
    assert x.sum().item() == pytest.approx((a + 1).sum().item(), rel=1e-5)
    assert torch.randn(3, device="npu", generator=torch.Generator("npu")).shape == (3,)


def _switches(rank: int, world: int) -> Any:
    torch.ones(1).to("npu")
    return torch.npu.get_device_name(0), torch.npu.device_count()


def test_soc_is_a_switch() -> None:
    """The version is one too: see test_conversion_facts.py."""
    assert simulated_npu.run(_switches, 1) == [("Ascend910B3", 8)]
    found = simulated_npu.run(_switches, 1, CANNSIM_SOC="Ascend910_9382")
    assert found == [("Ascend910_9382", 8)]


def test_stubs_say_that_they_were_called() -> None:
    lib = library.load()
    assert "aclrtGetVersion" not in library.called_stubs()
    assert lib.aclrtGetVersion(None, None, None) == 0
    assert "aclrtGetVersion" in library.called_stubs()


@pytest.mark.parametrize("name", ["aclopExecuteV2", "HcclReduceScatterV", "aclrtMemcpyBatch"])
def test_a_stub_that_would_move_data_fails_and_is_named(name: str) -> None:
    assert getattr(library.load(), name)() != 0
    assert name in library.last_error()
    message = library.load().aclGetRecentErrMsg
    message.restype = ctypes.c_char_p
    assert name in message().decode()


def test_an_op_without_reference_is_named() -> None:
    with pytest.raises(NotImplementedError, match="npu_mish"):
        torch_npu.npu_mish(torch.ones(4).to("npu"))


def test_no_kernel_of_the_wheel_is_left() -> None:
    """Whatever runs natively would look for an aclnn kernel, and there is none."""
    with open(library.folder() / "names_with_body.txt") as f:
        assert "aclnn" not in f.read()


def test_a_build_that_is_up_to_date_does_nothing(tmp_path: Path) -> None:
    site = Path(torch_npu.__file__).parent.parent
    (tmp_path / build.STAMP).write_text(build.fingerprint(site))
    assert build.build(site, tmp_path) is False
    assert [p.name for p in tmp_path.iterdir()] == [build.STAMP]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"without gcc, g\+\+, nm, strings"):
        build.build(tmp_path, tmp_path)


def test_a_missing_simulator_is_an_error_that_says_how_to_build_it() -> None:
    code = "import os; os.environ.pop('CANNSIM_LIB_DIR'); import cannsim; cannsim.install()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=simulated_npu.HERE, capture_output=True, text=True
    )
    assert "SimulatorMissingError" in done.stderr and "build.py" in done.stderr


def test_install_twice_is_once() -> None:
    cannsim.install()
