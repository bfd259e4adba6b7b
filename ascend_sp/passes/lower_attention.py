"""The opaque attention becomes the op that the lowering target runs.

``sdpa`` is `F.scaled_dot_product_attention`, which picks the device's fused kernel; ``math`` is the
same spelled out in matrix products, for comparison.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ascend_sp.passes.context import PassContext
from ascend_sp.passes.emitter import Emitter
from ascend_sp.runtime.ops import attention as attention_op

aten = torch.ops.aten


def lower_attention(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Replace every `ascend_sp::attention`."""
    emit = Emitter(gm, "lower_attention")
    for node in gm.graph.find_nodes(op="call_function", target=attention_op):
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        args = (given["q"], given["k"], given["v"], given.get("attn_mask"), 0.0)
        causal = given.get("is_causal", False)
        more = {"scale": given.get("scale"), "enable_gqa": given.get("enable_gqa", False)}
        with emit.at(node):
            if ctx.attention == "math":
                new = emit.call(
                    aten._scaled_dot_product_attention_math.default, *args, causal, **more
                )
                new = emit.call(operator.getitem, new, 0)
            else:
                new = emit.call(aten.scaled_dot_product_attention.default, *args, causal, **more)
            new = emit.restride(new, node.meta["val"].stride())
        new.meta.update({k: v for k, v in node.meta.items() if k.startswith("ascend_sp")})
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return gm
