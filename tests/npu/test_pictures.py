"""A VAE's decode, split along the picture, in both of Ascend's graphs."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import simulated_npu
import torch

from checks import free_links
from models import vae


def compile_decode(
    rank: int, world: int, target: str, dtype: torch.dtype, cost_model: str
) -> dict[str, Any]:
    import cannsim

    model = vae().to(dtype)
    z = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        want = model.decode(z).sample
        model = model.to("npu")
        options = {"target": target, "cost_model": cost_model}
        model.decode = torch.compile(model.decode, backend="ascend_sp", options=options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
            got = model.decode(z.to("npu")).sample.cpu()
    ops: Counter = Counter()
    for trace in cannsim.trace.captured_graphs():
        assert trace.races() == []
        ops.update(op.name for op in trace.ops)
    for graph in cannsim.ge.graphs():
        ops.update(graph.types())
    return {"error": ((got - want).abs().max() / want.abs().max()).item(), "ops": dict(ops)}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("npugraph_ex", torch.bfloat16),
        pytest.param("torchair", torch.float32, marks=SLOW),
        pytest.param("npugraph_ex", torch.float32, marks=SLOW),
        pytest.param("torchair", torch.bfloat16, marks=SLOW),
    ],
)
def test_the_same_picture(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    links = free_links(tmp_path)
    for got in simulated_npu.run(compile_decode, 2, target, dtype, links, timeout=280):
        assert got["error"] <= (2e-5 if dtype == torch.float32 else 5e-2)
        ops = got["ops"]
        if target == "torchair":
            assert ops["Conv2D"] == 22
            assert ops["HcomAllToAllV"] > 10
        else:
            assert ops["aten::convolution"] == 22
            assert ops["hccl.alltoallv"] > 10
            # Nothing wide is held: one op normalises, as a group norm of one device does.
            assert ops.get("aten::addcmul", 0) == 0
