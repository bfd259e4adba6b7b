"""Pictures whose channels are last in memory can be traced on NPUs.

PyTorch's fake tensors claim such an order behind an attention over a picture, where real NPU
tensors never have it. AOTAutograd's upsampling keeps the order of its operand, by a call of
``contiguous`` with that memory format, which torch_npu refuses for fake tensors, too: then no VAE
with attention in its middle can be compiled. While something is traced, they come out in the order
that NPUs have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_sp.graph._pytorch import NOT_KNOWN, python_kernel
from ascend_sp.runtime.npu import DEVICE

OP = torch.ops.aten.contiguous.default
KEYS = ("AutogradPrivateUse1", "PrivateUse1")
"""Where torch_npu registers its kernel, by PyTorch's name for devices that are not its own."""


def keep_layouts_traceable() -> None:
    """Have tracers see a plain order where torch_npu has no other; again does nothing."""
    for key in KEYS:
        python_kernel(OP, key, _contiguous)


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """`x` in row-major order, or that this is for torch_npu to say."""
    if memory_format == torch.contiguous_format or x.device.type != DEVICE:
        return NOT_KNOWN
    return x.contiguous()
