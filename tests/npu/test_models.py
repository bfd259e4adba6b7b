"""Whole models by name of the backend, from Dynamo through the real converters to what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simulated_npu
import torch
from reference import INPUTS, build, compute, first
from torch.utils._pytree import tree_map_only

MODES = ("npugraph_ex", "torchair")


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    folder: Path = tmp_path_factory.mktemp("references")
    return compute(folder / "cpu.pt")


def compile_models(rank: int, world: int, target: str, cases: list[tuple]) -> list[Any]:
    import warnings

    import cannsim

    results = []
    for name, case, dtype in cases:
        torch._dynamo.reset()
        cannsim.ge.forget()
        cannsim.trace.forget()
        model, args, kwargs = build(name, case, dtype)
        model = model.to("npu")
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("npu"), (args, kwargs))
        # The graphs that are looked into hold four all-to-alls an attention; the others what the
        # cost model chooses.
        strategy = "separate" if target == "torchair" else "auto"
        options = {"target": target, "strategy": strategy}
        compiled = torch.compile(model, backend="ascend_sp", options=options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "ascend_sp")  # no other target may take over
            for _ in range(2):
                out = first(compiled(*args, **kwargs))
        results.append(out.cpu().float().numpy())
        graphs, captured = cannsim.ge.graphs(), cannsim.trace.captured_graphs()
        assert bool(graphs) == (target == "torchair")
        assert bool(captured) == (target == "npugraph_ex")
        for trace in captured:
            assert trace.races() == []
        for graph in graphs:
            check_graph(graph, dtype, world)
    return results


def check_graph(graph: Any, dtype: torch.dtype, world: int) -> None:
    """What a GE graph must hold, and what not."""
    types = graph.types()
    attentions = types["FusedInferAttentionScore"] or types["SoftmaxV2"]
    assert attentions > 0
    assert (types["FusedInferAttentionScore"] > 0) == (dtype == torch.bfloat16)
    assert types["HcomAllToAll"] == (4 * attentions if world > 1 else 0)
    assert types["HcomAllToAllV"] == 0
    assert graph.options["ge.topoSortingMode"] == "3"  # StableRDFS
    for op in graph.ops:
        assert not any(dtype.is_complex for dtype, _ in op.outputs), op.name
    by_name = {op.name: op for op in graph.ops}
    for op in graph.ops:
        if op.type == "FusedInferAttentionScore":
            assert op.attrs["input_layout"] == "BSND"
            for i in op.inputs[:3]:
                assert by_name[i.rsplit(":", 1)[0]].type != "Transpose"
            users = [o for o in graph.ops if f"{op.name}:0" in o.inputs]
            assert not any(o.type == "Transpose" for o in users) or world > 1


@pytest.mark.parametrize(
    ("target", "world", "every"),
    [
        ("npugraph_ex", 2, False),
        *(pytest.param(t, w, True, marks=pytest.mark.slow) for t in MODES for w in (1, 2)),
    ],
)
def test_models(references: dict, target: str, world: int, every: bool) -> None:
    uneven = ("flux", "qwen", "z_image") if every else ("z_image",)
    even = [name for name, case in INPUTS if case == "even" and (every or name == "flux")]
    cases = [(name, "uneven", torch.float32) for name in uneven]
    cases += [(name, "even", torch.bfloat16) for name in even]
    for results in simulated_npu.run(compile_models, world, target, cases, timeout=500):
        for (name, case, dtype), result in zip(cases, results, strict=True):
            got = torch.from_numpy(result)
            exact = references[name, case, "torch.float32"]
            eager = references[name, case, str(dtype)]
            if dtype == torch.float32:
                assert error(got, exact) <= 1e-5, (name, case)
            else:
                # As far from the exact result as eager is in that precision.
                assert error(got, exact) <= 1.3 * error(eager, exact), (name, case)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
