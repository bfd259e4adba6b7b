"""The calculus of placements and sizes, against lists of elements that are labelled one by one."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascend_sp.graph.layout import (
    PARTIAL,
    REPLICATE,
    Sequence,
    Shard,
    at_dim,
    local_shape,
    reshaped,
    same,
)
from ascend_sp.graph.sizes import (
    as_shape,
    as_size,
    ceil_div,
    divide,
    equal,
    product,
    same_shape,
    total,
)
from brute_force import cut, fits, positions

examples = settings(max_examples=200, derandomize=True, deadline=None, database=None)

SEQUENCES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(
    lambda lengths: Sequence(tuple(lengths))
)
WORLDS = st.sampled_from([1, 2, 3, 4, 8])
FACTORS = st.lists(st.sampled_from([1, 1, 2, 3]), max_size=3)
PADDING = -1
SIZE = tuple[int, ...]


def label(shape: SIZE) -> Tensor:
    """Every element is its own row-major index."""
    return torch.arange(product(shape)).reshape(shape)


def shard_of(x: Tensor, p: Shard, rank: int, world: int) -> Tensor:
    index = torch.tensor(positions(p, rank, world))
    part = x.index_select(p.dim, index.clamp(min=0))
    return part.index_fill(p.dim, (index < 0).nonzero().flatten(), PADDING)


def shards(shape: SIZE, p: Shard, world: int) -> list[Tensor]:
    return [shard_of(label(shape), p, r, world) for r in range(world)]


@st.composite
def grouped(draw: st.DrawFn, factors: list[int]) -> SIZE:
    """The products of neighbouring `factors`: a shape, with dims of one in between."""
    sizes = [1]
    for f in factors:
        if draw(st.booleans()):
            sizes.append(1)
        sizes[-1] *= f
    return tuple(sizes)


@st.composite
def placed(draw: st.DrawFn) -> tuple[SIZE, Shard]:
    """A shape and a split of one of its dims."""
    seq = draw(SEQUENCES)
    outer, inner = (draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2))
    before, after = draw(FACTORS), draw(FACTORS)
    shape = (*before[:2], outer * seq.total * inner, *after[:2])
    return shape, Shard(len(before[:2]), seq, outer, inner)


@st.composite
def regrouped(draw: st.DrawFn) -> tuple[SIZE, Shard, SIZE]:
    """A split shape, and another shape in which the sequence is a factor of one dim."""
    shape, p = draw(placed())
    factors = [*shape[: p.dim], p.outer, p.seq.total, p.inner, *shape[p.dim + 1 :]]
    return shape, p, draw(grouped(factors))


@st.composite
def viewed(draw: st.DrawFn) -> tuple[SIZE, Shard, SIZE]:
    """A split shape, and any other shape of as many elements, nearly."""
    shape, p = draw(placed())
    primes = [f for n in shape for f, k in sympy.factorint(n).items() for _ in range(k)]
    return shape, p, draw(st.permutations(primes).flatmap(grouped))


# Sequences


@examples
@given(SEQUENCES, WORLDS)
def test_ranks_hold_equal_chunks_and_every_row_once(seq: Sequence, world: int) -> None:
    held = [positions(Shard(0, seq), r, world) for r in range(world)]
    assert {len(rows) for rows in held} == {seq.local(world)}
    assert sorted(i for rows in held for i in rows if i >= 0) == list(range(seq.total))
    assert seq.padded(world) == any(i < 0 for rows in held for i in rows)
    assert seq.local(world) == total(seq.chunks(world))
    assert all(c == -(-n // world) for c, n in zip(seq.chunks(world), seq.lengths, strict=True))


@examples
@given(SEQUENCES, st.integers(-2, 28), st.integers(-2, 28))
def test_cut_finds_the_segments_between_two_edges_and_nothing_else(
    seq: Sequence, start: int, stop: int
) -> None:
    wanted = range(start, stop)
    n = len(seq.lengths)
    right = [
        (i, j)
        for i in range(n)
        for j in range(i + 1, n + 1)
        if range(sum(seq.lengths[:i]), sum(seq.lengths[:j])) == wanted and len(wanted)
    ]
    assert seq.cut(start, stop) == (right[0] if right else None)
    assert seq.cut(0, seq.total) == (0, n)
    assert all(
        seq.cut(sum(seq.lengths[:i]), sum(seq.lengths[: i + 1])) == (i, i + 1) for i in range(n)
    )


def test_cut_knows_symbolic_edges() -> None:
    s, t = symbols("s t")
    seq = Sequence((512, s, t))
    assert seq.cut(512, s + 512) == (1, 2)
    assert seq.cut(512, s + t + 512) == (1, 3)
    assert seq.cut(0, s) is None
    assert seq.cut(s, s + 512) is None


# Placements


@examples
@given(placed(), WORLDS)
def test_local_shape_is_that_of_the_shards(case: tuple[SIZE, Shard], world: int) -> None:
    shape, p = case
    assert {tuple(x.shape) for x in shards(shape, p, world)} == {local_shape(shape, p, world)}
    assert local_shape(shape, REPLICATE, world) == local_shape(shape, PARTIAL, world) == shape


@examples
@given(regrouped(), WORLDS)
def test_reshaped_finds_the_sequence_in_every_view_that_keeps_it(
    case: tuple[SIZE, Shard, SIZE], world: int
) -> None:
    shape, p, new = case
    q = reshaped(shape, p, new)
    assert q is not None
    assert_views_locally(shape, p, new, q, world)
    back = reshaped(new, q, shape, prefer=p.dim)
    assert back is not None
    assert same(shape, back, p)
    if p.seq.total > 1:
        assert back == p


@examples
@given(viewed(), WORLDS, st.none() | st.integers(0, 4))
def test_reshaped_is_exact_where_it_answers(
    case: tuple[SIZE, Shard, SIZE], world: int, prefer: int | None
) -> None:
    shape, p, new = case
    q = reshaped(shape, p, new, prefer)
    if q is not None:
        assert_views_locally(shape, p, new, q, world)


@examples
@given(viewed())
def test_reshaped_refuses_only_what_no_split_of_one_dim_can_say(
    case: tuple[SIZE, Shard, SIZE],
) -> None:
    shape, p, new = case
    assume(max(p.seq.lengths) > 1)
    if reshaped(shape, p, new) is None:
        # As many ranks as tokens: then no two placements are alike.
        world = p.seq.total
        right = [x.flatten().tolist() for x in shards(shape, p, world)]
        for q in every_split(new, p.seq):
            assert [x.flatten().tolist() for x in shards(new, q, world)] != right


def every_split(shape: SIZE, seq: Sequence) -> list[Shard]:
    return [
        Shard(d, seq, outer, n // seq.total // outer)
        for d, n in enumerate(shape)
        if n % seq.total == 0
        for outer in range(1, n // seq.total + 1)
        if n // seq.total % outer == 0
    ]


def assert_views_locally(shape: SIZE, p: Shard, new: SIZE, q: Shard, world: int) -> None:
    """A local view of `p`'s shards as `q` says is the shard of the global view."""
    assert fits(new, q)
    for a, b in zip(shards(shape, p, world), shards(new, q, world), strict=True):
        assert a.reshape(local_shape(new, q, world)).equal(b)


