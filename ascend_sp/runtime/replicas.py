"""Inputs that must be the same on all ranks, compared before a graph's first collective.

Each rank computes on its part of whole inputs that it holds itself. Where these differ (another
generator seed on one rank, weights loaded from another file) the result is no error but a wrong
picture. So at the first run the ranks compare hashes of their values: bits as they lie in memory,
except that any NaN equals any other, and 0.0 equals -0.0.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_sp.runtime import guards
from ascend_sp.runtime._pytorch import without_modes
from ascend_sp.runtime.errors import RankMismatchError
from ascend_sp.runtime.topology import Topology

ELEMENTS = 1 << 22
"""Elements of an input that are compared; of a larger one, so many spread evenly over it."""
OF_PARAMETER = 1 << 6
"""The same for a parameter or buffer: files differ everywhere, so a sample shows it."""
SHOWN = 8
"""Inputs that an error names."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

STEP = guards.Step(
    "compares the inputs of a run",
    "do not have the same inputs",
    "They died, or did not start this run: all ranks must call the model the same number of times.",
    " (option check_timeout)",
)


@dataclass(frozen=True)
class Input:
    """One input of a graph."""

    name: str
    """What the user calls it, as far as that is known."""
    parameter: bool = False
    """Whether it is a parameter or a buffer."""
    own: bool = False
    """Whether each rank has a part of its own of it, so that there is nothing to compare."""


def checked(
    run: Callable[[list[Any]], Sequence[Any]],
    topology: Topology,
    name: str,
    inputs: Sequence[Input],
    mode: str,
    timeout: float,
) -> Callable[[list[Any]], Sequence[Any]]:
    """`run`, which first compares its inputs with those of the other ranks.

    Args:
        run: the program of one rank, boxed.
        topology: its group; `run` itself is returned for P = 1.
        name: what to call the program.
        inputs: one for each argument.
        mode: ``"off"``, ``"once"`` (until the inputs were the same for the first time) or
            ``"always"``.
        timeout: seconds to wait for the other ranks.
    """
    if mode == "off" or topology.size == 1:
        return run
    due = True

    def checked_run(args: list[Any]) -> Sequence[Any]:
        nonlocal due
        if due:
            compare(topology, name, inputs, args, timeout)
            due = mode == "always"
        return run(args)

    return checked_run


def compare(
    topology: Topology, name: str, inputs: Sequence[Input], values: Sequence[Any], timeout: float
) -> None:
    """Compare `values` with those of the other ranks; every rank calls this.

    Raises:
        RankMismatchError: on every rank, naming the inputs and the ranks.
    """
    with without_modes():
        hashes = digests(inputs, values)
    rows = [
        (i.name, i.parameter, _described(v), h)
        for i, v, h in zip(inputs, values, hashes, strict=True)
    ]
    whole = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
    words = guards.exchange(topology, whole, timeout, STEP)
    if len(set(words)) == 1:
        return
    # All ranks have seen that, so all of them come here, and tell which.
    details = guards.Step.named("reports its inputs")
    each = [json.loads(w) for w in guards.exchange(topology, json.dumps(rows), timeout, details)]
    text = _report(topology, name, each)
    raise RankMismatchError(text + guards.agreeing_groups(topology, words))


def _report(topology: Topology, name: str, each: list[list[list[Any]]]) -> str:
    tables = [{row[0]: (row[2], row[3]) for row in rows} for rows in each]
    parameters = {row[0] for rows in each for row in rows if row[1]}
    names = list(dict.fromkeys(row[0] for rows in each for row in rows))
    different = [n for n in names if len({t.get(n) for t in tables}) > 1]
    different.sort(key=lambda n: n in parameters)
    lines = []
    for n in different[:SHOWN]:
        words = [" ".join(t[n]) if n in t else "(none)" for t in tables]
        found = guards.by_value(topology, words)
        said = "; ".join(f"{w} on rank(s) {r}" for w, r in found.items())
        lines.append(f"  {'parameter ' if n in parameters else ''}{n}: {said}")
    if len(different) > SHOWN:
        lines.append(f"  and {len(different) - SHOWN} more")
    count = sum(n in parameters for n in different)
    if len(different) > count:
        lines.append(
            "Call the model with the same values on all ranks: give each the same generator "
            'seed (torch.Generator("cpu").manual_seed(0)), prompt and image, or broadcast them '
            "from rank 0."
        )
    if count:
        lines.append(
            "Load the same weights on all ranks, LoRA included; a model with random weights needs "
            "the same torch.manual_seed before it is made."
        )
    return "\n".join(
        [
            f"the ranks of group {topology.group_name!r} {STEP.differing} for {name}: "
            f"{len(different)} of {len(names)} differ (hashes of values):",
            *lines,
            "check_inputs='off' (ASCEND_SP_CHECK_INPUTS=off) switches this check off.",
        ]
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    return type(value).__name__


def digests(inputs: Sequence[Input], values: Sequence[Any]) -> list[str]:
    """A hash of each value, 16 hex digits; one copy to the host for each device there is."""
    out = [""] * len(values)
    parts: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, (which, value) in enumerate(zip(inputs, values, strict=True)):
        if which.own:
            continue
        if isinstance(value, Tensor):
            raw = _bits(value.detach(), which.parameter)
            parts.setdefault(raw.device, []).append((i, raw))
        else:
            out[i] = _hash(repr(value).encode())
    for device, found in parts.items():
        if device.type == "cpu":
            for i, raw in found:
                out[i] = _hash_of(raw)
            continue
        joined = torch.cat([raw for _, raw in found]).cpu()
        for (i, _), raw in zip(found, joined.split([raw.numel() for _, raw in found]), strict=True):
            out[i] = _hash_of(raw)
    return out


def _bits(x: Tensor, parameter: bool) -> Tensor:
    """The bytes of `x`, or of a sample of it: uint8, 1-D, contiguous, on the device of `x`."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = spread(x.resolve_neg(), OF_PARAMETER if parameter else ELEMENTS)
    if x.dtype in FLOATS and not parameter:
        x = x + 0  # -0.0 becomes 0.0
        x = x.masked_fill_(x != x, math.nan)
    x = x.contiguous().view(-1)
    if x.dtype == torch.bool:
        return x.view(torch.uint8)
    return x.view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def spread(x: Tensor, limit: int) -> Tensor:
    """About `limit` elements of `x` from all over it, as a view; `x` itself if it has no more."""
    if x.numel() <= limit:
        return x
    # Dims that are short anyway are taken whole, and leave more to the others.
    index, left, room = [slice(None)] * x.dim(), x.dim(), limit
    for dim in sorted(range(x.dim()), key=lambda d: x.shape[d]):
        share = max(1, math.ceil(room ** (1 / left)))
        step = -(-x.shape[dim] // share)
        index[dim] = slice(None, None, step)
        room = max(1, room // -(-x.shape[dim] // step))
        left -= 1
    return x[tuple(index)]


def _hash_of(raw: Tensor) -> str:
    size = raw.numel()
    # Without NumPy there is no other way to a tensor's memory that does not copy it.
    return _hash((ctypes.c_char * size).from_address(raw.data_ptr()) if size else b"")


def _hash(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
