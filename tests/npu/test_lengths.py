"""Lengths stay symbols on NPUs: one program for all, in both graph modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import simulated_npu
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTHS = (7, 9, 12, 5, 17, 33, 40, 64)


def attend(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q = x.unflatten(-1, (2, 16)).transpose(1, 2)
    return (
        F.scaled_dot_product_attention(q, q, q, mask, is_causal=causal).transpose(1, 2).flatten(2)
    )


def graphs_for(
    lengths: tuple[int, ...],
    grad: Callable[[], AbstractContextManager[Any]] = torch.no_grad,
    mask: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    causal: bool = False,
    dynamic: bool | None = True,
) -> list[int]:
    """How many graphs Dynamo has made of `attend` after each of `lengths`."""
    import ascend_sp  # noqa: F401

    torch._dynamo.reset()
    made = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made.append(gm)
        return gm.forward

    compiled = torch.compile(attend, backend=backend, dynamic=dynamic)
    found = []
    with grad():
        for n in lengths:
            hides = None if mask is None else torch.ones(1, 1, n, n).to("npu", mask)
            compiled(torch.randn(1, n, 32).to("npu", dtype), hides, causal)
            found.append(len(made))
    return found


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"grad": torch.inference_mode},
        {"mask": torch.bool},
        {"mask": torch.float32},
        {"causal": True},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_dynamo_keeps_the_length_of_attention_a_symbol(case: dict[str, Any]) -> None:
    assert graphs_for((5, 7, 9, 11), **case) == [1, 1, 1, 1]


def test_automatic_dynamic_sizes_need_one_recompile() -> None:
    assert graphs_for((5, 7, 9, 11), dynamic=None) == [1, 2, 2, 2]


def test_another_backend_has_torch_npus_own_attention() -> None:
    """What AOTAutograd records is what it was: the kernel that torch_npu chooses."""
    from torch._dynamo.backends.common import aot_autograd

    import ascend_sp  # noqa: F401

    torch._dynamo.reset()
    found: list[str] = []

    def record(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=record), dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(1, 5, 32).to("npu", torch.bfloat16), None, False)
    assert any("npu_fusion_attention" in name for name in found)


class Joint(nn.Module):
    """Text and image in one sequence, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([text, image], 1)
        for linear in self.qkv:
            q, k, v = linear(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x[:, text.shape[1] :]


def serve(rank: int, world: int, target: str) -> tuple[list[int], int, float]:
    """Programs after each length, captures of the last, and the worst error."""
    import warnings

    import cannsim
    from torch._dynamo.utils import counters

    import ascend_sp  # noqa: F401

    torch.manual_seed(0)
    model = Joint().to("npu")
    options = {"target": target, "strategy": "separate", "buckets": False}
    compiled = torch.compile(model, backend="ascend_sp", options=options, dynamic=True)
    image = torch.randn(1, 10, 32).to("npu")
    made, worst = [], 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
        for n in LENGTHS:
            text = torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)).to("npu")
            got, want = compiled(text, image), model(text, image)
            worst = max(worst, (got.cpu() - want.cpu()).abs().max().item())
            made.append(counters["ascend_sp"]["graphs"])
    return made, len(cannsim.trace.captured_graphs()), worst


@pytest.mark.slow
@pytest.mark.parametrize("target", ["npugraph_ex", "torchair"])
def test_programs_serve_all_lengths(target: str) -> None:
    for made, captured, worst in simulated_npu.run(serve, 2, target, timeout=300):
        # npugraph_ex has one for lengths with padding, and one for those without.
        assert made[-1] == (2 if target == "npugraph_ex" else 1)
        assert captured == (len(LENGTHS) if target == "npugraph_ex" else 0)
        assert worst < 1e-5
