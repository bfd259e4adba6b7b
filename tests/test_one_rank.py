"""P = 1: the pipeline adds nothing to what the lowering alone gives."""

from __future__ import annotations

import pytest
import torch

from models import flux, flux_inputs


@pytest.mark.parametrize("target", ["inductor", "eager"])
def test_one_rank_is_bit_for_bit_the_lowering_alone(target: str) -> None:
    model, inputs = flux(1, 1, 3), flux_inputs(2, 33, 7)
    with torch.no_grad():
        ours = torch.compile(
            model, backend="ascend_sp", options={"target": target}, fullgraph=True, dynamic=False
        )(**inputs)[0]
        torch._dynamo.reset()
        alone = {"inductor": "inductor", "eager": "aot_eager"}[target]
        theirs = torch.compile(model, backend=alone, fullgraph=True, dynamic=False)(**inputs)[0]
    assert torch.equal(ours, theirs)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor([1.5, 2.5]) + torch.view_as_real(torch.view_as_complex(x) * 1j)


def test_a_tensor_that_the_model_itself_holds() -> None:
    x = torch.randn(3, 2)
    options = {"target": "inductor"}
    got = torch.compile(scaled, backend="ascend_sp", options=options, dynamic=False)(x)
    torch.testing.assert_close(got, scaled(x))


def test_sequence_parallel_off_needs_no_group() -> None:
    model, inputs = flux(1, 1, 3), flux_inputs(1, 16, 7)
    options = {"target": "eager", "sequence_parallel": False}
    with torch.no_grad():
        got = torch.compile(model, backend="ascend_sp", options=options)(**inputs)[0]
        assert torch.equal(got, model(**inputs)[0])


def test_backend_is_found_without_an_import() -> None:
    assert "ascend_sp" in torch._dynamo.list_backends()
