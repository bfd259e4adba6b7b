"""The tests with each PyTorch, torch_npu and Python that ascend_sp is for: ``make test-versions``.

Makes an environment for each row of the tables below, in ``.versions``, runs the tests that touch
what differs there, keeps what they said in docs/versions.json and writes docs/versions.md from it.
``--torch 2.10.0`` runs the rows with that PyTorch only. Slow, and downloads gigabytes where
PyTorch's index of CPU builds cannot be reached; no part of ``make test``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/versions.md"
RESULTS = ROOT / "docs/versions.json"
ENVIRONMENTS = ROOT / ".versions"
LIMIT = 3600
"""Seconds that one command may take."""
FACTS = "test_conversion_facts"
"""The module whose tests are a trap of torch_npu each."""


def _files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


CORE = _files("pytorch_pins", "versions", "passes", "conventions")
"""Private PyTorch, passes on Dynamo's and AOTAutograd's graphs, what PyTorch's users expect."""
TESTS = [
    *CORE,
    *_files("rules", "ulysses", "unfuse_bias", "gloo", "inductor_order", "guards"),
    *_files("other_models", "explain"),
    # What weights are read on to is for the process group to say, and for the build of PyTorch.
    "tests/test_text_encoder_weights.py::test_weights_are_read_shard_by_shard",
]
NPU_TESTS = ["tests/cann", "tests/npu"]


@dataclass(frozen=True)
class Row:
    """An environment, and what is to be said of it."""

    torch: str
    differs: str = ""
    """What differs from the version of ``make test``, for ascend_sp."""
    python: str = "3.11"
    torch_npu: str = ""
    cann: str = ""
    """Which CANN goes with it, and where that is from."""
    demo: bool = False
    """Whether this is about Python: the program of ``make demo``, too, and the core only."""

    @property
    def name(self) -> str:
        """What it is called on the page and on disk."""
        if self.torch_npu:
            return f"torch_npu {self.torch_npu}"
        return f"Python {self.python}" if self.demo else f"torch {self.torch}"


