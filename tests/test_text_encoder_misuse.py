"""Wrong use of split text encoders, on every rank alike; meshes, and no process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ascend_sp
from encoders import LIMIT, MODELS, inputs, off, outputs, wrapped
from processes import run, values


def misuse(rank: int, world: int) -> list[str]:
    def text(call: Callable[[], Any]) -> str:
        try:
            call()
        except ascend_sp.AscendSPError as e:
            return f"{type(e).__name__}: {e}"
        return "nothing raised"

    split = ascend_sp.parallelize_text_encoder
    done = MODELS["clip"]()
    split(done)
    nameless = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    return [
        text(lambda: split(done)),
        text(lambda: split(MODELS["clip"](), nameless)),
        text(lambda: split(MODELS["clip"](), exclude=["absent"])),
        text(lambda: split(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))),
        text(lambda: split("clip")),  # type: ignore[arg-type]
        text(lambda: split(MODELS["clip"](heads=3 + rank))),
        text(lambda: ascend_sp.load_text_encoder(done, "/absent")),
        text(lambda: ascend_sp.load_text_encoder(done, f"/absent{rank}")),
    ]


def test_wrong_use() -> None:
    for got in values(run(misuse, 2)):
        for text, parts in zip(
            got,
            (
                ("TextEncoderError: CLIPTextModel is parallelized already", "once"),
                ("TopologyError: the mesh has 2 dims", "sp"),
                ("TextEncoderError: exclude names 'absent'", "layers.0.self_attn"),
                ("TextEncoderError: found nothing to split in Sequential", "one Linear"),
                ("TextEncoderError: encoder must be a torch.nn.Module, not str",),
                ("RankMismatchError", "each splits its text encoder", "split on rank(s) [1]"),
                ("TextEncoderError: no safetensors file at ['/absent']", "index"),
                ("RankMismatchError", "each loads its text encoder", "/absent0", "/absent1"),
            ),
            strict=True,
        ):
            assert all(p in text for p in parts), text


def of_a_mesh(rank: int, world: int) -> tuple[float, int]:
    """Two groups of two: each splits its own encoder."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model = MODELS["qwen3"]()
    call = inputs(model, seed=rank // 2)
    want = outputs(model, call)
    report = ascend_sp.parallelize_text_encoder(model, mesh)
    return off(outputs(model, call), want), report.ranks


def test_a_mesh() -> None:
    for got, ranks in values(run(of_a_mesh, 4)):
        assert got <= LIMIT and ranks == 2


def test_without_a_process_group() -> None:
    model = MODELS["clip"]()
    before = {n: id(p) for n, p in model.named_parameters()}
    report = ascend_sp.parallelize_text_encoder(model)
    assert before == {n: id(p) for n, p in model.named_parameters()} and not wrapped(model)
    assert report.ranks == 1 and "one rank" in str(report)
    with pytest.raises(ascend_sp.TopologyError, match="DeviceMesh"):
        ascend_sp.parallelize_text_encoder(model, "mesh")  # type: ignore[arg-type]
