"""Attention over ``[batch * heads, rows, width]``, as models without a dim for heads call it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ascend_sp.runtime.ops import attention
from checks import worst
from simulator import capture, dynamo_graph, simulate

DIM, HEADS, BATCH, ROWS = 24, 3, 2, 13
N = BATCH * HEADS
MASKS = {
    "no mask": None,
    "for all heads": torch.rand(ROWS, ROWS) > 0.3,
    "for each head": torch.randn(N, ROWS, ROWS),
    "for each key": (torch.arange(ROWS) < 9).expand(N, 1, ROWS),
    "for one head": torch.rand(1, ROWS, ROWS) > 0.3,
}
for mask in ("for all heads", "for one head"):
    MASKS[mask][..., 0] = True


class Merged(nn.Module):
    def __init__(self, mask: Tensor | None, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mask, self.causal = mask, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (HEADS, -1)).transpose(1, 2).flatten(0, 1)
            for t in self.qkv(x).chunk(3, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal)
        return self.out(y.unflatten(0, (BATCH, HEADS)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("which", [*MASKS, "causal"])
def test_it_is_split_over_batch_and_heads(which: str, size: int) -> None:
    torch.manual_seed(0)
    model = Merged(MASKS.get(which), which == "causal").eval()
    x = torch.randn(BATCH, ROWS, DIM)
    with torch.no_grad():
        want = model(x)
    outputs, _, ctx, network = simulate(capture(model, x, ranks=size), size)
    assert worst(outputs, want) <= 1e-5
    assert network.calls["all_to_all_single"] == 4
    assert not any(n.kind == "unsharded" for n in ctx.notes)


def test_one_rank_has_the_call_of_the_model() -> None:
    model, x = Merged(None).eval(), torch.randn(BATCH, ROWS, DIM)
    gm, out = dynamo_graph(model, x)
    with torch.no_grad():
        assert torch.equal(out, model(x))
    (node,) = gm.graph.find_nodes(op="call_function", target=attention)
    assert node.args[0].meta["example_value"].dim() == 3
