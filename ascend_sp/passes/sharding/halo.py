"""Rows of neighbours: what brings a value to the `Window` of it that an op reads.

One all-to-all, in which a rank sends only to those who need rows of it, and equally much on every
rank (`graph/windows.py`). Rows that nobody holds, around a picture, are put in; padding rows of
shards never travel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ascend_sp.graph import collectives
from ascend_sp.graph.emitter import Emitter, as_shape_of
from ascend_sp.graph.layout import Padded, Sequence, Shard, Window
from ascend_sp.graph.sizes import Size, product
from ascend_sp.graph.windows import Exchange, Piece, exchange, pieces, runs
from ascend_sp.runtime.topology import Topology

aten = torch.ops.aten


def window(
    e: Emitter, x: fx.Node, home: Shard | Padded | None, want: Window, size: int, t: Topology
) -> tuple[fx.Node, int]:
    """The rows of this rank, and how many rows each rank sends for that.

    Args:
        e: makes the nodes.
        x: what this rank holds.
        home: how the value lies; None if `x` is the whole of it.
        want: the rows that each rank is to have.
        size: global size of dim ``want.dim``.
        t: the ranks.
    """
    plan = exchange(want, home, size, t.size)
    blocks = _travel(e, x, want.dim, plan, t) if plan.rows else {}
    parts = pieces(want, home, size, t.rank, t.size)
    return _assemble(e, x, want.dim, parts, blocks, plan, t.rank), plan.rows


def with_margin(e: Emitter, whole: fx.Node, home: Padded, size: Size) -> fx.Node:
    """The whole picture with the rows around it, `size` rows together."""
    assert isinstance(size, int)
    everything = Window(home.dim, 0, 0, size)
    alone = replace(home, split=Shard(home.dim, Sequence((size - home.before - home.after,))))
    parts = pieces(everything, alone, size, 0, 1)
    return _assemble(e, whole, home.dim, parts, {}, Exchange(()), 0)


def _travel(e: Emitter, x: fx.Node, dim: int, plan: Exchange, t: Topology) -> dict[int, fx.Node]:
    """The blocks of rows that the other ranks sent, by rank."""
    shape = as_shape_of(x)
    row = product([*shape[:dim], *shape[dim + 1 :]])
    assert isinstance(row, int)
    sent = [
        _block(e, x, dim, plan.needed[to][t.rank], rows) if rows else None
        for to, rows in enumerate(plan.blocks(t.rank))
    ]
    came = [plan.block(source, t.rank) for source in range(t.size)]
    started = collectives.send_blocks(e, sent, [rows * row for rows in came], t)
    flat = collectives.wait(e, started)
    out: dict[int, fx.Node] = {}
    start = 0
    for source, rows in enumerate(came):
        if rows:
            part = e.narrow(flat, 0, start, start + rows * row)
            out[source] = e.view(part, (*shape[:dim], rows, *shape[dim + 1 :]))
            start += rows * row
    return out


def _block(e: Emitter, x: fx.Node, dim: int, rows: tuple[int, ...], count: int) -> fx.Node:
    """`count` rows of `x`, of which the first are `rows`; the others are for nobody."""
    held = as_shape_of(x)[dim]
    assert isinstance(held, int)
    if not rows:
        rows = tuple(range(min(count, held)))
    parts = [e.narrow(x, dim, start, start + n) for start, n in runs(rows)]
    return e.pad_end(e.cat(parts, dim), dim, count - len(rows))


def _assemble(
    e: Emitter,
    x: fx.Node,
    dim: int,
    parts: list[Piece],
    blocks: dict[int, fx.Node],
    plan: Exchange,
    rank: int,
) -> fx.Node:
    """The window, out of own rows, those that came, and rows of constants.

    Every rank's window depends on the exchange, or on `x`, even if nothing of that is in it: ranks
    order their collectives by what needs them, and all must come to the same order.
    """
    out: list[fx.Node] = []
    for p in parts:
        if p.rank is None:
            out.append(_constant(e, x, dim, p.count, p.value))
        elif p.rank == rank:
            out.append(e.narrow(x, dim, p.start, p.start + p.count))
        else:
            at = plan.needed[rank][p.rank].index(p.start)
            out.append(e.narrow(blocks[p.rank], dim, at, at + p.count))
    source = next(iter(blocks.values()), x)
    if any(p.rank is not None and (p.rank != rank or not blocks) for p in parts):
        return e.cat(out, dim)
    unused = e.narrow(source, dim, 0, 1)
    return e.narrow(e.cat([*out, unused], dim), dim, 0, sum(p.count for p in parts))


def _constant(e: Emitter, x: fx.Node, dim: int, count: int, value: float) -> fx.Node:
    shape: list[Size] = list(as_shape_of(x))
    shape[dim] = count
    val = x.meta["val"]
    return e.call(aten.full.default, shape, value, dtype=val.dtype, device=val.device)
