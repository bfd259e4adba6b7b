"""The arguments of an attention node by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from ascend_sp.graph.arguments import argument_of


class Attention(NamedTuple):
    """What an `attention` or `split_attention` node attends, in the order of the op's schema."""

    q: fx.Node
    """``[B, H, S, D]``."""
    k: fx.Node
    """``[B, G, T, D]``."""
    v: fx.Node
    """``[B, G, T, E]``."""
    attn_mask: fx.Node | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @staticmethod
    def of(node: fx.Node) -> Attention:
        """The arguments of `node`, defaults included."""
        return Attention(*(argument_of(node, name) for name in Attention._fields))
