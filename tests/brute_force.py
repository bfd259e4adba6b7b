"""Brute force against a sharding rule: run an op whole, run it on every rank's shards, compare.

Nothing here uses the library's idea of a shard: `positions` says from the definition which
elements a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ascend_sp.graph.layout import (
    PARTIAL,
    REPLICATE,
    Padded,
    Placement,
    Replicate,
    Shard,
    Window,
    local_shape,
)
from ascend_sp.passes.sharding.rules import Answer, Call, Local, Operand, Reshard, Unsupported
from ascend_sp.passes.sharding.rules import answer as ask
from ascend_sp.runtime.ops import split_attention, split_group_norm

NAN = float("nan")
UNINITIALISED = {torch.ops.aten.empty_like.default}


@dataclass(frozen=True)
class Placed:
    """A real, whole tensor argument, and the placement that the rule is told it has."""

    tensor: Tensor
    placement: Placement = REPLICATE


@lru_cache(10_000)
def positions(split: Shard, rank: int, world: int) -> list[int]:
    """Which position of the whole dim each local position of `rank` holds; -1 is padding."""
    rows: list[int] = []
    start = 0
    for length in split.seq.lengths:
        chunk = -(-length // world)
        mine = range(rank * chunk, (rank + 1) * chunk)
        rows += [start + i if i < length else -1 for i in mine]
        start += length
    return [
        (o * start + row) * split.inner + i if row >= 0 else -1
        for o in range(split.outer)
        for row in rows
        for i in range(split.inner)
    ]


def cut(x: Tensor, placement: Placement, rank: int, world: int, padding: float = NAN) -> Tensor:
    """The part of `x` that `rank` holds, with `padding` (or some other garbage) as padding."""
    if isinstance(placement, Window):
        n, d = x.shape[placement.dim], placement.dim
        inside = torch.tensor([0 <= r < n for r in placement.rows(rank)])
        rows = torch.tensor([min(max(r, 0), n - 1) for r in placement.rows(rank)])
        outside = (~inside).nonzero().flatten()
        return x.index_select(d, rows).index_fill(d, outside, placement.value)
    if isinstance(placement, Padded):
        inner = x.shape[placement.dim] - placement.before - placement.after
        x, placement = x.narrow(placement.dim, placement.before, inner), placement.split
    if not isinstance(placement, Shard):
        return x
    index = torch.tensor(positions(placement, rank, world), dtype=torch.long)
    out = x.index_select(placement.dim, index.clamp(min=0))
    if not (x.is_floating_point() or x.is_complex()) and padding != 0:
        padding = 1 if x.dtype == torch.bool else max(-(10**6), torch.iinfo(x.dtype).min)
    elif x.is_floating_point():
        padding = max(padding, torch.finfo(x.dtype).min)
    return out.index_fill(placement.dim, (index < 0).nonzero().flatten(), padding)


def real_rows(x: Tensor, placement: Placement, rank: int, world: int) -> Tensor:
    """`x`, local to `rank`, without its padding."""
    if isinstance(placement, Padded):
        placement = placement.split
    if not isinstance(placement, Shard):
        return x
    index = torch.tensor(positions(placement, rank, world), dtype=torch.long)
    return x.index_select(placement.dim, (index >= 0).nonzero().flatten())


def fits(shape: tuple[int, ...], placement: Placement) -> bool:
    """Whether a tensor of `shape` can lie as `placement` says."""
    if isinstance(placement, Window):
        return 0 <= placement.dim < len(shape) and placement.count > 0
    around = 0
    if isinstance(placement, Padded):
        around, placement = placement.before + placement.after, placement.split
    if not isinstance(placement, Shard):
        return True
    size = placement.outer * sum(placement.seq.lengths) * placement.inner
    return 0 <= placement.dim < len(shape) and shape[placement.dim] == size + around


def question(op: Any, args: tuple, kwargs: dict, world: int, outputs: list[Tensor]) -> Call:
    """The `Call` of ``op(*args, **kwargs)``, numbered as `plan.call_of` does."""
    count = iter(range(1000))

    def operand(x: Any) -> Any:
        if not isinstance(x, Placed):
            return x
        assert fits(tuple(x.tensor.shape), x.placement), "the case itself is wrong"
        return Operand(tuple(x.tensor.shape), x.placement, next(count))

    new_args, new_kwargs = pytree.tree_map(operand, (args, kwargs))
    return Call(op, new_args, new_kwargs, tuple(tuple(t.shape) for t in outputs), world)


def tensors_of(value: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever fails inside is an AssertionError that says of what."""
    try:
        yield
    except Exception as e:
        raise AssertionError(f"{what}: {e}") from e


