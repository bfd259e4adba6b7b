"""The floors of the house: who may import whom, and what nobody may know."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import ascend_sp

PACKAGE = Path(ascend_sp.__file__).parent
FLOORS = {
    "runtime": (),
    "text_encoder": ("runtime",),
    "weights": ("runtime",),
    "graph": ("runtime",),
    "passes": ("graph", "runtime"),
    "compiler": ("passes", "graph", "runtime", "text_encoder", "weights"),
}
"""Which folders the modules of each may import from, besides their own."""


def modules() -> dict[str, Path]:
    """Each module of the package by its dotted name."""
    out = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ("ascend_sp", *file.relative_to(PACKAGE).with_suffix("").parts)
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return out


def imports() -> dict[str, set[str]]:
    """Which modules of the package each module imports, anywhere in its text."""
    known = modules()
    out = {}
    for name, file in known.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                # `from a import b` imports the module a.b, or b out of a.
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {n if n in known else node.module for n in names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        out[name] = found & set(known) - {name}
    return out


def test_no_circle() -> None:
    TopologicalSorter(imports()).prepare()  # raises CycleError, which names the modules


def test_floors() -> None:
    wrong = []
    for name, found in imports().items():
        floor = (name.split(".")[1:] or [""])[0]
        for other in found:
            theirs = (other.split(".")[1:] or [""])[0]
            if floor in FLOORS and theirs not in (floor, *FLOORS[floor]):
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_circle_between_folders() -> None:
    """A folder, whatever is nested in it, counts as one; a module beside folders as itself."""
    files = modules()

    def folder(module: str) -> str:
        *above, _ = files[module].relative_to(PACKAGE).parts
        return "/".join(above[:2]) if len(above) > 1 else module

    arrows: dict[str, set[str]] = {}
    for name, found in imports().items():
        arrows.setdefault(folder(name), set()).update({folder(x) for x in found} - {folder(name)})
    TopologicalSorter(arrows).prepare()


def test_no_model_is_known_by_name() -> None:
    names = re.compile(r"flux|qwen|z.?image|wan\b|transformer_blocks|to_q\b|Transformer2D", re.I)
    for file in PACKAGE.rglob("*.py"):
        assert not names.search(file.read_text()), file
