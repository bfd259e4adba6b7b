"""Random small transformers: a description that can be printed and pasted, and how to draw one.

A model has streams ``[B, n, C]`` (image, text, ...), a context that is only looked at, and a
vector ``[B, C]``. A `Program` is a list of steps over them; `random_blocks.build` makes the module
and its inputs. Drawing keeps track of the streams' lengths, so that every step is possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from random import Random
from typing import Any, TypeAlias

from hypothesis import strategies as st

Lengths: TypeAlias = "tuple[int, ...]"


class Described:
    """Prints as the call that makes it, without the defaults."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def after(self, lengths: Lengths) -> Lengths:
        """The lengths of the streams behind this step."""
        return lengths


@dataclass(frozen=True, repr=False)
class Attend(Described):
    """Attention of some streams to themselves, to each other or to something else, a residual."""

    queries: tuple[int, ...]
    """Streams, in the order in which they stand in one sequence."""
    keys: tuple[int, ...] = ()
    """Streams that are looked at; -1 is the context; empty: those of the queries."""
    join: str = "rows"
    """Streams are concatenated before the projections, or after: ``bshd``, ``bhsd``."""
    project: str = "separate"
    heads_by: str = "unflatten"
    groups: int = 0
    """Heads of keys and values, if there are fewer of them."""
    share: str = "gqa"
    value_size: int = 0
    norm: str = ""
    """Of queries and keys."""
    rotary: str = ""
    table: str = "input"
    rotate_behind: bool = False
    """Only the streams behind the first one are rotated."""
    mask: str = ""
    scale: float | None = None
    null_keys: int = 0
    """Rows of learned keys and values in front."""
    tail: int = 0
    """Only so many queries, the last ones."""
    lone: bool = False
    """A context that is looked at alone is one for the whole batch."""
    how: str = "sdpa"
    modulated: bool = False
    beside: bool = False
    """An MLP of the same input goes through the same output projection."""
    dual: bool = False
    """The first stream attends to itself too."""


@dataclass(frozen=True, repr=False)
class Axial(Described):
    """Attention within each frame, or over the frames at each place, or in windows."""

    stream: int
    frames: int
    over: str = "space"


@dataclass(frozen=True, repr=False)
class Mlp(Described):
    """Norm, MLP, residual."""

    stream: int
    kind: str = "gelu"
    norm: str = "layer"
    modulated: bool = False


@dataclass(frozen=True, repr=False)
class Join(Described):
    """All streams become one sequence."""

    order: tuple[int, ...]

    def after(self, lengths: Lengths) -> Lengths:
        return (sum(lengths),)


@dataclass(frozen=True, repr=False)
class Split(Described):
    """One stream becomes two, which go to the end."""

    stream: int
    at: int
    how: str = "slice"

    def after(self, lengths: Lengths) -> Lengths:
        n = lengths[self.stream]
        rest = lengths[: self.stream] + lengths[self.stream + 1 :]
        return (*rest, self.at, n - self.at)


@dataclass(frozen=True, repr=False)
class Rows(Described):
    """Rows are added to a stream (class tokens, registers, padding), or taken away (negative)."""

    stream: int
    count: int
    where: str = "front"
    how: str = "learned"

    def after(self, lengths: Lengths) -> Lengths:
        n = lengths[self.stream] + self.count
        return (*lengths[: self.stream], n, *lengths[self.stream + 1 :])


@dataclass(frozen=True, repr=False)
class Pool(Described):
    """Something over the rows, added to the vector or to every row."""

    stream: int
    how: str = "mean"
    to: str = "vector"


@dataclass(frozen=True, repr=False)
class Position(Described):
    """Position embeddings."""

    stream: int
    how: str = "sin"


@dataclass(frozen=True, repr=False)
class Write(Described):
    """Some rows are overwritten, as models do in place."""

    stream: int
    start: int
    stop: int
    how: str = "assign"


@dataclass(frozen=True, repr=False)
class Mix(Described):
    """Rows are mixed, moved or regrouped in other ways."""

    stream: int
    how: str


Step: TypeAlias = "Attend | Axial | Mlp | Join | Split | Rows | Pool | Position | Write | Mix"


