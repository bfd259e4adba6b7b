"""Graphs of convolutions, split along a picture: right for any size, whole if that is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ascend_sp.compiler.config import Config
from ascend_sp.graph.layout import PLACEMENTS, Shard
from checks import collectives_of, error, free_links, worst
from models import unet, unet_inputs, vae
from processes import run, values
from simulator import capture, simulate

TOLERANCE = 2e-5
CONVOLUTION = torch.ops.aten.convolution.default


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A link that costs nothing: small pictures are split, too."""
    return Config(cost_model=free_links(tmp_path_factory.mktemp("device")))


class Residual(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class OneHead(nn.Module):
    """Attention over all positions, as it stands in the middle of VAEs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.view(b, c, h * w).transpose(1, 2)
        q, k, v = (t.view(b, h * w, 1, c).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + out.transpose(1, 2).reshape(b, c, h, w)


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        Residual(8, 2),
        OneHead(8),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(8, 8, 3, padding=1),
        Residual(8, 4),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.Conv2d(4, 12, 5, padding=2, dilation=1),
        nn.PixelShuffle(2),
    )


class Encoder(nn.Module):
    """As VAEs do it: one row of zeros behind, then a stride of two."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, 2) for i in range(3))
        self.norm = Residual(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(F.pad(x, (0, 1, 0, 1)))
        return self.norm(x)


def margins(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        *(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1, padding_mode=mode) for i in range(2)),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, (5, 3), stride=(3, 1), padding=(1, 1), dilation=(2, 1), groups=2),
        nn.PixelShuffle(2),
    )


class Causal(nn.Module):
    """Frames see earlier ones only; height and width are padded by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(3, 3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
        for conv in self.convs:
            x = F.silu(conv(F.pad(x, (1, 1, 1, 1, 2, 0))))
        return x


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 7, padding=3),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose1d(4, 4, 6, 3, 2, output_padding=1),
        nn.Conv1d(4, 2, 3, padding=2, dilation=2),
    )


class Smooth(nn.Module):
    """Linear interpolation of height and width, and of frames only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.first(x), scale_factor=(2, 1, 1), mode="trilinear").mean(2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.second(F.interpolate(x, scale_factor=3, mode="nearest"))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "decoder": (decoder, [(1, 2, 8, 5), (2, 2, 7, 9), (1, 2, 3, 3)]),
    "encoder": (Encoder, [(1, 3, 48, 20), (1, 3, 37, 41)]),
    "reflected": (lambda: margins("reflect"), [(1, 3, 13, 6)]),
    "replicated": (lambda: margins("replicate"), [(1, 3, 10, 6)]),
    "causal": (Causal, [(1, 3, 2, 5, 4)]),
    "signal": (signal, [(1, 2, 23)]),
    "smooth": (Smooth, [(1, 2, 2, 7, 5)]),
}


@pytest.mark.parametrize("ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_every_size_is_right(name: str, ranks: int, free: Config) -> None:
    make, sizes = MODELS[name]
    model = make().eval()
    for size in sizes:
        x = torch.randn(size)
        with torch.no_grad():
            reference = model(x)
        outputs, _, ctx, network = simulate(capture(model, x), ranks, free)
        notes = [str(n) for n in ctx.notes]
        assert worst(outputs, reference) <= TOLERANCE, notes
        assert network.calls["all_to_all_single"] > 0, notes
        whole = [n for n in notes if "runs on gathered" in n]
        assert not whole, whole


def without_rows(rank: int, values: Sequence[Tensor]) -> Tensor:
    """An all-to-all in which the rows of neighbours come as zeros."""
    return torch.zeros_like(values[rank])


def test_dropped_rows_are_noticed(free: Config) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))
    x = torch.randn(1, 2, 12, 5)
    with torch.no_grad():
        reference = model(x)
    for broken, right in ((None, True), (without_rows, False)):
        outputs, *_ = simulate(capture(model, x), 2, free, broken)
        assert (worst(outputs, reference) <= TOLERANCE) is right


