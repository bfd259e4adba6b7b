"""Small transformers that no library has: every kind of attention, and the ways to feed it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with projections; context for cross attention."""

    def __init__(self, dim: int, heads: int, groups: int | None = None) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups or heads, dim // heads
        self.q = nn.Linear(dim, heads * self.size)
        self.kv = nn.Linear(dim, 2 * self.groups * self.size)
        self.out = nn.Linear(heads * self.size, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.groups, self.size)).unbind(2)
        y = F.scaled_dot_product_attention(
            q,
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=self.groups != self.heads,
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norm, attention, MLP."""

    def __init__(self, dim: int, heads: int, groups: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, groups)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = x + self.attention(self.norm1(x), *args, **kwargs)
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Two blocks over one sequence."""

    def __init__(self, dim: int, heads: int, groups: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, groups) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x, None, mask, causal)
        return x


class JointAttention(nn.Module):
    """Text and image in one sequence, apart again afterwards."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(2))

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.text(text), self.image(image)], 1)
        for block in self.blocks:
            x = block(x, None, mask)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]


class CrossAttention(nn.Module):
    """Self attention over the image, cross attention to the text."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.own, self.cross = Block(dim, heads), Block(dim, heads)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.cross(self.own(image), text, mask)


class HigherOrder(nn.Module):
    """An op that holds a graph of its own stands between two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = SelfAttention(16, 4), SelfAttention(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        x = self.before(x)
        q = x.unflatten(-1, (1, 16)).transpose(1, 2)
        return self.after(flex_attention(q, q, q).transpose(1, 2).flatten(2))


class Sliced(nn.Module):
    """Rows are taken from within the sequence, and attend on their own; others are padded."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep
        self.first, self.second, self.third = Block(12, 3), Block(12, 3), Block(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        head = self.second(x[:, : self.keep])
        return head, self.third(F.pad(x[:, self.keep :], (0, 0, 0, 2), value=0.5))


class Modulated(nn.Module):
    """Each block's input is scaled by a projection of the same condition."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Linear(6, 12) for _ in range(3))
        self.blocks = nn.ModuleList(Block(12, 3) for _ in range(3))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for scale, block in zip(self.scales, self.blocks, strict=True):
            x = block(x * scale(condition).unsqueeze(1))
        return x


class Normed(nn.Module):
    """Queries and keys have work to do that values have not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return y.transpose(1, 2).flatten(2)
