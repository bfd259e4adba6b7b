"""A split is proved on numbers before it is used, and a wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ascend_sp
from ascend_sp.text_encoder.structure import Structure
from encoders import LIMIT, MODELS, Block, Odd, inputs, off, outputs, seeded, wrapped
from processes import errors, run, values


class Sides(nn.Module):
    """Two Linears with the shapes of a pair, of which none feeds the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


ODD: dict[str, Callable[[], nn.Module]] = {
    "right": lambda: Odd(),
    "groups": lambda: Odd(heads=6, kv_heads=2),
    "order of a fused projection": lambda: Odd("h3d"),
    "order of the groups": lambda: Odd("turns", heads=6, kv_heads=2),
    "a norm between": lambda: nn.Sequential(
        nn.Linear(16, 20), nn.LayerNorm(20, elementwise_affine=False), nn.Linear(20, 16)
    ),
    "side by side": lambda: Sides(),
}


def odd_module(name: str, exclude: tuple[str, ...] = (), tokens: int = 7) -> Any:
    """(error, modules that wait for their proof), or what was raised."""
    model = seeded(Block(ODD[name]()))
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(3))
    want = model(x)
    ascend_sp.parallelize_text_encoder(model, exclude=exclude)
    try:
        return off([model(x), model(x)], [want, want]), wrapped(model)
    except ascend_sp.TextEncoderError as e:
        return str(e)


def odd_modules(rank: int, world: int) -> dict[str, Any]:
    return {
        **{name: odd_module(name) for name in ODD},
        "excluded": odd_module("order of the groups", ("inner",)),
        "one token": odd_module("right", tokens=1),
    }


def test_the_proof() -> None:
    for got in values(run(odd_modules, 2)):
        for name in ("right", "groups", "excluded"):
            assert got[name][0] <= LIMIT and got[name][1] == [], name
        for name in ODD.keys() - {"right", "groups"}:
            assert got[name].startswith("inner (") and "which is wrong" in got[name], got[name]
            assert "exclude=['inner']" in got[name]
        # A wrong order does not show in one token, so the proof waits for more.
        assert got["one token"][1] == ["", "inner"]


def wrong(rank: int, world: int) -> None:
    """Not our finder's fault for once: its answer is spoiled before it is used."""
    true = Structure.shares

    def turned(self: Structure, ranks: int) -> dict:
        shares = true(self, ranks)
        if "kv" in shares:
            query = shares["query"]
            units = [u for r in query.ranks for u in r]
            units = units[1:] + units[:1]
            parts = tuple(tuple(units[i :: query.local]) for i in range(ranks))
            parts = tuple(
                tuple(units[r * query.local : (r + 1) * query.local]) for r in range(ranks)
            )
            shares["query"] = type(query)(query.total, parts)
        return shares

    Structure.shares = turned  # type: ignore[method-assign]
    model = MODELS["qwen3"](heads=4, kv_heads=2)
    ascend_sp.parallelize_text_encoder(model)
    outputs(model, inputs(model))


def test_a_wrong_grouping_is_refused() -> None:
    for text in errors(run(wrong, 2)):
        assert "TextEncoderError: layers.0.self_attn (Qwen3Attention)" in text
        assert "exclude=['layers.0.self_attn']" in text and "limit 0.003" in text
