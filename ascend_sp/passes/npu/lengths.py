"""Lengths stay symbols where Dynamo traces PyTorch's attention over NPU tensors.

torch_npu has a kernel of its own for it, one of autograd's, which runs when Dynamo asks for the
shape of the result: it reads sizes as numbers, and from then on the program is for one length only
(``Eq(s27, 5)`` among the guards). Sizes that are numbers anyway are left to that kernel, and so is
what AOTAutograd traces: there, each attention that is not captured becomes torch_npu's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_sp.graph._pytorch import NOT_KNOWN, fake_for_dynamo
from ascend_sp.graph.sizes import as_shape, same_shape
from ascend_sp.runtime.npu import DEVICE

OP = torch.ops.aten.scaled_dot_product_attention.default
KEY = "AutogradPrivateUse1"
"""Where torch_npu registers its kernel, by PyTorch's name for devices that are not its own."""


def keep_lengths_symbolic() -> None:
    """Tell Dynamo what attention over NPU tensors yields; again does nothing."""
    fake_for_dynamo(OP, KEY, _fake)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """An empty result ``[..., S, E]``, or that this is for torch_npu to say."""
    tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    symbolic = any(isinstance(n, torch.SymInt) for x in tensors for n in x.shape)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not symbolic or trains or query.device.type != DEVICE:
        return NOT_KNOWN
    # Grouped heads are repeated; what else is one for many is broadcast.
    shared = 3 if enable_gqa else 2
    parts = (x.shape[:-shared] for x in (query, key, value))
    batch = (*torch.broadcast_shapes(*parts), *query.shape[-shared:-2])
    shape = torch.Size((*batch, query.shape[-2], value.shape[-1]))
    # torch_npu's fused attention writes in the order in which the queries lie.
    alike = same_shape(as_shape(shape), as_shape(query.shape))
    return torch.empty_like(query) if alike else query.new_empty(shape)
