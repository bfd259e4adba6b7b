"""Every transformer of diffusers through the compiler, as diffusers' own tests build them.

    git clone --filter=blob:none https://github.com/huggingface/diffusers /tmp/diffusers
    git -C /tmp/diffusers checkout 58eb52c
    .venv/bin/python tests/all_of_diffusers.py /tmp/diffusers

Models and inputs are those of `tests/models/transformers` there: sizes that nobody here chose. Each
is compiled for 2 and 3 simulated ranks, every graph that Dynamo makes of it, and compared with
eager.
Printed is one line for each model and number of ranks, as Markdown; the exit status is 1 if one is
wrong or fails. A model that cannot be built with what is installed is named at the end.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ALLOWED = 1e-5
"""Largest difference to eager, as a share of the largest value."""
LIMIT = 600
"""Seconds for the models of one file."""


@dataclass
class Row:
    """One model on some ranks."""

    model: str
    ranks: int
    graphs: int = 0
    attentions: Counter = field(default_factory=Counter)
    collectives: Counter = field(default_factory=Counter)
    error: float = 0.0

    def __str__(self) -> str:
        split, all_ = self.attentions["split"], self.attentions.total()
        sent = ", ".join(f"{n} {op}" for op, n in sorted(self.collectives.items())) or "none"
        verdict = "" if self.error <= ALLOWED else " **wrong**"
        return (
            f"| {self.model} | {self.ranks} | {self.graphs} | {split} of {all_} | {sent} "
            f"| {self.error:.0e}{verdict} |"
        )


def random_weights(model: nn.Module) -> None:
    """diffusers starts some gates at zero, which hides mistakes."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point():
            nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.2)


def models(
    module: Any, weights: Callable[[nn.Module], None]
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """What the test classes of one of diffusers' files build."""
    seen = set()
    for made in list(vars(module).values()):
        if not isinstance(made, type) or made.__module__ != module.__name__:
            continue
        build = getattr(made, "get_init_dict", None)
        both = getattr(made, "prepare_init_args_and_inputs_for_common", None)
        if not hasattr(made, "model_class") or (build or both) in (None, *seen):
            continue
        seen.add(build or both)
        test = made()
        if build:
            init, inputs = test.get_init_dict(), test.get_dummy_inputs()
        else:
            init, inputs = test.prepare_init_args_and_inputs_for_common()
        torch.manual_seed(0)
        model = test.model_class(**init)
        weights(model)
        yield model.eval(), dict(inputs)


def tensors(output: Any) -> list[Tensor]:
    """The tensors in what a model returns."""
    from torch.utils._pytree import tree_leaves

    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def check(model: nn.Module, inputs: dict[str, Any], want: list[Tensor], ranks: int) -> Row:
    """Compile every graph of a call for simulated ranks, and compare with eager's `want`."""
    from ascend_sp.compiler.report.facts import report
    from simulator import Captured, intercept, simulate

    row = Row(type(model).__name__, ranks)

    def run(captured: Captured) -> Any:
        row.graphs += 1
        outputs, programs, ctx, network = simulate(captured, ranks)
        row.collectives.update(network.calls)
        found = report(programs[0], ctx, row.graphs, {}, {}, [])
        row.attentions["split"] += len(found.attentions) + len(found.local)
        row.attentions["whole"] += len(found.whole)
        for other in outputs[1:]:
            row.error = max(row.error, distance(tensors(other), tensors(outputs[0])))
        return outputs[0]

    got = tensors(intercept(run, model, **inputs))
    row.error = max(row.error, distance(got, want))
    return row


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value; inf if that is no number."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not b.numel():
            continue
        a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
        a, b = a.double(), b.double()
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def built(
    checkout: str, what: str, name: str, weights: Callable[[nn.Module], None] = random_weights
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The models of one file of diffusers' tests, and their inputs; none if it says why not."""
    warnings.filterwarnings("ignore")
    sys.path.insert(0, checkout)
    try:
        return list(models(importlib.import_module(f"tests.models.{what}.{name}"), weights))
    except Exception as e:
        print(f"cannot be built: {name}: {type(e).__name__}: {str(e).splitlines()[0]}")
        return []


def one_file(checkout: str, name: str, ranks: Sequence[int]) -> None:
    """The rows of one file of diffusers' tests."""
    for model, inputs in built(checkout, "transformers", name):
        try:
            with torch.no_grad():
                want = tensors(model(**inputs))
        except Exception as e:
            print(f"does not run here: {type(model).__name__}: {str(e).splitlines()[0]}")
            continue
        for size in ranks:
            try:
                print(check(model, inputs, want, size), flush=True)
            except Exception as e:
                told = f"{type(e).__name__}: {str(e).splitlines()[0]}"
                print(f"| {type(model).__name__} | {size} | | | | **fails** {told} |", flush=True)


def run_files(
    script: str,
    doc: str,
    what: str,
    head: str,
    ranks: list[int],
    one_file: Callable[..., None],
    more: Sequence[str] = (),
) -> None:
    """The command line of a program that takes each file of diffusers' tests for models of a kind.

    Args:
        script: the program, which is run once for each file, in a process of its own.
        doc: its text.
        what: the folder in which those files are.
        head: the first line of the table.
        ranks: numbers of ranks, where none are given.
        one_file: ``(checkout, name, ranks)`` prints the rows of a file.
        more: names besides those of the files.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", help="a checkout of diffusers")
    parser.add_argument("--ranks", type=int, nargs="+", default=ranks)
    parser.add_argument("--jobs", type=int, default=2, help="files at a time")
    parser.add_argument("--only", default="", help="files whose name holds this")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.file:
        one_file(given.checkout, given.file, given.ranks)
        return
    folder = Path(given.checkout) / "tests/models" / what
    files = sorted(f.stem for f in folder.glob("test_*.py"))
    names = [n for n in (*files, *more) if given.only in n]
    if not names:
        parser.error(f"no tests of {what} in {folder}: give a checkout of diffusers")
    columns = head.count("|") - 1
    print(head + "\n" + "|---" * columns + "|")
    left: list[str] = []

    def run(name: str) -> list[str]:
        command = [sys.executable, script, given.checkout, "--file", name, "--ranks"]
        command += map(str, given.ranks)
        empty = f"| {name} " + "| " * (columns - 1)
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return [f"{empty}**fails** more than {LIMIT} s |"]
        lines = done.stdout.splitlines()
        return lines if not done.returncode else [*lines, f"{empty}**fails** died |"]

    failed = False
    with ThreadPoolExecutor(given.jobs) as pool:
        for lines in pool.map(run, names):
            left += [line for line in lines if not line.startswith("|")]
            rows = [line for line in lines if line.startswith("|")]
            failed |= any("**" in row for row in rows)
            for row in rows:
                print(row, flush=True)
    print("\n".join(["", *left]))
    sys.exit(failed)


if __name__ == "__main__":
    columns = "| model | ranks | graphs | attentions split | collectives | difference |"
    run_files(__file__, __doc__ or "", "transformers", columns, [2, 3], one_file)
