"""Every autoencoder of diffusers through the compiler, on simulated ranks.

    git clone --filter=blob:none https://github.com/huggingface/diffusers /tmp/diffusers
    git -C /tmp/diffusers checkout 58eb52c
    .venv/bin/python tests/all_autoencoders.py /tmp/diffusers

Models are those of `tests/models/autoencoders` there, and of `autoencoders.py` where that has
none. `decode` of latents whose height, width or length divides by no number of ranks, and
`encode`, are compiled for 2, 3 and 4 simulated ranks, every graph that Dynamo makes of them, and
compared with eager in float32; where that is off by more than 2e-5, in float64, too, which tells
rounding from mistakes. Weights are those that a class begins with, but none is left constant, as
gates that begin at zero hide mistakes. Links cost nothing, so that small pictures are split, too.

A row says how many convolutions are split, what keeps the first op whole that is not, the exchanges
of one call on two ranks, and the largest differences, as a share of the largest value. The last
column is the same difference for the class's own tiling, in tiles of rather more than half the
picture. The exit status is 1 if a row is wrong or fails.
"""

from __future__ import annotations

import copy
import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from all_of_diffusers import built, distance, run_files, tensors
from autoencoders import OWN, own

ALLOWED = 2e-5
"""Largest difference to eager, as a share of the largest value."""
HEAD = (
    "| class | call | input | graphs | convolutions split | why not all | exchanges "
    "| float32 on 2, 3, 4 ranks | float64 | tiling |"
)
CONVOLUTION = torch.ops.aten.convolution.default
SHORT = {"all_to_all_single": "all-to-all", "all_gather_into_tensor": "all-gather"}
Call = tuple[str, Callable[[nn.Module, Tensor], Any], Tensor]


@dataclass
class Row:
    """One call of a model."""

    model: str
    call: str
    shape: Sequence[int]
    graphs: int = 0
    convolutions: Counter = field(default_factory=Counter)
    why: str = ""
    collectives: Counter = field(default_factory=Counter)
    errors: dict[torch.dtype, list[float]] = field(default_factory=dict)
    tiled: float | None = None

    @property
    def right(self) -> bool:
        """Whether every number of ranks gives eager's result, in the widest dtype that was run."""
        return max(self.errors.get(torch.float64) or self.errors[torch.float32]) <= ALLOWED

    def __str__(self) -> str:
        sent = ", ".join(f"{n} {SHORT.get(op, op)}" for op, n in sorted(self.collectives.items()))
        split = f"{self.convolutions['split']} of {self.convolutions.total()}"
        told = [
            " ".join(f"{e:.0e}" for e in self.errors.get(dtype, ()))
            for dtype in (torch.float32, torch.float64)
        ]
        told[1] += "" if self.right else " **wrong**"
        tiled = "" if self.tiled is None else f"{self.tiled:.0e}"
        shape = "x".join(map(str, self.shape))
        cells = [self.model, self.call, shape, self.graphs, split, self.why, sent or "none", *told]
        return "| " + " | ".join(map(str, [*cells, tiled])) + " |"


def check(
    row: Row, call: Callable[[Tensor], Any], x: Tensor, want: list[Tensor], size: int
) -> None:
    """Compile every graph of a call for simulated ranks, and compare with eager's `want`."""
    from ascend_sp.compiler.config import Config
    from ascend_sp.graph.layout import PLACEMENTS, Padded, Shard
    from checks import free_links
    from simulator import Captured, intercept, simulate

    first = not row.errors
    errors = row.errors.setdefault(x.dtype, [])
    config = Config(
        strategy="separate", cost_model=free_links(Path(tempfile.mkdtemp())), verify=size == 3
    )
    worst = 0.0

    def run(captured: Captured) -> Any:
        nonlocal worst
        outputs, programs, ctx, network = simulate(captured, size, config)
        for other in outputs[1:]:
            worst = max(worst, distance(tensors(other), tensors(outputs[0])))
        if first:
            row.graphs += 1
            row.collectives.update(network.calls)
            for node in programs[0].graph.find_nodes(op="call_function", target=CONVOLUTION):
                placed = node.meta.get(PLACEMENTS, ())
                split = any(isinstance(p, Shard | Padded) for p in placed)
                row.convolutions["split" if split else "whole"] += 1
            for note in ctx.notes:
                if str(note.kind) == "unsharded" and not row.why:
                    row.why = note.text.replace("runs on gathered operands: ", "") + f" ({note.op})"
        return outputs[0]

    got = tensors(intercept(run, call, x))
    errors.append(max(worst, distance(got, want)))


def latent_of(encoded: Any) -> Any:
    """What `decode` takes, of what `encode` returns."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latent", "latents"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    if isinstance(encoded, Tensor):
        return encoded
    if isinstance(encoded, tuple) and isinstance(encoded[0], Tensor):
        return encoded[0]
    raise TypeError(f"no latents in {type(encoded).__name__}")


def decode(model: Any, z: Tensor) -> Tensor:
    return tensors(model.decode(z, **model.more_for_decode))[0]


def encode(model: Any, x: Tensor) -> Tensor:
    return latent_of(model.encode(x, **model.more_for_encode))


def begin(model: nn.Module) -> None:
    """Weights as the class begins with, none of them constant."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
            p.data += 0.1 * torch.randn_like(p)


