"""The tests with each PyTorch, torch_npu and Python that ascend_sp is for: ``make test-versions``.

Makes an environment a row of the tables below, in ``.versions``, runs the tests that touch what
differs there, prints the tables and writes docs/versions.md. ``--torch 2.10.0`` runs the rows with
that PyTorch only, and keeps what the page says of the others. Slow, and downloads gigabytes where
PyTorch's index of CPU builds cannot be reached; no part of ``make test``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/versions.md"
ENVIRONMENTS = ROOT / ".versions"
LIMIT = 3600
"""Seconds that the tests of one row may take."""

TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("pytorch_pins", "versions", "rules", "passes", "ulysses", "layout", "unfuse_bias"),
        *("inductor_order", "overlap", "gloo", "guards", "lockstep", "bad_input", "conventions"),
        *("explain", "targets", "unbacked", "rounding", "qwen_and_z_image", "other_models"),
        *("flux_simulated", "text_encoder", "multi_head", "three_dims"),
    )
]
"""What touches PyTorch: its private parts, Dynamo, AOTAutograd, Inductor, gloo; models."""
NPU_TESTS = ["tests/cann", "tests/npu"]


@dataclass(frozen=True)
class Row:
    """An environment, and what is to be said of it."""

    torch: str
    differs: str
    """What is other than in the versions around it, for ascend_sp."""
    python: str = "3.11"
    torch_npu: str = ""
    cann: str = ""
    """Which CANN goes with it, and where that is from."""
    demo: bool = False
    """Whether to run ``make demo``'s program, too."""

    @property
    def name(self) -> str:
        """What it is called on the page and on disk."""
        if self.torch_npu:
            return f"torch_npu {self.torch_npu}"
        return f"Python {self.python}" if self.demo else f"torch {self.torch}"


PYTORCH = (
    Row("2.10.0", ""),
    Row("2.11.0", ""),
    Row("2.12.1", ""),
    Row("2.13.0", ""),
    Row("2.14.1", ""),
    Row("2.15.0", ""),
)
TORCH_NPU = (
    Row("2.10.0", "", torch_npu="2.10.0.post7"),
    Row("2.12.0", "", torch_npu="2.12.0.post3"),
    Row("2.13.0", "", torch_npu="2.13.0"),
    Row("2.14.0", "", torch_npu="2.14.0"),
)
PYTHON = (
    Row("2.13.0", "", python="3.10", demo=True),
    Row("2.10.0", "", python="3.12", demo=True),
    Row("2.15.0", "", python="3.13", demo=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", metavar="VERSION", help="only rows with this PyTorch")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name holds this")
    args = parser.parse_args(argv)
    only = (args.torch or "").removeprefix("torch==").partition("+")[0]
    rows = [
        r
        for r in (*PYTORCH, *TORCH_NPU, *PYTHON)
        if only in ("", r.torch) and (args.only or "") in r.name
    ]
    if not rows:
        known = ", ".join(sorted({r.torch for r in (*PYTORCH, *TORCH_NPU, *PYTHON)}))
        parser.error(f"no row for {args.torch or args.only!r}; versions of PyTorch: {known}")
    found = told_before()
    failed = False
    for row in rows:
        result, right = run(row)
        found[row.name] = result
        failed |= not right
        print(f"{row.name}: {result}", flush=True)
        PAGE.write_text(page(found))  # a run that is cut short keeps what it has
    print(page(found))
    return int(failed)


def run(row: Row) -> tuple[str, bool]:
    """What the tests say in the environment of `row`, made if need be, and whether all passed."""
    folder = ENVIRONMENTS / row.name.replace(" ", "-")
    python = folder / "bin/python"
    log = folder.with_suffix(folder.suffix + ".log")
    try:
        if not (folder / ".ready").exists():
            make(row, folder)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        tests = TESTS
        if row.torch_npu:
            tests, site, cann = NPU_TESTS, folder / "npu", folder / "cann"
            call(python, "tests/cann/build.py", "--torch-npu", site, "--out", cann)
            env |= {
                "PYTHONPATH": str(site),
                "CANNSIM_LIB_DIR": str(cann),
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            }
        said = []
        if row.demo:
            line = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            call(*line, "examples/flux.py", env=env)
            said.append("demo runs")
        start = time.monotonic()
        processes = ["-n", "2", "--dist", "worksteal"] * (not row.torch_npu)
        line = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *processes, *tests]
        with log.open("w") as out:
            done = subprocess.run(
                line, cwd=ROOT, env=env, stdout=out, stderr=out, timeout=LIMIT, check=False
            )
    except (subprocess.SubprocessError, OSError) as e:
        output = getattr(e, "output", None) or ""
        print(output[-4000:], file=sys.stderr)
        return f"not run: {str(e)[:200]}", False
    last = log.read_text().splitlines()[-1:] or [""]
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", last[0])
    print(f"{row.name}: {time.monotonic() - start:.0f} s, {log}", flush=True)
    return ", ".join([*said, *(counts or [f"pytest ended with {done.returncode}"])]), not (
        done.returncode
    )


