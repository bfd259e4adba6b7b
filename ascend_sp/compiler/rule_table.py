"""The page of all sharding rules, made from their docstrings; ``make docs`` writes it.

python -m ascend_sp.compiler.rule_table > docs/rules.md
"""

from __future__ import annotations

import inspect
from typing import Any

from ascend_sp.passes.sharding.rules.base import BY_NAME, RULES, Rule
from ascend_sp.passes.sharding.rules.pointwise import pointwise

HEAD = """# Rules

*Made from the docstrings in `ascend_sp/passes/sharding/rules/` by `make docs`; a test compares.*

How an op runs on shards. In the formulas `s` is the sequence, which is split: the op runs on each
rank's rows of it, and needs no communication. Operands without an `s` are whole. In all other
cases, and without a rule, the op's operands are gathered, and `summary.md` says why. How to add a
rule: [writing_a_rule.md](writing_a_rule.md).

Ops that PyTorch tags as pointwise need no rule of their own: {pointwise}
"""
TABLE = """
## {file}.py

{about}

| op | formula |
|---|---|
"""


def page() -> str:
    """The page, as Markdown."""
    ops: dict[Rule, list[str]] = {}
    for table in (RULES, BY_NAME):
        for op, rule in table.items():
            ops.setdefault(rule, []).append(str(op))
    files: dict[str, list[Rule]] = {}
    for rule in ops:
        files.setdefault(rule.__module__, []).append(rule)
    text = HEAD.format(pointwise=_first(pointwise))
    for module, rules in sorted(files.items()):
        about = _first(inspect.getmodule(rules[0]))
        text += TABLE.format(file=module.rpartition(".")[2], about=about)
        for rule in rules:
            text += f"| {', '.join(f'`{op}`' for op in ops[rule])} | {_first(rule)} |\n"
    return text


def _first(described: Any) -> str:
    """The first paragraph of a docstring, as Markdown on one line."""
    text = inspect.getdoc(described) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
