"""Code that Dynamo gives up is told of, on every rank, and is an error on demand."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ascend_sp.runtime import unsplit
from processes import run, values
from toy import SelfAttention

LIMIT = 2


def call(model: Any, lengths: list[int], **options: Any) -> tuple[list[str], float]:
    """What a compiled model warns of over `lengths`, or raises last; its worst error."""
    torch._dynamo.reset()
    unsplit.forget()
    compiled = torch.compile(
        model, backend="ascend_sp", options={"target": "eager"} | options, dynamic=False
    )
    told, worst = [], 0.0
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for n in lengths:
            x = torch.randn(1, n, 12, generator=torch.Generator().manual_seed(n))
            try:
                worst = max(worst, (compiled(x) - model(x)).abs().max().item())
            except RuntimeError as e:  # what the backend raises, PyTorch puts into its own
                told.append(f"{type(e).__name__}: {e}")
        told = [str(w.message) for w in caught if "ascend_sp: " in str(w.message)] + told
    return told, worst


def pass_the_limit(rank: int, _: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = SelfAttention(12, 3).eval()
    out: dict[str, Any] = {}
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        out["warned"] = call(model, [5, 7, 9, 11, 5])
        out["error"] = call(model, [5, 7, 9], on_unsharded="error")
    start = time.monotonic()
    with torch._dynamo.config.patch(recompile_limit=LIMIT + (rank == 0)):
        out["parted"] = call(model, [5, 7, 9], check_timeout=50)
    out["waited"] = time.monotonic() - start
    return out


def test_every_rank_is_told_once_and_ranks_that_part_do_not_hang() -> None:
    for found in values(run(pass_the_limit, 2, timeout=110)):
        (text,), worst = found["warned"]
        assert worst < 1e-5
        assert "x: [1, 5, 12], [1, 7, 12]; now [1, 9, 12]" in text
        assert "recompile_limit = 2" in text and "dynamic=True" in text
        assert "whole on each of 2 ranks" in text
        (text,), _ = found["error"]
        assert text.startswith("UnshardedError") and "now [1, 9, 12]" in text
        (text,), _ = found["parted"]
        assert "part here: " in text
        assert "rank(s) [0] compile" in text and "rank(s) [1] would run them uncompiled" in text
        assert found["waited"] < 40


class Switched(SelfAttention):
    scale = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_a_module_that_changes_is_told_with_dynamos_reason() -> None:
    torch._dynamo.reset()
    unsplit.forget()
    model = Switched(12, 3).eval()
    compiled = torch.compile(model, backend="ascend_sp", options={"target": "eager"}, dynamic=False)
    x = torch.randn(1, 5, 12)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=LIMIT):
        for model.scale in (1, 2):
            compiled(x)
        before = counters["ascend_sp"]["graphs"]
        model.scale = 3
        with pytest.warns(UserWarning, match="has been compiled 2 times") as caught:
            torch.testing.assert_close(compiled(x), model(x))
        assert counters["ascend_sp"]["graphs"] == before
    assert "scale" in str(caught[0].message) and "each of" not in str(caught[0].message)


def test_a_failed_compile_that_users_have_suppressed_is_told() -> None:
    torch._dynamo.reset()
    unsplit.forget()

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such thing")

    options = {"target": "eager", "post_passes": fails}
    compiled = torch.compile(SelfAttention(12, 3), backend="ascend_sp", options=options)
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.warns(UserWarning, match="suppress_errors is set, its code runs uncompiled"),
    ):
        compiled(torch.randn(1, 5, 12))
