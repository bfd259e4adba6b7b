"""Weights of which each rank holds a part: the sequence is split around the gathers of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize

import ascend_sp
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.report.weights import weights
from ascend_sp.graph.parts import gathers
from ascend_sp.runtime.errors import ConfigError
from checks import collectives_of, worst
from models import flux, flux_inputs, qwen, qwen_inputs, z_image, z_image_inputs
from processes import run, values
from simulator import capture, simulate, simulate_sharded
from test_strategies import MODELS as ALL
from toy import SelfAttention


class Whole(nn.Module):
    """What a user of DTensor writes for it (SimpleFSDP)."""

    def forward(self, x: DTensor) -> torch.Tensor:
        return x.redistribute(placements=[Replicate()]).to_local()


def x(rows: int = 8) -> torch.Tensor:
    return torch.randn(1, rows, 12, generator=torch.Generator().manual_seed(0))


def by_the_user(rank: int, world: int, target: str) -> tuple[float, dict[str, int]]:
    torch.manual_seed(0)
    model = SelfAttention(12, 3).requires_grad_(False)
    want = model(x())
    mesh = init_device_mesh("cpu", (world,))
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)]), False)
            module.register_parameter(name, sharded)
            parametrize.register_parametrization(module, name, Whole(), unsafe=True)
    options = {"target": target, "on_unsharded": "error", "strategy": "separate"}
    program = torch.compile(model, backend="ascend_sp", options=options, fullgraph=True)
    with torch.no_grad():
        program(x())
        calls = collectives_of(lambda: program(x()))
        return (program(x()) - want).abs().max().item(), calls


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gathers_that_the_user_wrote(target: str) -> None:
    for error, calls in values(run(by_the_user, 2, target)):
        assert error <= (0 if target == "eager" else 1e-5)
        assert calls["all_to_all_single"] > 0
        assert calls["all_gather_into_tensor"] > 1


MODELS: dict[str, Any] = {
    "flux": lambda: (flux(1, 1), (), flux_inputs(1, 33, 7)),
    "qwen": lambda: (qwen(layers=1), (), qwen_inputs()),
    "z_image": lambda: (z_image(layers=1), z_image_inputs(), {}),
}


def by_us(rank: int, world: int, name: str, target: str, budget: Any) -> dict[str, Any]:
    model, args, kwargs = MODELS[name]()
    # Of a third of its features a product of this size has another kernel.
    split = "off" if world == 3 else "auto"
    options = {"target": target, "on_unsharded": "error", "split_features": split}
    with torch.no_grad():
        whole = torch.compile(model, backend="ascend_sp", options=options)
        whole(*args, **kwargs)
        want = _first(whole(*args, **kwargs))
        torch.compiler.reset()
        report = ascend_sp.shard_weights(model, budget=budget)
        held = held_by(model)
        sharded = torch.compile(model, backend="ascend_sp", options=options)
        got = _first(sharded(*args, **kwargs))
    return {
        "error": (got - want).abs().max().item(),
        "held": held,
        "held after": held_by(model),
        "report": report,
        "names": sorted(model.state_dict()),
    }


def held_by(model: nn.Module) -> int:
    """Bytes of memory that a rank has for parameters, each once."""
    found = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in found}
    return sum(memory.values())


def _first(out: Any) -> torch.Tensor:
    while not isinstance(out, torch.Tensor):
        out = out[0]
    return out


@pytest.mark.parametrize(
    ("name", "world", "target", "budget"),
    [
        ("flux", 2, "eager", None),
        pytest.param("flux", 2, "eager", 0.7, marks=pytest.mark.slow),
        pytest.param("qwen", 3, "eager", None, marks=pytest.mark.slow),
        pytest.param("flux", 2, "inductor", 0.7, marks=pytest.mark.slow),
        pytest.param("z_image", 2, "eager", None, marks=pytest.mark.slow),
        pytest.param("flux", 4, "eager", None, marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_as_with_whole_weights(
    name: str, world: int, target: str, budget: float | None
) -> None:
    model, *_ = MODELS[name]()
    total = sum(p.nbytes for p in model.parameters())
    for found in values(run(by_us, world, name, target, budget, timeout=280)):
        report = found["report"]
        assert found["error"] <= (0 if target == "eager" else 1e-5)
        assert found["held"] == report.local_bytes
        assert found["names"] == sorted(model.state_dict())
        kept = sum(model.get_parameter(n).nbytes for n, why in report.whole)
        assert report.local_bytes == (total - kept) // world + kept
        assert all(f"divides by {world}" in why for _, why in report.whole)
        if budget:
            assert 0.6 * total < found["held after"] <= budget * total
        else:
            assert found["held after"] == found["held"]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [pytest.param(m, p, marks=pytest.mark.slow) for m in ALL for p in (2, 3, 4)],
)
def test_any_model_any_ranks_any_budget(name: str, ranks: int) -> None:
    """The same bits, and no more than the budget and two weights that are gathered."""
    model, inputs = ALL[name]()
    captured = capture(model, **inputs) if isinstance(inputs, dict) else capture(model, *inputs)
    # Fewer features, and keys that are gathered, may have other kernels.
    config = Config(split_features="off", strategy="separate")
    want, *_ = simulate(captured, ranks, config)
    total = sum(p.nbytes for p in model.parameters())
    for room in (0, total // 3, total):
        got, programs, contexts, _ = simulate_sharded(captured, ranks, config, room)
        pairs = zip(got, want, strict=True)
        assert all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))
        found = [weights(gm, ctx) for gm, ctx in zip(programs, contexts, strict=True)]
        assert all(w.resident <= found[0].least + room for w in found)
        pieces = sorted(g.whole.meta["val"].nbytes for g in gathers(programs[0].graph, contexts[0]))
        small = 0.1 * found[0].whole / ranks  # what is needed with them: biases, norms
        assert found[0].at_once <= sum(pieces[-2:]) + small
        assert (found[0].gathers == 0) is (found[0].least + room >= found[0].whole)


def test_a_weight_of_a_product_without_tokens_is_not_gathered() -> None:
    model, inputs = flux(1, 1), flux_inputs(1, 33, 7)
    captured = capture(model, **inputs)
    want, *_ = simulate(captured, 2, Config(split_features="on"))
    got, programs, contexts, _ = simulate_sharded(captured, 2, Config(cost_model="910B4"))
    assert worst(got, want[0]) <= 1e-6
    rows = {tuple(g.whole.meta["val"].shape) for g in gathers(programs[0].graph, contexts[0])}
    modulation = model.transformer_blocks[0].norm1.linear.weight
    assert tuple(modulation.shape) not in rows
    assert any("are not gathered" in n.text for n in contexts[0].notes)


def misuse(rank: int, world: int) -> list[str]:
    out = []

    def told(call: Any) -> None:
        try:
            call()
            out.append("")
        except Exception as e:
            out.append(f"{type(e).__name__}: {e}")

    torch.manual_seed(0)
    model = SelfAttention(12, 3)
    total = sum(p.nbytes for p in model.parameters())
    for budget in (0.1, 0, 1.5, "1GB"):
        told(lambda budget=budget: ascend_sp.shard_weights(model, budget=budget))
    told(lambda: ascend_sp.shard_weights(model, budget=total if rank else total // 2 + 999))
    told(lambda: ascend_sp.shard_weights(model, budget=0.75 if rank else float("nan")))
    torch.manual_seed(rank)
    told(lambda: ascend_sp.shard_weights(SelfAttention(12, 3)))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    ascend_sp.shard_weights(model)
    told(lambda: ascend_sp.shard_weights(model))
    told(lambda: model(x()))
    told(lambda: model.blocks[0].norm1.weight.data.add_(torch.ones(12)))
    torch.manual_seed(0)
    model = SelfAttention(12, 3)
    pipe = SimpleNamespace(components={"net": model}, net=model)
    (part,) = ascend_sp.parallelize(pipe, budget=0.75).parts
    assert 0.7 * part.whole_bytes < part.local_bytes <= 0.75 * part.whole_bytes
    assert pipe.net is not model
    return out


def test_misuse_is_an_error_on_every_rank() -> None:
    for found in values(run(misuse, 2)):
        least, zero, share, kind, differ, one_bad, seeds, twice, eager, fused = found
        assert "the least that 2 rank(s) can hold" in least and "more ranks" in least
        assert zero.startswith("ConfigError: budget is 0;") and "above 0" in zero
        assert "budget is 1.5: as a float it is a share" in share
        assert "budget is '1GB'; it must be a number of bytes" in kind
        assert differ.startswith("RankMismatchError") and "budget" in differ
        # Where one rank's is bad, the other neither goes on alone nor waits for it.
        assert one_bad.startswith("RankMismatchError") and "nan" in one_bad
        assert seeds.startswith("RankMismatchError") and "do not have the same inputs" in seeds
        assert "sharded already" in twice
        assert "whole in compiled programs only" in eager
        assert "mixed torch.Tensor and DTensor" in fused


def loaded(rank: int, world: int, folder: str) -> tuple[float, int, int, int]:
    """Built without memory, sharded, then read: nothing but the rank's part."""
    with init_empty_weights(include_buffers=False):
        model = flux(1, 1)
    sharded = ascend_sp.shard_weights(model)
    read = ascend_sp.load_weights(model.eval(), folder)
    options = {"target": "eager", "on_unsharded": "error"}
    with torch.no_grad():
        want = flux(1, 1)(**flux_inputs())[0]
        got = torch.compile(model, backend="ascend_sp", options=options)(**flux_inputs())[0]
    held = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    return (got - want).abs().max().item(), held, read.bytes_read, sharded.local_bytes


@pytest.mark.slow
def test_weights_are_read_shard_by_shard(tmp_path: Path) -> None:
    flux(1, 1).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    for error, held, read, local in values(run(loaded, 2, str(tmp_path / "model"))):
        assert error <= 1e-5
        assert held <= read == local


def test_one_rank_changes_nothing() -> None:
    model = SelfAttention(12, 3)
    report = ascend_sp.shard_weights(model)
    assert report.local_bytes == report.whole_bytes and not report.sharded
    assert "there is one rank" in str(report)
    with pytest.raises(ConfigError, match=r"takes a torch.nn.Module, and got list"):
        ascend_sp.shard_weights([model])  # type: ignore[arg-type]
