"""PyTorch's own ways to look inside and to take part: logs, traces, counters, passes, profiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters

import ascend_sp
from ascend_sp.compiler.report.diagnostics import count_up
from ascend_sp.compiler.report.ranges import names
from processes import run, values
from simulator import capture, compile_rank
from toy import CrossAttention, SelfAttention

ROOT = Path(__file__).parent.parent
PROGRAM = """
import torch
from toy import CrossAttention, SelfAttention
with torch.no_grad():
    torch.compile(SelfAttention(12, 3), backend="ascend_sp", options={"target": "eager"})(
        torch.randn(1, 5, 12))
"""


def compiled(options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    torch._dynamo.reset()
    model, x = SelfAttention(12, 3).eval(), torch.randn(1, 5, 12)
    with torch.no_grad():
        run = torch.compile(model, backend="ascend_sp", options={"target": "eager"} | options)
        return run(x), model(x)


@pytest.mark.parametrize("level", ["", pytest.param("+", marks=pytest.mark.slow)])
def test_torch_logs_and_torch_trace(level: str, tmp_path: Path) -> None:
    env = os.environ | {
        "TORCH_LOGS": f"{level}ascend_sp",
        "TORCH_TRACE": str(tmp_path),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    line = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "# Graph 0 on rank 0 of 1, for eager" in done.stderr
    assert ("graph 0 after lower_attention" in done.stderr) == (level == "+")
    (trace,) = tmp_path.glob("*.log")
    text = trace.read_text()
    for name in ("ascend_sp_00_captured", "ascend_sp_summary", "ascend_sp_collectives"):
        assert f'"name": "{name}"' in text


def test_torch_compile_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    monkeypatch.setattr("torch._dynamo.config.debug_dir_root", str(tmp_path))
    compiled({})
    assert list(tmp_path.glob("run_*/ascend_sp/graph_*/rank_0/summary.md"))


def test_recompiles_are_in_the_summary(tmp_path: Path) -> None:
    model = SelfAttention(12, 3)
    options = {"target": "eager", "dump_dir": str(tmp_path)}
    run = torch.compile(model, backend="ascend_sp", options=options, dynamic=False)
    with torch.no_grad():
        run(torch.randn(1, 5, 12))
        run(torch.randn(1, 6, 12))
    first, second = (p.read_text() for p in sorted(tmp_path.glob("*/rank_0/summary.md")))
    assert "expected 5, actual 6" in second
    assert first.count("expected 5, actual 6") == 0


def test_counters() -> None:
    counters.pop("ascend_sp", None)
    compiled({})
    assert counters["ascend_sp"] == {"graphs": 1, "attentions": 2, "attentions_split": 0}
    counters.pop("ascend_sp")
    program, ctx = compile_rank(capture(SelfAttention(12, 3), torch.randn(1, 5, 12)), 0, 2)
    count_up(program, ctx)
    assert counters["ascend_sp"] == {
        "graphs": 1,
        "attentions": 2,
        "attentions_split": 2,
        "all_to_all_single": 8,
        "all_gather_into_tensor": 1,
    }
    counters.pop("ascend_sp")
    # Queries are split, and all keys are on every rank: nothing travels.
    cross = capture(CrossAttention(12, 3), torch.randn(1, 6, 12), torch.randn(1, 5, 12))
    count_up(*compile_rank(cross, 0, 2))
    found = counters["ascend_sp"]
    assert found["attentions"] == found["attentions_split"] == 2
    assert found["all_to_all_single"] == 4
    counters.pop("ascend_sp")
    ascend_sp.explain(SelfAttention(12, 3), torch.randn(1, 5, 12))
    assert not counters["ascend_sp"]


def twice(gm: fx.GraphModule, ctx: object) -> fx.GraphModule:
    """All outputs doubled."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        new = [gm.graph.call_function(torch.ops.aten.mul.Scalar, (x, 2)) for x in output.args[0]]  # type: ignore[union-attr]
    output.args = (tuple(new),)
    return gm


