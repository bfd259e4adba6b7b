"""Capacities for lengths: the numbers of the model itself, by one program, whatever the lengths."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

import prompts
from ascend_sp.compiler.buckets import serve
from ascend_sp.compiler.capacities import Buckets, Capacities, automatic, parse
from ascend_sp.compiler.config import Config
from ascend_sp.runtime.errors import ConfigError
from processes import run, values

TOLERANCE = 1e-5


def test_an_option_is_read_and_a_bad_one_refused() -> None:
    assert parse(64) == parse("64") == Buckets(Capacities(64))
    assert parse("128,512") == parse([512, 128]) == Buckets(Capacities(128, (128, 512)))
    assert parse("auto") == Buckets() and parse("auto").automatic()
    assert all(parse(off).off() for off in (False, "off", "0", "false", 1, {"x": False}))
    each = parse({"text": 32, "image": "auto"})
    assert each.of({"text"}, 999) == Capacities(32)
    assert each.of({"image"}, 4096) == automatic(4096) and each.of({"mask"}, 999) == Capacities(1)
    for bad in (0, -1, 2.5, True, [], [0], ["64"], "x", "64,x", {}, {1: 2}, {"x": "y"}, None):
        with pytest.raises((ValueError, TypeError)):
            parse(bad)


def test_capacities() -> None:
    assert [Capacities(16).holding(n) for n in (0, 1, 16, 17)] == [16, 16, 16, 32]
    assert [Capacities.of_list((96, 32)).holding(n) for n in (5, 33, 97)] == [32, 96, None]
    for tokens in (10, 300, 1024, 4608, 10**5):
        assert automatic(tokens).unit <= max(16, tokens / 16)


class Joint(nn.Module):
    """Text and image in one sequence, with a mask, causality, and rows that it adds itself."""

    def __init__(self, mask: str = "none", causal: bool = False, first: str = "text") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask, self.causal, self.first = mask, causal, first
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        n = text.shape[1]
        ones = seen.new_ones(image.shape[:2])
        both, keys = ([text, image], [seen, ones])
        if self.first == "image":
            both, keys = both[::-1], keys[::-1]
        x, mask = torch.cat(both, 1), torch.cat(keys, 1)[:, None, None]
        x = x + torch.arange(x.shape[1])[None, :, None] / 64 if self.first == "image" else x
        hidden = {"none": None, "bool": mask, "float": torch.where(mask, 0.5, -1e4)}[self.mask]
        for linear in self.qkv:
            q, k, v = linear(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, hidden, is_causal=self.causal)
            x = x + y.transpose(1, 2).flatten(2)
        parts = x.split([n, image.shape[1]] if self.first == "text" else [image.shape[1], n], 1)
        return parts if self.first == "text" else parts[::-1]


def inputs(batch: int, text: int, image: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(text * 100 + image)
    seen = torch.rand(batch, text, generator=g) < 0.7
    seen[:, 0] = True
    return (
        torch.randn(batch, text, 8, generator=g),
        torch.randn(batch, image, 8, generator=g),
        seen,
    )


def worst(got: Any, want: Any) -> float:
    assert [g.shape for g in got] == [w.shape for w in want]
    return max((g - w).abs().max().item() for g, w in zip(got, want, strict=True))


@settings(max_examples=4)
@given(
    st.sampled_from(["none", "bool", "float"]),
    st.sampled_from(["text", "image"]),
    st.sampled_from([4, 7, (8, 24, 40)]),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=3, max_size=6),
)
def test_any_lengths(mask: str, first: str, sizes: Any, batch: int, calls: list) -> None:
    model = Joint(mask, first=first)
    torch._dynamo.reset()
    before = counters["ascend_sp"]["graphs"]
    options = {"target": "eager", "buckets": sizes}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    with torch.no_grad():
        for text, image in calls:
            # Equal sizes in the first call are one symbol to Dynamo, which is another program.
            args = inputs(batch, text, image + 41)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lists are shorter than some images
                assert worst(compiled(*args), model(*args)) < TOLERANCE
    assert counters["ascend_sp"]["graphs"] - before <= 2


def test_causal_attention_and_a_length_that_no_capacity_holds() -> None:
    model = Joint(causal=True)
    torch._dynamo.reset()
    options = {"target": "eager", "buckets": {"text": [8, 16]}}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    with torch.no_grad():
        for text in (5, 8, 11):
            args = inputs(1, text, 20)
            assert worst(compiled(*args), model(*args)) < TOLERANCE
        args = inputs(1, 17, 20)
        with pytest.warns(UserWarning, match="17 is longer than the longest capacity, 16"):
            got = compiled(*args)
        assert worst(got, model(*args)) < TOLERANCE


def test_rows_that_are_taken_for_real_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens if a replay does not learn the new length."""
    monkeypatch.setattr(
        serve, "_real_rows", lambda capacity, length, device: torch.ones(capacity) > 0
    )
    model = Joint()
    torch._dynamo.reset()
    options = {"target": "eager", "buckets": 16}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    args = inputs(1, 5, 20)
    with torch.no_grad():
        assert worst(compiled(*args), model(*args)) > 100 * TOLERANCE