def test_reshaped_prefers_a_dim_of_its_own_then_the_minor_factor_and_obeys_the_caller() -> None:
    one = Shard(1, Sequence((1,)))
    assert reshaped((2, 1, 3), one, (2, 1, 3)) == one
    assert reshaped((2, 1, 3), one, (2, 3)) == Shard(0, Sequence((1,)), outer=2)
    assert reshaped((1, 1, 3), one, (1, 1, 3)) == one
    assert reshaped((1, 1, 3), one, (1, 1, 3), prefer=0) == one.moved(0)
    assert reshaped((1, 1, 3), one, (1, 1, 3), prefer=2) == one


def test_reshaped_of_symbolic_shapes() -> None:
    b, s, t = symbols("b s t")
    p = Shard(1, Sequence((s, t)))
    merged = Shard(0, p.seq, outer=b)
    assert reshaped((b, s + t, 6), p, (b * (s + t), 6)) == merged
    assert reshaped((b, s + t, 6), p, (b * s + b * t, 6)) == merged
    assert reshaped((b * (s + t), 6), merged, (b, s + t, 2, 3)) == p
    assert reshaped((b, s + t, 6), p, (b, s + t, 2, 3)) == p
    assert reshaped((b, s + t, 6), p, (b, 6 * s + 6 * t)) == Shard(1, p.seq, 1, 6)
    assert reshaped((b, s + t, 6), p, (b, 2 * (s + t), 3)) == Shard(1, p.seq, 1, 2)
    assert reshaped((b, s + t, 6), p, (6, s + t, b)) is None
    assert reshaped((s, 6), Shard(0, Sequence((s,))), (s / 2, 12)) is None


