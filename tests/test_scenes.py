"""The demo's own weights: they are small, and the prompt chooses what they draw."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scenes import draw, model, words

PROMPTS = {
    "a ship at night, the moon": ("night", "ship", "moon", False),
    "a lighthouse at night under a full moon": ("night", "lighthouse", "moon", False),
    "the lighthouse on a cliff by day": ("day", "lighthouse", "", False),
    "a ship and a lighthouse at sunset, the sun": ("sunset", "lighthouse and ship", "sun", False),
    "a lighthouse on the left in the evening": ("sunset", "lighthouse", "", True),
    "an empty sea at noon, a bright sun": ("day", "sea", "sun", False),
}


def drawn(what: tuple[str, str, str, bool]) -> np.ndarray:
    return draw.draw(words.Scene(*what, shifts=(0.0,) * 8))


def every_scene() -> dict[tuple[str, str, str, bool], np.ndarray]:
    return {
        what: drawn(what)
        for time in words.TIMES
        for subject in words.SUBJECTS
        for sky in words.SKIES[time]
        for left in (False, True)[: 1 + ("lighthouse" in subject)]
        for what in [(time, subject, sky, left)]
    }


def test_a_seed_is_a_picture() -> None:
    a, b = (words.scene(random.Random(3)) for _ in range(2))
    assert a == b and words.caption(a, random.Random(4)) == words.caption(b, random.Random(4))
    assert (draw.draw(a) == draw.draw(b)).all()
    assert (draw.draw(a) != draw.draw(words.scene(random.Random(4)))).any()
    pictures = every_scene()
    assert len({p.tobytes() for p in pictures.values()}) == len(pictures) == 36
    bright = {t: np.mean([p.mean() for w, p in pictures.items() if w[0] == t]) for t in words.TIMES}
    assert bright["night"] < bright["sunset"] < bright["day"]


def test_the_prompt_chooses() -> None:
    assert model.WEIGHTS.stat().st_size <= 3_000_000
    pipe = model.load(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        list(PROMPTS),
        height=draw.SIDE,
        width=draw.SIDE,
        num_inference_steps=8,
        max_sequence_length=model.LETTERS,
        generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))],
        output_type="np",
    ).images
    scenes = every_scene()
    for (prompt, what), picture in zip(PROMPTS.items(), made, strict=True):
        off = {w: float(np.abs(picture * 255 - p).mean()) for w, p in scenes.items()}
        assert min(off, key=lambda w: off[w]) == what, prompt
        assert off[what] < 20


def test_text_encoders_are_the_ones_that_it_was_trained_with() -> None:
    """Whatever PyTorch and transformers draw their own first weights with."""
    clip, t5 = model.text_encoders()
    ids = model.small.tokenizer(77, end=True)("a ship", return_tensors="pt").input_ids
    pooled, vectors = clip(ids).pooler_output[0], t5(ids).last_hidden_state[0, 1]
    assert pooled[:3].tolist() == pytest.approx([1.2237, 0.5450, 0.5172], abs=1e-3)
    assert vectors[:3].tolist() == pytest.approx([-0.8616, -0.0130, 0.5633], abs=1e-3)


def test_without_weights_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import flux

    args: Any = argparse.Namespace(model=None, prompt=None)
    assert flux.example(args).drawing and not capsys.readouterr().out
    monkeypatch.setattr(model, "WEIGHTS", tmp_path / "weights.safetensors")
    assert not flux.example(args).drawing
    said = capsys.readouterr().out
    assert "weights.safetensors is missing" in said and "noise" in said and "make weights" in said


def test_a_difference_is_made_visible() -> None:
    from common import Run, amplified_difference

    grey = np.full((2, 2, 3), 0.5, np.float32)
    one, other = Run(grey, torch.zeros(1)), Run(grey.copy(), torch.zeros(1))
    assert amplified_difference(one, other)[0] == "no difference"
    other.pixels[0, 1] += 3e-4
    name, picture = amplified_difference(one, other)
    assert name == "difference x 1,000"
    shown = np.asarray(picture)
    assert shown[0, 1].tolist() == pytest.approx([76.5] * 3, abs=1) and not shown[1].any()
