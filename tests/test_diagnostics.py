"""Dumps: there, readable, and never a reason to fail."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_sp.compiler.report.runnable import script
from models import flux, flux_inputs
from processes import run, values
from simulator import capture, compile_rank
from toy import SelfAttention


def dumped(rank: int, world: int, folder: str) -> bool:
    """Whether a dump changed neither the result nor the program."""
    model = flux(1, 1, 3)
    seen = []
    for more in ({"dump_dir": folder}, {}):
        codes: list[str] = []
        options = {
            "target": "eager",
            "strategy": "separate",
            "observer": lambda name, gm, _, codes=codes: codes.append(f"{name} {gm.graph}"),
        }
        torch._dynamo.reset()
        program = torch.compile(model, backend="ascend_sp", options=options | more)
        seen.append((program(**flux_inputs(1, 17, 7))[0], codes))
    (with_dump, one), (without, two) = seen
    return torch.equal(with_dump, without) and len(one) > 5 and one == two


def test_dump(tmp_path: Path) -> None:
    assert values(run(dumped, 2, str(tmp_path))) == [True, True]
    for rank in (0, 1):
        (folder,) = tmp_path.glob(f"graph_*/rank_{rank}")
        names = sorted(f.name for f in folder.iterdir())
        assert names == [
            "00_captured.py",
            "01_eliminate_common_subexpressions.py",
            "02_decompose_complex.py",
            "03_raise_upsampling.py",
            "04_propagate_sharding.py",
            "05_materialise_sharding.py",
            "06_choose_strategy.py",
            "07_ulysses.py",
            "08_gather_keys.py",
            "09_join_statistics.py",
            "10_split_features.py",
            "11_keep_weights.py",
            "12_pack_gathers.py",
            "13_schedule_collectives.py",
            "14_lower_attention.py",
            "collectives.json",
            "compile_time.json",
            "dataflow.svg",
            "placements.txt",
            "summary.md",
            "timeline.json",
        ]
        rows = json.loads((folder / "collectives.json").read_text())
        assert [r["op"] for r in rows] == ["all_to_all_single"] * 8 + ["all_gather_into_tensor"]
        # q of the first block: (4 + 9) rows of 2 * 2 padded heads of 16, fp32.
        assert rows[0]["bytes"] == 13 * 4 * 16 * 4
        assert all("attention_dispatch.py" in r["source"] for r in rows[:-1])
        assert "transformer_flux.py" in rows[-1]["source"]
        summary = (folder / "summary.md").read_text()
        assert f"rank {rank} of 2" in summary
        assert "**2 of 2 attentions are split** over 2 ranks" in summary
        assert "8 all-to-alls, 1 all-gather" in summary
        assert "| 2 | 7+17 | 3 x 16 | no | separate | 4 all-to-alls |" in summary
        assert "| sdpa | transformer_flux.py:" in summary
        assert "is hidden behind compute" in summary
        events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
        sent = [e for e in events if e["ph"] == "X" and e["tid"] == 2 and e["pid"] == 2]
        assert [e["name"] for e in sent] == [r["name"] for r in rows]
        assert {"ulysses", "verify", "lowering"} <= set(
            json.loads((folder / "compile_time.json").read_text())
        )
        placements = (folder / "placements.txt").read_text()
        assert "S(1: [17])" in placements
        assert "transformer_flux.py" in placements
        head = (folder / "07_ulysses.py").read_text()[:1500]
        assert "after ulysses" in head and "strategy=separate" in head
        assert "   +8  _c10d_functional.all_to_all_single.default" in head
        assert "   -2  ascend_sp.split_attention.default" in head
    # A file runs by itself, in one process, as the rank that wrote it.
    folder = next(tmp_path.glob("graph_*/rank_1"))
    for name in ("00_captured", "14_lower_attention"):
        line = [sys.executable, str(folder / f"{name}.py")]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=env)
        assert done.stdout == "(1, 17, 16)\n", done.stderr
    with pytest.raises(SystemExit, match="split_attention stands for communication"):
        runpy.run_path(str(folder / "06_choose_strategy.py"), run_name="__main__")


class Constants(torch.nn.Module):
    """Has numbers of its own, and an input that is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SelfAttention(12, 3)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.inner(x * torch.tensor([0.5, 2.0, float("inf")])[:2].sum())[:, at]


def test_a_file_computes_what_the_graph_computes() -> None:
    model = Constants()
    inputs = torch.randn(2, 5, 12).transpose(0, 1).contiguous().transpose(0, 1), torch.tensor([3])
    captured = capture(model, *inputs)
    gm, _ = compile_rank(captured, 0, 1)
    space: dict[str, Any] = {"__name__": "dumped"}
    exec(script(gm, 0, ["a graph"]), space)
    graph = space["Graph"]()
    space["constants"](graph)
    torch.testing.assert_close(graph(*captured.inputs), gm(*captured.inputs), rtol=0, atol=0)
    made = space["inputs"]()
    for x, own in zip(captured.inputs, made, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (own.shape, own.stride(), own.dtype)
    assert all(out.isfinite().all() for out in graph(*made))


@pytest.mark.parametrize("kind", ["file", "read only", "full"])
def test_dumps_never_stop_a_compile(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dump"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28 if kind == "full" else 30, "no room")

    if kind == "file":
        folder.write_text("")
    else:
        monkeypatch.setattr(Path, "mkdir" if kind == "read only" else "write_text", refuse)
    model, x = SelfAttention(12, 3), torch.randn(1, 5, 12)
    options = {"target": "eager", "dump_dir": str(folder)}
    with torch.no_grad(), pytest.warns(UserWarning, match="cannot dump to") as seen:
        got = torch.compile(model, backend="ascend_sp", options=options)(x)
    assert len([w for w in seen if "cannot dump" in str(w.message)]) == 1
    torch.testing.assert_close(got, model(x).detach())
