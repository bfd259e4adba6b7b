"""What software this process runs on, and whether ascend_sp is tested with its PyTorch.

The only module that compares a version of PyTorch. What one version of it does otherwise than
another is found out where it is used, in the `_pytorch.py` of each layer and in `_inductor.py`.
"""

from __future__ import annotations

import platform
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ascend_sp.runtime.npu import Ascend, ascend

VERSION = "0.1.0"
"""Of ascend_sp."""
OLDEST = (2, 10)
NEWEST = (2, 15)
"""The releases of PyTorch that the tests run with, see docs/versions.md."""


@dataclass(frozen=True)
class Software:
    """What a reader of a bug report would ask for first; empty where there is none."""

    ascend_sp: str
    torch: str
    python: str
    processor: str
    torch_npu: str = ""
    cann: str = ""
    soc: str = ""

    def __str__(self) -> str:
        told = [f"ascend_sp {self.ascend_sp}", f"torch {self.torch}"]
        if self.torch_npu:
            told += [
                f"torch_npu {self.torch_npu}",
                f"CANN {self.cann or 'of unknown version'}",
                self.soc or "chip not known",
            ]
        return ", ".join([*told, f"Python {self.python} on {self.processor}"])


def software() -> Software:
    """What was found. Starts no NPU and never raises: it is called while an error is told."""
    there = _ascend()
    return Software(
        ascend_sp=VERSION,
        torch=str(torch.__version__),
        python=platform.python_version(),
        processor=platform.machine(),
        torch_npu=there.torch_npu,
        cann=there.cann,
        soc=there.soc,
    )


def _ascend() -> Ascend:
    torch_npu: Any = sys.modules.get("torch_npu")
    try:
        # Before the process has set its device, to ask for the chip's name would set another one.
        return ascend(chip=torch_npu is not None and torch_npu.npu.is_initialized())
    except Exception:  # half imported, or its CANN is broken: that may be what is told
        return Ascend(torch_npu=str(getattr(torch_npu, "__version__", "of unknown version")))


def check_torch(version: str | None = None) -> None:
    """Refuse a PyTorch that is too old, and warn of one that is newer than what is tested.

    Args:
        version: as in ``torch.__version__``, which it is by default.

    Raises:
        ImportError: it is older than `OLDEST`.
    """
    found = str(torch.__version__) if version is None else version
    release = re.match(r"(\d+)\.(\d+)", found)
    if release is None:
        return  # a build with a name of its own
    number = int(release[1]), int(release[2])
    tested = f"{_text(OLDEST)} to {_text(NEWEST)}"
    if number < OLDEST:
        raise ImportError(
            f"ascend_sp needs torch {_text(OLDEST)} or newer, and this is torch {found}. Install "
            f"one of {tested}; with an NPU, also the torch_npu of the same number."
        )
    if number > NEWEST:
        warnings.warn(
            f"ascend_sp is tested with torch {tested}, and this is torch {found}. It uses private "
            "parts of PyTorch, which may have changed. If something fails, try one of those.",
            stacklevel=3,
        )


def _text(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
