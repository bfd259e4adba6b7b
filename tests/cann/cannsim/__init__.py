"""A simulated Ascend device for the real torch_npu: ``import cannsim; cannsim.install()``.

See tests/cann/README.md. Importing this package loads nothing; `install` must run before torch_npu
is imported by anyone else, unless LD_LIBRARY_PATH names the simulated libraries.
"""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

from cannsim import library
from cannsim.library import SimulatorError, SimulatorMissingError

if TYPE_CHECKING:
    from cannsim import attention, capture, eager, ge, hccl, trace

__all__ = [
    "SimulatorError",
    "SimulatorMissingError",
    "attention",
    "capture",
    "eager",
    "ge",
    "hccl",
    "install",
    "library",
    "trace",
]

_installed = False


def install() -> None:
    """Load the simulated libraries, import torch_npu and connect the two. Again does nothing."""
    global _installed
    if _installed:
        return
    # Kernels are launched from the thread that calls them: hooks enter Python with its lock held.
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    # torch would import torch_npu by itself, before its libraries can be found.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    library.load()
    import torch_npu  # noqa: F401

    import cannsim.capture
    import cannsim.eager
    import cannsim.ge
    import cannsim.hccl

    cannsim.capture.install()
    cannsim.hccl.install()
    cannsim.ge.install()
    cannsim.eager.install()
    # Before torch_npu's own ending, which destroys graphs and groups when Python is half gone.
    atexit.register(cannsim.hccl.leave)
    atexit.register(library.clear_hooks)
    _installed = True
