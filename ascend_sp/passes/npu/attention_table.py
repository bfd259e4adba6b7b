"""Which of Ascend's attention ops takes a given attention: one table, each row with its reasons.

Limits are those of the op-plugin and CANN documents of the ops (`docs/ascend.md` names them). The
training op ``npu_fusion_attention`` is no row: it is not documented for graphs, its GE converter
knows two layouts, and where single ops run, PyTorch's own SDPA chooses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ascend_sp.graph.sizes import Size
from ascend_sp.runtime.npu import Ascend


@dataclass(frozen=True)
class Form:
    """What there is to know of one attention before it runs."""

    dtype: torch.dtype
    heads: Size
    groups: Size
    """Heads of keys and values."""
    queries: Size
    keys: Size
    dim: Size
    value_dim: Size
    mask: torch.dtype | None = None
    mask_heads: bool = False
    """Whether the mask differs between heads."""
    broadcast: bool = False
    """Whether the batches of q, k, v and mask differ, or heads do without being grouped."""


@dataclass(frozen=True)
class Kernel:
    """One attention op of torch_npu."""

    op: str
    needs: str
    """Oldest CANN that has the kernel."""
    max_dim: int
    takes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    empty_rows: bool = True
    """Whether it is defined for a query with every key masked out."""

    def refuses(self, form: Form, ascend: Ascend) -> str | None:
        """Why the op cannot take `form` here, or None if it can."""
        return next((text for wrong, text in _limits(self, form, ascend) if wrong), None)


KERNELS = (
    # Inference and graphs; takes BSND, which is how projections leave rows, so nothing is
    # transposed. aclnnFusedInferAttentionScoreV4 is in the documents of CANN from 8.3.RC1 on.
    Kernel("npu_fused_infer_attention_score_v2", "8.3.RC1", 512),
    # The same kernel under its older name: aclnnFusedInferAttentionScoreV2, CANN 8.1.RC1.
    Kernel("npu_fused_infer_attention_score", "8.1.RC1", 512),
    # What the two above run for more than one query; older, no longer on later chips. Unlike them
    # it has no correction for queries that see nobody, and forbids them.
    Kernel("npu_prompt_flash_attention", "8.0.RC1", 512, empty_rows=False),
)

CAUSAL_MASK = 2048
"""Side of the triangle that the kernels want for ``sparse_mode`` 2, whatever the lengths are."""

_LONGEST = 20 * 1024 * 1024


def _limits(kernel: Kernel, form: Form, ascend: Ascend) -> list[tuple[bool, str]]:
    aligned = isinstance(form.dim, int) and form.dim % 16 == 0
    lengths = [n for n in (form.queries, form.keys) if isinstance(n, int)]
    have = ascend.cann or "a CANN of unknown version"
    return [
        (not ascend.has_cann(kernel.needs), f"it needs CANN {kernel.needs}, and this is {have}"),
        (
            form.dtype not in kernel.takes,
            f"it takes float16 and bfloat16, not {str(form.dtype)[6:]}",
        ),
        (form.dim != form.value_dim, f"values have {form.value_dim} channels, keys {form.dim}"),
        (not aligned, f"{form.dim} channels a head are not known to be a multiple of 16"),
        (
            isinstance(form.dim, int) and form.dim > kernel.max_dim,
            f"{form.dim} channels a head are more than {kernel.max_dim}",
        ),
        (
            not isinstance(form.heads, int) or not isinstance(form.groups, int),
            "the number of heads is not known at compile time",
        ),
        (isinstance(form.heads, int) and form.heads > 256, f"{form.heads} heads are more than 256"),
        (any(n > _LONGEST for n in lengths), f"a sequence of more than {_LONGEST} tokens"),
        (
            form.queries == 1,
            "one query runs another kernel, with other rules for masks",
        ),
        (
            form.mask is not None and form.mask != torch.bool,
            "an additive mask may hold other values than 0 and -inf",
        ),
        (form.mask_heads, "the mask differs between heads"),
        (
            form.mask is not None and not kernel.empty_rows,
            "it is undefined for a query whose keys are all masked out, and the mask may have one",
        ),
        (form.broadcast, "operands are broadcast over the batch or the heads"),
    ]


def choose(
    form: Form, ascend: Ascend, exists: Callable[[str], bool]
) -> tuple[Kernel | None, list[str]]:
    """The first kernel that takes `form`, and why those before it do not."""
    reasons: list[str] = []
    for kernel in KERNELS:
        why = kernel.refuses(form, ascend)
        if why is None and not exists(kernel.op):
            why = "this torch_npu does not have it"
        if why is None:
            return kernel, reasons
        reasons.append(f"{kernel.op}: {why}")
    return None, reasons
