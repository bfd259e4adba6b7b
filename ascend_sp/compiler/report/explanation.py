"""What `explain` hands back: the reports of all graphs, as an object, as text and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, TextIO

from ascend_sp.compiler.report.facts import Report
from ascend_sp.compiler.report.page import summary


@dataclass
class Explanation:
    """What the backend would do with a model on one of several ranks."""

    reports: list[Report]
    """One for each graph, in the order in which they are compiled."""
    ranks: int
    device: str
    """Whose rates the estimates are from."""
    remarks: list[str]
    """What would be otherwise on the devices themselves."""
    seconds: float
    """What explaining took."""

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "ranks": self.ranks,
            "device": self.device,
            "remarks": self.remarks,
            "seconds": self.seconds,
            "graphs": [r.to_json() for r in self.reports],
        }

    def text(self, *, short: bool = False) -> str:
        """The page of each graph, as Markdown; `short`: only what fits a screen."""
        head = [f"> {remark}\n" for remark in self.remarks]
        if not self.reports:
            head.append("Nothing was compiled: the call made no graph.\n")
        return "\n".join([*head, *(summary(r, short=short) for r in self.reports)])

    def __str__(self) -> str:
        return self.text()

    def show(self, file: TextIO | None = None, *, full: bool = False) -> None:
        """Print it, with rich if that is installed; `full`: every section."""
        text = self.text(short=not full)
        try:
            from rich.console import Console
            from rich.markdown import Markdown
        except ImportError:
            print(text, file=file or sys.stdout)
            return
        Console(file=file).print(Markdown(text))