def calls(model: nn.Module, sample: Tensor | None, latents: Sequence[int]) -> list[Call]:
    """`decode` and `encode`, with inputs of odd sizes if the class takes such."""
    torch.manual_seed(0)
    found: list[Call] = []
    with torch.no_grad():
        if sample is None:
            z = torch.randn(*latents)
        else:
            given = encode(model, sample)
            z = given if given.dtype != sample.dtype else _uneven(model, given)
        found.append(("decode", decode, z))
        picture = decode(model, z)
        x = torch.randn_like(picture) if picture.is_floating_point() else sample
        try:
            assert x is not None
            encode(model, x)
        except Exception:
            x = sample
        if x is not None:
            found.append(("encode", encode, x))
    return found


def _uneven(model: nn.Module, z: Tensor) -> Tensor:
    """Latents like `z` of 5 x 7, or of 17, if `decode` takes them."""
    positions = min(z.dim() - 2, 2)
    new = torch.randn(*z.shape[: z.dim() - positions], *((5, 7) if positions == 2 else (17,)))
    try:
        decode(model, new)
    except Exception:
        return z
    return new


def tiled(model: Any, name: str, call: Callable, x: Tensor, want: list[Tensor]) -> float | None:
    """The difference of the class's own tiling; None if it has none for this call."""
    model = copy.deepcopy(model)
    if not hasattr(model, "enable_tiling"):
        return None
    with torch.no_grad():
        z = x if name == "decode" else want[0]
        picture = want[0] if name == "decode" else x
        for what, n in (("height", -2), ("width", -1), ("size", -2)):
            times = picture.shape[n] // z.shape[n]
            tile = z.shape[n] // 2 + 2
            for attribute, value in {
                f"tile_sample_min_{what}": tile * times,
                f"tile_latent_min_{what}": tile,
                f"tile_sample_stride_{what}": (tile - 2) * times,
            }.items():
                if hasattr(model, attribute):
                    setattr(model, attribute, value)
        try:
            model.enable_tiling()
            got = tensors(call(model, x))
            different = got[0].shape == want[0].shape and not torch.equal(got[0], want[0])
            return distance(got, want) if different else None
        except Exception:
            return None


def one_file(checkout: str, name: str, ranks: Sequence[int]) -> None:
    """The rows of one file of diffusers' tests, or of a class of `OWN`."""
    if name in OWN:
        model, latents = own(name)
        found: list[tuple[nn.Module, dict[str, Any], Sequence[int]]] = [(model, {}, latents)]
    else:
        # Their tests are decorated by a package that need not be here; only their models are
        # wanted.
        same = SimpleNamespace(expand=lambda *_, **__: lambda test: test)
        sys.modules.setdefault("parameterized", SimpleNamespace(parameterized=same))  # type: ignore[arg-type]
        found = [(m, i, ()) for m, i in built(checkout, "autoencoders", name, begin)]
    for model, inputs, latents in found:
        kind = type(model).__name__
        if name in OWN:
            begin(model)
        takes: Any = inspect.signature(model.decode).parameters  # type: ignore[arg-type]
        model.more_for_decode = {n: x for n, x in inputs.items() if n in takes}
        draws = "sample_posterior" in inspect.signature(model.encode).parameters  # type: ignore[arg-type]
        model.more_for_encode = {"sample_posterior": False} if draws else {}
        try:
            todo = calls(model, inputs.get("sample"), latents)
        except Exception as e:
            told = (str(e) or "-").splitlines()[0]
            print(f"does not run here: {kind}: {type(e).__name__}: {told}")
            continue
        for call, fn, x in todo:
            row = Row(kind, call, tuple(x.shape))
            try:
                rows(row, model, fn, x, ranks)
                print(row, flush=True)
            except NotImplementedError as e:
                print(f"not compared: {kind}, {call}: {e}")
            except Exception as e:
                told = f"{type(e).__name__}: {(str(e) or '-').splitlines()[0][:200]}"
                empty = "| " * (HEAD.count("|") - 4)
                print(f"| {kind} | {call} {empty}**fails** {told} |", flush=True)


def rows(row: Row, model: nn.Module, fn: Callable, x: Tensor, ranks: Sequence[int]) -> None:
    """Fill `row`."""
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        given = x.to(dtype) if x.is_floating_point() else x
        with torch.no_grad():
            want = tensors(fn(model, given))
            again = tensors(fn(model, given))
        assert all(x.count_nonzero() for x in want), "nothing to compare"
        if not all(map(torch.equal, want, again)):
            raise NotImplementedError("it draws random numbers: eager differs from itself")
        if dtype == torch.float32:
            row.tiled = tiled(model, row.call, fn, given, want)
        for size in ranks:
            check(row, partial(fn, model), given, want, size)
        if max(row.errors[dtype]) <= ALLOWED:
            break


if __name__ == "__main__":
    run_files(__file__, __doc__ or "", "autoencoders", HEAD, [2, 3, 4], one_file, tuple(OWN))
