"""Split text encoders under torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ascend_sp
from encoders import LIMIT, MODELS, Block, Odd, inputs, off, outputs, seeded, wrapped
from processes import run, values


def compiled(rank: int, world: int, name: str, target: str, dump: str) -> dict:
    model = MODELS[name]()
    calls = [inputs(model, seed) for seed in (1, 2, 3)]
    want = [outputs(model, call) for call in calls]
    ascend_sp.parallelize_text_encoder(model)
    fast = torch.compile(model, backend="ascend_sp", options={"target": target, "dump_dir": dump})
    got = [outputs(fast, calls[0])]
    assert not torch._dynamo.utils.counters["stats"]  # the first call is the proof's, and eager
    got += [outputs(fast, call) for call in calls[1:2]]
    torch._dynamo.config.error_on_recompile = True
    got += [outputs(fast, call) for call in calls[2:]]
    counters = torch._dynamo.utils.counters
    return {
        "off": max(off(g, w) for g, w in zip(got, want, strict=True)),
        "left": wrapped(model),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


@pytest.mark.parametrize(
    ("name", "target"), [("t5", "eager"), pytest.param("clip", "inductor", marks=pytest.mark.slow)]
)
def test_compiled(name: str, target: str, tmp_path: Path) -> None:
    for got in values(run(compiled, 2, name, target, str(tmp_path), timeout=280)):
        assert got["off"] <= LIMIT and got["left"] == []
        assert (got["graphs"], got["breaks"]) == (1, 0)
    for rank in range(2):
        text = (tmp_path / "graph_0" / f"rank_{rank}" / "summary.md").read_text()
        assert "tensor-parallel already" in text
        # Two layers, each with an attention and a feed-forward, and the vocabulary; no all-to-all.
        assert "Collectives: 5 all-reduces;" in text


class Breaks(nn.Module):
    """Attention that Dynamo cuts in three; the middle holds a rank's heads, and no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        torch._dynamo.graph_break()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return self.o(y.transpose(1, 2).flatten(2))


def broken(rank: int, world: int) -> float:
    model = seeded(Block(Breaks()))
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    want = model(x)
    ascend_sp.parallelize_text_encoder(model)
    options = {"target": "eager", "on_unsharded": "error"}  # nobody wants these split
    fast = torch.compile(model, backend="ascend_sp", options=options)
    return off([fast(x), fast(x), fast(x)], [want] * 3)


@pytest.mark.slow
def test_graphs_between_graph_breaks_hold_other_heads_on_each_rank() -> None:
    assert max(values(run(broken, 2))) <= LIMIT


class Later(Block):
    """A tower that is only run when there is something to see."""

    def __init__(self) -> None:
        super().__init__(Odd())
        self.tower = Block(Odd(heads=6, kv_heads=2))

    def forward(self, x: Tensor, see: Tensor | None = None) -> Tensor:
        return super().forward(x) if see is None else super().forward(x + self.tower(see))


def later(rank: int, world: int) -> dict:
    model = seeded(Later())
    x, see = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    want = [model(x), model(x, see)]
    ascend_sp.parallelize_text_encoder(model)
    fast = torch.compile(model, backend="ascend_sp", options={"target": "eager"})
    breaks, left = [], []
    got = []
    for i in (0, 0, 1, 1, 1, 0):
        torch._dynamo.utils.counters.clear()
        got.append(off([fast(*(x, see)[: i + 1])], want[i : i + 1]))
        breaks.append(sum(torch._dynamo.utils.counters["graph_break"].values()))
        left.append(len(wrapped(model)))
    return {"off": max(got), "breaks": breaks, "left": left}


@pytest.mark.slow
def test_a_part_that_is_first_called_after_compiling() -> None:
    """Its proof breaks that call's graph; the graphs of later calls are whole."""
    for got in values(run(later, 2)):
        assert got["off"] <= LIMIT
        assert got["left"] == [2, 2, 0, 0, 0, 0]
        assert got["breaks"][2] > 0 and got["breaks"][3:] == [0, 0, 0] == [*got["breaks"][:2], 0]