class Filled(Joint):
    """Fills the text up to a multiple of four rows, if it is not full."""

    def forward(self, text: Tensor, image: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        missing = -text.shape[1] % 4
        total = text.shape[1] + missing
        if missing > 0:
            text = torch.cat([text, text[:, -1:].repeat(1, missing, 1)], 1)
        return super().forward(text, image, seen.new_ones(text.shape[0], total))


def test_sequences_that_are_filled_up_already_have_capacities(tmp_path: Any) -> None:
    model = Filled()
    torch._dynamo.reset()
    options = {"target": "eager", "buckets": 16, "dump_dir": str(tmp_path)}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    with torch.no_grad():
        for text in (5, 8, 17, 20):
            args = inputs(1, text, 50)
            assert worst(compiled(*args), model(*args)) < TOLERANCE
    summaries = [f.read_text() for f in tmp_path.rglob("summary.md")]
    assert len(summaries) == 2
    assert all("a length of" in s and "has no capacity" not in s for s in summaries)


class Mean(Joint):
    """Adds up rows before it attends, so that real lengths are needed."""

    def forward(self, text: Tensor, image: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        x = text + self.qkv[0](text).mean(1, keepdim=True)[..., :8]
        return super().forward(x, image, seen)


def test_what_needs_real_lengths_keeps_them_and_the_report_says_so(tmp_path: Any) -> None:
    model = Mean()
    torch._dynamo.reset()
    options = {"target": "eager", "buckets": 16, "dump_dir": str(tmp_path)}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    with torch.no_grad():
        for text, image in ((5, 20), (9, 33), (21, 35)):
            args = inputs(1, text, image)
            assert worst(compiled(*args), model(*args)) < TOLERANCE
    summary = next(tmp_path.rglob("summary.md")).read_text()
    assert "## Lengths and capacities" in summary
    assert (
        "has no capacity: " in summary and "runs with a capacity of 32 (multiples of 16)" in summary
    )


def few_on_real_ranks(rank: int, world: int) -> tuple[list[float], int]:
    model = Joint("bool")
    options = {"target": "eager", "buckets": 16}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    errors = []
    for text, image in ((5, 20), (9, 33), (21, 35), (16, 48)):
        args = inputs(2, text, image)
        errors.append(worst(compiled(*args), model(*args)))
    return errors, counters["ascend_sp"]["graphs"]


def test_real_ranks() -> None:
    for errors, programs in values(run(few_on_real_ranks, 3)):
        assert max(errors) < TOLERANCE
        assert programs == 1


def real_ranks(rank: int, world: int, name: str, target: str) -> dict[str, Any]:
    options = {"target": target, "buckets": prompts.CAPACITY}
    return prompts.answer(name, options, "cpu", eager=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world", "target"),
    [
        *((name, 2, "inductor") for name in prompts.MODELS),
        *((name, 3, "eager") for name in prompts.MODELS),
    ],
)
def test_sixty_prompts(name: str, world: int, target: str) -> None:
    for found in values(run(real_ranks, world, name, target, timeout=1500)):
        assert found["worst"] < TOLERANCE
        # Z-Image fills captions up by itself; those that lack no row, or one, are other graphs.
        assert found["compiles"] <= (3 if name == "z_image" else 1)


def test_a_bad_option_names_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="'buckets' is -4; it must be auto, "):
        Config.load({"buckets": -4})