def test_a_group_norm_is_as_precise_as_on_one_device(free: Config) -> None:
    """Far from zero, as sums of squares could not be; in half precision, too; with uneven rows."""
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
    model = nn.Sequential(conv, norm)
    with torch.no_grad():
        norm.weight.normal_()
        conv.bias += 3000.0
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        x = torch.randn(2, 4, 13, 6, dtype=dtype)
        model.to(dtype)
        if dtype == torch.bfloat16:
            conv.bias.data.zero_()
        with torch.no_grad():
            reference = model.double()(x.double())
            model.to(dtype)
        outputs, *_ = simulate(capture(model, x), 4, free)
        assert worst(outputs, reference) <= tolerance


def test_what_does_not_pay_stays_whole_and_says_so() -> None:
    """A small picture on a link with a latency; a large one is split."""
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))
    for size, split in ((8, False), (512, True)):
        captured = capture(model, torch.randn(1, 16, size, size))
        *_, ctx, network = simulate(captured, 2)
        assert bool(network.calls) is split
        said = [n for n in ctx.notes if "convolutions are not split along a picture" in n.text]
        assert bool(said) is not split


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_an_autoencoder(ranks: int, free: Config) -> None:
    model = vae()
    z, picture = torch.randn(1, 4, 9, 7), torch.randn(1, 3, 36, 28)
    calls: list[tuple[Callable[[Tensor], Any], Tensor]] = [
        (lambda z: model.decode(z).sample, z),
        (lambda x: model.encode(x).latent_dist.mean, picture),
    ]
    for call, x in calls:
        with torch.no_grad():
            reference = call(x)
        outputs, _, ctx, network = simulate(capture(call, x), ranks, free)
        assert worst(outputs, reference) <= TOLERANCE, [str(n) for n in ctx.notes]
        assert network.calls["all_to_all_single"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_unet(ranks: int, free: Config) -> None:
    """As SDXL's: nothing here knows a VAE. All convolutions and attentions are split."""
    model, inputs = unet(), unet_inputs()
    call = lambda **kwargs: model(**kwargs).sample  # noqa: E731
    with torch.no_grad():
        reference = call(**inputs)
    outputs, programs, ctx, network = simulate(capture(call, **inputs), ranks, free)
    assert worst(outputs, reference) <= TOLERANCE, [str(n) for n in ctx.notes]
    whole = [n for n in ctx.notes if "runs on gathered" in n.text or "whole on every" in n.text]
    assert not whole, [str(n) for n in whole]
    placed = [
        n.meta.get(PLACEMENTS)
        for n in programs[0].graph.find_nodes(op="call_function", target=CONVOLUTION)
    ]
    assert len(placed) > 20
    assert all(isinstance(p[0], Shard) for p in placed)
    assert network.calls["all_to_all_single"] > 10


def on_ranks(rank: int, world: int, target: str, cost_model: str) -> dict[str, Any]:
    model = vae() if target == "eager" else decoder().eval()
    options = {"target": target, "cost_model": cost_model}
    x = torch.randn(1, 4 if target == "eager" else 2, 9, 7)
    if target == "eager":
        want = model.decode(x).sample
        # As a user does it, so that a pipeline calls it.
        model.decode = torch.compile(model.decode, backend="ascend_sp", options=options)
        run = lambda: model.decode(x).sample  # noqa: E731
    else:
        want = model(x)
        compiled = torch.compile(model, backend="ascend_sp", options=options)
        run = lambda: compiled(x)  # noqa: E731
    got = run()
    return {"error": error(got, want), "calls": collectives_of(run)}


@pytest.mark.parametrize(
    ("world", "target"), [(3, "eager"), pytest.param(2, "inductor", marks=pytest.mark.slow)]
)
def test_on_real_ranks(world: int, target: str, free: Config) -> None:
    torch.manual_seed(0)
    for got in values(run(on_ranks, world, target, free.cost_model, timeout=280)):
        assert got["error"] <= TOLERANCE
        assert got["calls"]["all_to_all_single"] >= 5
