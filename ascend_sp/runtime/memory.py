"""How much memory a device has, and whether an error says that it had too little."""

from __future__ import annotations

import os

import torch


def is_out_of_memory(e: BaseException) -> bool:
    """Whether `e` says so, in the words of whichever allocator failed."""
    text = str(e).lower()
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(
        said in text for said in ("out of memory", "can't allocate memory")
    )


def total_memory(device: str) -> int | None:
    """Bytes of the current device of a type, or of the host; None if it is not known."""
    try:
        if device == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(torch.get_device_module(device).mem_get_info()[1])
    except (AttributeError, OSError, RuntimeError, ValueError):
        return None
