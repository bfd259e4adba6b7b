"""How to draw a random call of every op that has a sharding rule.

A case draws whole tensors and a placement for each. It is no concern of a case what the rule ought
to say: `brute_force.check` finds out whether what it says is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st

from ascend_sp.graph.layout import REPLICATE, Padded, Placement, Sequence, Shard
from ascend_sp.runtime.ops import attention as attention_op
from brute_force import NAN, Placed

aten = torch.ops.aten
TO_THE_END = 2**63 - 1

Args = tuple[Any, ...]
Case = Callable[["Draw", Any], "Args | tuple[Args, dict[str, Any]]"]
CASES: dict[Any, Case] = {}


@lru_cache
def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@dataclass
class Drawn:
    """One call to prove."""

    args: Args
    kwargs: dict[str, Any]
    world: int
    padding: float


class Draw:
    """The random choices of one example. Dims of `n` are, most of the time, split as `split`."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.world = self.pick(1, 2, 3, 4, 8)
        self.padding = self.pick(NAN, float("inf"), -1e30)
        lengths = tuple(self.integer(1, 9) for _ in range(self.integer(1, 3)))
        outer, inner = self.pick(1, 1, 1, 2, 3), self.pick(1, 1, 1, 2, 3)
        self.split = Shard(0, Sequence(lengths), outer, inner)
        self.n = self.split.outer * self.split.seq.total * self.split.inner
        self.random = torch.Generator().manual_seed(self.integer(0, 999))

    def pick(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def integer(self, low: int, high: int) -> int:
        return self.draw(integers(low, high))

    def flag(self) -> bool:
        return self.integer(0, 1) == 1

    def shape(self, ndim: int) -> list[int]:
        """One dim of `n`, the others short (and one of them, at times, of `n` too)."""
        sizes = [self.pick(1, 2, 3) for _ in range(ndim)]
        for _ in range(self.pick(1, 1, 2)):
            sizes[self.integer(0, ndim - 1)] = self.n
        return sizes

    def dim(self, ndim: int) -> int:
        return self.integer(-ndim, ndim - 1)

    def short_dim(self, shape: list[int]) -> int:
        """A dim of `shape`: not one of `n`, most of the time."""
        short = [d for d, n in enumerate(shape) if n != self.n]
        return self.pick(*short * 3, *range(len(shape))) - self.pick(0, len(shape))

    def dim_of(self, x: Placed) -> int:
        """A dim of `x`: not the split one, most of the time."""
        others = [d for d in range(x.tensor.ndim) if d != x.placement.dim]
        return self.pick(*others * 3, x.placement.dim) - self.pick(0, x.tensor.ndim)

    def dims_of(self, x: Placed) -> list[int]:
        """Different dims of `x`, at least one."""
        first = self.dim_of(x)
        more = [d for d in range(x.tensor.ndim) if d != first % x.tensor.ndim]
        return [first, *(d for d in more if self.pick(False, False, True))]

    def sequence(self, total: int) -> Sequence:
        """Some segments that add up to `total`."""
        if total == self.split.seq.total and self.flag():
            return self.split.seq
        first = self.integer(1, total)
        return Sequence((first, total - first) if first < total else (total,))

    def placement(self, shape: list[int]) -> Placement:
        dims = [d for d, n in enumerate(shape) if n > 0]
        if not dims:
            return REPLICATE
        # Along the dim of the sequence, most of the time.
        dim = self.pick(*dims, *(d for d in dims if shape[d] == self.n for _ in range(4)))
        size = shape[dim]
        if size == self.n and self.pick(True, True, True, False):
            return self.split.moved(dim)
        outer = self.pick(*(f for f in (1, 2, 3) if size % f == 0))
        inner = self.pick(*(f for f in (1, 2, 3) if size // outer % f == 0))
        return Shard(dim, self.sequence(size // outer // inner), outer, inner)

    def values(self, shape: list[int], kind: str = "float") -> torch.Tensor:
        if kind == "int":
            return torch.randint(1, 5, shape, generator=self.random)
        if kind == "bool":
            return torch.rand(shape, generator=self.random) < 0.5
        dtype = torch.complex128 if kind == "complex" else torch.float64
        return torch.randn(shape, generator=self.random, dtype=dtype)

    def tensor(self, *shape: int, kind: str = "float", whole: bool = False) -> Placed:
        """A tensor, sharded unless it is to be `whole`."""
        placement = REPLICATE if whole else self.placement(list(shape))
        return Placed(self.values(list(shape), kind), placement)

    def other(self, *shape: int, kind: str = "float") -> Placed:
        """A second operand: sharded or not."""
        return self.tensor(*shape, kind=kind, whole=self.flag())

    def some(self, ndim: int = 3, kind: str = "float") -> Placed:
        """A sharded tensor of up to `ndim` dims."""
        return self.tensor(*self.shape(self.pick(ndim, 2, min(ndim, 3), 1)), kind=kind)


def case(*ops: Any) -> Callable[[Case], Case]:
    def register(fn: Case) -> Case:
        CASES.update(dict.fromkeys(ops, fn))
        return fn

    return register


@st.composite
def calls(draw: st.DrawFn, op: Any, make: Case | None = None) -> Drawn:
    """A call of `op`, with some of its last arguments by name, at times."""
    g = Draw(draw)
    drawn = (make or CASES[op])(g, op)
    args, kwargs = drawn if isinstance(drawn[-1], dict) else (drawn, {})
    if op is not attention_op and g.pick(False, False, True):
        last = max((i + 1 for i, x in enumerate(args) if isinstance(x, Placed | list)), default=0)
        first = g.integer(min(last, len(args)), len(args))
        named = {op._schema.arguments[i].name: args[i] for i in range(first, len(args))}
        args, kwargs = args[:first], {**named, **kwargs}
    return Drawn(args, kwargs, g.world, g.padding)


# Matrix products


def two(g: Draw, left: list[int], right: list[int]) -> tuple[Placed, Placed]:
    """Two operands, at least one of them sharded."""
    which = g.integer(0, 2)
    return g.tensor(*left, whole=which == 0), g.tensor(*right, whole=which == 1)


@case(aten.mm.default)
def _(g: Draw, op: Any) -> Any:
    m, k, n = g.shape(3)
    return two(g, [m, k], [k, n])


@case(aten._int_mm.default)
def _(g: Draw, op: Any) -> Any:
    m, k, n = g.shape(3)
    return tuple(Placed(x.tensor.to(torch.int8), x.placement) for x in two(g, [m, k], [k, n]))


@case(aten.bmm.default)
def _(g: Draw, op: Any) -> Any:
    b, m, k, n = g.shape(4)
    return two(g, [b, m, k], [b, k, n])


@case(aten.matmul.default)
def _(g: Draw, op: Any) -> Any:
    a, b, m, k, n = g.shape(5)
    return two(
        g,
        *g.pick(
            ([m, k], [k, n]),
            ([b, m, k], [k, n]),
            ([a, b, m, k], [k, n]),
            ([a, b, m, k], [a, b, k, n]),
            ([a, b, m, k], [b, k, n]),
            ([a, 1, m, k], [1, b, k, n]),
            ([m, k], [a, b, k, n]),
            ([m, k], [k]),
        ),
    )


@case(aten.mv.default)
def _(g: Draw, op: Any) -> Any:
    m, k = g.shape(2)
    return two(g, [m, k], [k])


@case(aten.addmm.default)
def _(g: Draw, op: Any) -> Any:
    m, k, n = g.shape(3)
    bias = g.other(*g.pick([n], [1, n], [m, n], [m, 1], [1, 1], [1], []))
    return (bias, *two(g, [m, k], [k, n])), g.pick({}, {"beta": 2, "alpha": 0.5})


@case(aten.baddbmm.default)
def _(g: Draw, op: Any) -> Any:
    b, m, k, n = g.shape(4)
    bias = g.other(*g.pick([b, m, n], [1, m, n], [b, 1, n], [b, m, 1], [m, n], [n], [1]))
    return (bias, *two(g, [b, m, k], [b, k, n])), g.pick({}, {"beta": 2, "alpha": 0.5})


def margined(g: Draw, x: Placed, first: int) -> Placed:
    """`x`, some rows of which are around a picture that is split along a dim from `first`."""
    dim = g.integer(first, x.tensor.ndim - 1)
    size = x.tensor.shape[dim]
    before = g.integer(0, min(3, size - 1))
    after = g.integer(0, min(3, size - 1 - before))
    rows = size - before - after
    inner = g.pick(*(f for f in (1, 2, 3) if rows % f == 0))
    return Placed(x.tensor, Padded(Shard(dim, Sequence((rows // inner,)), 1, inner), before, after))


def picture(g: Draw, sizes: list[int], first: int = 2) -> Placed:
    """A tensor whose dims from `first` are positions: split somewhere, or with rows around it."""
    x = g.tensor(*sizes)
    return margined(g, x, first) if g.pick(False, False, True) else x


@case(aten.convolution.default)
def _(g: Draw, op: Any) -> Any:
    positions = g.pick(1, 1, 2, 3)
    taps = [g.pick(1, 2, 3, 4) for _ in range(positions)]
    dilation = [g.pick(1, 1, 2)] * g.pick(1, positions)
    groups = g.pick(1, 1, 2)
    b, i, o, *x = g.shape(3 + positions)
    # Enough positions for the taps, and channels for the groups.
    spans = [(t - 1) * d + 1 for t, d in zip(taps, dilation * positions, strict=False)]
    x = [max(n, span) for n, span in zip(x, spans, strict=True)]
    transposed, spread = g.pick(False, False, True), g.pick(1, 1, 2, 3)
    stride = [spread] * g.pick(1, positions)
    padding = [g.pick(0, 1, 2)] * g.pick(1, positions)
    more = [g.integer(0, spread - 1) if transposed else 0] * positions
    channels = [i * groups, o] if transposed else [o * groups, i]
    bias = g.pick(None, Placed(g.values([o * groups]), REPLICATE))
    if transposed and min((n - 1) * spread + s for n, s in zip(x, spans, strict=True)) < 5:
        padding = [0]
    sizes = [b, i * groups, *x]
    image = g.tensor(*sizes, whole=True) if g.pick(*[False] * 6, True) else picture(g, sizes)
    weight = g.tensor(*channels, *taps, whole=image.placement != REPLICATE)
    return image, weight, bias, stride, padding, dilation, transposed, more, groups


@case(aten.avg_pool2d.default, aten.avg_pool3d.default)
def _(g: Draw, op: Any) -> Any:
    positions = 2 if op is aten.avg_pool2d.default else 3
    taps = [g.pick(1, 2, 3) for _ in range(positions)]
    b, c, *x = g.shape(2 + positions)
    x = [max(n, t) for n, t in zip(x, taps, strict=True)]
    padding = [g.integer(0, min(taps) // 2)] * g.pick(1, positions)
    stride = g.pick([], [g.pick(1, 2, 3)])
    return picture(g, [b, c, *x]), taps, stride, padding, g.pick(False, False, True), g.flag()


UPSAMPLED = (
    *(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default),
    aten.upsample_nearest3d.default,
)


@case(*UPSAMPLED)
def _(g: Draw, op: Any) -> Any:
    x = g.tensor(*g.shape(3 + UPSAMPLED.index(op)))
    times = [g.pick(1, 2, 3) for _ in range(x.tensor.ndim - 2)]
    sizes = [t * n for t, n in zip(times, x.tensor.shape[2:], strict=True)]
    sizes[0] += g.pick(0, 0, 0, 1)
    return x, sizes


@case(aten.pixel_shuffle.default)
def _(g: Draw, op: Any) -> Any:
    *lead, c, h, w = g.shape(g.pick(3, 4))
    return g.tensor(*lead, 4 * c, h, w), 2


@case(aten.pixel_unshuffle.default)
def _(g: Draw, op: Any) -> Any:
    *lead, c, h, w = g.shape(g.pick(3, 4))
    return g.tensor(*lead, c, 2 * h, 2 * w), 2


MARGINS = {f"{kind}_pad{d}d": d for kind in ("reflection", "replication") for d in (1, 2, 3)}


@case(*(getattr(aten, name).default for name in MARGINS))
def _(g: Draw, op: Any) -> Any:
    dims = MARGINS[op._schema.name.split("::")[1]]
    sizes = [n + 1 for n in g.shape(2 + dims)]
    pad = [g.pick(0, 0, 1, 1) for _ in range(2 * dims)]
    return g.tensor(*sizes), pad


@case(aten.native_group_norm.default)
def _(g: Draw, op: Any) -> Any:
    groups, n = g.pick(1, 2), g.pick(g.n, g.n, 3)
    c, *positions = groups * g.pick(1, 2), *(g.pick(1, 3, g.n) for _ in range(g.pick(1, 2)))
    x = g.tensor(n, c, *positions, whole=g.pick(False, False, False, True))
    weight = g.tensor(c, whole=x.placement != REPLICATE)
    bias = g.pick(None, g.other(c))
    return x, weight, bias, n, c, prod(positions), groups, 1e-5


# Reductions


@case(aten.sum.dim_IntList, aten.mean.dim)
def _(g: Draw, op: Any) -> Any:
    kind = g.pick("float", "float", "int", "bool") if op is aten.sum.dim_IntList else "float"
    x = g.some(kind=kind)
    return (x, g.pick(*[g.dims_of(x)] * 4, None, []), g.flag()), g.pick(
        {}, {"dtype": torch.float32}
    )


@case(aten.amax.default, aten.amin.default, aten.logsumexp.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    whole = [] if op is aten.logsumexp.default else [[]]
    return x, g.pick(*[g.dims_of(x)] * 4, *whole), g.flag()


@case(aten.prod.dim_int, aten.max.dim, aten.min.dim)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.dim_of(x), g.flag()


@case(aten.any.dim, aten.all.dim)
def _(g: Draw, op: Any) -> Any:
    x = g.some(kind="bool")
    return x, g.dim_of(x), g.flag()


@case(aten.any.dims, aten.all.dims)
def _(g: Draw, op: Any) -> Any:
    x = g.some(kind="bool")
    return x, g.pick(*[g.dims_of(x)] * 4, None, []), g.flag()


@case(aten.argmax.default, aten.argmin.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.pick(*[g.dim_of(x)] * 4, None), g.flag()


@case(aten.linalg_vector_norm.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.pick(0, 1, 2, float("inf")), g.pick(*[g.dims_of(x)] * 4, None), g.flag()


@case(aten.var.correction, aten.std.correction, aten.var_mean.correction)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    dims = g.pick(*[g.dims_of(x)] * 4, None, [])
    return (x, dims), {"correction": g.pick(None, 0, 1), "keepdim": g.flag()}


@case(aten._softmax.default, aten._log_softmax.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.dim_of(x), False


@case(aten._safe_softmax.default, aten.cumsum.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.dim_of(x)


@case(aten.sort.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return (x, *g.pick((), (g.dim_of(x),), (g.dim_of(x), True)))


@case(aten.topk.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return (x, 1, *g.pick((), (g.dim_of(x), g.flag())))


@case(aten.glu.default)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(3)
    dim = g.dim(3)
    shape[dim] += shape[dim] % 2
    return (g.tensor(*shape), *((dim,) if dim != 2 or g.flag() else ()))


@case(aten.native_layer_norm.default)
def _(g: Draw, op: Any) -> Any:
    shape, normalized, weight, bias = norm(g)
    return (g.tensor(*shape), normalized, weight, bias, 1e-5)


@case(aten._fused_rms_norm.default, aten.rms_norm.default)
def _(g: Draw, op: Any) -> Any:
    shape, normalized, weight, _ = norm(g)
    return g.tensor(*shape), normalized, weight, g.pick(None, 1e-5)


def norm(g: Draw) -> tuple[list[int], list[int], Placed | None, Placed | None]:
    shape = g.shape(3)
    normalized = shape[g.pick(1, 2, 2, 2) :]
    weight, bias = (g.pick(None, g.tensor(*normalized, whole=True)) for _ in range(2))
    if g.pick(False, False, True):
        weight = g.tensor(*normalized)
    return shape, normalized, weight, bias


# Tables


@case(aten.embedding.default)
def _(g: Draw, op: Any) -> Any:
    index = g.shape(g.integer(1, 2))
    whole = g.integer(0, 2)
    return (
        g.tensor(5, g.pick(1, 3), whole=whole != 0),
        g.tensor(*index, kind="int", whole=whole == 0),
    )


@case(aten.index_select.default)
def _(g: Draw, op: Any) -> Any:
    shape = g.shape(g.integer(1, 3))
    dim = g.dim(len(shape))
    shape[dim] = max(5, shape[dim])
    whole = g.integer(0, 3)
    return (
        g.tensor(*shape, whole=whole >= 2),
        dim,
        g.tensor(g.pick(g.n, 2), kind="int", whole=whole < 2),
    )


# Ops of one operand that keep its shape


@case(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
)
def _(g: Draw, op: Any) -> Any:
    return (g.some(kind=g.pick("float", "int", "bool")),)


@case(aten._conj.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(kind="complex"),)


@case(aten.new_full.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(), [g.integer(1, 4), 3], 2.5)


@case(aten.new_zeros.default, aten.new_ones.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(), [g.integer(1, 4), 3])


@case(aten.full_like.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(), 2.5), g.pick({}, {"dtype": torch.int64})


@case(aten._to_copy.default)
def _(g: Draw, op: Any) -> Any:
    return (g.some(),), {"dtype": g.pick(torch.float32, torch.bfloat16, torch.float64)}


@case(aten.flip.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    return x, g.pick(*[g.dims_of(x)] * 4, [])


@case(aten.roll.default)
def _(g: Draw, op: Any) -> Any:
    x = g.some()
    dims = g.dims_of(x)
    shifts = [g.integer(-2, 2) for _ in dims]
    return g.pick((x, shifts, dims), (x, shifts, dims), (x, [3]))


# Attention


@case(attention_op)
def _(g: Draw, op: Any) -> Any:
    groups = g.pick(1, 2)
    heads = groups * g.pick(1, 2)
    role = g.pick("queries", "queries", "joint", "batch", "any")
    seq, b, s, t = g.split.seq, 2, 3, g.pick(1, 3, 4)
    if role in ("queries", "joint"):
        s = seq.total
    if role == "joint":
        t = s
    if role == "batch":
        b = g.n
    q, k, v = [b, heads, s, 2], [b, groups, t, 2], [b, groups, t, 3]
    first = {"queries": Shard(2, seq), "joint": Shard(2, seq), "batch": g.split}
    second = first[role] if role in ("joint", "batch") else REPLICATE
    placed = [Placed(g.values(q), first.get(role) or g.pick(REPLICATE, g.placement(q)))]
    for shape in (k, v):
        other = g.placement(shape) if role == "any" else second
        placed.append(Placed(g.values(shape), g.pick(second, other, other, other, REPLICATE)))
    if role == "batch":  # whichever it is that is split
        placed[0] = Placed(placed[0].tensor, g.pick(placed[0].placement, placed[1].placement))
        placed[2] = Placed(placed[2].tensor, g.split)
    more: dict[str, Any] = {"enable_gqa": heads != groups, "scale": g.pick(None, 0.3)}
    if g.flag():
        more["is_causal"] = g.flag()
        return tuple(placed), more
    mask = g.pick(
        [s, t], [1, t], [s, 1], [b, 1, s, t], [b, heads, s, t], [1, 1, 1, t], [1, 1, s, t]
    )
    placed_mask = g.other(*mask, kind=g.pick("bool", "float"))
    if g.flag():
        return (*placed, placed_mask), more
    return tuple(placed), {"attn_mask": placed_mask, **more}
