"""Every autoencoder of diffusers through the compiler, as diffusers' own tests build them.

    git clone --filter=blob:none https://github.com/huggingface/diffusers /tmp/diffusers
    git -C /tmp/diffusers checkout 58eb52c
    .venv/bin/python tests/all_autoencoders.py /tmp/diffusers

Models and inputs are those of `tests/models/autoencoders` there. `encode`, and `decode` of what
that yields, are compiled for 2, 3 and 4 simulated ranks, every graph that Dynamo makes of them, and
compared with eager, in float64: some of these models, with their random weights, make 5e-5 of the
last bits of float32. Links cost nothing, so that small pictures are split, too. A row says how many
convolutions are split, what keeps the first other op whole, the exchanges of
one call, and the largest difference. The exit status is 1 if a row is wrong or fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from all_of_diffusers import built, distance, run_files, tensors

ALLOWED = 2e-5
"""Largest difference to eager, as a share of the largest value."""
HEAD = (
    "| class | call | ranks | graphs | convolutions split | why not all | exchanges | difference |"
)
CONVOLUTION = torch.ops.aten.convolution.default


@dataclass
class Row:
    """One call of a model on some ranks."""

    model: str
    call: str
    ranks: int
    graphs: int = 0
    convolutions: Counter = field(default_factory=Counter)
    why: str = ""
    collectives: Counter = field(default_factory=Counter)
    error: float = 0.0

    def __str__(self) -> str:
        sent = ", ".join(f"{n} {op}" for op, n in sorted(self.collectives.items())) or "none"
        verdict = "" if self.error <= ALLOWED else " **wrong**"
        split = f"{self.convolutions['split']} of {self.convolutions.total()}"
        cells = [self.model, self.call, self.ranks, self.graphs, split, self.why, sent]
        return "| " + " | ".join(map(str, cells)) + f" | {self.error:.0e}{verdict} |"


def check(
    name: str, call: str, fn: Callable[[Tensor], Any], x: Tensor, want: list[Tensor], ranks: int
) -> Row:
    """Compile every graph of a call for simulated ranks, and compare with eager's `want`."""
    from ascend_sp.compiler.config import Config
    from ascend_sp.graph.layout import PLACEMENTS, Shard
    from checks import free_links
    from simulator import Captured, intercept, simulate

    row = Row(name, call, ranks)
    config = Config(
        strategy="separate", cost_model=free_links(Path(tempfile.mkdtemp())), verify=ranks == 3
    )

    def run(captured: Captured) -> Any:
        row.graphs += 1
        outputs, programs, ctx, network = simulate(captured, ranks, config)
        row.collectives.update(network.calls)
        for node in programs[0].graph.find_nodes(op="call_function", target=CONVOLUTION):
            split = any(isinstance(p, Shard) for p in node.meta.get(PLACEMENTS, ()))
            row.convolutions["split" if split else "whole"] += 1
        for note in ctx.notes:
            if str(note.kind) == "unsharded" and not row.why:
                row.why = note.text.replace("runs on gathered operands: ", "") + f" ({note.op})"
        for other in outputs[1:]:
            row.error = max(row.error, distance(tensors(other), tensors(outputs[0])))
        return outputs[0]

    got = tensors(intercept(run, fn, x))
    row.error = max(row.error, distance(got, want))
    return row


def latent_of(encoded: Any) -> Any:
    """What `decode` takes, of what `encode` returns."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latent", "latents"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    raise TypeError(f"no latents in {type(encoded).__name__}")


def calls(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[str, Callable, Tensor]]:
    """`decode` and `encode` with their inputs."""
    model.double()
    x = inputs["sample"].double()
    z = latent_of(model.encode(x))
    return [
        ("decode", lambda z: tensors(model.decode(z))[0], z),
        ("encode", lambda x: latent_of(model.encode(x)), x),
    ]


def one_file(checkout: str, name: str, ranks: Sequence[int]) -> None:
    """The rows of one file of diffusers' tests."""
    # Their tests are decorated by a package that need not be here; only their models are wanted.
    same = SimpleNamespace(expand=lambda *_, **__: lambda test: test)
    sys.modules.setdefault("parameterized", SimpleNamespace(parameterized=same))  # type: ignore[arg-type]
    for model, inputs in built(checkout, "autoencoders", name):
        kind = type(model).__name__
        try:
            with torch.no_grad():
                found = [(call, fn, x, tensors(fn(x))) for call, fn, x in calls(model, inputs)]
        except Exception as e:
            print(
                f"does not run here: {kind}: {type(e).__name__}: {(str(e) or '-').splitlines()[0]}"
            )
            continue
        for call, fn, x, want in found:
            for size in ranks:
                try:
                    print(check(kind, call, fn, x, want, size), flush=True)
                except Exception as e:
                    told = f"{type(e).__name__}: {(str(e) or '-').splitlines()[0][:200]}"
                    print(f"| {kind} | {call} | {size} | | | | | **fails** {told} |", flush=True)


if __name__ == "__main__":
    run_files(__file__, __doc__ or "", "autoencoders", HEAD, [2, 3, 4], one_file)