@examples
@given(placed(), st.integers(0, 4), WORLDS)
def test_at_dim_names_the_same_shards_with_the_dim_filled(
    case: tuple[SIZE, Shard], dim: int, world: int
) -> None:
    shape, p = case
    assume(dim < len(shape))
    q = at_dim(shape, p, dim)
    if q is not None:
        assert q.dim == dim
        assert q.whole_dim()
        assert same(shape, p, q)
        assert all(
            a.equal(b)
            for a, b in zip(shards(shape, p, world), shards(shape, q, world), strict=True)
        )
    elif p.dim == dim:
        assert not p.whole_dim()


@st.composite
def two_splits(draw: st.DrawFn) -> tuple[SIZE, Shard, Shard]:
    """A shape and two splits of it, which are often alike."""
    shape, p = draw(placed())
    kept = every_split(shape, p.seq)
    other = Sequence(p.seq.lengths[::-1])
    lump = Sequence((p.seq.total,))
    return (
        shape,
        p,
        draw(st.sampled_from(kept + every_split(shape, other) + every_split(shape, lump))),
    )


@examples
@given(two_splits())
def test_same_means_the_same_data_on_every_rank_of_every_group(
    case: tuple[SIZE, Shard, Shard],
) -> None:
    shape, p, q = case
    alike = all(
        a.equal(b)
        for world in {1, 2, 3, p.seq.total}
        for a, b in zip(shards(shape, p, world), shards(shape, q, world), strict=True)
    )
    found = same(shape, p, q)
    assert found == same(shape, q, p)
    if max(p.seq.lengths) > 1:
        assert found == alike
    else:  # Rank 0 holds all of every segment, wherever that is said to be: `same` may miss it.
        assert alike or not found


def test_whole_and_split_and_partial_are_never_the_same() -> None:
    p = Shard(0, Sequence((4,)))
    assert same((4,), REPLICATE, REPLICATE)
    assert same((4,), PARTIAL, PARTIAL)
    assert not any(
        same((4,), a, b) for a, b in [(p, REPLICATE), (REPLICATE, p), (REPLICATE, PARTIAL)]
    )


def test_placements_read_well() -> None:
    assert str(Shard(1, Sequence((512, 4096)))) == "S(1: [512+4096])"
    assert str(Shard(0, Sequence((7,)), 2, 3)) == "S(0: 2*[7]*3)"
    assert [str(REPLICATE), str(PARTIAL)] == ["R", "P(sum)"]