@dataclass(frozen=True, repr=False)
class Program(Described):
    """A model, its inputs, and how many ranks run it."""

    lengths: Lengths
    steps: tuple[Step, ...]
    ranks: int = 2
    batch: int = 1
    heads: int = 2
    size: int = 4
    """Of a head."""
    width: int = 8
    context: int = 3
    """Rows of the context."""
    dtype: str = "float32"
    out: str = "streams"
    dynamic: bool = False

    def lengths_at(self, step: int) -> Lengths:
        """The lengths of the streams in front of step number `step`."""
        lengths = self.lengths
        for s in self.steps[:step]:
            lengths = s.after(lengths)
        return lengths


RANKS = (2, 2, 3, 3, 4, 5, 8)
MASKS = (
    *("key_bool", "key_reshaped", "key_float", "rows", "rows_float", "heads", "one_row"),
    *("lengths", "causal", "tril", "outer", "content", "alibi"),
)
HOWS = ("flat", "math", "linear", "einsum", "strided", "rolled_keys", "rolled_queries")
POSITIONS = ("sin", "table", "input", "buffer", "linear", "ids", "patches")
MIXES = (
    *("flip", "roll", "conv", "cumsum", "permute", "shuffle", "repeat", "sbc", "flat", "bcs"),
    *("pixels", "group_norm", "keep", "where", "masked_fill", "pairs", "shift", "gather"),
    *("guidance", "twice", "fold"),
)
POOLS = (
    "mean",
    "sum",
    "max",
    "masked",
    "softmax",
    "first",
    "last",
    "var",
    "weighted",
    "all",
    "peak",
)
OUTS = ("streams", "first", "cat", "unpatchify", "transposed", "pooled", "sliced", "einsum")


def _sometimes(r: Random, *values: Any, default: Any) -> Any:
    """Mostly the default, so that programs stay readable."""
    return r.choice(values) if values and r.random() < 0.3 else default


def _attend(r: Random, lengths: Lengths, heads: int, size: int) -> Attend:
    queries = tuple(r.sample(range(len(lengths)), len(lengths)))
    if r.random() < 0.3:
        queries = queries[:1]
    others = [-1, *(i for i in range(len(lengths)) if i not in queries)]
    keys = _sometimes(r, *[(i,) for i in others], (*queries, r.choice(others)), default=())
    total = sum(lengths[i] for i in queries)
    groups = [g for g in range(1, heads) if heads % g == 0]
    rotations = ("interleaved", "half", "complex", "written") if size % 2 == 0 else ()
    rotary = r.choice(rotations) if rotations and r.random() < 0.4 else ""
    return Attend(
        queries=queries,
        keys=keys,
        join=r.choice(["rows", "bshd", "bhsd"]) if len(queries) > 1 else "rows",
        project=r.choice(["separate", "chunk", "unbind", "stacked"]),
        heads_by=r.choice(["unflatten", "view", "reshape"]),
        groups=_sometimes(r, *groups, default=0),
        share=r.choice(["gqa", "repeat", "expand", "broadcast"]),
        value_size=3 if r.random() < 0.15 else 0,
        norm=_sometimes(r, "rms", "layer", "across", "l2", default=""),
        rotary=rotary,
        table=r.choice(["input", "inside", "buffer", "batch"]) if rotary else "input",
        rotate_behind=bool(rotary) and len(queries) > 1 and not keys and r.random() < 0.4,
        mask=r.choice(MASKS) if r.random() < 0.4 else "",
        scale=_sometimes(r, 0.3, 1.0, default=None),
        null_keys=r.choice([1, 3]) if r.random() < 0.15 else 0,
        tail=r.randint(1, total) if r.random() < 0.15 else 0,
        lone=r.random() < 0.3,
        how=r.choice(HOWS) if r.random() < 0.25 else "sdpa",
        modulated=r.random() < 0.5,
        beside=r.random() < 0.2,
        dual=r.random() < 0.15,
    )


KINDS = (
    *("attend", "attend", "attend", "mlp", "mlp", "mix", "mix"),
    *("axial", "join", "split", "rows", "pool", "position", "write"),
)


