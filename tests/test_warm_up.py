"""One call for everything that a server will meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ascend_sp
from toy import SelfAttention


def test_warm_up_calls_each_once_and_counts_programs() -> None:
    torch._dynamo.reset()
    model = SelfAttention(12, 3).eval()
    compiled = torch.compile(model, backend="ascend_sp", options={"target": "eager"})

    def calls() -> Iterator[Any]:
        for n in (5, 7, 9):
            x = torch.randn(1, n, 12)
            yield {"x": x} if n == 7 else (x,)

    took = ascend_sp.warm_up(compiled, calls())
    # The second length is the first that differs; its program is for all.
    assert (took.calls, took.programs, took.captures, took.memory) == (3, 2, 0, 0)
    assert 0 < took.slowest <= took.seconds
    assert str(took).startswith("3 calls in ") and str(took).endswith(": 2 programs")
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(1, 11, 12)), model(torch.ones(1, 11, 12)))
    assert ascend_sp.warm_up(compiled, [(torch.ones(1, 11, 12),)]).programs == 0


def test_what_is_no_call_is_named() -> None:
    with pytest.raises(ascend_sp.ConfigError, match="call 0 of warm_up is a Tensor"):
        ascend_sp.warm_up(lambda x: x, [torch.ones(1)])  # type: ignore[list-item]