_SCHEDULER = "Inductor's cache takes a pass over its scheduler only as a `CustomGraphPass`"
_TAGS = "`leaky_relu`, `ldexp` and `_conj_physical` are not tagged as pointwise"
_MOVES = (
    "Inductor moves collectives and waits by itself (`enable_simple_overlap`): switched off in "
    "graphs that communicate. Left on, it gives 8 of 145 kernels of a reduced FLUX another place, "
    "and none of its collectives, waits and matmuls: those depend on each other"
)
PYTORCH = (
    Row(
        "2.10.0",
        f"{_SCHEDULER}; {_TAGS}; AOTAutograd refuses fake inputs of another mode, which `explain` "
        "has: they are made over",
    ),
    Row("2.11.0", f"{_SCHEDULER}; {_TAGS}"),
    Row("2.12.1", _SCHEDULER),
    Row("2.13.0"),
    Row("2.14.1", _MOVES),
    Row("2.15.0", f"{_MOVES}; a linear layer ends with `_unsafe_view`"),
)
_TABLE = "9.1.0: torch_npu's COMPATIBILITY.md"
_NONE = "in no table that could be read; some features that ascend_sp does not use ask for 9.2.0"
TORCH_NPU = (
    Row(
        "2.10.0",
        "requires `torch==2.10.0+cpu` on x86-64, which PyPI lacks; memory of npugraph_ex's scopes, "
        "which ascend_sp does not use, is not given away early",
        torch_npu="2.10.0.post4",
        cann="9.1.0: Dockerfiles of vllm-ascend 0.23.0, which has this one",
    ),
    Row(
        "2.10.0",
        "requires `torch==2.10.0+cpu` on x86-64, which PyPI lacks",
        torch_npu="2.10.0.post7",
        cann=_TABLE,
    ),
    Row("2.12.0", torch_npu="2.12.0.post3", cann=_TABLE),
    Row("2.13.0", torch_npu="2.13.0", cann=_NONE),
    Row("2.14.0", torch_npu="2.14.0", cann=_NONE),
)
PYTHON = (
    Row(
        "2.13.0",
        "the last diffusers for it is 0.41, so the models are those of 0.41",
        python="3.10",
        demo=True,
    ),
    Row("2.10.0", "what vllm-ascend's images hold", python="3.12", demo=True),
    Row("2.15.0", python="3.13", demo=True),
)
ALL = (*PYTORCH, *TORCH_NPU, *PYTHON)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", default="", metavar="VERSION", help="rows with this PyTorch")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
    args = parser.parse_args(argv)
    version = args.torch.removeprefix("torch==").partition("+")[0]
    rows = [r for r in ALL if version in ("", r.torch) and args.only in r.name]
    if not rows:
        known = ", ".join(sorted({r.torch for r in ALL}))
        parser.error(f"no row for {version} {args.only}; versions of PyTorch: {known}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wrong = 0
    for row in rows:
        results[row.name] = found = run(row)
        wrong += not found["right"]
        print(f"{row.name}: {found['tests']}", flush=True)
        # Now, so that a run that is cut short keeps what it has.
        kept = {r.name: results[r.name] for r in ALL if r.name in results}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(page(kept))
    print(page(results))
    return int(wrong > 0)


def run(row: Row) -> dict[str, Any]:
    """What the tests say in the environment of `row`, made if need be."""
    folder = ENVIRONMENTS / row.name.replace(" ", "-")
    python, log, report = folder / "bin/python", folder / "log.txt", folder / "report.xml"
    # Its own cache: in a shared one, an earlier run that was stopped may have left half a file.
    cache = folder / "inductor"
    shutil.rmtree(cache, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    said = []
    try:
        if not (folder / "ready").exists():
            make(row, folder)
        if row.torch_npu:
            site, cann = folder / "npu", folder / "cann"
            call(python, "tests/cann/build.py", "--torch-npu", site, "--out", cann)
            env |= {
                "PYTHONPATH": str(site),
                "CANNSIM_LIB_DIR": str(cann),
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            }
        if row.demo:
            ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
            call(python, *ranks, "examples/flux.py", "--output", folder / "flux.png", env=env)
            said = ["demo runs"]
        tests = NPU_TESTS if row.torch_npu else CORE if row.demo else TESTS
        line = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        report.unlink(missing_ok=True)
        with log.open("w") as out:
            done = subprocess.run(
                [*line, "-n", "2", "--dist", "worksteal", *tests],
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=out,
                timeout=LIMIT,
                check=False,
            )
        outcomes = read(report)
    except (subprocess.SubprocessError, OSError) as e:
        print((getattr(e, "output", None) or "")[-4000:], file=sys.stderr)
        return {"tests": f"could not be run: {str(e)[:200]}", "right": False}
    counts = Counter(o for _, _, o in outcomes)
    facts: dict[str, list[bool]] = {}
    for module, name, outcome in outcomes:
        if module.endswith(FACTS):
            facts.setdefault(name.partition("[")[0], []).append(outcome == "passed")
        if outcome == "failed":
            print(f"  {module}::{name}, see {log}", flush=True)
    return {
        "tests": ", ".join([*said, *(f"{n} {outcome}" for outcome, n in sorted(counts.items()))]),
        "right": done.returncode == 0,
        "facts": sorted(name for name, holds in facts.items() if all(holds)),
    }


def read(report: Path) -> list[tuple[str, str, str]]:
    """Module, name and outcome of each test in what pytest wrote."""
    out = []
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        bad = "failed" if tags & {"failure", "error"} else ""
        outcome = bad or ("skipped" if "skipped" in tags else "passed")
        out.append((case.get("classname", ""), case.get("name", ""), outcome))
    return out


def make(row: Row, folder: Path) -> None:
    """An environment: PyTorch's CPU build where it can be had, the package, its tests' needs."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    pyenv = [str(p) for p in sorted(Path.home().glob(".pyenv/versions/*/bin"))]
    env = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), *pyenv])}
    shutil.rmtree(folder, ignore_errors=True)
    call(uv, "venv", "--quiet", "--python", row.python, folder, env=env)
    install = [uv, "pip", "install", "--quiet", "--python", folder / "bin/python"]
    torch = f"torch=={row.torch}"
    try:
        call(*install, "--torch-backend", "cpu", torch, env=env | {"UV_HTTP_RETRIES": "0"})
    except subprocess.CalledProcessError:
        call(*install, torch)
    call(*install, torch, "--editable", ".[dev]")
    if row.torch_npu:
        call(
            *install,
            *("--no-deps", "--target", folder / "npu"),
            *(f"torch-npu=={row.torch_npu}", "protobuf"),
        )
        (packages,) = folder.glob("lib/python*/site-packages")
        call(folder / "bin/python", "tests/cann/cuda_build.py", packages)
    (folder / "ready").touch()


def call(*line: object, env: dict[str, str] | None = None) -> None:
    """Run a command in the root of the checkout; raises, with its output, if it fails."""
    subprocess.run(
        [str(x) for x in line],
        cwd=ROOT,
        env=env,
        check=True,
        text=True,
        timeout=LIMIT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


HEAD = """# Versions

*Made by `make test-versions`, which runs the tests in an environment for each row; the words are in
`tests/all_versions.py`. One PyTorch alone: `make test-versions TORCH=2.10.0`.*

ascend_sp takes PyTorch 2.10 to 2.15. An older one is an error that names the oldest; with a newer
one it warns, once, that nobody has tested it. What it found stands at the head of `summary.md`, in
what `explain` says, and at the end of every error.

## PyTorch

With Python 3.11: the tests of private parts, rules, passes, Inductor's order, gloo, guards, errors
and `explain`; FLUX, Qwen-Image-Edit, Z-Image and Wan at reduced size on two ranks, against eager;
other models on simulated ranks; a text encoder's weights.
"""
NPU = """
## torch_npu

With the PyTorch that the wheel asks for, all tests of the [simulated CANN](../tests/cann/README.md)
and of the simulated NPU: fused ops, both graph modes, FLUX, Qwen-Image-Edit and Z-Image at reduced
size on one and two ranks, order and overlap by traced events.
"""
TRAPS = """
## Traps of torch_npu

What ascend_sp works around, each a test of `tests/cann/test_conversion_facts.py`, and the versions
of torch_npu that were found to have it.
"""
INTERPRETERS = """
## Python

The package and its examples installed, the program of `make demo` (FLUX on two ranks, against one),
and of the tests of the first table those of private parts, versions, passes and conventions.
"""


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/versions.md."""
    have: dict[str, list[str]] = {}
    for row in TORCH_NPU:
        for fact in results.get(row.name, {}).get("facts", ()):
            have.setdefault(fact, []).append(row.torch_npu)
    every = [r.torch_npu for r in TORCH_NPU]
    traps = [
        (fact.removeprefix("test_").replace("_", " "), "all" if v == every else ", ".join(v))
        for fact, v in sorted(have.items())
    ]
    return "".join(
        [
            HEAD,
            rows(PYTORCH, results, ("what differs from 2.13, for ascend_sp",), "differs"),
            NPU,
            rows(TORCH_NPU, results, ("torch", "CANN", "what differs"), "torch", "cann", "differs"),
            TRAPS,
            table(("trap", "versions"), traps),
            INTERPRETERS,
            rows(PYTHON, results, ("torch", "what differs"), "torch", "differs"),
        ]
    )


def rows(
    rows: Sequence[Row], results: dict[str, dict[str, Any]], heads: Sequence[str], *columns: str
) -> str:
    """A table of environments: name, what the tests said, and columns of facts."""
    lines = [
        (
            row.name,
            results.get(row.name, {}).get("tests", "not run yet"),
            *(getattr(row, c) or "nothing" for c in columns),
        )
        for row in rows
    ]
    return table(("version", "tests", *heads), lines)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n" + "".join(
        f"| {' | '.join(line)} |\n" for line in (heads, ("---",) * len(heads), *lines)
    )


if __name__ == "__main__":
    sys.exit(main())
