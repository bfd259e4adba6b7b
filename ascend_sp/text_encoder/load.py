"""``load_text_encoder``: weights from safetensors, this rank's slices only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ascend_sp.runtime import guards
from ascend_sp.runtime._pytorch import not_compiled
from ascend_sp.runtime.errors import TextEncoderError
from ascend_sp.text_encoder.apply import Record, as_parameter, record_of
from ascend_sp.text_encoder.names import match
from ascend_sp.text_encoder.split import PADDING

Paths = str | PathLike[str] | Iterable[str | PathLike[str]]
_STEP = guards.Step.named("loads its text encoder")
_TIMEOUT = 600.0


@dataclass(frozen=True)
class LoadReport:
    """What `load_text_encoder` read."""

    parameters: int
    """Parameters and buffers that have their weights now."""
    bytes_read: int
    """Bytes that this rank read."""
    unused: tuple[str, ...]
    """Tensors of the files that the encoder has no place for."""


def load_text_encoder(
    encoder: nn.Module,
    paths: Paths,
    *,
    rename: Callable[[str], str] | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Load an encoder's weights from safetensors, reading only what this rank holds.

    Meant for an encoder built without memory, so that no rank ever holds the whole:

        with accelerate.init_empty_weights(include_buffers=False):
            encoder = Model(config)
        ascend_sp.parallelize_text_encoder(encoder)
        ascend_sp.load_text_encoder(encoder.eval(), folder)

    ``torch.device("meta")`` instead of `init_empty_weights` loses buffers that no file holds, such
    as rotary frequencies; an encoder that has some is refused with their names. Weights take the
    dtype of the encoder's parameters.

    Args:
        encoder: parallelized, or whole for one rank.
        paths: a folder as `save_pretrained` writes it, an index ``*.safetensors.index.json``, a
            file, or several files.
        rename: gives the encoder's name for a name in the files. Not needed where only the
            beginnings differ, as when a part of a saved model is loaded.
        device: for parameters that are on ``meta``; None takes the mesh's device type.

    Returns:
        How much was read, and which tensors were not used.

    Raises:
        TextEncoderError: safetensors is missing, a file or a tensor is, a shape differs, or
            something stays on ``meta``.
        RankMismatchError: some ranks could not load.
    """
    encoder = not_compiled(encoder)
    record = record_of(encoder)
    report, error = None, None
    try:
        report = _load(encoder, record, _files(paths), rename, device)
    except Exception as e:
        error = e
    # A rank that failed alone must not leave the others waiting in the first call.
    word = "loaded" if error is None else f"{type(error).__name__}: {error}"
    if error is None or record.topology.size > 1:
        guards.agree(record.topology, {"weights": word}, _TIMEOUT, _STEP)
    if report is None:
        raise error or AssertionError
    return report


def _load(
    encoder: nn.Module,
    record: Record,
    files: list[Path],
    rename: Callable[[str], str] | None,
    device: torch.device | str | None,
) -> LoadReport:
    try:
        from safetensors import safe_open
    except ImportError as e:
        raise TextEncoderError(
            "load_text_encoder reads safetensors, which is not installed: pip install safetensors."
        ) from e
    device = device or (record.mesh.device_type if record.mesh else "cpu")
    targets = _targets(encoder)
    shapes = {n: _whole_shape(t, n, record) for t, names in targets for n in names}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for key in list(file.keys()):
                name = rename(key) if rename else key
                opened[name], origin[name] = file, key
        slices = {name: file.get_slice(origin[name]) for name, file in opened.items()}
        there = {name: tuple(s.get_shape()) for name, s in slices.items()}
        chosen = match([names for _, names in targets], shapes, there)
        read = sum(
            _fill(encoder, old, names, record, slices[name], device)
            for (old, names), name in zip(targets, chosen, strict=True)
        )
    _refuse_meta(encoder)
    known = {*chosen, *shapes}
    unused = tuple(origin[n] for n in slices if n not in known)
    return LoadReport(len(targets), read, unused)


def _targets(encoder: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """The tensors that files hold, each with its names; tied weights have several."""
    targets: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in encoder.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            targets.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(targets.values())


def _whole_shape(tensor: Tensor, name: str, record: Record) -> tuple[int, ...]:
    return record.pieces[name].shape if name in record.pieces else tuple(tensor.shape)


def _fill(
    encoder: nn.Module,
    old: Tensor,
    names: list[str],
    record: Record,
    source: Any,
    device: torch.device | str,
) -> int:
    """Read this rank's part of a tensor, and put it wherever it is; returns the bytes read."""
    piece = next((record.pieces[n] for n in names if n in record.pieces), None)
    if piece is None:
        parts = [source[...]]
        value = parts[0]
    else:
        before = (slice(None),) * piece.dim
        parts = [source[(*before, slice(s, s + n))] for s, n in piece.runs if s != PADDING]
        value = piece.join(parts, parts[0] if parts else torch.empty(0))
    value = value.to(dtype=old.dtype, device=device if old.is_meta else old.device)
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = as_parameter(value, old)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(encoder.get_submodule(owner), leaf, new)
    return sum(p.numel() * p.element_size() for p in parts)


def _refuse_meta(encoder: nn.Module) -> None:
    left = [n for n, b in encoder.named_buffers() if b.is_meta]
    left += [n for n, p in encoder.named_parameters() if p.is_meta]
    if left:
        raise TextEncoderError(
            f"{len(left)} buffers or parameters are on meta and in no file: {left[:4]}. Build the "
            "encoder under accelerate.init_empty_weights(include_buffers=False), which "
            "creates real buffers, instead of torch.device('meta')."
        )


def _files(paths: Paths) -> list[Path]:
    given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    files: list[Path] = []
    for path in map(Path, given):
        index = (
            [path]
            if path.name.endswith(".index.json")
            else sorted(path.glob("*.safetensors.index.json"))
        )
        if index and index[0].is_file():
            names = json.loads(index[0].read_text())["weight_map"].values()
            files += [index[0].parent / n for n in dict.fromkeys(names)]
        elif path.is_dir():
            files += sorted(path.glob("*.safetensors"))
        else:
            files.append(path)
    absent = [str(f) for f in files if not f.is_file()]
    if absent or not files:
        raise TextEncoderError(
            f"no safetensors file at {absent or [str(g) for g in given]}. Pass a folder with "
            "*.safetensors, an index *.safetensors.index.json, or files."
        )
    return files
