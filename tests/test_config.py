"""Options: names, values, precedence, and errors that list what is allowed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from ascend_sp import Config, ConfigError
from ascend_sp.compiler.config import NO_VARIABLE, PREFIX, option_name
from ascend_sp.compiler.toggles import page


def test_defaults() -> None:
    assert Config.load() == Config()


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_SP_TARGET", "eager")
    monkeypatch.setenv("ASCEND_SP_DEGREE", "4")
    monkeypatch.setenv("ASCEND_SP_VERIFY", "off")
    config = Config.load({"target": "inductor"})
    assert (config.target, config.degree, config.verify) == ("inductor", 4, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tarqet": "eager"}, ["'tarqet'", "target", "on_unsharded"]),
        ({"target": "cuda"}, ["'cuda'", "auto, inductor, npugraph_ex, torchair or eager"]),
        ({"degree": 0}, ["0", "whole number >= 1"]),
        ({"degree": 2.5}, ["2.5", "whole number >= 1"]),
        ({"degree": True}, ["True", "whole number >= 1"]),
        ({"check_timeout": -1}, ["-1", "seconds > 0"]),
        ({"sequence_parallel": "maybe"}, ["'maybe'", "1/true/on or 0/false/off"]),
        ({"mesh": 2}, ["2", "DeviceMesh"]),
        ({"dump_dir": 7}, ["7", "a folder"]),
        ({"pre_passes": ["ulysses"]}, ["'ulysses'", "functions (gm, ctx) -> gm"]),
        ({"observer": 1}, ["1", "a function (name, gm, ctx)"]),
        ({"on_unsharded": "raise"}, ["'raise'", "fallback or error"]),
    ],
)
def test_bad_options(options: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        Config.load(options)
    assert all(w in str(e.value) for w in words), e.value


def test_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_SP_ATENTION", "sdpa")
    with pytest.raises(ConfigError, match=r"ASCEND_SP_ATENTION.*ASCEND_SP_ATTENTION"):
        Config.load()
    monkeypatch.delenv("ASCEND_SP_ATENTION")
    monkeypatch.setenv("ASCEND_SP_DEGREE", "two")
    with pytest.raises(ConfigError, match="ASCEND_SP_DEGREE is 'two'"):
        Config.load()


def test_errors_reach_the_user_of_torch_compile() -> None:
    with pytest.raises(Exception, match="unknown option 'tarqet'"), torch.no_grad():
        torch.compile(nn.Linear(2, 2), backend="ascend_sp", options={"tarqet": 1})(torch.ones(1, 2))
    torch._dynamo.reset()
    with (
        pytest.raises(
            Exception,
            match=r"it may hold eliminate_common_subexpressions, .*schedule_collectives",
        ),
        torch.no_grad(),
    ):
        torch.compile(nn.Linear(2, 2), backend="ascend_sp", options={"skip_passes": "ulysses"})(
            torch.ones(1, 2)
        )


def test_the_page_of_toggles_is_what_the_declarations_say() -> None:
    root = Path(__file__).parent.parent
    found = (root / "docs" / "toggles.md").read_text()
    assert found == page(), "docs/toggles.md is not up to date: make docs"
    for f in fields(Config):
        assert f.metadata["effect"][-1] == "." and "|" not in f.metadata["effect"], f.name
        assert f"\n| `{option_name(f)}` | " in found
        if f.name not in NO_VARIABLE:
            assert f"`{PREFIX}{option_name(f).upper()}`" in found
    assert "(docs/toggles.md)" in (root / "README.md").read_text()
