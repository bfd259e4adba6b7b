"""The module and the inputs of a random model; see `random_models`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_attention import AxialAttention, Extra, Modulation, RandomAttention, norm_of
from random_models import (
    Attend,
    Axial,
    Join,
    Lengths,
    Mix,
    Mlp,
    Pool,
    Position,
    Program,
    Rows,
    Split,
    Write,
)


def build(p: Program) -> tuple[nn.Module, tuple]:
    """The model of `p` and its inputs, the same on every call."""
    torch.manual_seed(0)
    dtype = getattr(torch, p.dtype)
    model = RandomModel(p)
    streams = [torch.randn(p.batch, n, p.width, dtype=dtype) for n in p.lengths]
    context, vector = (torch.randn(p.batch, p.context, p.width), torch.randn(p.batch, p.width))
    model.to(dtype).eval()
    return model, (streams, context.to(dtype), vector.to(dtype), model.extra)


class RandomModel(nn.Module):
    """The steps of a program, one behind the other."""

    def __init__(self, p: Program) -> None:
        super().__init__()
        self.program = p
        self.extra: Extra = {}
        self.blocks = nn.ModuleList(
            self._block(i, step, p.lengths_at(i)) for i, step in enumerate(p.steps)
        )
        self.out = nn.Linear(p.width, p.width)

    def _block(self, i: int, step: object, lengths: Lengths) -> nn.Module:
        p, name = self.program, f"step{i}"
        if isinstance(step, Attend):
            return RandomAttention(step, p, lengths, name, self.extra)
        if isinstance(step, Axial):
            return AxialAttention(step, p)
        kinds: dict[type, type] = {
            Mlp: RandomMlp,
            Rows: RandomRows,
            Pool: RandomPool,
            Position: RandomPosition,
            Write: RandomWrite,
            Mix: RandomMix,
        }
        if type(step) in kinds:
            return kinds[type(step)](step, p, lengths[step.stream], name, self.extra)  # type: ignore[attr-defined]
        return nn.Identity()

    def forward(
        self, streams: list[Tensor], context: Tensor, vector: Tensor, extra: Extra
    ) -> object:
        streams = list(streams)
        for step, block in zip(self.program.steps, self.blocks, strict=True):
            if isinstance(step, Attend):
                streams = block(streams, context, vector, extra)
            elif isinstance(step, Join):
                streams = [torch.cat([streams[i] for i in step.order], 1)]
            elif isinstance(step, Split):
                x = streams.pop(step.stream)
                streams += self._split(step, x)
            elif isinstance(step, Axial):
                streams[step.stream] = block(streams[step.stream])
            else:
                x, vector = block(streams[step.stream], context, vector, extra)
                streams[step.stream] = x
        return self._leave(streams)

    def _split(self, step: Split, x: Tensor) -> list[Tensor]:
        at, n = step.at, x.shape[1]
        if step.how == "slice":
            return [x[:, :at], x[:, at:]]
        if step.how == "negative":
            return [x[:, : at - n], x[:, at - n :]]
        if step.how == "narrow":
            return [x.narrow(1, 0, at), x.narrow(1, at, n - at)]
        if step.how == "split" and n <= 2 * at:
            return list(x.split(at, 1))
        return list(x.split([at, n - at], 1))

    def _leave(self, streams: list[Tensor]) -> object:
        streams = [2 * x for x in streams]  # an input that is an output would leave the graph
        out, first = self.program.out, streams[0]
        if out == "streams":
            return tuple(self.out(x) for x in streams)
        if out == "cat":
            return torch.cat(streams, 1)
        if out == "transposed":
            return self.out(first).transpose(1, 2), streams[-1]
        if out == "pooled":
            return self.out(first.mean(1)), first
        if out == "sliced":
            return self.out(first)[:, first.shape[1] // 2 :], first[:, :1]
        b, s, c = first.shape
        if out in ("unpatchify", "einsum") and c % 4 == 0:
            h = next(d for d in range(int(s**0.5), 0, -1) if s % d == 0)
            x = self.out(first).view(b, h, s // h, 2, 2, c // 4)
            if out == "einsum":
                x = torch.einsum("bhwpqc->bchpwq", x)
            else:
                x = x.permute(0, 5, 1, 3, 2, 4)
            return x.reshape(b, c // 4, 2 * h, 2 * (s // h))
        return self.out(first)


class Block(nn.Module):
    """A step that takes one stream: ``(x, context, vector, extra) -> (x, vector)``."""

    def __init__(self, step: object, p: Program, rows: int, name: str, extra: Extra) -> None:
        super().__init__()
        self.step, self.name, self.dtype = step, name, getattr(torch, p.dtype)
        self.make(p, rows, extra)

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        """Parameters and inputs."""


class RandomMlp(Block):
    step: Mlp

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        inner = 14
        gated = self.step.kind in ("geglu", "swiglu")
        self.norm = norm_of(self.step.norm, p.width)
        self.modulation = Modulation(p.width, self.step.modulated)
        self.up = nn.Linear(p.width, 2 * inner if gated else inner)
        self.down = nn.Linear(inner, p.width)
        self.gate = nn.Linear(p.width, inner, bias=False)

    def forward(self, x: Tensor, context: Tensor, vector: Tensor, extra: Extra) -> tuple:
        y, gate = self.modulation(self.norm(x), vector)
        kind, z = self.step.kind, self.up(y)
        if kind in ("geglu", "swiglu"):
            a, b = z.chunk(2, -1)
            z = a * (F.gelu(b) if kind == "geglu" else F.silu(b))
        elif kind == "wide":
            z = F.silu(z) * self.gate(y)
        elif kind == "relu2":
            z = F.relu(z).square()
        else:
            z = F.gelu(z, approximate="tanh" if kind == "tanh" else "none")
        return x + gate * self.down(z), vector


class RandomRows(Block):
    step: Rows

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        if self.step.how == "learned":
            self.tokens = nn.Parameter(torch.randn(1, self.step.count, p.width))

    def forward(self, x: Tensor, context: Tensor, vector: Tensor, extra: Extra) -> tuple:
        count, front = self.step.count, self.step.where == "front"
        if count < 0:
            return (x[:, -count:] if front else x[:, :count]), vector
        if self.step.how == "pad":
            return F.pad(x, (0, 0, count, 0) if front else (0, 0, 0, count), value=0.5), vector
        if self.step.how == "learned":
            more = self.tokens.expand(x.shape[0], -1, -1)
        elif self.step.how == "zeros":
            more = x.new_zeros(x.shape[0], count, x.shape[2])
        elif self.step.how == "own":
            more = x[:, :count]
        else:
            more = vector[:, None].repeat(1, count, 1)
        return torch.cat([more, x] if front else [x, more], 1), vector


class RandomPool(Block):
    step: Pool

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        self.linear, self.score = nn.Linear(p.width, p.width), nn.Linear(p.width, 1)
        if self.step.how == "masked":
            mask = torch.rand(p.batch, rows) > 0.4
            mask[:, 0] = True
            extra[f"{self.name}_keep"] = mask
        if self.step.how == "weighted":
            extra[f"{self.name}_weights"] = torch.rand(p.batch, rows).to(self.dtype)

    def forward(self, x: Tensor, context: Tensor, vector: Tensor, extra: Extra) -> tuple:
        pooled = self.linear(self._pooled(x, extra))
        if self.step.to == "vector":
            return x, vector + pooled
        return x + pooled[:, None], vector

    def _pooled(self, x: Tensor, extra: Extra) -> Tensor:
        how = self.step.how
        if how == "max":
            return x.amax(1)
        if how == "all":
            return x.mean((1, 2))[:, None] + x.std() + x.sum(1)
        if how == "peak":
            return x.mean(1) / x.abs().max()
        if how == "sum":
            return x.sum(1) / 8
        if how == "var":
            return x.var(1, correction=0)
        if how in ("first", "last"):
            return x[:, 0 if how == "first" else -1]
        if how == "masked":
            keep = extra[f"{self.name}_keep"].unsqueeze(-1).to(x.dtype)
            return (x * keep).sum(1) / keep.sum(1).clamp(min=1)
        if how == "softmax":
            return (self.score(x).softmax(1) * x).sum(1)
        if how == "weighted":
            return torch.einsum("bs,bsc->bc", extra[f"{self.name}_weights"], x) / 4
        return x.mean(dim=1)


class RandomPosition(Block):
    step: Position

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        self.table = nn.Embedding(rows + 3, p.width)
        self.linear = nn.Linear(1, p.width)
        self.register_buffer("positions", torch.randn(1, rows + 2, p.width))
        self.patches = nn.Conv2d(3, p.width, 2, 2)
        if self.step.how == "input":
            extra[f"{self.name}_positions"] = torch.randn(rows, p.width, dtype=self.dtype)
        elif self.step.how == "ids":
            extra[f"{self.name}_ids"] = torch.randint(0, rows + 3, (p.batch, rows))
        elif self.step.how == "patches":
            image = torch.randn(p.batch, 3, 2, 2 * rows)
            extra[f"{self.name}_image"] = image.to(self.dtype)

    def forward(self, x: Tensor, context: Tensor, vector: Tensor, extra: Extra) -> tuple:
        n, c = x.shape[1:]
        at = torch.arange(n, device=x.device)
        if self.step.how == "table":
            more = self.table(at)[None]
        elif self.step.how == "ids":  # the stream starts anew
            return self.table(extra[f"{self.name}_ids"]), vector
        elif self.step.how == "patches":
            image = self.patches(extra[f"{self.name}_image"]).flatten(2).transpose(1, 2)
            return image + x.mean(), vector
        elif self.step.how == "input":
            more = extra[f"{self.name}_positions"]
        elif self.step.how == "buffer":
            more = self.positions[:, :n]
        elif self.step.how == "linear":
            more = self.linear((at / n).to(x.dtype).unsqueeze(-1))
        else:
            half = c - c // 2
            angles = at[:, None].float() * torch.exp(-torch.arange(half, dtype=torch.float32))
            more = torch.cat([angles.sin(), angles.cos()], -1)[:, :c].to(x.dtype)
        return x + more, vector


class RandomWrite(Block):
    step: Write

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        self.linear = nn.Linear(p.width, p.width)

    def forward(self, x: Tensor, context: Tensor, vector: Tensor, extra: Extra) -> tuple:
        start, stop, how = self.step.start, self.step.stop, self.step.how
        if how == "scatter":
            return torch.slice_scatter(x, self.linear(x[:, start:stop]), 1, start, stop), vector
        if how == "cat":
            parts = [x[:, :start], self.linear(x[:, start:stop]), x[:, stop:]]
            return torch.cat(parts, 1), vector
        x = x.clone()
        if how == "assign":
            x[:, start:stop] = self.linear(x[:, start:stop])
        elif how == "add":
            x[:, start:stop] += vector[:, None]
        else:
            x[:, start:stop] = 0
        return x, vector


class RandomMix(Block):
    step: Mix

    def make(self, p: Program, rows: int, extra: Extra) -> None:
        self.linear = nn.Linear(p.width, p.width)
        self.conv = nn.Conv1d(p.width, p.width, 3, padding=1, groups=p.width)
        self.pointwise = nn.Conv1d(p.width, p.width, 1)
        self.pixels = nn.Conv2d(p.width, p.width, 3, padding=1)
        self.token = nn.Parameter(torch.randn(p.width))
        if self.step.how in ("shuffle", "gather"):
            extra[f"{self.name}_order"] = torch.randperm(rows)
        if self.step.how in ("keep", "where", "masked_fill"):
            extra[f"{self.name}_keep"] = torch.rand(p.batch, rows) > 0.4

    def forward(self, x: Tensor, context: Tensor, vector: Tensor, extra: Extra) -> tuple:
        return x + self._mixed(x, extra), vector

    def _mixed(self, x: Tensor, extra: Extra) -> Tensor:
        how, (b, s, c) = self.step.how, x.shape
        order, keep = extra.get(f"{self.name}_order"), extra.get(f"{self.name}_keep")
        if how == "flip":
            return x.flip(1)
        if how == "roll":
            return x.roll(1, 1)
        if how == "shift":
            return torch.cat([x[:, 1:], x[:, :1]], 1)
        if how == "cumsum":
            return x.cumsum(1) / s
        if how == "conv":
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        if how == "bcs":
            return self.pointwise(x.transpose(1, 2)).transpose(1, 2)
        if how == "permute":
            return self.linear(x.permute(2, 0, 1).permute(1, 2, 0))
        if how == "sbc":
            return F.gelu(self.linear(x.transpose(0, 1).contiguous())).transpose(0, 1)
        if how == "flat":
            return F.silu(self.linear(x.reshape(b * s, c))).view(b, s, c)
        if how == "shuffle":
            return x[:, order]
        if how == "gather":
            return x.gather(1, order[None, :, None].expand(b, -1, c))
        if how == "repeat":
            return self.linear(x.repeat_interleave(2, 1)).unflatten(1, (-1, 2)).mean(2)
        if how == "pairs":
            wide = x.reshape(b, s // 2, 2 * c) if s % 2 == 0 else x
            return F.layer_norm(wide, wide.shape[-1:]).view(b, s, c)
        if how == "pixels":
            h = next(d for d in range(int(s**0.5), 0, -1) if s % d == 0)
            y = self.pixels(x.transpose(1, 2).reshape(b, c, h, s // h))
            return y.flatten(2).transpose(1, 2)
        if how == "group_norm":
            return F.group_norm(x.transpose(1, 2), 1).transpose(1, 2)
        if how == "guidance":
            a, b = self.linear(torch.cat([x, -x], 0)).chunk(2, 0)
            return b + 2 * (a - b)
        if how == "twice":
            y = F.gelu(self.linear(torch.cat([x, x], 1)))
            return y[:, :s] + y[:, s:]
        if how == "fold":
            pair = 2 if s % 2 == 0 else 1
            y = x.reshape(b, 1, s // pair, pair * c)
            return F.scaled_dot_product_attention(y, y, y).reshape(b, s, c)
        if how == "keep":
            return x * keep.unsqueeze(-1)
        if how == "where":
            return torch.where(keep[..., None], x, self.token)
        assert how == "masked_fill"
        return x.masked_fill(~keep[:, :, None], 0.25)
