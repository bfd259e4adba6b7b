"""Windows: which rows a rank has, where they come from, and the exchange that brings them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from ascend_sp.graph.emitter import Emitter
from ascend_sp.graph.layout import Padded, Sequence, Shard, Window
from ascend_sp.graph.windows import exchange, valid_rows
from ascend_sp.passes.sharding import halo
from ascend_sp.runtime.topology import Topology
from brute_force import cut, positions
from simulator import run_ranks

MODES = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}


@st.composite
def homes(draw: st.DrawFn) -> tuple[Shard | Padded | None, int, int]:
    """How a dim may lie, the size of the picture in it, and of all of it."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    inner = draw(st.integers(1, 3))
    split = Shard(2, Sequence(tuple(lengths)), 1, inner)
    n = sum(lengths) * inner
    if draw(st.booleans()):
        return draw(st.sampled_from([split, None])), n, n
    mode = draw(st.sampled_from(list(MODES)))
    most = n - 1 if mode == "reflect" else 4
    before, after = (draw(st.integers(0, min(4, most))) for _ in range(2))
    value = draw(st.sampled_from([0.0, -2.5])) if mode == "constant" else 0.0
    return Padded(split, before, after, mode, value), n, before + n + after


@st.composite
def windows(draw: st.DrawFn) -> Window:
    step, start, count = (draw(st.integers(*b)) for b in ((0, 12), (-6, 6), (1, 14)))
    return Window(2, step, start, count, draw(st.sampled_from([0.0, 7.0])))


def picture(x: Tensor, home: Shard | Padded | None) -> Tensor:
    """All of it, with the rows around it."""
    if not isinstance(home, Padded):
        return x
    value = {"value": home.value} if home.mode == "constant" else {}
    return F.pad(x, [0, 0, home.before, home.after], mode=home.mode, **value)


def wanted(whole: Tensor, want: Window, rank: int) -> Tensor:
    """What the definition of a window says."""
    rows = [
        whole[:, :, r] if 0 <= r < whole.shape[2] else torch.full_like(whole[:, :, 0], want.value)
        for r in want.rows(rank)
    ]
    return torch.stack(rows, 2)


def program(x: Tensor, home: Any, want: Window, size: int, t: Topology) -> fx.GraphModule:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch._subclasses.FakeTensorMode().from_tensor(x)
    out = graph.output(node)
    gm = fx.GraphModule({}, graph)
    emit = Emitter(gm, "test")
    with emit.at(out):
        found, rows = halo.window(emit, node, home, want, size, t)
    assert rows == exchange(want, home, size, t.size).rows
    out.args = ((found,),)
    gm.recompile()
    return gm


@settings(max_examples=60)
@given(home=homes(), want=windows(), world=st.integers(1, 5), data=st.data())
def test_every_rank_gets_the_rows_of_its_window(
    home: Any, want: Window, world: int, data: st.DataObject
) -> None:
    home, n, size = home
    x = torch.randn(2, 3, n, 2)
    whole = picture(x, home)
    assert whole.shape[2] == size
    split = home.split if isinstance(home, Padded) else home
    topology = [Topology(r, world, "simulated", tuple(range(world))) for r in range(world)]
    shards = [x if split is None else cut(x, split, r, world) for r in range(world)]
    programs = [program(shards[r], home, want, size, topology[r]) for r in range(world)]
    sends = {sum(exchange(want, home, size, world).blocks(r)) for r in range(world)}
    assert len(sends) == 1, "ranks send unequally much"
    if world == 1:
        outputs = [programs[0](shards[0])]
    else:
        outputs, network = run_ranks(programs, lambda r: [shards[r]])
        assert sum(network.calls.values()) <= 1
        assert bool(network.calls) == (sends != {0})
    for rank in range(world):
        torch.testing.assert_close(outputs[rank][0], wanted(whole, want, rank), rtol=0, atol=0)


@settings(max_examples=60)
@given(home=homes(), world=st.integers(1, 5))
def test_rows_that_are_no_padding(home: Any, world: int) -> None:
    split = home[0].split if isinstance(home[0], Padded) else home[0]
    if split is None:
        return
    for rank in range(world):
        real = [i for i, g in enumerate(positions(split, rank, world)) if g >= 0]
        assert [i for a, n in valid_rows(split, rank, world) for i in range(a, a + n)] == real


def test_a_convolution_asks_its_neighbours_only() -> None:
    """One row to each of them."""
    home = Shard(2, Sequence((16,)), 1, 1)
    for world, blocks in ((2, [0, 1]), (4, [0, 1, 0, 1])):
        rows = 16 // world
        plan = exchange(Window(2, rows, -1, rows + 2), home, 16, world)
        assert plan.blocks(0) == blocks
    few = exchange(Window(2, 1, -2, 5), Shard(2, Sequence((5,))), 5, 5)
    assert few.blocks(0) == [0, 1, 1, 1, 1], "more ranks: rows of further ones, too"
