"""The page of all toggles, made from the declarations in `config.py`; ``make docs`` writes it.

python -m ascend_sp.compiler.toggles > docs/toggles.md
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ascend_sp.compiler.config import NO_VARIABLE, PREFIX, Config, option_name
from ascend_sp.compiler.pipeline import optional_passes

HEAD = """# Toggles

*Made from `ascend_sp/compiler/config.py` by `make docs`; a test compares. Change it there.*

    torch.compile(model, backend="ascend_sp", options={"target": "eager"})
    ASCEND_SP_TARGET=eager torchrun ...

Options win over the environment, which wins over the default. A name or a value that does not exist
is an error that lists those that do. All ranks must have the same, but for `dump_dir`, `mesh` and
`observer`. They are read when a graph is compiled: `torch.compiler.reset()` before a change of the
environment in a running program. What to switch when: [debugging.md](debugging.md).

| option | environment | values | default | effect |
|---|---|---|---|---|
"""


def page() -> str:
    """The page, as Markdown."""
    rows = []
    for f in fields(Config):
        name = option_name(f)
        variable = "" if name in NO_VARIABLE else f"`{PREFIX}{name.upper()}`"
        allowed, effect = f.metadata["allowed"], f.metadata["effect"]
        rows.append(f"| `{name}` | {variable} | {allowed} | {_shown(f.default)} | {effect} |\n")
    passes = ", ".join(f"`{name}`" for name in optional_passes())
    return f"{HEAD}{''.join(rows)}\nPasses that `skip_passes` may name: {passes}.\n"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default == ():
        return "unset"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


if __name__ == "__main__":
    print(page(), end="")
