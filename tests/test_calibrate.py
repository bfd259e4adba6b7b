"""Calibration: the fit, the command on one and on two ranks, its errors."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ascend_sp.command import calibrate
from ascend_sp.command.calibrate import Clock, Sizes, fit, table
from ascend_sp.graph.cost.device import DEVICES, find
from ascend_sp.runtime.errors import ConfigError
from processes import errors, run, values

TINY = Sizes(((32, 64, 64),), (2, 32, 16), 1 << 12, 1 << 12, (1 << 12, 1 << 14, 1 << 16))


def test_fit_finds_the_line() -> None:
    sizes = [1e3, 1e5, 1e6, 1e7]
    latency, bandwidth = fit(sizes, [2e-4 + s / 5e9 for s in sizes])
    assert latency == pytest.approx(2e-4)
    assert bandwidth == pytest.approx(5e9)


def test_small_transfers_say_what_the_latency_is() -> None:
    sizes = [1e3, 1e4, 1e7]
    # The largest is 10 % off: in a fit of seconds, that would be many latencies.
    latency, _ = fit(sizes, [1e-4 + 1e3 / 1e9, 1e-4 + 1e4 / 1e9, (1e-4 + 1e7 / 1e9) * 1.1])
    assert latency == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize("seconds", [[3e-3, 2e-3, 1e-3], [1e-6, 1e-3, 9.0]])
def test_noise_makes_no_negative_rate(seconds: list[float]) -> None:
    latency, bandwidth = fit([1e3, 1e5, 1e6], seconds)
    assert latency > 0 and bandwidth > 0


def test_a_clock_divides_by_the_calls_that_it_made() -> None:
    seconds = Clock(torch.device("cpu")).seconds(lambda: time.sleep(1e-3))
    assert 1e-3 <= seconds < 20e-3
    # Sleeping takes no CPU.
    assert Clock(torch.device("cpu"), busy=True).seconds(lambda: time.sleep(1e-3)) < 1e-3


def command(rank: int, world: int, out: str, *more: str) -> str:
    calibrate.SMALL = TINY
    dist.barrier()  # or a rank that fails at once is gone before the other has connected
    calibrate.main(["--out", out, "--device", "cpu", *more])
    return Path(out).read_text() if rank == 0 else ""


def test_two_ranks_write_one_file(tmp_path: Path) -> None:
    out = str(tmp_path / "device.json")
    text, _ = values(run(command, 2, out, timeout=90))
    model = find(out, "cpu")
    assert json.loads(text)["name"] == model.name == "cpu, calibrated"
    assert model.shared_link
    assert set(model.matmul) == set(model.attention) == {"float32", "bfloat16"}
    assert "2 ranks" in model.sources[0] and len(model.sources) == 1
    # All of it was measured, so nothing is what the table says to the last digit.
    table_of = DEVICES["cpu"]
    of_link = ("link_latency", "link_bandwidth", "link_launch", "link_work")
    for name in ("memory", "transcendental", "launch", *of_link):
        assert getattr(model, name) != getattr(table_of, name)
    # A loopback is no slower than a floppy disk, no faster than memory.
    assert 1e6 < model.link_bandwidth < 1e12 and 1e-6 < model.link_latency < 1


def test_one_rank_keeps_the_link_of_the_table_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "SMALL", TINY)
    out = tmp_path / "device.json"
    calibrate.main(["--out", str(out), "--device", "cpu"])
    model, known = find(str(out), "cpu"), DEVICES["cpu"]
    assert model.link_latency == known.link_latency
    assert model.link_bandwidth == known.link_bandwidth
    assert model.launch != known.launch
    assert "not measured" in model.sources[1]
    printed = capsys.readouterr().out
    assert "Measured on this machine (1 ranks)" in printed
    assert printed.count("not measured") == 4
    assert table(model, 1) in printed


def test_a_folder_that_does_not_exist_is_an_error_on_every_rank(tmp_path: Path) -> None:
    out = str(tmp_path / "no" / "device.json")
    for text in errors(run(command, 2, out, timeout=90)):
        assert "ConfigError: --out is" in text and "that can be written" in text


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'npu', which PyTorch does not see here; it sees cpu"):
        calibrate.main(["--out", str(tmp_path / "x.json"), "--device", "npu"])
