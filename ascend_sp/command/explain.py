"""Say what the backend would do with a model at its real size, without devices or weights.

    python -m ascend_sp explain FILE.py:function --height 2048 --width 2048 --ranks 8 --device 910B4
    python -m ascend_sp explain SomeModel --config config.json --dtype bf16 --ranks 4 \
        --input hidden_states=bf16[1,4096,64] --input timestep=bf16[1]

WHAT is a class of diffusers, any other as package.module.Class, or FILE.py:function. A function
gets the options that explain does not know (--height 2048) as keyword arguments, runs with ``meta``
as the default device, and returns (model, kwargs) or (model, args, kwargs).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ascend_sp.compiler.explain import LEAST, explain
from ascend_sp.runtime.errors import AscendSPError

SHORT = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "f16": torch.float16,
    "fp32": torch.float32,
    "f32": torch.float32,
    "i64": torch.int64,
    "i32": torch.int32,
}
SIZE = re.compile(r"(?P<number>[\d.]+)\s*(?P<unit>[kMGT])(?P<binary>i?)B")
TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\]")


class UsageError(Exception):
    """Something on the command line is not right."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    try:
        return _run(argv)
    except (UsageError, AscendSPError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    options = dict(_pair(text, "--option") for text in args.option)
    options |= {"ranks": args.ranks, "rank": args.rank}
    if args.budget:
        options["budget"] = _budget(args.budget)
    if args.device:
        options["device"] = args.device
    if args.dump:
        options["dump_dir"] = args.dump
    with torch.device("meta"):
        model, positional, named = _made(args, _keywords(others))
    if isinstance(model, torch.nn.Module):
        model = model.eval()
    found = explain(model, *positional, **named, explain_options=options)
    if args.json:
        Path(args.json).write_text(found.to_json())
    found.show(full=args.full)
    if args.dump:
        print(f"\nEverything about it: {args.dump}")
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m ascend_sp explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("what", metavar="WHAT", help="a class, or FILE.py:function")
    add("--ranks", type=int, default=2, help="devices that share the sequence (default: 2)")
    add("--rank", type=int, default=0, help="the one to look at (default: 0)")
    add("--device", help="npu, cpu, cuda, a card (910B3, 910B4), or a file of calibrate")
    add("--budget", help="weights a rank may hold: 24GB, 20GiB, a share (0.5), or least")
    add("--dtype", help="of the weights of a class, e.g. bf16")
    add("--config", action="append", default=[], metavar="FILE|NAME=VALUE", help="of a class")
    add("--input", action="append", default=[], metavar="NAME=DTYPE[SHAPE]|NAME=VALUE")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the backend")
    add("--full", action="store_true", help="print every section, not only what fits a screen")
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--dump", metavar="FOLDER", help="write graphs, pictures and timelines")
    return parser


def _made(
    args: argparse.Namespace, given: dict[str, Any]
) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """The model, and what it is called with."""
    file, colon, name = args.what.rpartition(":")
    if colon:
        if args.config or args.input or args.dtype:
            raise UsageError("--config, --input and --dtype are for a class, not for a function.")
        made = _function(file, name)(**given)
        if not isinstance(made, tuple) or len(made) not in (2, 3):
            raise UsageError(f"{name} must return (model, kwargs) or (model, args, kwargs).")
        model, *positional, named = made
        return model, positional[0] if positional else (), dict(named)
    if given:
        raise UsageError(f"unknown: {', '.join(f'--{k}' for k in given)}. A class takes --input.")
    config: dict[str, Any] = {}
    for text in args.config:
        path = Path(text)
        config |= json.loads(path.read_text()) if path.is_file() else [_pair(text, "--config")]
    # What diffusers writes of itself into a config.json.
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    model = _class(args.what)(**config)
    if args.dtype:
        model = model.to(_dtype(args.dtype))
    named = dict(_input(text) for text in args.input)
    return model, (), named


def _class(name: str) -> Callable[..., Any]:
    package, _, short = name.rpartition(".")
    try:
        module = importlib.import_module(package or "diffusers")
        return getattr(module, short)
    except ImportError as e:
        raise UsageError(f"{name}: {e}.") from None
    except AttributeError:
        raise UsageError(f"{package or 'diffusers'} has no {short}.") from None


def _function(file: str, name: str) -> Callable[..., Any]:
    if not Path(file).is_file():
        raise UsageError(f"there is no file {file!r}.")
    sys.path.insert(0, str(Path(file).resolve().parent))
    with torch.device("cpu"):  # what a file makes while it is imported
        found = runpy.run_path(file)
    if name not in found:
        names = [k for k, v in found.items() if callable(v) and not k.startswith("_")]
        raise UsageError(f"{file} has no {name}. It has {', '.join(names)}.")
    return found[name]


def _keywords(words: Sequence[str]) -> dict[str, Any]:
    """``--height 2048 --flag`` as keyword arguments."""
    out: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            out[name] = _literal(value) if equals else True
            name = "" if equals else name
        elif name:
            out[name], name = _literal(word), ""
        else:
            raise UsageError(f"{word!r} belongs to no option; write --NAME VALUE.")
    return out


def _pair(text: str, option: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{option} {text}: there is no such file, and it is not NAME=VALUE.")
    return name, _literal(value)


def _input(text: str) -> tuple[str, Any]:
    name, value = _pair(text, "--input")
    tensor = TENSOR.fullmatch(value) if isinstance(value, str) else None
    if tensor is None:
        return name, value
    shape = [int(n) for n in tensor["shape"].split(",") if n.strip()]
    return name, torch.empty(shape, dtype=_dtype(tensor["dtype"]))


def _budget(text: str) -> int | float | str:
    """Bytes, a share, or ``least``."""
    found = SIZE.fullmatch(text)
    if found is not None:
        power = "kMGT".index(found["unit"]) + 1
        return int(float(found["number"]) * (1024 if found["binary"] else 1000) ** power)
    value = LEAST if text == LEAST else _literal(text)
    if value == LEAST or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise UsageError(f"--budget {text}: write 24GB, 20GiB, bytes, a share such as 0.5, or least.")


def _dtype(name: str) -> torch.dtype:
    found = SHORT.get(name) or getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"{name!r} is no dtype; e.g. {', '.join(SHORT)}, bool.")
    return found


def _literal(text: str) -> Any:
    """A number, a list, True..., or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)
