"""A whole pipeline on several ranks: each part by the means that there is for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ascend_sp.compiler.backend import ascend_sp as backend
from ascend_sp.compiler.config import Config
from ascend_sp.runtime._pytorch import not_compiled
from ascend_sp.runtime.errors import ConfigError, TextEncoderError
from ascend_sp.runtime.units import mib
from ascend_sp.text_encoder.apply import parallelize_text_encoder
from ascend_sp.weights.shard import shard_weights

CODES = ("encode", "decode")
"""The methods of an autoencoder."""


@dataclass(frozen=True)
class Part:
    """A component of the pipeline that is a module."""

    name: str
    """Its name in the pipeline."""
    module: str
    """Its class."""
    done: str
    """What is done with it: ``compiled``, ``weights split`` or ``whole``."""
    why: str
    """What that means for it, or why it is whole."""
    whole_bytes: int
    """Bytes of its parameters, all of them."""
    local_bytes: int
    """Bytes of its parameters that this rank holds."""


@dataclass(frozen=True)
class PipelineReport:
    """What `parallelize` did; print it for a table."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        rows = [
            (p.name, p.module, mib(p.whole_bytes), mib(p.local_bytes), f"{p.done}: {p.why}")
            for p in self.parts
        ]
        rows.insert(0, ("part", "class", "MiB", "on this rank", "what is done"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        lines = []
        for *cells, last in rows:
            padded = [c.ljust(w) for c, w in zip(cells, widths, strict=True)]
            lines.append("  ".join([*padded, last]))
        return "\n".join(lines)


def parallelize(
    pipe: Any,
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    budget: int | float | None = None,
    skip: Sequence[str] = (),
) -> PipelineReport:
    """Do with each part of a diffusion pipeline what spreads it over the ranks, in place.

    - Models of transformers (text and image encoders) get their weights split, by
      `parallelize_text_encoder`; those that it cannot split stay whole.
    - Of autoencoders, which are what encodes and decodes, these two methods are compiled. The first
      call of each splits its convolutions along a picture, if that pays by estimate.
    - All other modules (transformers, U-Nets, ControlNets) are compiled by
      ``torch.compile(module, backend="ascend_sp")``, which splits the sequence at their first call.

    Every rank calls this, with the pipeline on its device, and later calls the pipeline with the
    same arguments.

    Args:
        pipe: a pipeline of diffusers, or what has ``components`` by name as those have.
        options: of the backend, for what is compiled.
        dynamic: as `torch.compile` takes it, for what is compiled.
        budget: how much of the weights of each module that denoises a rank may hold, as
            `shard_weights` takes it; None leaves them whole.
        skip: names of components to leave as they are.

    Returns:
        What was done with each part, and the bytes.

    Raises:
        ConfigError: `pipe` has no components that are modules, `skip` names none of them, or an
            option does not exist or has a bad value (nothing has been changed then); or a bad
            budget.
        TopologyError, RankMismatchError: as `parallelize_text_encoder` and `shard_weights`.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ConfigError(
            f"parallelize takes a pipeline of diffusers, which has components by name, and got "
            f"{type(pipe).__name__}. For one module, write torch.compile(module, "
            'backend="ascend_sp").'
        )
    modules = {n: m for n, m in components.items() if isinstance(m, nn.Module)}
    unknown = sorted(set(skip) - set(modules))
    if unknown or not modules:
        raise ConfigError(
            f"parallelize: skip names {', '.join(unknown) or 'nothing'}, but the modules of "
            f"{type(pipe).__name__} are {', '.join(modules) or 'none'}."
        )
    Config.load(options or {})  # raises now what a bad option would raise in the first call
    how = {"backend": backend, "options": dict(options or {}), "dynamic": dynamic}
    return PipelineReport(
        tuple(
            _part(pipe, name, module, how, budget, skipped=name in skip)
            for name, module in modules.items()
        )
    )


def _part(
    pipe: Any,
    name: str,
    module: nn.Module,
    how: Mapping[str, Any],
    budget: int | float | None,
    *,
    skipped: bool,
) -> Part:
    size = sum(p.nbytes for p in module.parameters())

    def part(done: str, why: str, local: int = size) -> Part:
        return Part(name, type(module).__name__, done, why, size, local)

    if skipped:
        return part("whole", "as asked for")
    if not_compiled(module) is not module:
        return part("whole", "it is compiled already, and left as it is")
    if _is_of_transformers(module):
        if getattr(module, "_hf_hook", None) is not None:
            return part("whole", "it is offloaded, and what moves it would move parts of weights")
        try:
            split = parallelize_text_encoder(module)
        except TextEncoderError as e:
            return part("whole", str(e))
        if not split.split:
            return part("whole", "there is one rank")
        return part("weights split", f"over {split.ranks} ranks", split.local_bytes)
    if all(callable(getattr(module, method, None)) for method in CODES):
        if any(method in vars(module) for method in CODES):
            return part(
                "whole", "its methods are compiled already, or replaced, and left as they are"
            )
        for method in CODES:
            setattr(module, method, torch.compile(getattr(module, method), **how))
        return part("compiled", "pictures are split in its first call, if that pays by estimate")
    local = size
    if budget is not None:
        found = shard_weights(module, budget=budget)
        local = found.local_bytes + found.room
    setattr(pipe, name, torch.compile(module, **how))
    return part("compiled", "its sequence is split in its first call, which compiles", local)


def _is_of_transformers(module: nn.Module) -> bool:
    """Whether it is a model of the library of that name; if that is not loaded, it is none."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)
