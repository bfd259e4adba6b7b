"""`ascend_sp::attention` becomes the fused inference attention of torch_npu.

Three things differ from PyTorch's attention and are put right here: the scale is 1.0 unless given;
a mask says who is masked *out*, has a row for each query and none for a head; and a row that is
masked out altogether is only right with the kernel's correction for such rows (``inner_precise``
2). Padding keys never come here: the Ulysses pass has cut them off.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ascend_sp.graph.attention import Attention
from ascend_sp.graph.context import NoteKind, PassContext
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.npu_names import OPS, UNLIMITED
from ascend_sp.graph.sizes import equal
from ascend_sp.passes.npu.attention_table import CAUSAL_MASK, Form, Kernel, choose
from ascend_sp.runtime.npu import npu_op
from ascend_sp.runtime.ops import attention as attention_op

aten = torch.ops.aten
BSND = (0, 2, 1, 3)
"""From ``[B, N, S, D]``, and back."""


def fuse_attention(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace the attentions that a fused op takes; the others stay, and the report says why."""
    emit = Emitter(gm, "fuse_attention")
    for node in gm.graph.find_nodes(op="call_function", target=attention_op):
        given = Attention.of(node)
        shapes = [len(as_shape_of(x)) for x in given[:3]]
        if shapes != [4, 4, 4]:
            ctx.note(NoteKind.ATTENTION, node, f"not fused: {max(shapes)}-D operands; 4-D is fused")
            continue
        kernel, reasons = choose(_form(given), ctx.ascend, lambda op: npu_op(op) is not None)
        why = "; ".join(reasons)
        if kernel is None:
            ctx.note(NoteKind.ATTENTION, node, f"not fused, decomposed into matmuls: {why}")
            continue
        ctx.runs_as(node, kernel.op)
        ctx.note(NoteKind.ATTENTION, node, f"runs as {kernel.op}" + (f" ({why})" if why else ""))
        with emit.at(node):
            emit.replace(node, _emit(emit, kernel, given))
    return gm


def _form(given: Attention) -> Form:
    q, k, v = (as_shape_of(x) for x in given[:3])
    (_, heads, queries, dim), (_, groups, keys, _) = q, k
    mask = given.attn_mask
    shape = as_shape_of(mask) if mask is not None else ()
    batches = [k[0], v[0], *(n for n in shape[:-3] if n != 1)]
    grouped = equal(heads, groups) or given.enable_gqa
    return Form(
        dtype=given.q.meta["val"].dtype,
        heads=heads,
        groups=groups,
        queries=queries,
        keys=keys,
        dim=dim,
        value_dim=v[3],
        mask=None if mask is None else mask.meta["val"].dtype,
        mask_heads=len(shape) >= 3 and shape[-3] != 1,
        broadcast=not (grouped and equal(k[1], v[1]) and all(equal(n, q[0]) for n in batches)),
    )


def _emit(e: Emitter, kernel: Kernel, given: Attention) -> fx.Node:
    q, k, v = (e.permute(x, BSND) for x in given[:3])
    b, s, heads, dim = as_shape_of(q)
    groups, keys = as_shape_of(k)[2], as_shape_of(k)[1]
    scale = given.scale if given.scale is not None else dim**-0.5
    mask, sparse, precise = None, 0, 0
    if given.attn_mask is not None:
        mask, precise = _mask(e, given.attn_mask, (b, s, keys)), 2
    elif given.is_causal:
        # Rows count from the top left, as in PyTorch: sparse_mode 2, not 3. All see the first key.
        mask, sparse = _triangle(e, q), 2
    what = {"heads": heads, "groups": groups, "scale": scale, "sparse": sparse, "precise": precise}
    return e.permute(_call(e, kernel, (q, k, v), mask, **what), BSND)


def _mask(e: Emitter, mask: fx.Node, shape: tuple[Any, Any, Any]) -> fx.Node:
    """PyTorch's mask of whom to see, ``[..., 1 | S, T]``, as whom not to, ``[B | 1, 1, S, T]``."""
    b, s, t = shape
    have = as_shape_of(mask)
    lead = have[0] if len(have) == 4 else 1
    four = e.view(mask, [1] * (4 - len(have)) + list(have))
    hidden = e.call(aten.logical_not.default, four)
    # A row for every query, and in memory: with one row for all of them FIA has been seen to look
    # at its first 512 columns only (vllm-ascend issue 15503).
    whole = e.call(aten.expand.default, hidden, [lead if lead == 1 else b, 1, s, t])
    return e.contiguous(whole)


def _triangle(e: Emitter, like: fx.Node) -> fx.Node:
    device = like.meta["val"].device
    ones = e.call(aten.ones.default, [CAUSAL_MASK] * 2, dtype=torch.bool, device=device)
    return e.call(aten.triu.default, ones, 1)


def _call(
    e: Emitter, kernel: Kernel, qkv: tuple[fx.Node, ...], mask: fx.Node | None, **what: Any
) -> fx.Node:
    """The op of `kernel` on BSND operands; `what` by the names that `Names` has for it."""
    names = OPS[kernel.op]
    arguments = {
        names.heads: what["heads"],
        names.groups: what["groups"],
        names.scale: what["scale"],
        "sparse_mode": what["sparse"],
    }
    if kernel.empty_rows:
        arguments["inner_precise"] = what["precise"]
    else:
        arguments[names.after] = UNLIMITED  # its default, 0, hides all keys behind the query
    op = npu_op(kernel.op)
    out = e.call(op, *qkv, atten_mask=mask, input_layout="BSND", **arguments)
    return e.call(operator.getitem, out, 0) if names.tuple_result else out
