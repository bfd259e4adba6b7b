"""Device memory is host memory: CPU tensors over the same bytes, without a copy."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def at(pointer: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements of `dtype` at an address."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(buffer, dtype=dtype)


def alias(t: Tensor) -> Tensor:
    """A CPU tensor over the memory of an npu tensor. It does not keep that memory alive."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0 or t.numel() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    base = at(storage.data_ptr(), storage.nbytes(), torch.uint8)
    out = torch.empty(0, dtype=t.dtype)
    out.set_(base.untyped_storage(), t.storage_offset(), t.shape, t.stride())
    return out


def on_device(value: Any) -> bool:
    """Whether `value` is a tensor in device memory."""
    return isinstance(value, Tensor) and value.device.type == "npu"


_generators: dict[int, tuple[Any, torch.Generator]] = {}


def _cpu_generator(generator: torch.Generator) -> torch.Generator:
    """One CPU generator for each npu generator: random numbers repeat, but are not Ascend's."""
    if id(generator) not in _generators:
        twin = torch.Generator().manual_seed(generator.initial_seed())
        _generators[id(generator)] = (generator, twin)
    return _generators[id(generator)][1]


def to_cpu(args: Any) -> Any:
    """Arguments of an npu op, as a CPU op takes them."""

    def convert(value: Any) -> Any:
        if on_device(value):
            return alias(value)
        if isinstance(value, torch.device) and value.type == "npu":
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "npu":
            return _cpu_generator(value)
        return value

    return tree_map(convert, args)
