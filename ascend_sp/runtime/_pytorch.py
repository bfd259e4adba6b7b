"""The private PyTorch that the runtime stands on: groups by name, their stores, nested values.

`tests/test_pytorch_pins.py` fails when PyTorch moves any of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.distributed_c10d import (
    PrefixStore,
    Store,
    _get_group_tag,
    _resolve_process_group,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "Store",
    "group_by_name",
    "local_of",
    "not_compiled",
    "ranks_of",
    "store_of",
    "tag_of",
    "tree_leaves",
    "tree_map",
    "values_of",
    "wait_for",
    "without_modes",
]


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group that functional collectives know as `name`; raises if there is none."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a group."""
    return list(dist.get_process_group_ranks(group))


def not_compiled(model: Any) -> Any:
    """What was given to `torch.compile`, if `model` came from there."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def local_of(x: DTensor) -> Tensor:
    """What this rank holds of `x`: the tensor itself, which compiled programs are given."""
    return x._local_tensor


def tag_of(group: dist.ProcessGroup) -> str:
    """What, with its ranks, tells `group` from others of the same ranks."""
    return _get_group_tag(group)


def store_of(group: dist.ProcessGroup, prefix: str) -> Store:
    """The key-value store that the ranks of `group` share, under a prefix of our own."""
    return PrefixStore(prefix, group.get_group_store())


def wait_for(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether all `keys` are set within `seconds`."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except Exception:  # each kind of store has its own timeout error
        return False
    return True


def values_of(store: Store, keys: list[str]) -> list[str]:
    """The values of `keys`, all of them set; in one round trip where the store can."""
    if store.has_extended_api():  # type: ignore[attr-defined]
        return [v.decode() for v in store.multi_get(keys)]
    return [store.get(k).decode() for k in keys]


def without_modes() -> AbstractContextManager[Any]:
    """A context without Python dispatch modes.

    AOTAutograd watches the first run of each graph by one, which makes every op many times slower.
    """
    return _disable_current_modes()
