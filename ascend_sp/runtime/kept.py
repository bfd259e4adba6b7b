"""Weights of which a rank has a part, and that programs keep whole: gathered once, then inputs.

`shard_weights` says how many bytes the programs of a model may keep; which weights these are, each
compile chooses for what it needs. The whole then holds the part: a rank has no part twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ascend_sp.runtime._pytorch import group_by_name
from ascend_sp.runtime.ops import ALL_GATHER, WAIT


class Room:
    """What the programs of one model may keep.

    Args:
        total: bytes, besides the ranks' parts.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def left(self) -> int:
        """Bytes that are not taken."""
        return self.total - sum(self._taken.values())

    def take(self, part: Tensor, more: int) -> None:
        """Note that a program keeps the whole of `part`, `more` bytes."""
        self._taken[part] = more

    def has(self, part: Tensor) -> bool:
        """Whether a program keeps the whole of `part`."""
        return part in self._taken


@dataclass
class _Whole:
    value: Tensor
    """``[N, ...]``."""
    version: int | None
    """That of the part that it was gathered from."""


_rooms: WeakKeyDictionary[nn.Module, Room] = WeakKeyDictionary()
_wholes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def allow(model: nn.Module, total: int) -> None:
    """Let the programs of `model` keep `total` bytes of weights."""
    _rooms[model] = Room(total)


def room_in(model: nn.Module | None) -> Room:
    """What there is for the programs of `model`, or of the one module in it that has room."""
    inside = set(model.modules()) if model is not None and _rooms else set()
    found = [room for m, room in _rooms.items() if m in inside]
    return found[0] if len(found) == 1 else Room(0)


def with_wholes(
    run: Callable[[list[Any]], Sequence[Any]], parts: Sequence[int], group: str, size: int
) -> Callable[[list[Any]], Sequence[Any]]:
    """`run`, which takes the wholes of the inputs at positions `parts` behind its inputs."""
    if not parts:
        return run

    def call(args: list[Any]) -> Sequence[Any]:
        args.extend([_whole(args[i], group, size) for i in parts])
        return run(args)

    return call


def _whole(part: Tensor, group: str, size: int) -> Tensor:
    """All of a weight; gathered if it was not yet, or if the part has changed since."""
    found = _wholes.get(part)
    if found is None or found.version != _version(part):
        with torch.inference_mode(False), torch.no_grad():
            found = _wholes[part] = _gather(part, group, size, found)
    return found.value


def _gather(part: Tensor, group: str, size: int, old: _Whole | None) -> _Whole:
    value = WAIT(ALL_GATHER(part.contiguous(), size, group))
    if old is not None:  # the same memory, which a captured graph reads
        value = old.value.copy_(value)
    held = value.narrow(0, dist.get_rank(group_by_name(group)) * part.shape[0], part.shape[0])
    part.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
    return _Whole(value, _version(part))


def _version(x: Tensor) -> int | None:
    """How often `x` was written to; those of inference mode do not count that."""
    return None if x.is_inference() else x._version
