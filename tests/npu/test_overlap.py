"""ACL graphs on two ranks: what really overlaps, and that nothing runs before it may.

Streams and events are those that torch_npu and HCCL's process group gave to CANN while the graph
was captured; `cannsim.trace` says what they order.
"""

from __future__ import annotations

from typing import Any

import pytest
import simulated_npu
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Self-attention with norms on queries and keys, and an MLP beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(48, 48) for _ in range(4))
        self.norm = nn.RMSNorm(16)
        self.mlp = nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        y = self.out(y.transpose(1, 2).flatten(2))
        return torch.cat([y, F.gelu(self.mlp(x), approximate="tanh")], 2)


def captured(rank: int, world: int, skip: str, strategy: str = "separate") -> dict[str, Any]:
    import cannsim

    torch._dynamo.reset()
    cannsim.trace.forget()
    torch.manual_seed(0)
    model = Block().to(torch.bfloat16)
    x = torch.randn(1, 19, 48, dtype=torch.bfloat16)
    options = {"target": "npugraph_ex", "skip_passes": skip, "strategy": strategy}
    on_device = model.to("npu")
    compiled = torch.compile(on_device, backend="ascend_sp", options=options)
    got = [compiled((x + i).to("npu")).cpu() for i in range(3)]
    want = [on_device((x + i).to("npu")).cpu() for i in range(3)]
    (trace,) = cannsim.trace.captured_graphs()
    sent = trace.find("hccl.alltoall") or trace.find("hccl.allgather")
    attentions = trace.find("fused_infer_attention_score_v2.out")
    attention = attentions[-1]
    products = trace.find("mm")
    norms = trace.find("rms_norm")
    return {
        "error": max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)),
        "races": [(r.names, r.what) for r in trace.races()],
        "streams": len({trace.ops[i].stream for i in sent} | {trace.ops[attention].stream}),
        "order": [[trace.before(i, attention) for i in sent], len(sent)],
        # For each all-to-all: the matrix products and the norms that it may run beside.
        "beside products": [sum(trace.overlaps(i, j) for j in products) for i in sent],
        "beside norms": [sum(trace.overlaps(i, j) for j in norms) for i in sent],
        "attentions": len(attentions),
        "beside attention": [[trace.overlaps(i, j) for j in attentions] for i in sent],
        "text": str(trace),
    }


@pytest.fixture(scope="module")
def both() -> list[list[dict[str, Any]]]:
    return simulated_npu.run(captured_both, 2, timeout=200)


def captured_both(rank: int, world: int) -> list[dict[str, Any]]:
    return [
        captured(rank, world, "", "separate"),
        captured(rank, world, "schedule_collectives", "separate"),
        captured(rank, world, "", "pipelined:2"),
        captured(rank, world, "", "gather"),
    ]


def test_every_consumer_waits_for_what_travels(both: list) -> None:
    for rank in both:
        for found in rank[:3]:
            assert found["error"] <= 0.02
            assert found["races"] == [], found["text"]
            # All groups of Q, K and V are there before the last attention; what it yields leaves
            # after it, and what earlier ones yielded may still be under way.
            groups = found["attentions"]
            assert found["order"] == [[True] * 3 * groups + [False] * groups, 4 * groups]
            assert found["streams"] == 2  # collectives have a stream of their own


def test_values_travel_while_queries_are_projected(both: list) -> None:
    for ordered, *_ in both:
        # V goes first, beside the projections and norms of Q and K; then Q beside those of K, and
        # all of them beside the projection of the MLP.
        assert ordered["beside products"][:3] == [3, 2, 1], ordered["text"]
        assert ordered["beside norms"][:3] == [2, 1, 0]


def test_groups_of_heads_travel_while_others_attend(both: list) -> None:
    for *_, pipelined, _ in both:
        assert pipelined["attentions"] == 2
        for i, (first, second) in enumerate(pipelined["beside attention"][:6]):
            # What is sent last, the second group of keys, may travel beside the first attention:
            # the link is first in, first out, and the others were under way during projections.
            assert (first, second) == (i == 5, False), pipelined["text"]
        # So may what the first group yielded beside the second.
        assert pipelined["beside attention"][6:] == [[False, True], [False, False]]


def test_gathered_keys_travel_while_queries_are_projected(both: list) -> None:
    for *_, gathered in both:
        assert gathered["error"] <= 0.02
        assert gathered["races"] == [], gathered["text"]
        # Values, keys, and what the graph returns.
        assert gathered["order"] == [[True, True, False], 3]
        values, keys, _ = gathered["beside products"]
        assert values >= 2 and keys >= 1, gathered["text"]
        assert gathered["attentions"] == 1


def test_without_the_order_nothing_is_hidden(both: list) -> None:
    for _, unordered, *_ in both:
        assert unordered["beside products"][:3] == [0, 0, 0]
