"""What the Ascend software of this machine is, and the ops of torch_npu by name.

ascend_sp never imports torch_npu by itself: it is there if the user's tensors are on ``"npu"``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.torch_version import TorchVersion

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
        return bool(self.cann) and TorchVersion(self.cann) >= at_least


def ascend() -> Ascend:
    """The Ascend software that this process runs on; empty versions without torch_npu."""
    torch_npu: Any = sys.modules.get("torch_npu")
    if torch_npu is None:
        return Ascend()
    return Ascend(
        torch_npu=str(torch_npu.__version__),
        cann=str(torch_npu.npu.utils.get_cann_version() or ""),
        soc=str(torch_npu.npu.get_device_name(0)),
    )


def npu_op(name: str, overload: str = "default") -> Any:
    """The op ``npu::name``, or None where torch_npu does not have it."""
    packet = getattr(torch.ops.npu, name, None)
    return getattr(packet, overload, None)
