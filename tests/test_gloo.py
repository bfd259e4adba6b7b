"""The whole backend on real processes: FLUX, compiled by name, equal to eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.fx.experimental._config

from checks import collectives_of, error
from models import flux, flux_inputs, qwen, qwen_inputs, z_image, z_image_inputs
from processes import run, values
from toy import SelfAttention


def compile_flux(
    rank: int, world: int, target: str, image: int, text: int, dynamic: bool | None
) -> dict:
    model = flux(1, 1, 3)
    options = {"target": target, "strategy": "separate"}
    compiled = torch.compile(
        model, backend="ascend_sp", options=options, fullgraph=True, dynamic=dynamic
    )
    torch._dynamo.config.error_on_recompile = True
    # The first length is the number of channels, and PyTorch would take the two for one size.
    torch.fx.experimental._config.use_duck_shape = False
    errors = []
    lengths = [image, *((17, 18, 21, 24, 25, 7, 64) if dynamic else (image,))]
    for seed, length in enumerate(lengths):
        inputs = flux_inputs(2, length, text, seed=seed)
        errors.append(error(compiled(**inputs)[0], model(**inputs)[0]))
    calls = collectives_of(lambda: compiled(**inputs))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"errors": errors, "calls": calls, "graphs": graphs}


@pytest.mark.parametrize(
    ("world", "target", "image", "text", "dynamic"),
    [
        (2, "eager", 1023, 7, False),
        pytest.param(4, "eager", 64, 8, False, marks=pytest.mark.slow),
        pytest.param(4, "inductor", 1023, 7, False, marks=pytest.mark.slow),
        pytest.param(4, "eager", 1023, 7, False, marks=pytest.mark.slow),
        pytest.param(2, "inductor", 33, 7, False, marks=pytest.mark.slow),
        pytest.param(3, "eager", 16, 7, True, marks=pytest.mark.slow),
    ],
)
def test_flux(world: int, target: str, image: int, text: int, dynamic: bool | None) -> None:
    for got in values(run(compile_flux, world, target, image, text, dynamic, timeout=280)):
        assert max(got["errors"]) <= 1e-5
        assert got["graphs"] == 1
        assert got["calls"] == {
            "all_to_all_single": 4 * 2,
            "all_gather_into_tensor": 1,
            "wait_tensor": 4 * 2 + 1,
            # The same, one level down: what the process group was asked for.
            "alltoall_base_": 4 * 2,
            "allgather_into_tensor_coalesced_": 1,
        }


def resolutions(rank: int, world: int) -> list[float]:
    """Automatic dynamic shapes: the third length must not compile again."""
    model = SelfAttention(12, 3)
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    compiled = torch.compile(model, backend="ascend_sp", options={"target": "inductor"})
    out = []
    for length in (16, 21, 34, 40):
        x = torch.randn(1, length, 12, generator=torch.Generator().manual_seed(length))
        out.append(error(compiled(x), model(x)))
    out.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return out


@pytest.mark.slow
def test_new_lengths_compile_once_more_and_then_never_again() -> None:
    for *errors, graphs in values(run(resolutions, 2, timeout=280)):
        assert max(errors) <= 1e-5
        assert graphs == 2


def subgroup(rank: int, world: int) -> float:
    """degree=2 on four ranks: two groups, each with its own input."""
    torch.manual_seed(0)
    model = SelfAttention(12, 3)
    compiled = torch.compile(model, backend="ascend_sp", options={"target": "eager", "degree": 2})
    x = torch.randn(1, 15, 12, generator=torch.Generator().manual_seed(rank // 2))
    return error(compiled(x), model(x))


def test_degree_smaller_than_the_world() -> None:
    assert max(values(run(subgroup, 4))) <= 1e-5


def mesh(rank: int, world: int) -> float:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    model = SelfAttention(12, 3)
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "dp"))
    compiled = torch.compile(
        model, backend="ascend_sp", options={"target": "eager", "mesh": device_mesh}
    )
    x = torch.randn(1, 15, 12, generator=torch.Generator().manual_seed(rank % 2))
    return error(compiled(x), model(x))


def test_mesh_with_a_sequence_dim() -> None:
    assert max(values(run(mesh, 4))) <= 1e-5


def without_exchange(rank: int, world: int) -> float:
    """The same as `compile_flux`, with an all-to-all that gives every rank its own blocks back."""
    library = torch.library.Library("_c10d_functional", "IMPL", "CPU")
    library.impl("all_to_all_single", lambda x, out, into, group: x.clone(), allow_override=True)
    model, inputs = flux(1, 1, 3), flux_inputs(2, 33, 7)
    options = {"target": "eager", "strategy": "separate"}
    compiled = torch.compile(model, backend="ascend_sp", options=options)
    return error(compiled(**inputs)[0], model(**inputs)[0])


@pytest.mark.slow
def test_an_all_to_all_that_does_nothing_is_noticed() -> None:
    assert min(values(run(without_exchange, 2))) > 1e-3


def compile_edit_models(
    rank: int, world: int, target: str, captions: tuple[tuple[int, ...], ...], folder: str
) -> dict[str, float]:
    """A masked batch; then a model from cold, which Dynamo cuts into several graphs."""
    options = {"target": target, "dump_dir": folder}
    out = {}
    model, inputs = qwen(3, 1), qwen_inputs(2, mask=(7, 4))
    compiled = torch.compile(model, backend="ascend_sp", options=options, fullgraph=True)
    out["padded prompts"] = error(compiled(**inputs)[0], model(**inputs)[0])
    cold = torch.compile(z_image(3, 1, warm=False), backend="ascend_sp", options=options)
    for seed, text in enumerate(captions):
        args = z_image_inputs(((12, 16),) * len(text), text, seed)
        want = z_image(3, 1)(*args, return_dict=False)[0]
        got = cold(*args, return_dict=False)[0]
        out[f"cold, call {seed}"] = max(map(error, got, want))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "target", "captions"),
    [
        pytest.param(2, "inductor", ((9,), (9,)), marks=pytest.mark.slow),
        (2, "eager", ((9, 40), (9, 40), (9,))),
    ],
)
def test_masks_and_a_cold_start(
    world: int, target: str, captions: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    args = (world, target, captions, str(tmp_path))
    for got in values(run(compile_edit_models, *args, timeout=280)):
        assert max(got.values()) <= 1e-5, got
    summaries = {f: f.read_text() for f in tmp_path.glob("graph_*/rank_0/summary.md")}
    assert len(summaries) > 5
    told = [s for s in summaries.values() if "## Graph breaks" in s]
    assert told and all("`device` context manager" in s for s in told)
    # The blocks are in one graph of each kind of call all the same.
    assert sum("## Attention" in s for s in summaries.values()) == 1 + len(set(captions))
