"""Documents name files, headings, options, commands and words that there are."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest

import combinations
import rule_cases
import test_rules
from ascend_sp import Config
from ascend_sp.command import explain as command
from ascend_sp.compiler import rule_table
from ascend_sp.compiler.config import NO_VARIABLE, PREFIX, option_name
from ascend_sp.compiler.pipeline import PASSES, optional_passes
from ascend_sp.compiler.report import page
from ascend_sp.compiler.report.diagnostics import FILES
from ascend_sp.graph.context import NoteKind
from ascend_sp.passes.sharding.rules import base, reductions
from ascend_sp.runtime.versions import software

ROOT = Path(__file__).parent.parent
TEXTS = {
    str(p.relative_to(ROOT)): p.read_text()
    for p in sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/*.md"),
            *ROOT.glob("examples/*.md"),
            *ROOT.glob("tests/cann/*.md"),
        ]
    )
}
NAMES = list(TEXTS)
CODE = {p: p.read_text() for p in sorted(ROOT.glob("ascend_sp/**/*.py"))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")


def code(name: str) -> list[str]:
    """What a page has between backticks, in a line or in a block."""
    text = TEXTS[name]
    return [m[2] for m in FENCED.finditer(text)] + QUOTED.findall(FENCED.sub("", text))


def commands(name: str) -> list[str]:
    """The command lines of a page, each on one line and without its comment."""
    lines = "\n".join(code(name)).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*|^[A-Z_]+=\S+ ", "", line.strip()) for line in lines]


def literals(text: str) -> list[str]:
    """The strings of a Python file; what an f-string computes is a NUL."""
    nodes = list(ast.walk(ast.parse(text)))
    formatted = [n for n in nodes if isinstance(n, ast.JoinedStr)]
    parts = {id(v) for n in formatted for v in n.values}
    plain = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in parts]
    return [x for x in plain if isinstance(x, str)] + [
        "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in n.values)
        for n in formatted
    ]


LITERALS = [text for p in CODE for text in literals(CODE[p])]


# Pages and links.


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXTS[name])):
        if "://" in target:
            continue
        file, _, place = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        if place:
            body = FENCED.sub("", path.read_text())
            anchors = [anchor(h) for h in re.findall(r"^#+ (.+)$", body, re.MULTILINE)]
            assert place in anchors, f"{name}: {target}"


def test_every_page_can_be_found() -> None:
    linked = {Path(t).name for n in NAMES for t in re.findall(r"\]\(([^)#\s]+)", TEXTS[n])}
    assert {Path(n).name for n in NAMES if n.startswith("docs/")} <= linked


def test_the_readme_is_one_page() -> None:
    assert TEXTS["README.md"].count("\n") < 130


def test_the_page_of_rules_is_made_from_the_code() -> None:
    assert TEXTS["docs/rules.md"] == rule_table.page(), "docs/rules.md is not up to date: make docs"


def test_the_page_of_combinations_is_made_from_what_was_seen() -> None:
    seen = json.loads(combinations.RESULTS.read_text())
    assert set(seen) == {row.what for row in combinations.ROWS}
    assert combinations.page(seen) == combinations.PAGE.read_text()


def test_python_in_pages_is_python() -> None:
    for name in NAMES:
        for block in FENCED.finditer(TEXTS[name]):
            if block[1] == "python":
                ast.parse(block[2], name)


# What the compiler writes.


def table(first: str, rows: dict[str, str]) -> str:
    lines = [
        f"| {first} | what it shows |",
        "|---|---|",
        *(f"| `{k}` | {v} |" for k, v in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def test_the_tables_of_a_dump_are_those_of_the_program() -> None:
    sections = {f"## {title}": text for title, text in page.SECTIONS.items()}
    for made in (table("file", FILES), table("section", sections)):
        assert f"\n{made}\n" in TEXTS["docs/debugging.md"], f"put this there:\n{made}"


def test_the_program_writes_the_sections_and_files_of_its_tables() -> None:
    source = (ROOT / "ascend_sp/compiler/report/page.py").read_text()
    titles = [t[3:].partition(" (")[0] for t in literals(source) if t.startswith("## ")]
    named = [kind.heading for kind in NoteKind]
    # One heading stands for all kinds of notes.
    assert {*titles, *named} == {*page.SECTIONS, "\0"}
    whole = r"\w+\.(?:md|txt|json|svg)"
    made = [t for p in ROOT.glob("ascend_sp/compiler/**/*.py") for t in literals(p.read_text())]
    written = {t for t in made if re.fullmatch(whole, t)}
    assert written | {"NN_pass.py"} == set(FILES)


@pytest.mark.parametrize("name", NAMES)
def test_headings_and_files_that_are_named_are_there(name: str) -> None:
    for text in code(name):
        if text.startswith("## "):
            assert text[3:] in page.SECTIONS, f"{name}: {text}"
        if re.fullmatch(r"(?:[\w*]+/)*[\w*]+\.(?:md|txt|json|svg|py|sh)", text):
            known = Path(text).name in FILES or text in OTHERS or "*" in text
            assert known or any(f"/{f}".endswith(f"/{text}") for f in TREE), f"{name}: {text}"


TREE = [
    p.relative_to(ROOT).as_posix()
    for folder in ("ascend_sp", "benchmarks", "docs", "examples", "findings", "tests")
    for p in (ROOT / folder).rglob("*.*")
]
OTHERS = {
    *("COMPATIBILITY.md", "config.json", "serve.py", "device.json", "set_env.sh"),
    *("tensor_cast/device.py", "demos/torch_jit/flash_atten/README.md"),
    "auto_generated_ge_raw_ops.py",
}
"""Files of others, and of the user."""


def test_the_passes_are_described_in_their_order() -> None:
    text = TEXTS["docs/architecture.md"]
    way = text[text.index("## The way of a graph") : text.index("**Lowering**")]
    steps = [n for n in re.findall(r"`(\w+)`", way) if n in {p.name for p in PASSES}]
    assert list(dict.fromkeys(steps)) == [p.name for p in PASSES]


def pieces(quoted: str) -> list[str]:
    """The parts of a message that are not values of one case."""
    return [s for s in re.split(r"\.\.\.|['\[\]{}()]|\b[\w.]*\d\S*", quoted) if len(s.split()) > 2]


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_quoted_as_they_are(name: str) -> None:
    said = "\n".join(LITERALS)
    chunks = {c.strip(" .,:;") for text in LITERALS for c in text.split("\0")}
    chunks = {c for c in chunks if len(c.split()) > 1}
    quoted = [m[1] for t in code(name) if (m := re.fullmatch(r"\w+Error: (.+)", t, re.DOTALL))]
    blocks = re.findall(
        r"^    (?:\w+Error|ascend_sp): (.+(?:\n    .+)*)", TEXTS[name], re.MULTILINE
    )
    for line in [*quoted, *(line.strip() for b in blocks for line in b.splitlines())]:
        found = [part.strip(" .,:;") for part in pieces(line)]
        known = line.startswith("at ") or any(part in said for part in found)
        known |= any(c in line for c in chunks)
        assert known or not found, f"{name}: {line}"


# Options.

OPTIONS = {option_name(f) for f in fields(Config)}


def parsed(name: str, value: str) -> None:
    Config.load({name: value})
    if name == "skip_passes":
        assert set(value.split(",")) <= set(optional_passes()), value


def test_variables_that_are_named_are_there() -> None:
    known = {PREFIX + n.upper() for n in OPTIONS if n not in NO_VARIABLE}
    for name, text in {**TEXTS, **CODE}.items():
        assert set(re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", text)) <= known, name


@pytest.mark.parametrize("name", NAMES)
def test_options_that_are_named_are_there(name: str) -> None:
    text = TEXTS[name]
    for variable, value in re.findall(rf"\b{PREFIX}([A-Z_]+)=([\w,:./]+)", text):
        parsed(variable.lower(), value)
    for option in re.findall(r"""options={["'](\w+)["']""", text):
        assert option in OPTIONS | {"ranks", "rank", "device"}, option
    for option, value in re.findall(r"`([a-z_]+)=[\"'](\w[\w,:]*)[\"']`", text):
        assert option in OPTIONS, f"{option}={value}"
        parsed(option, value)


# Commands.


@pytest.mark.parametrize("name", NAMES)
def test_commands_can_be_run(name: str) -> None:
    make = (ROOT / "Makefile").read_text()
    for line in commands(name):
        if line.startswith("make "):
            goals = [w for w in line.split()[1:] if "=" not in w]
            assert all(re.search(rf"^{g}:", make, re.MULTILINE) for g in goals), f"{name}: {line}"
        words = line.split()
        for i, word in enumerate(words):
            if not re.fullmatch(r"\S*(?:python|torchrun)", words[0]):
                break
            if word == "-m" and (module := words[i + 1]).startswith("ascend_sp"):
                command, *rest = words[i + 2 :] if module == "ascend_sp" else ("", *words[i + 2 :])
                module = f"ascend_sp.command.{command}" if command else module
                spec = importlib.util.find_spec(module)
                assert spec is not None and spec.origin is not None, f"{name}: {line}"
                options_exist(line, Path(spec.origin), rest)
            if re.match(r"(?:examples|benchmarks|tests)/\w+\.py", word):
                file, colon, function = word.partition(":")
                assert (ROOT / file).exists(), f"{name}: {line}"
                if colon:
                    assert f"\ndef {function}(" in (ROOT / file).read_text(), f"{name}: {line}"
                else:
                    options_exist(line, ROOT / file, words[i + 1 :])


def options_exist(line: str, program: Path, words: list[str]) -> None:
    """Each option is one of the program's, of a module beside it, or of a recipe of explain."""
    beside = [*program.parent.glob("*.py")] if program.parent.parent == ROOT else [program]
    text = "".join(p.read_text() for p in [*beside, ROOT / "examples/explain_inputs.py"])
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            assert f'"--{name}"' in text or re.search(rf"\b{name}: \w+ = ", text), f"{line}: {word}"


def test_ci_runs_the_command_of_the_readme() -> None:
    run = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert run == "exec make test"
    assert "make test" in commands("README.md") and "make demo" in commands("README.md")


# The answer of explain that the README shows.


def shown() -> tuple[list[str], str]:
    """The arguments of the README's command, and what it is said to print."""
    blocks = [m[2] for m in FENCED.finditer(TEXTS["README.md"])]
    (at,) = [i for i, b in enumerate(blocks) if b.startswith("python -m ascend_sp explain")]
    return blocks[at].split()[4:], blocks[at + 1]


def answer(line: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What explain prints where rich is not installed."""
    for module in ("rich", "rich.console", "rich.markdown"):
        monkeypatch.setitem(command.sys.modules, module, None)
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with redirect_stdout(out):
        assert command.main(line) == 0
    return out.getvalue()


def words(text: str) -> list[str]:
    """Line breaks, the number of the graph and versions are not compared."""
    text = re.sub(r"^ascend_sp \d.*$", str(software()), text, flags=re.MULTILINE)
    return re.sub(r"# Graph \d+", "# Graph 0", text).split()


def without_numbers(text: str) -> str:
    # A single block has too few products without tokens for it to pay.
    text = text.partition("## Split by output features")[0]
    text = re.sub(r"\d+% \.\. \d+%", "N%", " ".join(words(text)))
    return re.sub(r"\d[\d.]*( [kMG]?B\b| m?s\b| us\b)?", "N", text)


def test_the_readme_shows_what_explain_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    line, said = shown()
    small = ["--num_layers", "0", "--num_single_layers", "1", "--option", "strategy=separate"]
    assert without_numbers(answer([*line, *small], monkeypatch)) == without_numbers(said)


@pytest.mark.slow
def test_the_readme_shows_what_explain_prints_with_its_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, said = shown()
    found = answer(line, monkeypatch)
    assert words(found) == words(said), f"put this there:\n{found}"


# The guide to a rule.

BLOCKS = [m[2] for m in FENCED.finditer(TEXTS["docs/writing_a_rule.md"]) if m[1] == "python"]
MISTAKES = {
    "no size": (", args={3: size}", "", r"native_group_norm.*rank \d: Expected X.numel\(\)"),
    "no refusal": ("x.shard.dim != 0", "False", "cannot lie as"),
    "refusals only": ("x.shard.dim != 0", "x.shard.dim < 9", "0.0 > 0.2"),
    "too few results": ("for _ in call.outputs", "for _ in call.outputs[1:]", "results"),
}


def prove_the_guide(rule: str) -> None:
    tables = (base.RULES, rule_cases.CASES, test_rules.KNOWN, test_rules.REFUSED)
    before = [dict(t) for t in tables]
    for table in tables[:2]:  # the package has a rule that does more
        table.pop(test_rules.aten.native_group_norm.default)
    known = set(base.RULES)
    try:
        space = {**vars(base), **vars(reductions), **vars(rule_cases), **vars(test_rules)}
        exec("from __future__ import annotations\n" + rule, space)
        for block in BLOCKS[1:]:
            exec("from __future__ import annotations\n" + block, space)
        (op,) = base.RULES.keys() - known
        test_rules.test_every_op_with_a_rule_has_a_case()
        test_rules.test_rule_is_right_on_every_rank(op)
        for name in test_rules.KNOWN.keys() - before[2].keys():
            test_rules.test_known_operation_runs_on_shards(name)
        for name in test_rules.REFUSED.keys() - before[3].keys():
            test_rules.test_operation_is_refused(name)
    finally:
        for t, old in zip(tables, before, strict=True):
            t.clear()
            t.update(old)


def test_the_guide_leads_to_a_green_test() -> None:
    assert len(BLOCKS) == 3
    prove_the_guide(BLOCKS[0])


@pytest.mark.parametrize("name", MISTAKES)
def test_the_guide_says_what_a_mistake_looks_like(name: str) -> None:
    right, wrong, message = MISTAKES[name]
    assert right in BLOCKS[0]
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        prove_the_guide(BLOCKS[0].replace(right, wrong))
