"""Views with the strides that the traced graph promises, for graphs that run op by op.

In dims of one element PyTorch's fake view yields other strides than the real one (before 2.15).
Nothing lies there, but ops tell channels-last tensors from others by all strides: when traced, a
group norm at batch 1 finds its operand in order, and lacks the copy that it then needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_sp.compiler._pytorch import compiled_kernels
from ascend_sp.graph.emitter import VIEWS, Emitter

aten = torch.ops.aten


def keep_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Put ``as_strided`` behind each view that would have other strides than its fake value."""
    emit = Emitter(gm, "keep_strides")
    changed = False
    for node in [n for n in gm.graph.nodes if n.target in VIEWS]:
        value = node.meta["val"]
        if _real_strides(node.args[0].meta["val"], value) in (None, _known(value.stride())):
            continue
        sizes = ([emit.argument(s) for s in sizes] for sizes in (value.shape, value.stride()))
        with gm.graph.inserting_after(node):
            # Named after the view, so that it has the same name in each of a model's graphs.
            new = gm.graph.create_node(
                "call_function",
                aten.as_strided.default,
                (node, *sizes),
                name=f"{node.name}_as_traced",
            )
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        new.meta.update(node.meta)
        changed = True
    if changed:
        gm.recompile()
    return gm


def _real_strides(source: torch.Tensor, view: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of the view of a tensor without numbers; None if its sizes are not known."""
    known = [_known(x) for x in (source.shape, source.stride(), view.shape)]
    if None in known:
        return None
    shape, strides, new = known
    with compiled_kernels():
        try:
            return torch.empty_strided(shape, strides, device="meta").view(new).stride()  # type: ignore[arg-type]
        except RuntimeError:
            return None  # the op itself will say so


def _known(sizes: Any) -> tuple[int, ...] | None:
    """Sizes as numbers: those of this call, where they are symbols."""
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in sizes]
    return None if None in hints else tuple(map(int, hints))
