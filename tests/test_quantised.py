"""Quantised linears run on shards, as others do, and to the same numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ascend_sp.graph.layout import PLACEMENTS, REPLICATE, Shard
from checks import collectives_of, error
from models import flux, flux_inputs
from processes import run, values
from quantised import quantise
from simulator import capture, simulate

aten = torch.ops.aten

# So exact that no activation is rounded to another integer because ranks add up in another order.
EXACT = torch.float64


def products(gm: fx.GraphModule) -> Counter:
    """How many integer products run on shards, and how many on whole tensors of several rows."""
    found: Counter = Counter()
    for node in gm.graph.find_nodes(op="call_function", target=aten._int_mm.default):
        (placement,) = node.meta[PLACEMENTS]
        if isinstance(placement, Shard):
            found["shards"] += 1
        else:  # vectors of modulation, which have one row for the whole picture
            assert placement == REPLICATE
            found["whole"] += node.meta["val"].shape[0] > 1
    return found


def compile_flux(rank: int, world: int) -> dict[str, Any]:
    """Dynamic 8 bits in every linear, by name of the backend."""
    model = quantise(flux(1, 1, 3, dtype=EXACT))
    found: Counter = Counter()

    def observer(name: str, gm: fx.GraphModule, _: object) -> None:
        if name == "materialise_sharding":
            found.update(products(gm))

    options = {"target": "eager", "strategy": "separate", "observer": observer}
    compiled = torch.compile(model, backend="ascend_sp", options=options, fullgraph=True)
    errors = []
    for seed in (1, 2):
        inputs = flux_inputs(1, 33, 7, dtype=EXACT, seed=seed)
        errors.append(error(compiled(**inputs)[0], model(**inputs)[0]))
    return {
        "errors": errors,
        "products": dict(found),
        "calls": collectives_of(lambda: compiled(**inputs)),
    }


@pytest.mark.slow
def test_dynamic_int8() -> None:
    linears = flux(1, 1, 3)
    # Embeddings of image and text; q, k, v, out and an MLP of two for each stream; q, k, v, MLP and
    # out of the single block; what leaves. The rest makes vectors of modulation.
    on_rows = 2 + 2 * (4 + 2) + 5 + 1
    assert sum(isinstance(m, nn.Linear) for m in linears.modules()) > on_rows
    for got in values(run(compile_flux, 2, timeout=120)):
        assert got["products"] == {"shards": on_rows, "whole": 0}
        assert max(got["errors"]) <= 2e-5
        assert got["calls"]["all_to_all_single"] == 4 * 2
        assert got["calls"]["all_gather_into_tensor"] == 1


class HigherOrder(nn.Module):
    """Attention behind a product as torchao writes it for devices that are no CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (12, 36), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        rows = (x / scale).round().to(torch.int8).flatten(0, 1)
        product = OUT_DTYPE(aten.mm.default, torch.int32, rows, self.weight)
        qkv = product.unflatten(0, x.shape[:2]) * scale * 1e-3
        q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(-1, (3, 2, 6)).unbind(2))
        return F.scaled_dot_product_attention(q, k, v)


OUT_DTYPE = torch.ops.higher_order.out_dtype


def test_a_product_in_another_type_is_plain_aten() -> None:
    model, x = HigherOrder(), torch.randn(1, 9, 12, dtype=EXACT)
    captured = capture(model, x)
    assert not captured.gm.graph.find_nodes(op="call_function", target=OUT_DTYPE)
    outputs, _, ctx, network = simulate(captured, 3)
    assert max(error(out[0], model(x)) for out in outputs) <= 1e-6
    assert network.calls == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert not [n for n in ctx.notes if "no sharding rule" in n.text or "is not an ATen" in n.text]
