"""Hashes of inputs: of every dtype, the same for the same values, and of a sample of large ones."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import Tensor

from ascend_sp.runtime import stalls
from ascend_sp.runtime.replicas import ELEMENTS, OF_PARAMETER, Input, digests, spread


def digest(value: object, parameter: bool = False) -> str:
    return digests([Input("x", parameter)], [value])[0]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
        *(torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.uint16, torch.int64),
    ],
)
def test_equal_values_have_equal_hashes(dtype: torch.dtype) -> None:
    x = (torch.arange(35).reshape(5, 7) % 3).to(dtype)
    transposed = x.t().contiguous().t()
    assert digest(x) == digest(transposed) == digest(torch.cat([x, x], 1)[:, :7])
    other = x.clone()
    other[3, 2] = 1 - other[3, 2].item() if dtype == torch.bool else 5
    assert digest(other) != digest(x)
    assert digest(x.flip(0)) != digest(x)  # the same elements at other places
    assert digest(x[:0]) == digest(other[:0])
    assert len(digest(x[0, 0])) == 16


def test_lazy_views_are_hashed_as_what_they_mean() -> None:
    z = torch.randn(5, dtype=torch.complex64)
    assert digest(z.conj()) == digest(z.conj().resolve_conj()) != digest(z)
    assert digest(z.conj().imag) == digest(-z.imag)


def test_nan_and_zero_are_what_they_are_whatever_their_bits() -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, -0x400000, 0, -0x80000000], dtype=torch.int32)
    strange = bits.view(torch.float32)
    plain = torch.tensor([math.nan, math.nan, math.nan, 0.0, 0.0])
    assert digest(strange) == digest(plain)
    assert digest(strange) != digest(plain.nan_to_num(0.0))


def test_numbers_are_hashed() -> None:
    assert digest(2) == digest(2) != digest(3)


@pytest.mark.parametrize(
    "shape", [(3072, 12288), (3072,), (3072, 1), (7, 3, 100, 99), (2, 1, 1, 30000), (5, 5)]
)
def test_a_sample_lies_all_over(shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape)).reshape(shape)
    sample = spread(x, OF_PARAMETER)
    assert sample.numel() <= 2 * OF_PARAMETER
    assert sample.numel() >= min(OF_PARAMETER // 4, x.numel())
    assert sample.max() >= 0.75 * x.max() or sample.numel() == x.numel()
    assert digest(x, True) != digest(x + 1, True)


def test_inputs_are_compared_whole() -> None:
    x = torch.zeros(ELEMENTS // 8)
    other = x.clone()
    other[-2] = 1
    assert digest(x) != digest(other)


def test_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies on a device goes over together; here the device is only said to be one."""
    copies: list[Tensor] = []

    class Device(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

        def cpu(self) -> Tensor:  # type: ignore[override]
            copies.append(self)
            return self.as_subclass(Tensor)

    values = [torch.randn(4, 3), torch.ones(5, dtype=torch.bfloat16), torch.arange(3), True]
    inputs = [Input(str(i), i == 0) for i in range(4)]
    there = [v.as_subclass(Device) if isinstance(v, Tensor) else v for v in values]
    assert digests(inputs, there) == digests(inputs, values)
    assert len(copies) == 1


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "PATIENCE", -1.9)
    start = time.monotonic()
    assert "does not answer" in stalls._bounded(lambda: time.sleep(30) or "")  # type: ignore[func-returns-value]
    assert time.monotonic() - start < 5

    def broken() -> str:
        raise ConnectionError("Broken pipe")

    monkeypatch.setattr(stalls, "PATIENCE", 3)
    assert "store failed too: Broken pipe" in stalls._bounded(broken)