def _step(r: Random, lengths: Lengths, heads: int, size: int) -> Step:
    """One possible step on streams of these lengths."""
    stream = r.randrange(len(lengths))
    n = lengths[stream]
    kind = r.choice(KINDS)
    if kind == "axial":
        frames = r.choice([d for d in range(1, n + 1) if n % d == 0])
        return Axial(stream, frames, r.choice(["space", "time"]))
    if kind == "mlp":
        mlp = r.choice(["gelu", "tanh", "geglu", "swiglu", "wide", "relu2"])
        norm = r.choice(["layer", "rms", "by_hand", "none", "var"])
        return Mlp(stream, mlp, norm, r.random() < 0.5)
    if kind == "join" and len(lengths) > 1:
        return Join(tuple(r.sample(range(len(lengths)), len(lengths))))
    if kind == "split" and n > 1 and len(lengths) < 3:
        how = r.choice(["slice", "negative", "split", "sizes", "narrow"])
        return Split(stream, r.randint(1, n - 1), how)
    if kind == "rows":
        where = r.choice(["front", "back"])
        if n > 1 and r.random() < 0.5:
            return Rows(stream, -r.randint(1, n - 1), where, "slice")
        how = r.choice(["learned", "zeros", "pad", "context", "own"])
        return Rows(stream, r.randint(1, min(4, n) if how == "own" else 4), where, how)
    if kind == "pool":
        return Pool(stream, r.choice(POOLS), r.choice(["vector", "rows"]))
    if kind == "position":
        return Position(stream, r.choice(POSITIONS))
    if kind == "write":
        start = r.randrange(n)
        how = r.choice(["assign", "add", "scatter", "zero", "cat"])
        return Write(stream, start, r.randint(start + 1, n), how)
    if kind == "mix":
        return Mix(stream, r.choice(MIXES))
    return _attend(r, lengths, heads, size)


def draw_program(r: Random, most: int = 4) -> Program:
    """A program of up to `most` steps, at least one of them an attention."""
    heads, size, width = r.randint(1, 6), r.choice([2, 3, 4, 5, 6]), r.choice([8, 12, 15])
    # Few tokens, and as many as something else has, are where dims are confused.
    odd = [1, 1, 2, 3, heads, size, width, heads * size]
    lengths = tuple(
        r.choice(odd) if r.random() < 0.35 else r.randint(1, 24)
        for _ in range(r.choice([1, 2, 2, 3]))
    )
    if r.random() < 0.2:
        lengths = (r.randint(20, 40), *lengths[1:])
    steps: list[Step] = []
    now = lengths
    for _ in range(r.randint(0, most - 1)):
        steps.append(_step(r, now, heads, size))
        now = steps[-1].after(now)
    if not any(isinstance(s, Attend) for s in steps) or r.random() < 0.5:
        steps.append(_attend(r, now, heads, size))
    return Program(
        lengths=lengths,
        steps=tuple(steps),
        ranks=r.choice(RANKS),
        batch=r.choice([1, 1, 2, 3]),
        heads=heads,
        size=size,
        width=width,
        context=r.randint(1, 7),
        dtype="bfloat16" if r.random() < 0.1 else "float32",
        out=r.choice(OUTS),
        dynamic=False,
    )


def programs(most: int = 4) -> st.SearchStrategy[Program]:
    """Programs, evenly drawn: Hypothesis chooses the seed only, for its own choices repeat.

    So it cannot shrink either; `simpler` does, and needs fewer tries.
    """
    return st.randoms(use_true_random=True).map(lambda r: draw_program(r, most))


def simpler(p: Program) -> Iterator[Program]:
    """Programs with one step less, or with one thing less unusual."""
    for i in range(len(p.steps)):
        yield replace(p, steps=p.steps[:i] + p.steps[i + 1 :])
    yield from _plainer(p)
    for i, s in enumerate(p.steps):
        for t in _plainer(s):
            yield replace(p, steps=(*p.steps[:i], t, *p.steps[i + 1 :]))
    for i, n in enumerate(p.lengths):
        if n > 1:
            for m in {n // 2, n - 1}:
                yield replace(p, lengths=(*p.lengths[:i], m, *p.lengths[i + 1 :]))


def _plainer(x: Any) -> Iterator[Any]:
    for f in fields(x):
        if f.default is not MISSING and getattr(x, f.name) != f.default:
            yield replace(x, **{f.name: f.default})
