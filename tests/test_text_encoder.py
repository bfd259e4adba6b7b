"""Text encoders split over ranks compute what the whole ones do: transformers' own classes."""

from __future__ import annotations

import pytest
import transformers
from torch import Tensor, nn

import ascend_sp
from ascend_sp.text_encoder import find as finder
from ascend_sp.text_encoder.vocabulary import find_vocabularies
from encoders import LIMIT, MODELS, inputs, off, outputs, seeded, wrapped
from processes import run, values


def same_as_whole(rank: int, world: int, cases: list[tuple[str, dict]]) -> list[dict]:
    results = []
    for name, sizes in cases:
        model = MODELS[name](**sizes)
        calls = [inputs(model, seed) for seed in (1, 2)]
        want = [outputs(model, call) for call in calls]
        report = ascend_sp.parallelize_text_encoder(model)
        got = [outputs(model, call) for call in calls]
        results.append(
            {
                "off": max(off(g, w) for g, w in zip(got, want, strict=True)),
                "left": wrapped(model),
                "report": report,
                "held": sum(storage_bytes(p) for p in model.parameters()),
            }
        )
    return results


def storage_bytes(p: Tensor) -> int:
    return getattr(p, "_local_tensor", p).untyped_storage().nbytes()


CASES = {
    2: [
        ("t5", {}),
        ("qwen3", {"heads": 15, "kv_heads": 3}),
        ("qwen_vl", {}),
        ("clip", {}),
    ],
    3: [
        ("t5", {"heads": 7}),
        ("qwen3", {"heads": 6, "kv_heads": 2}),
        ("qwen_vl", {"heads": 12, "kv_heads": 3, "vision_heads": 4}),
        ("clip", {"heads": 5}),
    ],
    4: [
        ("t5", {"heads": 3}),
        ("qwen3", {"heads": 6, "kv_heads": 1}),
        ("qwen_vl", {"heads": 14, "kv_heads": 2, "vision_heads": 5}),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_outputs_and_bytes(world: int) -> None:
    for results in values(run(same_as_whole, world, CASES[world])):
        for (name, sizes), got in zip(CASES[world], results, strict=True):
            assert got["off"] <= LIMIT
            assert got["left"] == []
            check_bytes(got["report"], got["held"], world, MODELS[name](**sizes))


def check_bytes(
    report: ascend_sp.TextEncoderReport, held: int, world: int, whole: nn.Module
) -> None:
    # What the report says is what is in memory.
    assert report.ranks == world
    assert held == report.local_bytes
    rest = report.whole_bytes - report.sharded_bytes
    assert report.local_bytes == rest + report.sharded_local_bytes
    assert all(r.module in WHOLE for r in report.whole), report
    # A rank's part, and in each module one unit more: a K/V head with its queries, or a feature.
    assert report.split
    for row in report.split:
        assert row.local_bytes <= row.whole_bytes / world + unit_bytes(whole, row.name)


WHOLE = {"Embedding", "Qwen2_5_VLForConditionalGeneration"}


def unit_bytes(whole: nn.Module, name: str) -> int:
    """The bytes of one unit of a module, and of the biases and norms that stay whole."""
    found = next((f for f in finder.find(whole, ())[0] if f.name == name), None)
    if found is None:  # a vocabulary: a row
        table = whole.get_submodule(name).weight
        return table.nbytes // len(table)
    cuts = dict(found.structure.cuts(found.module))
    rest = sum(p.nbytes for n, p in found.module.named_parameters() if n not in cuts)
    totals = found.structure.totals
    units = totals["kv"] if "kv" in totals else totals["inner"]
    return rest + sum(found.module.get_parameter(n).nbytes for n in cuts) // units


def test_vocabularies() -> None:
    found = find_vocabularies
    names = ("model.language_model.embed_tokens", "lm_head")
    model = MODELS["qwen_vl"]()  # 408 rows
    assert [v.names for v in found(model, 3, (), ())[0]] == [(n,) for n in names]
    # Logits of padding would be outputs, so a projection must divide; a lookup need not.
    assert [v.names for v in found(model, 5, (), ())[0]] == [(names[0],)]
    assert [v.names for v in found(model, 3, ["lm_*"], ())[0]] == [(names[0],)]
    model.lm_head.weight = model.get_input_embeddings().weight
    assert [v.names for v in found(model, 3, (), ())[0]] == [names]
    split, whole = found(model, 5, (), ())
    assert not split and "5 does not divide them" in whole[names[0]]


def tied(rank: int, world: int) -> tuple[float, bool]:
    model = MODELS["qwen_vl"]()
    embed = model.get_input_embeddings()
    model.lm_head.weight = embed.weight
    call = inputs(model)
    want = outputs(model, call)
    report = ascend_sp.parallelize_text_encoder(model, exclude=["model.visual"])
    assert {r.how for r in report.whole if "visual" in r.name} == {"excluded"}
    return off(outputs(model, call), want), model.lm_head.weight is embed.weight


def test_a_tied_projection() -> None:
    for got, same in values(run(tied, 2)):
        assert got <= LIMIT and same


def others(rank: int, world: int) -> dict[str, float]:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 70,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    result = {}
    for name in ("Llama", "Mistral", "Gemma2", "Gemma3Text", "Glm4", "Olmo2", "Cohere2"):
        config = getattr(transformers, f"{name}Config")(**sizes)
        model = seeded(getattr(transformers, f"{name}Model")(config))
        call = {"input_ids": inputs(model)["input_ids"]}
        want = outputs(model, call)
        ascend_sp.parallelize_text_encoder(model)
        result[name] = off(outputs(model, call), want)
    return result


@pytest.mark.slow
def test_encoders_that_nobody_asked_for() -> None:
    for got in values(run(others, 3, timeout=280)):
        assert len(got) == 7 and max(got.values()) <= LIMIT, got
