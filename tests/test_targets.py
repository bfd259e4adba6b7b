"""Which target `auto` stands for."""

from __future__ import annotations

import pytest

from ascend_sp.compiler.targets import choose, eager, inductor


@pytest.mark.parametrize(
    ("name", "device", "target"),
    [
        ("auto", "cpu", inductor),
        ("auto", "cuda", inductor),
        ("auto", "npu", eager),
        ("eager", "cpu", eager),
        ("inductor", "npu", inductor),
    ],
)
def test_target_is_chosen_by_device(name: str, device: str, target: object) -> None:
    assert choose(name, device) is target
