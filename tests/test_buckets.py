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
from torch.utils._pytree import tree_leaves

from ascend_sp.compiler.buckets import serve
from ascend_sp.compiler.capacities import Buckets, Capacities, automatic, parse
from ascend_sp.compiler.config import Config
from ascend_sp.runtime.errors import ConfigError
from models import flux, flux_inputs, qwen, qwen_inputs, z_image, z_image_inputs
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


@settings(max_examples=6)
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


MODELS: dict[str, Any] = {
    "flux": (lambda: flux(1, 1, 3), lambda n: ((), flux_inputs(1, 16, n))),
    "qwen": (lambda: qwen(3, 1), lambda n: ((), qwen_inputs(1, ((4, 4), (3, 4)), n))),
    "z_image": (lambda: z_image(3, 1), lambda n: (z_image_inputs(((12, 16),), (n,)), {})),
}


def real_ranks(rank: int, world: int, name: str, target: str, lengths: list[int]) -> Any:
    make, of = MODELS[name]
    model = make()
    options = {"target": target, "buckets": 32}
    compiled = torch.compile(model, backend="ascend_sp", dynamic=True, options=options)
    errors = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", "ascend_sp")
        for n in lengths:
            args, kwargs = of(n)
            got, want = (tree_leaves(f(*args, **kwargs)) for f in (compiled, model))
            errors.append(worst(got, want))
    return errors, counters["ascend_sp"]["graphs"]


@pytest.mark.parametrize(
    ("name", "world", "target"),
    [
        ("flux", 2, "eager"),
        pytest.param("z_image", 3, "eager", marks=pytest.mark.slow),
        pytest.param("qwen", 2, "eager", marks=pytest.mark.slow),
        pytest.param("flux", 2, "inductor", marks=pytest.mark.slow),
    ],
)
def test_models_on_real_ranks(name: str, world: int, target: str) -> None:
    lengths = [37, 5, 100, 63, 9, 130]
    for errors, programs in values(run(real_ranks, world, name, target, lengths, timeout=280)):
        assert max(errors) < TOLERANCE
        # Z-Image fills its captions up by itself; by a size of one, which PyTorch makes a constant.
        assert programs == (2 if name == "z_image" else 1)


def test_a_bad_option_names_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="'buckets' is -4; it must be auto, "):
        Config.load({"buckets": -4})
