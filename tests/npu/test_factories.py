"""Graphs with symbolic sizes compile whatever makes a tensor of a size, and hold what it makes."""

from __future__ import annotations

import simulated_npu
import torch
from torch import Tensor

LENGTHS = (5, 9, 12)


def made(x: Tensor) -> list[Tensor]:
    n, own = x.shape[0], {"device": x.device}
    row = torch.zeros(1, 2, dtype=torch.long, **own)  # of no size, and then repeated by one
    return [
        torch.zeros(n, dtype=torch.bool, **own),
        torch.ones([n, 2], **own),
        torch.full([2, n], 0.5, **own),
        torch.arange(n, **own),
        torch.arange(2, n, dtype=torch.int32, **own),
        torch.arange(1, 2 * n, 2, dtype=torch.float32, **own),
        row.repeat(n, 1) + torch.scalar_tensor(3, dtype=torch.long, **own),
    ]


def serve(rank: int, world: int, target: str) -> int:
    import warnings

    from torch._dynamo.utils import counters

    import ascend_sp  # noqa: F401

    options = {"target": target}
    compiled = torch.compile(made, backend="ascend_sp", options=options, dynamic=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
        for n in LENGTHS:
            x = torch.randn(n)
            for got, want in zip(compiled(x.to("npu")), made(x), strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got.cpu(), want)
    return counters["ascend_sp"]["graphs"]


def test_made_of_sizes() -> None:
    assert simulated_npu.run(serve, 1, "npugraph_ex", grouped=False) == [1]