def make(row: Row, folder: Path) -> None:
    """An environment: PyTorch's CPU build where it can be had, the package, its tests' needs."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    pyenv = [str(p) for p in sorted(Path.home().glob(".pyenv/versions/*/bin"))]
    env = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), *pyenv])}
    shutil.rmtree(folder, ignore_errors=True)
    call(uv, "venv", "--quiet", "--python", row.python, folder, env=env)
    install = [uv, "pip", "install", "--quiet", "--python", str(folder)]
    torch = f"torch=={row.torch}"
    try:
        call(*install, "--torch-backend", "cpu", torch, env=env | {"UV_HTTP_RETRIES": "0"})
    except subprocess.CalledProcessError:
        call(*install, torch)
    call(*install, torch, "--editable", ".[dev]")
    if row.torch_npu:
        site = folder / "npu"
        wheel = f"torch-npu=={row.torch_npu}"
        call(*install, "--no-deps", "--target", site, wheel, "protobuf")
        call(folder / "bin/python", "tests/cann/cuda_build.py")
    (folder / ".ready").touch()


def call(*line: object, env: dict[str, str] | None = None) -> None:
    """Run a command in the root of the checkout; raises, with its output, if it fails."""
    subprocess.run(
        [str(x) for x in line], cwd=ROOT, env=env, check=True, text=True, timeout=LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def told_before() -> dict[str, str]:
    """What the page says of each row that was run before."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return dict(re.findall(r"^\| ((?:torch|Python)[^|]*?) \| ([^|]*?) \|", text, re.M))


HEAD = """# Versions

*Made by `make test-versions`, which runs the tests in an environment for each row; the words are in
`tests/all_versions.py`. One PyTorch alone: `make test-versions TORCH=2.10.0`.*

ascend_sp takes PyTorch 2.10 to 2.15. An older one is an error that names the oldest; with a newer
one it warns, once, that nobody has tested it. What it found stands at the head of `summary.md`, in
what `explain` says, and at the end of every error.

## PyTorch

On Linux, x86_64, with Python 3.11: the tests of private parts, rules, passes, Inductor's order,
gloo, guards, messages and one model of each kind. A slow test or one of a simulated NPU is not
among them.
"""
NPU = """
## torch_npu

With the PyTorch that the wheel asks for, all tests of the [simulated CANN](../tests/cann/README.md)
and of the simulated NPU: fused ops, both graph modes, FLUX, Qwen-Image-Edit and Z-Image at reduced
size on one and two ranks, order and overlap by traced events.
"""
INTERPRETERS = """
## Python

The package and its examples installed, the program of `make demo`, and the tests of the first
table.
"""


def page(found: dict[str, str]) -> str:
    """docs/versions.md."""
    return "".join(
        [
            HEAD,
            table(PYTORCH, found, ("what is other than in 2.13, for ascend_sp",), "differs"),
            NPU,
            table(TORCH_NPU, found, ("torch", "CANN", "what is other"), "torch", "cann", "differs"),
            INTERPRETERS,
            table(PYTHON, found, ("torch", "what is other"), "torch", "differs"),
        ]
    )


def table(rows: Sequence[Row], found: dict[str, str], heads: Sequence[str], *columns: str) -> str:
    """The rows as Markdown: name, what the tests said, and columns of facts."""
    lines = [("version", "tests", *heads), ("---",) * (2 + len(heads))]
    for row in rows:
        cells = (getattr(row, c) or "nothing" for c in columns)
        lines.append((row.name, found.get(row.name, "not run yet"), *cells))
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