@examples
@given(placed(), WORLDS)
def test_joined_shards_are_the_shards_of_what_is_joined(
    case: tuple[SIZE, Shard], world: int
) -> None:
    shape, p = case
    assume(p.whole_dim())
    x = label(shape)
    both = Shard(p.dim, Sequence(p.seq.lengths * 2))
    for r in range(world):
        local = torch.cat([shard_of(x, p, r, world)] * 2, p.dim)
        whole = cut(torch.cat([x, x], p.dim), both, r, world, padding=0)
        assert local.where(local != PADDING, 0).equal(whole)


# Sizes


def symbols(names: str) -> tuple[sympy.Symbol, ...]:
    return tuple(sympy.Symbol(n, integer=True, positive=True) for n in names.split())


S, T = symbols("s t")
SMALL = st.integers(1, 6)
TERMS = st.one_of(st.integers(-4, 8), st.sampled_from([S, T, S * T, S**2, S + T, 2 * S, 8 * T]))


@st.composite
def expressions(draw: st.DrawFn) -> sympy.Expr | int:
    """Sums, products and roundings-up of two symbols."""
    x = draw(TERMS)
    for _ in range(draw(st.integers(0, 3))):
        y = draw(TERMS)
        how = draw(st.integers(0, 2))
        x = x + y if how == 0 else x * y if how == 1 else ceil_div(x, draw(SMALL))
    return as_size(x)


def at(x: sympy.Expr | int, s: int, t: int) -> int:
    return int(sympy.sympify(x).subs({S: s, T: t}))


@examples
@given(expressions(), expressions(), SMALL, SMALL)
def test_divide_is_exact_for_every_value_of_the_symbols(
    a: object, b: object, s: int, t: int
) -> None:
    for x, y in [(a, b), (product([a, b]), b), (a, s)]:
        found = divide(x, y)
        if found is not None and at(y, s, t) != 0:
            assert at(found, s, t) * at(y, s, t) == at(x, s, t)
    if isinstance(b, int) and b:
        assert divide(product([a, b]), b) is not None


@examples
@given(st.integers(-50, 50), st.integers(-9, 9))
def test_divide_of_ints(a: int, b: int) -> None:
    assert divide(a, b) == (a // b if b and a % b == 0 else None)


@pytest.mark.parametrize(
    ("a", "b", "right"),
    [
        (S * T, S, T),
        (S * 6 + 4, 2, S * 3 + 2),
        (S**2 + S * T, S + T, S),
        (0, S, 0),
        (S + 2, 2, None),
        (2 * S + 2, 4, None),
        (S, 0, None),
        (3, S, None),
        (S * S + S, 2 * S, None),
        (8 * ceil_div(S, 8), 8, ceil_div(S, 8)),
        (8 * ceil_div(S, 8), ceil_div(S, 8), 8),
        (ceil_div(S, 8), 8, None),
    ],
)
def test_divide_of_expressions(a: object, b: object, right: object) -> None:
    found = divide(a, b)
    assert (found is None) if right is None else equal(found, right)


@examples
@given(expressions(), SMALL, SMALL, SMALL)
def test_ceil_div_rounds_up(a: object, b: int, s: int, t: int) -> None:
    assert at(ceil_div(a, b), s, t) == -(-at(a, s, t) // b)


@examples
@given(expressions(), expressions(), SMALL, SMALL)
def test_equal_is_right_for_every_value_of_the_symbols(
    a: object, b: object, s: int, t: int
) -> None:
    assert equal(a, a)
    assert equal(total([a, b]), total([b, a]))
    assert equal(product([a, b]), product([b, a]))
    if equal(a, b):
        assert at(a, s, t) == at(b, s, t)
    assert same_shape((a, b), (a, b))
    assert not same_shape((a,), (a, a))
    assert not equal(a, total([a, 1]))


def test_sizes_are_ints_where_they_can_be() -> None:
    assert type(as_size(sympy.Integer(3))) is int
    assert type(product([S, 0])) is int
    assert type(total([S, 3, -S])) is int
    assert (product([]), total([])) == (1, 0)
    assert as_shape([2, sympy.Integer(3), S]) == (2, 3, S)
