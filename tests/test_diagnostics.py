"""Dumps: there, readable, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models import flux, flux_inputs
from processes import run, values
from toy import SelfAttention


def dumped(rank: int, world: int, folder: str) -> None:
    model = flux(1, 1, 3)
    options = {"target": "eager", "dump_dir": folder, "strategy": "separate"}
    torch.compile(model, backend="ascend_sp", options=options)(**flux_inputs(1, 17, 7))


def test_dump(tmp_path: Path) -> None:
    values(run(dumped, 2, str(tmp_path)))
    for rank in (0, 1):
        (folder,) = tmp_path.glob(f"graph_*/rank_{rank}")
        names = sorted(f.name for f in folder.iterdir())
        assert names == [
            "00_captured.py",
            "01_decompose_complex.py",
            "02_propagate_sharding.py",
            "03_materialise_sharding.py",
            "04_choose_strategy.py",
            "05_ulysses.py",
            "06_schedule_collectives.py",
            "07_lower_attention.py",
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
        assert "| 2 | 7+17 | 3 x 16 | no | separate | 4 |" in summary
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
        compile((folder / "05_ulysses.py").read_text(), "graph", "exec")


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, x = SelfAttention(12, 3), torch.randn(1, 5, 12)
    options = {"target": "eager", "dump_dir": str(tmp_path / "file")}
    with torch.no_grad(), pytest.warns(UserWarning, match="cannot dump to"):
        got = torch.compile(model, backend="ascend_sp", options=options)(x)
    torch.testing.assert_close(got, model(x).detach())
