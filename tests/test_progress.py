"""A compile that takes long says what it does; a short one says nothing."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Iterator

import pytest
import torch
from torch import fx

from ascend_sp.compiler import progress
from ascend_sp.graph.context import PassContext
from toy import SelfAttention


def slow_pass(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    time.sleep(0.3)
    return gm


def compile_slowly(**options: object) -> None:
    torch.compiler.reset()
    options |= {"target": "eager", "pre_passes": [slow_pass]}
    with torch.no_grad():
        torch.compile(SelfAttention(12, 3), backend="ascend_sp", options=options)(
            torch.ones(1, 7, 12)
        )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def entries() -> Iterator[list[str]]:
    """What the module writes to its log."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    progress.log.addHandler(handler)
    level = progress.log.level
    progress.log.setLevel(logging.INFO)  # not the attribute: what a logger may say is cached
    yield found
    progress.log.setLevel(level)
    progress.log.removeHandler(handler)


def test_in_the_log(monkeypatch: pytest.MonkeyPatch, entries: list[str]) -> None:
    monkeypatch.setattr(progress, "AFTER", 200.0)
    compile_slowly()
    assert not entries
    monkeypatch.setattr(progress, "AFTER", 0.01)
    monkeypatch.setattr(progress, "EVERY_ENTRY", 0.01)
    compile_slowly()
    assert any(
        re.fullmatch(r"ascend_sp has been compiling for \d+ s: slow_pass", e) for e in entries
    )
    seen = len(entries)
    time.sleep(0.05)
    assert len(entries) == seen  # it is over


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.01)
    monkeypatch.setattr(progress, "EVERY_LINE", 0.01)
    monkeypatch.setattr("sys.stderr", Terminal())
    with progress.Progress(0) as shown:
        shown.phase("lowering", 3, 57)
        time.sleep(0.2)
    lines = progress.sys.stderr.getvalue().split("\r")
    assert any(re.fullmatch(r"ascend_sp .* for \d+ s: lowering, 3 of 57 *", x) for x in lines)
    assert not lines[-2].strip() and lines[-1] == ""  # what is written next has the line for itself
    other = Terminal()
    monkeypatch.setattr("sys.stderr", other)
    with progress.Progress(1):
        time.sleep(0.05)
    assert not other.getvalue()


def test_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.0)
    shown = progress.Progress(0)
    with pytest.raises(ValueError, match="its own"), shown:
        raise ValueError("its own")
    assert shown._thread and not shown._thread.is_alive()
