"""Which target is tried on which device, in which order."""

from __future__ import annotations

import pytest

from ascend_sp.compiler.targets import TARGETS, ladder
from ascend_sp.compiler.targets.npugraph_ex import NPUGRAPH_EX
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.npu import Ascend


@pytest.mark.parametrize(
    ("name", "device", "order"),
    [
        ("auto", "cpu", ["inductor"]),
        ("auto", "cuda", ["inductor"]),
        ("auto", "xpu", ["eager"]),
        ("eager", "cpu", ["eager"]),
        ("inductor", "cpu", ["inductor"]),
        ("auto", "npu", ["npugraph_ex", "eager"]),
        ("npugraph_ex", "npu", ["npugraph_ex", "eager"]),
        ("torchair", "npu", ["torchair", "npugraph_ex", "eager"]),
        ("inductor", "npu", ["inductor"]),
        ("eager", "npu", ["eager"]),
    ],
)
def test_ladder(name: str, device: str, order: list[str]) -> None:
    assert [t.name for t in ladder(name, device)] == order


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("torchair", "cpu", "target='torchair' is for Ascend, and the model is on 'cpu'"),
        ("npugraph_ex", "cuda", "target='npugraph_ex' is for Ascend.*'cuda'"),
    ],
)
def test_a_target_of_another_device_is_an_error(name: str, device: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ladder(name, device)


def test_the_last_rung_takes_everything() -> None:
    for name in TARGETS:
        assert ladder(name, "npu")[-1].missing(Ascend()) is None


@pytest.mark.parametrize(
    ("cann", "fits"), [("9.1.0", True), ("8.5.0", True), ("8.5.RC1", False), ("8.1.RC1", False)]
)
def test_npugraph_ex_needs_a_cann_that_has_it(cann: str, fits: bool) -> None:
    why = NPUGRAPH_EX.missing(Ascend(cann=cann))
    assert (why is None) == fits
    assert fits or (why and "8.5.0" in why and cann in why)


def test_versions_of_cann_are_compared_as_ascend_means_them() -> None:
    order = ["8.1.RC1", "8.2.RC1.alpha003", "8.2.RC1", "8.2.RC2", "8.5.0.alpha001", "8.5.0"]
    order += ["8.5.1", "9.0.0.B120", "9.1.0", "10.0.RC1"]
    for i, have in enumerate(order):
        for j, want in enumerate(order):
            assert Ascend(cann=have).has_cann(want) == (i >= j), (have, want)
    assert not any(Ascend(cann=c).has_cann("8.0.RC1") for c in ("", "unknown"))


def test_an_unknown_cann_is_an_old_one() -> None:
    assert "unknown version" in (NPUGRAPH_EX.missing(Ascend()) or "")
