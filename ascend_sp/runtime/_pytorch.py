"""The private PyTorch that the runtime stands on: groups by name, their stores, nested values.

`tests/test_pytorch_pins.py` fails when PyTorch moves any of it.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    Store,
    _get_group_tag,
    _resolve_process_group,
)
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Store", "group_by_name", "store_of", "tag_of", "tree_leaves", "tree_map", "wait_for"]


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group that functional collectives know as `name`; raises if there is none."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


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
