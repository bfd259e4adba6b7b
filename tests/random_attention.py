"""The attention of random models, in the many ways in which models write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_models import Attend, Axial, Lengths, Program

Extra = dict[str, Tensor]


class ByHand(nn.Module):
    """RMS norm as models without `nn.RMSNorm` write it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * self.weight


class Var(nn.Module):
    """Layer norm by `var_mean`."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt()


class Unit(nn.Module):
    """Vectors of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.normalize(x, dim=-1)


def norm_of(kind: str, dim: int) -> nn.Module:
    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "by_hand": ByHand, "across": nn.RMSNorm}
    if kind in kinds:
        return kinds[kind](dim)
    return {"var": Var, "l2": Unit}.get(kind, nn.Identity)()


class Modulation(nn.Module):
    """Shift, scale and gate from the vector; nothing if `on` is false."""

    def __init__(self, width: int, on: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3 * width) if on else None

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor | float]:
        if self.linear is None:
            return x, 1.0
        shift, scale, gate = self.linear(F.silu(vector))[:, None].chunk(3, dim=-1)
        return x * (1 + scale) + shift, gate


def rotated(x: Tensor, how: str, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` rotated in pairs; `cos` and `sin` broadcast to ``[..., D / 2]``."""
    if how == "complex":
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).type_as(x)
    if how == "half":
        a, b = x.chunk(2, -1)
        both = torch.cat([-b, a], -1)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        return (x.float() * cos + both.float() * sin).to(x.dtype)
    if how == "interleaved":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        both = torch.stack([-b, a], -1).flatten(-2)
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return (x.float() * cos + both.float() * sin).to(x.dtype)
    out = torch.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = (a * cos - b * sin).type_as(x)
    out[..., 1::2] = (a * sin + b * cos).type_as(x)
    return out


class Project(nn.Module):
    """Queries, keys and values ``[B, n, H, D]`` of one stream, or one of something looked at."""

    def __init__(self, step: Attend, p: Program) -> None:
        super().__init__()
        self.step, self.size = step, p.size
        groups = step.groups or p.heads
        value_size = step.value_size or p.size
        self.counts = (p.heads, groups, groups)
        self.sizes = (p.size, p.size, value_size)
        self.fused = groups == p.heads and value_size == p.size and not step.keys
        widths = [h * d for h, d in zip(self.counts, self.sizes, strict=True)]
        self.widths = widths
        if step.project == "separate":
            self.q, self.k, self.v = (nn.Linear(p.width, w) for w in widths)
        else:
            self.q = nn.Linear(p.width, widths[0]) if step.keys else None
            self.qkv = nn.Linear(p.width, sum(widths[1:] if step.keys else widths))
        across = step.norm == "across"
        self.norms = nn.ModuleList(norm_of(step.norm, w if across else p.size) for w in widths[:2])

    def queries(self, x: Tensor) -> Tensor:
        return self.heads(self.q(x), 0)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.step.project == "separate":
            k, v = self.k(x), self.v(x)
        elif self.widths[1] == self.widths[2]:
            k, v = self.qkv(x).chunk(2, -1)
        else:
            k, v = self.qkv(x).split(self.widths[1:], -1)
        return self.heads(k, 1), self.heads(v, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.step.project == "separate":
            found = (self.q(x), self.k(x), self.v(x))
        elif self.fused and self.step.project in ("unbind", "stacked"):
            qkv = self.qkv(x).view(x.shape[0], x.shape[1], 3, -1, self.size)
            if self.step.project == "unbind":
                found = qkv.unbind(2)
            else:
                qkv = qkv.permute(2, 0, 3, 1, 4)
                found = tuple(qkv[i].transpose(1, 2) for i in range(3))
            if self.step.norm != "across":
                q, k, v = found
                return self.norms[0](q), self.norms[1](k), v
            found = tuple(y.flatten(2) for y in found)
        elif self.fused:
            found = self.qkv(x).chunk(3, dim=-1)
        else:
            found = self.qkv(x).split(self.widths, dim=-1)
        return tuple(self.heads(y, i) for i, y in enumerate(found))

    def heads(self, x: Tensor, which: int) -> Tensor:
        """``[B, n, H * D] -> [B, n, H, D]``, normalised."""
        across = self.step.norm == "across"
        if across and which < 2:
            x = self.norms[which](x)
        size = self.sizes[which]
        if self.step.heads_by == "unflatten":
            x = x.unflatten(-1, (self.counts[which], size))
        elif self.step.heads_by == "view":
            x = x.view(x.shape[0], -1, self.counts[which], size)
        else:
            x = x.reshape(*x.shape[:2], -1, size)
        return x if across or which == 2 else self.norms[which](x)


class RandomAttention(nn.Module):
    """See `Attend`."""

    def __init__(self, step: Attend, p: Program, lengths: Lengths, name: str, extra: Extra) -> None:
        super().__init__()
        self.step, self.name, self.heads = step, name, p.heads
        self.groups = step.groups or p.heads
        value_size = step.value_size or p.size
        apart = step.join != "rows"
        self.projects = nn.ModuleList(
            Project(step, p) for _ in (step.queries if apart else step.queries[:1])
        )
        self.norms = nn.ModuleList(nn.LayerNorm(p.width) for _ in step.queries)
        self.modulations = nn.ModuleList(Modulation(p.width, step.modulated) for _ in step.queries)
        self.wide = nn.Linear(p.width, 10) if step.beside else None
        inner = p.heads * value_size + (10 if step.beside else 0)
        self.out = nn.ModuleList(nn.Linear(inner, p.width) for _ in step.queries)
        self.again = None
        if step.dual:
            alone = Attend((step.queries[0],), project="chunk", norm="rms")
            self.again = RandomAttention(alone, p, lengths, name + "_again", extra)
        if step.null_keys:
            self.null = nn.Parameter(torch.randn(1, step.null_keys, self.groups, p.size))
            self.null_value = nn.Parameter(torch.randn(1, step.null_keys, self.groups, value_size))
        rows = sum(lengths[i] for i in step.queries)
        seen = sum(p.context if i == -1 else lengths[i] for i in step.keys) or rows
        self.first = lengths[step.queries[0]] if step.rotate_behind else 0
        self._make_mask(p, step.tail or rows, seen + step.null_keys, extra)
        self._make_tables(p, max(rows, seen), extra)

    def _make_mask(self, p: Program, rows: int, seen: int, extra: Extra) -> None:
        kind, b = self.step.mask, p.batch
        shapes = {
            "key_bool": (b, 1, 1, seen),
            "key_reshaped": (b, seen),
            "key_float": (b, 1, 1, seen),
            "rows": (b, 1, rows, seen),
            "rows_float": (rows, seen),
            "heads": (1, p.heads, rows, seen),
            "one_row": (b, p.heads, rows, 1),
            "outer": (b, seen),
        }
        if kind in shapes:
            mask = torch.rand(shapes[kind]) > 0.4
            mask[..., 0] = True
            if kind in ("key_float", "rows_float"):
                mask = torch.where(mask, torch.rand(mask.shape), torch.tensor(-1e4))
            extra[f"{self.name}_mask"] = (
                mask.to(getattr(torch, p.dtype)) if mask.dtype.is_floating_point else mask
            )
        elif kind == "lengths":
            extra[f"{self.name}_lengths"] = torch.randint(1, seen + 1, (b,))

    def _make_tables(self, p: Program, rows: int, extra: Extra) -> None:
        if not self.step.rotary:
            return
        self.register_buffer("frequencies", 0.3 / torch.arange(1, p.size // 2 + 1))
        angles = torch.outer(torch.arange(rows).float(), self.frequencies)
        if self.step.table == "batch":
            angles = angles + torch.arange(p.batch)[:, None, None]
        if self.step.table == "buffer":
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        elif self.step.table != "inside":
            extra[f"{self.name}_cos"], extra[f"{self.name}_sin"] = angles.cos(), angles.sin()

    def _tables(self, rows: int, extra: Extra) -> tuple[Tensor, Tensor]:
        """For ``[B, n, H, D]``."""
        if self.step.table == "inside":
            at = torch.arange(rows, device=self.frequencies.device)
            angles = torch.outer(at.float(), self.frequencies.float())
            cos, sin = angles.cos(), angles.sin()
        elif self.step.table == "buffer":
            cos, sin = self.cos[:rows].float(), self.sin[:rows].float()
        else:
            cos, sin = (extra[f"{self.name}_{x}"][..., :rows, :] for x in ("cos", "sin"))
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def _rotate(self, x: Tensor, extra: Extra) -> Tensor:
        if not self.step.rotary:
            return x
        cos, sin = self._tables(x.shape[1] - self.first, extra)
        if not self.first:
            return rotated(x, self.step.rotary, cos, sin)
        x = x.clone()
        x[:, self.first :] = rotated(x[:, self.first :], self.step.rotary, cos, sin)
        return x

    def _mask(self, rows: int, k: Tensor, extra: Extra) -> Tensor | None:
        kind, seen = self.step.mask, k.shape[2]
        if kind == "content":
            return k.mean(-1).mean(1)[:, None, None]
        if kind == "alibi":
            away = torch.arange(rows)[:, None] - torch.arange(seen)
            slopes = torch.arange(1, self.heads + 1) / 16
            return (-slopes[:, None, None] * away.abs()).to(k.dtype)
        if kind == "key_reshaped":
            return extra[f"{self.name}_mask"][:, None, None, :]
        if kind == "outer":
            keep = extra[f"{self.name}_mask"]
            return keep[:, None, None, :] & torch.ones_like(keep[:, None, :1, None])
        if kind == "lengths":
            lengths = extra[f"{self.name}_lengths"]
            at = torch.arange(seen, device=lengths.device)
            return (at[None] < lengths[:, None]).unsqueeze(1).unsqueeze(1)
        if kind == "tril":
            return torch.ones(rows, seen, dtype=torch.bool).tril()
        return extra.get(f"{self.name}_mask")

    def forward(
        self, streams: list[Tensor], context: Tensor, vector: Tensor, extra: Extra
    ) -> list[Tensor]:
        step = self.step
        made = [
            m(norm(streams[i]), vector)
            for i, m, norm in zip(step.queries, self.modulations, self.norms, strict=True)
        ]
        normed, gates = [x for x, _ in made], [g for _, g in made]
        parts = [torch.cat(normed, 1)] if step.join == "rows" else normed
        if step.keys:
            qs = [p.queries(x) for p, x in zip(self.projects, parts, strict=True)]
            looked = [context if i == -1 else streams[i] for i in step.keys]
            if step.lone and step.keys == (-1,):
                looked = [context[:1]]
            k, v = self.projects[0].keys(torch.cat(looked, 1) if len(looked) > 1 else looked[0])
            y = self._attend([*qs], [k], [v], extra)
        else:
            found = [p(x) for p, x in zip(self.projects, parts, strict=True)]
            y = self._attend(*([f[i] for f in found] for i in range(3)), extra)
        if self.wide is not None:
            y = torch.cat([y, F.gelu(self.wide(torch.cat(normed, 1)))], -1)
        out = list(streams)
        start = 0
        for i, x, gate, linear in zip(step.queries, normed, gates, self.out, strict=True):
            out[i] = streams[i] + gate * linear(y[:, start : start + x.shape[1]])
            start += x.shape[1]
        if self.again is not None:
            first = step.queries[0]
            more = self.again(
                [normed[0] if i == first else s for i, s in enumerate(streams)],
                context,
                vector,
                extra,
            )
            out[first] = out[first] + more[first]
        return out

    def _attend(self, qs: list[Tensor], ks: list[Tensor], vs: list[Tensor], extra: Extra) -> Tensor:
        """``[B, n, H, D]``, stream by stream ``-> [B, S, H * E]``."""
        step = self.step
        if step.join == "bhsd" and not step.rotary:
            q, k, v = (torch.cat([x.transpose(1, 2) for x in xs], 2) for xs in (qs, ks, vs))
        else:
            q, k, v = (torch.cat(xs, 1) if len(xs) > 1 else xs[0] for xs in (qs, ks, vs))
            q, k = self._rotate(q, extra), self._rotate(k, extra)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if step.null_keys:
            grown = (self.null, k), (self.null_value, v)
            k, v = (
                torch.cat([null.transpose(1, 2).expand(x.shape[0], -1, -1, -1), x], 2)
                for null, x in grown
            )
        rows = q.shape[2]
        if step.tail:
            q = q[:, :, -step.tail :]
        y = self._core(q, k, v, self._mask(q.shape[2], k, extra))
        y = y.transpose(1, 2).flatten(2)
        return F.pad(y, (0, 0, rows - step.tail, 0)) if step.tail else y

    def _core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        step, causal = self.step, self.step.mask == "causal"
        if step.how == "strided" and (mask is None or mask.shape[-1] == 1):
            k, v = k[:, :, ::2], v[:, :, ::2]
        elif step.how == "rolled_keys":
            k = k.roll(1, 2)
        elif step.how == "rolled_queries":
            q = q.roll(1, 2)
        gqa = self.groups != self.heads
        if gqa and not (step.share == "gqa" and step.how not in ("math", "einsum", "linear")):
            times = self.heads // self.groups
            if step.share == "expand":
                k, v = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (k, v))
            elif step.share != "broadcast" or self.groups != 1:
                k, v = (x.repeat_interleave(times, 1) for x in (k, v))
            gqa = False
        if step.how == "flat" and mask is None and not gqa and k.shape[:2] == q.shape[:2]:
            flat = (x.flatten(0, 1) for x in (q, k, v))
            y = F.scaled_dot_product_attention(*flat, is_causal=causal, scale=step.scale)
            return y.unflatten(0, (q.shape[0], -1))
        if step.how == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2, keepdim=True).mT + 1)
        if step.how in ("math", "einsum"):
            return self._by_hand(q, k, v, mask)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=step.scale, enable_gqa=gqa
        )

    def _by_hand(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = self.step.scale or q.shape[-1] ** -0.5
        if self.step.how == "einsum":
            k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
        else:
            scores = q @ k.transpose(-1, -2) * scale
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -1e9)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1)
        if self.step.how == "einsum":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        return weights @ v


class AxialAttention(nn.Module):
    """See `Axial`."""

    def __init__(self, step: Axial, p: Program) -> None:
        super().__init__()
        self.step, self.heads = step, p.heads
        self.norm = nn.LayerNorm(p.width)
        self.qkv = nn.Linear(p.width, 3 * p.heads * p.size)
        self.out = nn.Linear(p.heads * p.size, p.width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        frames = self.step.frames
        y = self.norm(x).view(b, frames, s // frames, c)
        if self.step.over == "time":
            y = y.transpose(1, 2)
        first, rows = y.shape[1:3]
        y = y.reshape(b * first, rows, c)
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(y).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.out(y).view(b, first, rows, c)
        if self.step.over == "time":
            y = y.transpose(1, 2)
        return x + y.reshape(b, s, c)