def shrinks(gm: fx.GraphModule, ctx: object) -> fx.GraphModule:
    node = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)[0]
    node.meta["val"] = node.meta["val"][..., :1]
    return gm


def forgets(gm: fx.GraphModule, ctx: object) -> None:
    pass


@pytest.mark.parametrize("place", ["pre_passes", "post_passes"])
def test_passes_of_the_user(place: str) -> None:
    seen: list[str] = []
    got, eager = compiled({place: [twice], "observer": lambda name, gm, ctx: seen.append(name)})
    torch.testing.assert_close(got, 2 * eager)
    expected = ["captured", "lower_attention"]
    expected.insert(1 if place == "pre_passes" else 2, "twice")
    assert seen == expected
    with pytest.raises(Exception, match=r"after shrinks: .*shrinks is a pass of pre") as e:
        compiled({place: shrinks})
    assert "bug in ascend_sp" not in str(e.value)
    with pytest.raises(Exception, match="forgets of pre_passes or post_passes returned NoneType"):
        compiled({place: forgets})


def test_a_pass_of_the_user_is_sharded_like_the_model() -> None:
    options = {"pre_passes": twice}
    report = ascend_sp.explain(
        SelfAttention(12, 3), torch.randn(1, 6, 12), explain_options=options
    ).reports[0]
    assert report.options["pre_passes"] == "twice"
    (gathered,) = (n for n in report.notes if n.kind == "gather")
    assert gathered.op == "aten.mul.Scalar" and len(report.attentions) == 2


def test_ranges_of_the_profiler() -> None:
    with torch.profiler.profile() as seen:
        compiled({})
    events = [e.key for e in seen.key_averages()]
    assert any(e.startswith("ascend_sp: graph") and "rank 0 of 1" in e for e in events)
    assert sum(e.startswith("ascend_sp: attention") for e in events) >= 1

    program, _ = compile_rank(capture(SelfAttention(12, 3), torch.randn(1, 6, 12)), 0, 2)
    named = list(names(program).values())
    assert "ascend_sp: all-to-all, 48 elements of attention at toy.py:30" in named, named
    assert any(n.startswith("ascend_sp: wait for all-to-all of attention at") for n in named)
    assert any(n.startswith("ascend_sp: all-gather, 36 elements") for n in named)
    assert any(n.startswith("ascend_sp: attention of attention") for n in named)


def profiled(rank: int, world: int) -> list[tuple[list[str], int]]:
    """Of two runs with Inductor, and one op by op: ranges in time order, and all-to-alls seen."""
    out = []
    model, x = SelfAttention(12, 3).eval(), torch.ones(1, 6, 12)
    for target, runs in (("inductor", 2), ("eager", 1)):
        torch._dynamo.reset()
        options = {"target": target, "strategy": "separate"}
        program = torch.compile(model, backend="ascend_sp", options=options)
        program(x)
        for _ in range(runs):
            with torch.profiler.profile() as seen:
                program(x)
            found = [e.name for e in sorted(seen.events(), key=lambda e: e.time_range.start)]
            named = [n for n in found if n.startswith("ascend_sp: ") and ": graph" not in n]
            out.append((named, found.count("_c10d_functional::all_to_all_single")))
    return out


@pytest.mark.slow
def test_ranges_in_compiled_code() -> None:
    for (inductor, sent), again, eager in values(run(profiled, 2)):
        assert (inductor, sent) == again
        assert sum("wait for all-to-all of attention at" in n for n in inductor) == 4
        assert sum("ascend_sp: attention of attention at" in n for n in inductor) == 1
        assert sum("ascend_sp: wait for all-gather" in n for n in inductor) == 1
        assert (inductor, sent) == eager
        assert sent == 4 * 2  # once for each; a mode of dispatch would make it twice