def check(
    op: Any,
    args: tuple,
    kwargs: dict | None = None,
    *,
    world: int,
    padding: float = NAN,
    rule: Callable[[Call], Answer] = ask,
) -> Answer:
    """Prove the rule's answer about one call, for every rank. AssertionError if it is wrong."""
    kwargs = kwargs or {}
    placed = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Placed)]
    whole_args, whole_kwargs = pytree.tree_map(
        lambda x: x.tensor if isinstance(x, Placed) else x, (args, kwargs)
    )
    whole = tensors_of(op(*whole_args, **whole_kwargs))
    found = rule(question(op, args, kwargs, world, whole))
    if isinstance(found, Reshard | Unsupported):
        assert found.reason.strip()
        return found
    assert isinstance(found, Local)
    lies, needs, yields = (
        ", ".join(map(str, p)) for p in ([x.placement for x in placed], found.inputs, found.outputs)
    )
    with told(f"{op} on ({lies}), {world} ranks: Local ({needs}) -> ({yields})"):
        _check_form(found, placed, whole, world)
        if found.op is split_attention:
            _check_split_attention(found)
        elif found.op is split_group_norm:
            _check_split_group_norm(found)
        else:
            _check_ranks(op, args, kwargs, found, placed, whole, world, padding)
    return found


def _check_ranks(
    op: Any,
    args: tuple,
    kwargs: dict,
    found: Local,
    placed: list[Placed],
    whole: list[Tensor],
    world: int,
    padding: float,
) -> None:
    sums: list[list[Tensor]] = [[] for _ in whole]
    for rank in range(world):
        fill = 0.0 if found.mask_padding else padding
        shards = iter(
            cut(x.tensor, want, rank, world, fill)
            for x, want in zip(placed, found.inputs, strict=True)
        )
        with told(f"rank {rank}"):
            local = tensors_of(_run_local(found.op or op, args, kwargs, found, shards))
            _check_rank(op, whole, local, found, rank, world, sums)
    for x, terms in zip(whole, sums, strict=True):
        if terms:
            torch.testing.assert_close(sum(terms), x, equal_nan=True)


def _check_form(found: Local, placed: list[Placed], whole: list[Tensor], world: int) -> None:
    assert len(found.inputs) == len(placed), f"{len(placed)} tensors are given"
    assert len(found.outputs) == len(whole), f"there are {len(whole)} results"
    for x, want in zip(placed, found.inputs, strict=True):
        assert isinstance(want, Replicate | Shard | Window), (
            "nobody can be asked for a partial operand"
        )
        assert fits(tuple(x.tensor.shape), want), f"{list(x.tensor.shape)} cannot lie as {want}"
        if found.mask_padding and isinstance(want, Shard) and want.seq.padded(world):
            assert want.whole_dim(), "redistribute.zero_padding does not know merged dims"
    for x, out in zip(whole, found.outputs, strict=True):
        assert fits(tuple(x.shape), out), f"{list(x.shape)} cannot lie as {out}"


def _check_split_attention(found: Local) -> None:
    """It stands for communication: q, k and v split along dim 2, and the mask whole."""
    q, k, v, *mask = found.inputs
    assert isinstance(q, Shard)
    assert isinstance(k, Shard)
    assert k == v
    assert all(p.dim == 2 and p.whole_dim() for p in (q, k))
    assert all(p == REPLICATE for p in mask)
    assert found.outputs == (q,)


def _check_split_group_norm(found: Local) -> None:
    """It stands for communication: `tests/test_pictures.py` runs it."""
    x, *affine = found.inputs
    assert isinstance(x, Shard)
    assert x.dim >= 2
    assert x.outer == 1
    assert all(p == REPLICATE for p in affine)
    assert found.outputs == (x, REPLICATE, REPLICATE)


def _run_local(op: Any, args: tuple, kwargs: dict, found: Local, shards: Any) -> Any:
    new_args, new_kwargs = pytree.tree_map(
        lambda x: next(shards) if isinstance(x, Placed) else x, (args, kwargs)
    )
    local_args, local_kwargs = list(new_args), dict(new_kwargs)
    schema = op._schema.arguments
    # As Materialiser._localise_arguments does.
    for position, value in sorted(found.args.items()):
        while len(local_args) < position:
            a = schema[len(local_args)]
            local_args.append(local_kwargs.pop(a.name, a.default_value))
        local_kwargs.pop(schema[position].name, None)
        local_args[position : position + 1] = [value]
    return op(*local_args, **local_kwargs)


def _check_rank(
    op: Any,
    whole: list[Tensor],
    local: list[Tensor],
    found: Local,
    rank: int,
    world: int,
    sums: list[list[Tensor]],
) -> None:
    assert len(local) == len(whole)
    for x, part, out, terms in zip(whole, local, found.outputs, sums, strict=True):
        assert tuple(part.shape) == local_shape(tuple(x.shape), out, world), "local shape"
        assert part.dtype == x.dtype
        if out == PARTIAL:
            terms.append(part)
        elif op not in UNINITIALISED:
            mine, right = (
                real_rows(part, out, rank, world),
                real_rows(cut(x, out, rank, world), out, rank, world),
            )
            if not torch.equal(mine, right):
                torch.testing.assert_close(mine, right, equal_nan=True)
