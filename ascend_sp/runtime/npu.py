"""What the Ascend software of this machine is, and the ops of torch_npu by name.

ascend_sp never imports torch_npu by itself: it is there if the user's tensors are on ``"npu"``.
"""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = "npu"


@dataclass(frozen=True)
class Ascend:
    """Versions that decide which ops exist."""

    torch_npu: str = ""
    cann: str = ""
    """E.g. ``"8.5.0"`` or ``"8.2.RC1"``; empty where CANN does not say, which means a very old one.
    """
    soc: str = ""
    """E.g. ``"Ascend910B3"`` (Atlas 800I A2)."""

    def has_cann(self, at_least: str) -> bool:
        """Whether CANN is `at_least` this version."""
        have, want = _order(self.cann), _order(at_least)
        return have is not None and want is not None and have >= want


def _order(version: str) -> tuple[int, int, int, int, int] | None:
    """Something to compare versions of CANN by: ``8.5.0.alpha3 < 8.5.RC1 < 8.5.0``.

    They are not Python's (``8.3.RC1.alpha003``, ``9.0.0.B120``), so its parsers refuse some.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if found is None:
        return None
    stage, number = 2, 0
    for rank, word in enumerate(("alpha", "RC")):
        early = re.search(rf"{word}(\d+)", version, re.IGNORECASE)
        if early is not None:
            stage, number = rank, int(early[1])
            break
    major, minor, patch = (int(n or 0) for n in found.groups())
    return major, minor, patch, stage, number


def ascend(*, chip: bool = True) -> Ascend:
    """The Ascend software that this process runs on; empty versions without torch_npu.

    Args:
        chip: whether to ask for its name, which sets the process's device if it has none yet.
    """
    torch_npu: Any = sys.modules.get("torch_npu")
    if torch_npu is None:
        return Ascend()
    return Ascend(
        torch_npu=str(torch_npu.__version__),
        cann=str(torch_npu.npu.utils.get_cann_version() or ""),
        # Asking about another device than this process's would take memory there.
        soc=str(torch_npu.npu.get_device_name(torch_npu.npu.current_device())) if chip else "",
    )


def npu_op(name: str, overload: str = "default") -> Any:
    """The op ``npu::name``, or None where torch_npu does not have it."""
    packet = getattr(torch.ops.npu, name, None)
    return getattr(packet, overload, None)


def captured_graphs() -> int:
    """How many ACL graphs this process holds; looks through all objects, so it takes a moment."""
    if "torch_npu" not in sys.modules:
        return 0
    kind = torch.npu.NPUGraph  # type: ignore[attr-defined]
    return sum(isinstance(x, kind) for x in gc.get_objects())
