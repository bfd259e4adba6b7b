"""Sizes that the data decides: users who want one graph have Dynamo capture them as symbols.

`torch._dynamo.config.capture_dynamic_output_shape_ops` and `capture_scalar_outputs`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ascend_sp  # noqa: F401
from ascend_sp.graph.context import PassContext
from checks import worst
from processes import run, values
from simulator import Network, capture, simulate
from toy import Attention

DIM, HEADS, IMAGE, TEXT = 24, 3, 17, 9
CAPTURE = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}


@pytest.fixture(autouse=True)
def captured_whole() -> Iterator[None]:
    with torch._dynamo.config.patch(**CAPTURE):
        yield


class Block(nn.Module):
    """An attention over the image, and one that sees the valid tokens of the text."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.first, self.second = Attention(DIM, HEADS), Attention(DIM, HEADS)
        self.mlp = nn.Linear(DIM, DIM)
        self.register = nn.Parameter(torch.randn(2, 1, DIM))
        self.joint = joint

    def forward(self, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        image = image + self.first(image)
        if self.joint:
            # The same mask twice has the same size; what the slice has is known by the sum only.
            text = text[:, valid] + valid[valid][:, None]
            image = image + self.second(torch.cat([image, text], 1))[:, : -text.shape[1]]
        else:
            text = text[:, valid.nonzero().flatten()]
            # PyTorch does not trace an attention that might have no key at all.
            image = image + self.second(image, torch.cat([self.register, text], 1))
        return self.mlp(image)


class Scaled(nn.Module):
    """A number leaves the tensors and comes back as a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(DIM, HEADS)

    def forward(self, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        return self.attention(image) * valid.sum().item()


def inputs(valid: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(TEXT) < valid
    return torch.randn(2, IMAGE, DIM), torch.randn(2, TEXT, DIM), mask


def on_ranks(model: nn.Module, ranks: int) -> tuple[Network, PassContext]:
    with torch.no_grad():
        want = model(*inputs())
    captured = capture(model, *inputs(), ranks=ranks)
    assert captured.graphs == 1
    outputs, _, ctx, network = simulate(captured, ranks)
    assert worst(outputs, want) <= 1e-5
    return network, ctx


@pytest.mark.parametrize("ranks", [2, 4])
def test_keys_of_any_number_need_no_communication(ranks: int) -> None:
    torch.manual_seed(0)
    network, ctx = on_ranks(Block(joint=False).eval(), ranks)
    assert network.calls == {"all_to_all_single": 4, "all_gather_into_tensor": 1}
    assert not any(n.kind == "unsharded" for n in ctx.notes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_queries_of_unknown_number_run_whole_and_are_told(ranks: int) -> None:
    torch.manual_seed(0)
    network, ctx = on_ranks(Block(joint=True).eval(), ranks)
    assert network.calls["all_to_all_single"] == 4
    (note,) = [n for n in ctx.notes if n.kind == "unsharded" and "whole on every" in n.text]
    assert "one of its sizes is known only when the program runs" in note.text


def test_one_rank() -> None:
    on_ranks(Block(joint=True).eval(), 1)


def test_a_number_from_the_data() -> None:
    network, _ = on_ranks(Scaled().eval(), 3)
    assert network.calls["all_to_all_single"] == 4


def whole_compile(rank: int, world: int, joint: bool, target: str) -> list[float]:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    torch.manual_seed(0)
    model = Block(joint).eval()
    compiled = torch.compile(model, backend="ascend_sp", fullgraph=True, options={"target": target})
    return [(compiled(*inputs(n)) - model(*inputs(n))).abs().max().item() for n in (5, 1, TEXT, 2)]


@pytest.mark.parametrize(
    ("joint", "target"), [pytest.param(True, "inductor", marks=pytest.mark.slow), (False, "eager")]
)
def test_real_ranks_and_other_numbers_with_the_same_program(joint: bool, target: str) -> None:
    for errors in values(run(whole_compile, 2, joint, target)):
        assert max(errors) <= 1e-5
