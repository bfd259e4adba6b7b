"""Options: what they are called, what they allow, and where their values come from.

``torch.compile(..., options={...})`` wins over the environment, which wins over the default. The
declarations below are the only list; error messages and documentation are made from them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ascend_sp.compiler import capacities
from ascend_sp.graph.cost.device import DEVICES
from ascend_sp.passes.overlap.strategies import parse
from ascend_sp.runtime.errors import ConfigError

PREFIX = "ASCEND_SP_"
NO_VARIABLE = ("mesh", "pre_passes", "post_passes", "observer")
"""Options whose values no environment variable can hold."""


def _flag(value: Any) -> bool:
    words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError


def _flag_or_auto(value: Any) -> str:
    return "auto" if value == "auto" else "on" if _flag(value) else "off"


def _positive(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError
    return int(value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) < float("inf"):
        raise ValueError
    return float(value)


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError
        return str(value)

    return parse


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [v.strip() for v in value.split(",") if v.strip()]
    if not all(isinstance(v, str) for v in value):
        raise ValueError
    return tuple(value)


def _strategy(value: Any) -> str:
    parse(value)
    return str(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < float("inf"):
        raise ValueError
    return float(value)


def _path(value: Any) -> str:
    return os.fspath(value)


def _passes(value: Any) -> tuple[Callable[..., Any], ...]:
    value = (value,) if callable(value) else tuple(value)
    if not all(callable(v) for v in value):
        raise ValueError
    return value


def _callable(value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise ValueError
    return value


def _mesh(value: Any) -> DeviceMesh:
    if not isinstance(value, DeviceMesh):
        raise ValueError
    return value


def _option(default: Any, parse: Callable[[Any], Any], allowed: str, effect: str) -> Any:
    return field(default=default, metadata={"parse": parse, "allowed": allowed, "effect": effect})


@dataclass(frozen=True)
class Config:
    """Every option of ``torch.compile(..., backend="ascend_sp", options={...})``."""

    sequence_parallel: bool = _option(
        True, _flag, "1/true/on or 0/false/off", "Shard the sequence; off compiles for one rank."
    )
    degree: int | None = _option(
        None, _positive, "a whole number >= 1", "Ranks that share a sequence; unset takes all."
    )
    mesh: DeviceMesh | None = _option(
        None,
        _mesh,
        "a torch DeviceMesh (1-D, or with a dim named 'sp'; for a ProcessGroup, "
        "DeviceMesh.from_group(group, device_type)); only as an option",
        "The ranks that share a sequence, instead of degree.",
    )
    target: str = _option(
        "auto",
        _one_of("auto", "inductor", "npugraph_ex", "torchair", "eager"),
        "auto, inductor, npugraph_ex, torchair or eager",
        "What the finished graph is lowered to; auto is npugraph_ex on Ascend (docs/ascend.md says "
        "why), inductor on CPU and CUDA, else eager.",
    )
    attention: str = _option(
        "auto",
        _one_of("auto", "sdpa", "math"),
        "auto, sdpa or math",
        "The kernel of attention; auto is Ascend's fused inference attention in its graphs, and "
        "sdpa, PyTorch's fused kernel of the device, elsewhere.",
    )
    on_unsharded: str = _option(
        "fallback",
        _one_of("fallback", "error"),
        "fallback or error",
        "What cannot be sharded runs on gathered tensors, or raises; so does what is warned of "
        "otherwise: that nothing is split, or that little comes of it.",
    )
    dump_dir: str | None = _option(
        None, _path, "a folder", "Write the graph after each pass, placements and collectives here."
    )
    skip_passes: tuple[str, ...] = _option(
        (), _names, "names of passes, separated by commas", "Leave these optional passes out."
    )
    verify: bool = _option(
        True, _flag, "1/true/on or 0/false/off", "Check the whole graph after every pass."
    )
    check_ranks: bool = _option(
        True,
        _flag,
        "1/true/on or 0/false/off",
        "At each compile, compare the program with the other ranks'.",
    )
    check_timeout: float = _option(
        300.0, _seconds, "seconds > 0", "How long each check waits for the other ranks."
    )
    check_inputs: str = _option(
        "once",
        _one_of("off", "once", "always"),
        "off, once or always",
        "Compare the values of inputs, and a sample of the weights, with the other ranks': at the "
        "first run of each graph, or at every run. A different seed on one rank is then an error, "
        "not a wrong picture.",
    )
    check_numerics: bool = _option(
        False,
        _flag,
        "1/true/on or 0/false/off",
        "At every run, also run the model's own graph, on whole tensors and op by op; where the "
        "results differ, an error names the pass and the first node. For debugging: adds the time "
        "and memory of a run on one rank.",
    )
    async_: bool = _option(
        True,
        _flag,
        "1/true/on or 0/false/off",
        "Overlap collectives with compute; off keeps the order of the model.",
    )
    strategy: str = _option(
        "auto",
        _strategy,
        "auto, separate, packed, pipelined or pipelined:N (N >= 2 groups of heads), or gather",
        "How queries meet keys of other ranks: rows are exchanged for heads (three ways), or keys "
        "and values are gathered; auto chooses for each attention by estimated cost.",
    )
    split_features: str = _option(
        "auto",
        _flag_or_auto,
        "auto, 1/true/on or 0/false/off",
        "Of products without tokens (modulation, embeddings of the time) each rank computes some "
        "output features, and these are gathered: auto where it pays by estimated cost, on "
        "wherever it is possible.",
    )
    buckets: capacities.Buckets = _option(
        capacities.Buckets(),
        capacities.parse,
        "auto, 0/false/off, a size, a list of sizes (128,512), or, only as an option, a dict of "
        "these by the name of an input",
        "Capacities for sizes that change (dynamic=True): a program runs with the next multiple of "
        "a size, or the next in a list, and what is too much is left out of every attention, so "
        "that Ascend's graphs are captured for few sizes; auto is multiples of a sixteenth of the "
        "sequence at most in Ascend's graphs, and off elsewhere (docs/serving.md).",
    )
    memory_budget: float = _option(
        0.1,
        _share,
        "a share >= 0, e.g. 0.1",
        "By how much overlap may raise the estimated peak memory of intermediate results.",
    )
    cost_model: str = _option(
        "auto",
        str,
        f"auto, {', '.join(DEVICES)}, or a file that `ascend_sp calibrate` wrote",
        "The device that times are estimated for; auto detects it.",
    )
    pre_passes: tuple[Callable[..., Any], ...] = _option(
        (),
        _passes,
        "functions (gm, ctx) -> gm; only as an option",
        "Passes of your own on the model's graph of whole tensors, before those of ascend_sp.",
    )
    post_passes: tuple[Callable[..., Any], ...] = _option(
        (),
        _passes,
        "functions (gm, ctx) -> gm; only as an option",
        "Passes of your own on one rank's finished program, before it is lowered.",
    )
    observer: Callable[..., Any] | None = _option(
        None,
        _callable,
        "a function (name, gm, ctx); only as an option",
        "Called with the graph before the first pass and after each pass, for inspection.",
    )

    @classmethod
    def load(cls, options: Mapping[str, Any] | None = None) -> Config:
        """The configuration from `options` and the environment.

        Raises:
            ConfigError: an unknown name, or a value that is not allowed.
        """
        declared = {option_name(f): f for f in fields(cls)}
        given = dict(options or {})
        for name in given:
            if name not in declared:
                raise ConfigError(
                    f"unknown option {name!r} for backend 'ascend_sp'. Options: "
                    f"{', '.join(declared)}."
                )
        for variable in os.environ:
            name = variable.removeprefix(PREFIX)
            known_name = name.lower() in declared and name.lower() not in NO_VARIABLE
            if variable.startswith(PREFIX) and not known_name:
                known = ", ".join(PREFIX + n.upper() for n in declared if n not in NO_VARIABLE)
                raise ConfigError(f"unknown environment variable {variable}. Known: {known}.")
        values: dict[str, Any] = {}
        for name, f in declared.items():
            variable = PREFIX + name.upper()
            if name in given:
                values[f.name] = _parse(f, f"option {name!r}", given[name])
            elif name not in NO_VARIABLE and os.environ.get(variable, "") != "":
                values[f.name] = _parse(f, variable, os.environ[variable])
        return cls(**values)

    def described(self) -> dict[str, str]:
        """The values as text, for dumps and for comparing ranks."""
        return {option_name(f): _text(getattr(self, f.name)) for f in fields(self)}


def _text(value: Any) -> str:
    """A value as text that is the same on all ranks: functions by their names."""
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else str(value)


def option_name(f: Field[Any]) -> str:
    """What a user calls an option; words that Python keeps for itself end in ``_`` here only."""
    return f.name.removesuffix("_")


def _parse(f: Any, source: str, value: Any) -> Any:
    if value is None and f.default is None:
        return None
    try:
        return f.metadata["parse"](value)
    except (ValueError, TypeError):
        raise ConfigError(f"{source} is {value!r}; it must be {f.metadata['allowed']}.") from None
