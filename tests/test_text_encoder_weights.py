"""Weights of a split text encoder are read from files, each rank its share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights

import ascend_sp
from ascend_sp.text_encoder.names import match
from encoders import LIMIT, MODELS, inputs, off, outputs, wrapped
from processes import run, values


def saved(folder: Path, name: str, shard: str = "60KB") -> str:
    """As a user's cache has it: several files and an index, or one file."""
    MODELS[name]().save_pretrained(folder / name, max_shard_size=shard)
    return str(folder / name)


def load(rank: int, world: int, folders: dict[str, str]) -> list[Any]:
    results = []
    for name, folder in folders.items():
        whole = MODELS[name]()
        call = inputs(whole)
        with init_empty_weights(include_buffers=False):
            model = MODELS[name]()
        model.tie_weights()  # which init_empty_weights undoes
        assert all(p.is_meta for p in model.parameters())
        report = ascend_sp.parallelize_text_encoder(model)
        loaded = ascend_sp.load_text_encoder(model, folder)
        got = off(outputs(model, call), outputs(whole, call))
        tied = len(list(model.parameters())) == len(list(whole.parameters()))
        results.append((got, tied, wrapped(model), report, loaded))
    return results


def test_weights_are_read_shard_by_shard(tmp_path: Path) -> None:
    folders = {
        "t5": saved(tmp_path, "t5"),  # tied embeddings
        "qwen3": saved(tmp_path, "qwen3", "1GB"),
        "qwen_vl": saved(tmp_path, "qwen_vl"),  # other names in the files than in the model
    }
    index = json.loads((tmp_path / "qwen_vl" / "model.safetensors.index.json").read_text())
    assert "visual.merger.mlp.0.weight" in index["weight_map"]
    for results in values(run(load, 3, folders)):
        for got, tied, left, report, loaded in results:
            assert got <= LIMIT and tied and left == []
            # Nothing but what this rank holds; padding is not in the files.
            assert loaded.bytes_read <= report.local_bytes < report.whole_bytes
            assert loaded.unused == ()


def test_loading_on_one_rank(tmp_path: Path) -> None:
    whole = MODELS["t5"]()
    folder = saved(tmp_path, "t5")
    with torch.device("meta"):
        model = MODELS["t5"]()
    report = ascend_sp.parallelize_text_encoder(model)
    assert report.ranks == 1 and not report.split and report.local_bytes == report.whole_bytes
    loaded = ascend_sp.load_text_encoder(model, folder)
    assert loaded.bytes_read == report.whole_bytes
    assert off(outputs(model, inputs(model)), outputs(whole, inputs(whole))) == 0


def test_names_in_files() -> None:
    wanted = [["m.lm.layers.0.up.w"], ["m.lm.layers.1.up.w"], ["m.lm.norm.w"], ["head.w", "e.w"]]
    shapes = {n: (2,) for names in wanted for n in names}
    there = ["m.layers.0.up.w", "m.layers.1.up.w", "m.norm.w", "e.w", "other.up.w"]
    assert match(wanted, shapes, dict.fromkeys(there, (2,))) == there[:4]
    for names, text in (
        (
            ["m.layers.0.up.w", "m.norm.w", "e.w"],
            "not in the files, such as ['m.lm.layers.1.up.w']",
        ),
        (["m.layers.0.up.w", "x.layers.0.up.w", *there[1:4]], "['m.lm.layers.0.up.w']"),
    ):
        with pytest.raises(ascend_sp.TextEncoderError) as e:
            match(wanted, shapes, dict.fromkeys(names, (2,)))
        assert text in str(e.value) and "rename=" in str(e.value)
    with pytest.raises(ascend_sp.TextEncoderError, match=r"shape \[2\] .* \[3\]"):
        match(wanted, shapes, dict.fromkeys(there, (3,)))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3", "1GB")
    with torch.device("meta"):
        lost, other = MODELS["qwen3"](), MODELS["qwen3"](heads=8)
    for model, path, text in (
        (lost, folder, "on meta and in no file: ['rotary_emb.inv_freq'"),
        (other, folder, "q_proj.weight has shape [128, 40] in the encoder"),
        (lost, f"{folder}/absent.safetensors", "absent.safetensors"),
        (lost, str(tmp_path), "no safetensors file"),
    ):
        with pytest.raises(ascend_sp.TextEncoderError) as e:
            ascend_sp.load_text_encoder(model, path)
        assert text in str(e.value)
