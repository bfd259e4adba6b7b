"""The picture of the dataflow: what is condensed, what repeats, and that it is an SVG."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import ascend_sp
from ascend_sp.compiler.report.picture import condense
from ascend_sp.compiler.report.picture.condense import Stage, fold
from models import flux, flux_inputs, wan
from toy import SelfAttention


def drawn(tmp_path: Path) -> str:
    (file,) = tmp_path.glob("graph_*/rank_0/dataflow.svg")
    svg = file.read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    return svg


@pytest.mark.slow
def test_flux(tmp_path: Path) -> None:
    options = {"ranks": 2, "dump_dir": str(tmp_path), "strategy": "separate"}
    (report,) = ascend_sp.explain(
        flux(3, 3), **flux_inputs(1, 64, 16), explain_options=options
    ).reports
    svg = drawn(tmp_path)
    assert "6 attentions split over 2 ranks" in svg
    assert svg.count("attention, 16+64 rows, 4 heads x 16") == 4  # of six, two pairs are alike
    assert svg.count("x 2<") == 2
    assert "transformer_blocks 0 to 2" in svg and "all-gather" in svg
    assert svg.count("3 all-to-alls") == svg.count(">all-to-all,") == 4
    assert len(report.collectives) == 25


def test_what_every_rank_computes_is_at_the_left(tmp_path: Path) -> None:
    model, inputs = wan()
    ascend_sp.explain(model, **inputs, explain_options={"dump_dir": str(tmp_path)})
    svg = drawn(tmp_path)
    assert "runs whole" in svg and "cut, not sent" in svg


def test_one_rank(tmp_path: Path) -> None:
    options = {"ranks": 1, "dump_dir": str(tmp_path)}
    ascend_sp.explain(SelfAttention(12, 3), torch.randn(1, 5, 12), explain_options=options)
    assert "Nothing is split" in drawn(tmp_path)


def test_stages_that_repeat() -> None:
    def stage(name: str) -> Stage:
        s = Stage()
        s.parts[condense.SHARDED].ops[name] += 1
        return s

    runs = fold([stage(c) for c in "abcbcbcddde"])
    assert [(len(r.stages), r.times) for r in runs] == [(1, 1), (2, 3), (1, 3), (1, 1)]
    assert sum(len(r.every) for r in runs) == 11


def test_a_picture_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise KeyError("nothing there")

    monkeypatch.setattr("ascend_sp.compiler.report.diagnostics.picture", fails)
    with pytest.warns(UserWarning, match="cannot make dataflow.svg: KeyError"):
        ascend_sp.explain(
            SelfAttention(12, 3),
            torch.randn(1, 5, 12),
            explain_options={"dump_dir": str(tmp_path)},
        )
    assert list(tmp_path.glob("graph_*/rank_0/summary.md"))
