"""What diffusers puts around or into a transformer, with ascend_sp, row by row on two gloo ranks.

    .venv/bin/python tests/combinations.py                # every row; some minutes
    .venv/bin/python tests/combinations.py --only cache   # rows whose name holds this

Each row is a reduced FLUX of one double and two single blocks (three attentions), used as the
documentation of diffusers says, for some denoising steps, twice; with ``target="eager"``, since
what is asked is what is split and whether it is right. What was seen goes to
docs/combinations.json, and docs/combinations.md is made from it and from the words below. LoRA
needs peft and int8 weights need torchao, which nothing else here does:

    .venv/bin/uv pip install --no-deps --target out/more peft torchao
    PYTHONPATH=out/more .venv/bin/python tests/combinations.py

A row whose package is not there is left out, and the page keeps what was seen of it before. The
exit status is 1 if a row fails or differs from eager.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/combinations.md"
RESULTS = ROOT / "docs/combinations.json"
ALLOWED = 1e-5
"""Largest difference to eager, as a share of the largest value."""
LIMIT = 900
"""Seconds for a row."""
STEPS = (950.0, 800.0, 650.0, 500.0, 350.0, 200.0)
"""Timesteps of a run."""
CPU = torch.device("cpu")

Prepare = Callable[[nn.Module, SimpleNamespace], Any]


@dataclass(frozen=True)
class Row:
    """One thing to combine with."""

    what: str
    how: str
    """The calls, as a user writes them."""
    note: str
    """What follows from what was seen: what to do."""
    prepare: Prepare = lambda model, pipe: None
    """Before `torch.compile`; `pipe` has the ``current_timestep`` that a pipeline has, and the same
    as a ``number``."""
    compiled: Callable[[nn.Module, dict[str, Any]], nn.Module] = lambda model, kw: torch.compile(
        model, **kw
    )
    before: Callable[[nn.Module, int], Any] = lambda model, step: None
    """In front of a step, on the model that was given to `torch.compile`."""
    control: bool = False
    """With a ControlNet, compiled as well."""
    needs: str = ""
    """A package."""
    rounds: bool = False
    """Whether the model itself rounds to integers, so that a last bit may become a step of them."""


@dataclass
class Seen:
    """What was seen of a row on rank 0; the other rank saw the same, or the row fails."""

    graphs: int = 0
    split: int = 0
    attentions: int = 0
    gathers: list[int] = field(default_factory=list)
    """In each step of the second run."""
    again: int = 0
    """Graphs that were compiled in the second run."""
    error: float = 0.0
    """Largest difference to eager, as a share of the largest value."""
    own: float = 0.0
    """The same of eager with inputs that are off by their last bit, where a row rounds."""
    told: list[str] = field(default_factory=list)
    """The first lines of ascend_sp's warnings."""
    failed: str = ""
    diffusers: str = ""
    """The version of it."""


def _cache(name: str, *, number: bool = False, **config: Any) -> Prepare:
    def prepare(model: nn.Module, pipe: SimpleNamespace) -> None:
        import diffusers.hooks

        attribute = "number" if number else "current_timestep"
        if number:  # what breaks the graph besides, or makes another one of each step
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
            torch._dynamo.config.ignore_logging_functions.add(logging.Logger.debug)
        callback = {"current_timestep_callback": lambda: getattr(pipe, attribute)}
        made = getattr(diffusers.hooks, name)
        known = made.__dataclass_fields__
        model.enable_cache(made(**config, **{k: v for k, v in callback.items() if k in known}))

    return prepare


def _group_offload(level: str, **more: Any) -> Prepare:
    return lambda model, pipe: model.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=level, **more
    )


def _sequential(model: nn.Module, pipe: SimpleNamespace) -> None:
    import accelerate

    accelerate.cpu_offload(model, CPU)


def _whole_model(model: nn.Module, pipe: SimpleNamespace) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(model, CPU)


def _casting(model: nn.Module, pipe: SimpleNamespace) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _adapter(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA of the attentions, as a file holds it."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v"):
            out[f"{name}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=g) * 0.1
            out[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=g) * 0.1
    return out


def _lora(model: nn.Module, pipe: SimpleNamespace) -> None:
    model.load_lora_adapter(_adapter(model), adapter_name="style", prefix=None)


def _fused_lora(model: nn.Module, pipe: SimpleNamespace) -> None:
    _lora(model, pipe)
    model.fuse_lora()


def _swappable_lora(model: nn.Module, pipe: SimpleNamespace) -> None:
    model.enable_lora_hotswap(target_rank=4)
    _lora(model, pipe)


def _scaled(model: nn.Module, step: int) -> None:
    model.set_adapters(["style"], weights=[1.0 if step < 3 else 0.5])


def _swapped(model: nn.Module, step: int) -> None:
    adapter = _adapter(model, step // 3)
    model.load_lora_adapter(adapter, adapter_name="style", prefix=None, hotswap=True)


def _quantised(config: str) -> Prepare:
    def prepare(model: nn.Module, pipe: SimpleNamespace) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())

    return prepare


def _repeated(model: nn.Module, kw: dict[str, Any]) -> nn.Module:
    model.compile_repeated_blocks(**kw)
    return model


def _backend(name: str) -> Prepare:
    return lambda model, pipe: model.set_attention_backend(name)


BROADCAST: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (100, 800),
}
FASTER: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 681),
    "is_guidance_distilled": True,
    "tensor_format": "BCHW",
}
AS_BLOCKS = (
    "goes with it. Each block is a graph of its own and gathers what it returns: by estimate a "
    "tenth of a step at FLUX.1's width and length on 910B4s"
)
SMALL = "; the warning is for a model as small as this one"
ROWS = (
    Row("nothing else", '`torch.compile(transformer, backend="ascend_sp")`', "one graph: best"),
    Row(
        "regional compile",
        '`transformer.compile_repeated_blocks(backend="ascend_sp")`',
        f"{AS_BLOCKS}. Compiles sooner: as few graphs for any number of blocks",
        compiled=_repeated,
    ),
    Row(
        "fused QKV projections",
        "`transformer.fuse_qkv_projections()`",
        "goes with it",
        lambda model, pipe: model.fuse_qkv_projections(),
    ),
    Row(
        "ControlNet",
        "compiled as the transformer is",
        "goes with it; what the ControlNet hands over is gathered",
        control=True,
    ),
    Row(
        "cache: FirstBlockCache",
        "`enable_cache(FirstBlockCacheConfig(threshold=0.2))`",
        AS_BLOCKS + SMALL,
        _cache("FirstBlockCacheConfig", threshold=0.2),
    ),
    Row(
        "cache: PyramidAttentionBroadcast",
        "`enable_cache(PyramidAttentionBroadcastConfig(..., current_timestep_callback=lambda: "
        "pipe.current_timestep))`",
        "a pipeline's timestep is a tensor, and comparing it breaks every block around its "
        "attention, so MLPs are whole on every rank. Give it a number: next row",
        _cache("PyramidAttentionBroadcastConfig", **BROADCAST),
    ),
    Row(
        "PyramidAttentionBroadcast, the timestep a number",
        "`current_timestep_callback=lambda: state.number`, an int that `callback_on_step_end` "
        "sets, and `torch._dynamo.config.allow_unspec_int_on_nn_module = True`",
        "goes with it: one graph a step. A few are compiled for the cases of the cache, and "
        "what it keeps is gathered with the result",
        _cache("PyramidAttentionBroadcastConfig", number=True, **BROADCAST),
    ),
    Row(
        "cache: FasterCache",
        "`enable_cache(FasterCacheConfig(..., current_timestep_callback=lambda: "
        "pipe.current_timestep))`",
        "as PyramidAttentionBroadcast",
        _cache("FasterCacheConfig", **FASTER),
    ),
    Row(
        "FasterCache, the timestep a number",
        "the same, and `torch._dynamo.config.ignore_logging_functions.add(logging.Logger.debug)`",
        "the same",
        _cache("FasterCacheConfig", number=True, **FASTER),
    ),
    Row(
        "cache: TaylorSeer",
        "`enable_cache(TaylorSeerCacheConfig(cache_interval=2, ...))`",
        "every attention is a graph of its own, and MLPs are whole on every rank: use "
        "FirstBlockCache",
        _cache(
            "TaylorSeerCacheConfig",
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
        ),
    ),
    Row(
        "cache: MagCache",
        "`enable_cache(MagCacheConfig(mag_ratios=...))`",
        "it switches compilation off by itself: every block runs in eager, whole on every rank, "
        "and nobody can warn of that. Use FirstBlockCache",
        _cache("MagCacheConfig", mag_ratios=[1.0] * 6, num_inference_steps=6),
    ),
    Row(
        "offload: groups of blocks",
        '`enable_group_offload(..., offload_type="block_level", num_blocks_per_group=1)`',
        AS_BLOCKS + SMALL,
        _group_offload("block_level", num_blocks_per_group=1),
    ),
    Row(
        "offload: groups of leaves",
        '`enable_group_offload(..., offload_type="leaf_level")`',
        "every linear is a graph of its own, whole on every rank: offload groups of blocks",
        _group_offload("leaf_level"),
    ),
    Row(
        "offload: sequential",
        "`pipe.enable_sequential_cpu_offload()`, which calls `accelerate.cpu_offload`",
        "as groups of leaves",
        _sequential,
    ),
    Row(
        "offload: whole models",
        "`pipe.enable_model_cpu_offload()`, which calls `accelerate.cpu_offload_with_hook`",
        "goes with it",
        _whole_model,
    ),
    Row(
        "casting: fp8 layer by layer",
        "`enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, ...)`",
        "every linear is a graph of its own, whole on every rank: use int8 weights",
        _casting,
    ),
    Row(
        "int8 weights",
        "torchao's `quantize_(transformer, Int8WeightOnlyConfig())`",
        "goes with it",
        _quantised("Int8WeightOnlyConfig"),
        needs="torchao",
    ),
    Row(
        "int8 weights and activations",
        "torchao's `quantize_(transformer, Int8DynamicActivationInt8WeightConfig())`",
        "goes with it; a last bit may become a step of int8, in eager as well",
        _quantised("Int8DynamicActivationInt8WeightConfig"),
        needs="torchao",
        rounds=True,
    ),
    Row("LoRA", "`load_lora_adapter(...)`", "goes with it", _lora, needs="peft"),
    Row("LoRA: fused", "`fuse_lora()`", "goes with it", _fused_lora, needs="peft"),
    Row(
        "LoRA: another scale",
        '`set_adapters(["style"], weights=[0.5])` between steps',
        "goes with it; Dynamo compiles once more for another scale",
        _lora,
        before=_scaled,
        needs="peft",
    ),
    Row(
        "LoRA: hot swap",
        "`enable_lora_hotswap()`, then `load_lora_adapter(..., hotswap=True)` between steps",
        "goes with it; nothing is compiled once more",
        _swappable_lora,
        before=_swapped,
        needs="peft",
    ),
    *(
        Row(f"attention: `{name}`", f'`set_attention_backend("{name}")`', note, _backend(name))
        for name, note in (
            ("native", "what diffusers does by itself: goes with it"),
            ("_native_math", "goes with it; which kernel runs is the option `attention`'s to say"),
            ("_native_flash", "the same"),
            ("flex", "is not split: use `native`, which takes any mask"),
        )
    ),
)


def made(row: Row) -> tuple[nn.Module, nn.Module | None, SimpleNamespace]:
    """The model of a row, its ControlNet, and what a pipeline says of itself."""
    from models import flux, randomised

    pipe = SimpleNamespace(current_timestep=None, number=0)
    model = flux(1, 2, 4)
    control = None
    if row.control:
        import diffusers

        control = diffusers.FluxControlNetModel.from_transformer(
            model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4
        )
        control = randomised(control)
    row.prepare(model, pipe)
    return model, control, pipe


def run_steps(
    row: Row,
    model: nn.Module,
    control: nn.Module | None,
    pipe: SimpleNamespace,
    call: nn.Module,
    around: Callable[[Callable[[], Tensor]], Tensor] = lambda step: step(),
    off: bool = False,
) -> list[Tensor]:
    """The output of each denoising step.

    Args:
        row: what is run.
        model: what was given to `torch.compile`.
        control: its ControlNet.
        pipe: what a pipeline says of itself.
        call: what is called.
        around: runs a step.
        off: begin with inputs whose last bit is another.
    """
    from models import flux_inputs

    inputs = flux_inputs()
    if off:
        inputs["hidden_states"] = torch.nextafter(inputs["hidden_states"], torch.tensor(9.0))
    out = []
    for i, t in enumerate(STEPS):
        pipe.current_timestep, pipe.number = torch.tensor(t), int(t)
        row.before(model, i)
        given = {**inputs, "timestep": torch.tensor([t / 1000])}

        def step(given: dict[str, Any] = given) -> Tensor:
            if control is not None:
                hint = inputs["hidden_states"].flip(1)
                double, single = control(**given, controlnet_cond=hint)
                given["controlnet_block_samples"] = double
                given["controlnet_single_block_samples"] = single
            with model.cache_context("cond"):
                return call(**given)[0]

        out.append(around(step))
        inputs["hidden_states"] = inputs["hidden_states"] - 0.1 * out[-1]
    if hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()  # as pipelines do at the end
    return out


def measure(rank: int, world: int, name: str) -> Seen:
    """One row on one rank."""
    import diffusers
    from torch._dynamo.utils import counters

    row = next(r for r in ROWS if r.what == name)
    want, other = [], []
    for off, out in ((False, want), (True, other))[: 1 + row.rounds]:
        model, control, pipe = made(row)
        for _ in range(2):
            out += run_steps(row, model, control, pipe, model, off=off)
    model, control, pipe = made(row)
    kw: dict[str, Any] = {"backend": "ascend_sp", "options": {"target": "eager"}}
    call = row.compiled(model, kw)
    if control is not None:
        control = torch.compile(control, **kw)
    seen = Seen(diffusers=diffusers.__version__)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = run_steps(row, model, control, pipe, call)
        seen.graphs = counters["ascend_sp"]["graphs"]

        def profiled(step: Callable[[], Tensor]) -> Tensor:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                result = step()
            names = [e.name for e in profile.events()]
            seen.gathers.append(names.count("_c10d_functional::all_gather_into_tensor"))
            return result

        got += run_steps(row, model, control, pipe, call, profiled)
    seen.again = counters["ascend_sp"]["graphs"] - seen.graphs
    seen.split = counters["ascend_sp"]["attentions_split"]
    seen.attentions = counters["ascend_sp"]["attentions"]
    seen.error = distance(got, want)
    seen.own = distance(other, want) if row.rounds else 0.0
    texts = [str(w.message) for w in caught if str(w.message).startswith("ascend_sp: ")]
    seen.told = [t.removeprefix("ascend_sp: ").splitlines()[0] for t in texts]
    return seen


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference of any step, as a share of the largest value."""
    largest = max(x.abs().max().item() for x in want)
    return max((a - b).abs().max().item() / largest for a, b in zip(got, want, strict=True))


def observed(row: Row) -> Seen:
    """One row on two ranks."""
    from processes import run

    try:
        outcomes = run(measure, 2, row.what, timeout=LIMIT)
    except AssertionError as e:
        return Seen(failed=str(e).splitlines()[0])
    errors = [o.error for o in outcomes if o.error]
    if errors:
        return Seen(failed=errors[0].strip().splitlines()[-1])
    first, second = (o.value for o in outcomes)
    alike = asdict(first) == asdict(second)
    return first if alike else Seen(failed=f"rank 1 saw something else: {second}")


COLUMNS = "| what | how | graphs | split | gathers | error | warns | what to do |"
HEAD = """# What combines with it

*Made by `tests/combinations.py`, which runs each row on two gloo ranks with diffusers {diffusers};
the words are in it.*

A reduced FLUX, one double and two single blocks (three attentions), used as the documentation of
diffusers says for six denoising steps, twice. **Graphs** is how many Dynamo makes of it in the
first run, recompiles counted, and behind a plus what the second run adds. **Split** are how many of
the attentions in those graphs. **Gathers** are the all-gathers in each step of the second run.
**Error** is the largest difference to the same model in eager, as a share of the largest value.
**Warns** is what ascend_sp warns of, once on each rank
([debugging.md](debugging.md#nothing-is-split)). Offloading goes from the CPU to the CPU here, which
breaks graphs as it does elsewhere.

"""
TAIL = """
Not run here, since they need an accelerator: the attention backends `flash`, `sage`, `xformers`,
`_native_cudnn`, `_native_efficient` and their kin. Those that are ops of a library are not split,
and a warning says so; those that Dynamo cannot trace break the graph around each attention.
`_native_npu` is split, see `tests/npu/test_attention_calls.py`. SeaCache and TextKVCache are for
models that are not reduced here.
"""


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/combinations.md."""
    versions = sorted({seen["diffusers"] for seen in results.values() if seen["diffusers"]})
    lines = [HEAD.format(diffusers=" and ".join(versions)) + COLUMNS, "|---" * 8 + "|"]
    for row in ROWS:
        seen = Seen(**results[row.what]) if row.what in results else Seen(failed="not run yet")
        if seen.failed:
            lines.append(f"| {row.what} | {row.how} | {seen.failed} | | | | | {row.note} |")
            continue
        graphs = f"{seen.graphs}" + (f" + {seen.again}" if seen.again else "")
        # In the order of steps; one number if all are alike.
        gathers = seen.gathers if len(set(seen.gathers)) > 1 else seen.gathers[:1]
        error = f"{seen.error:.0e}" + (f" (eager: {seen.own:.0e})" if seen.own else "")
        warns = ", ".join("in pieces" if "pieces" in t else t.split(":")[0] for t in seen.told)
        lines.append(
            f"| {row.what} | {row.how} | {graphs} | {seen.split} of {seen.attentions} "
            f"| {', '.join(map(str, gathers))} | {error} | {warns} | {row.note} |"
        )
    return "\n".join([*lines, TAIL])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wrong = 0
    for row in ROWS if not given.page else ():
        if given.only not in row.what:
            continue
        if row.needs and importlib.util.find_spec(row.needs) is None:
            print(f"left out, since there is no {row.needs}: {row.what}")
            continue
        seen = observed(row)
        print(row.what, asdict(seen), flush=True)
        wrong += bool(seen.failed) or not seen.error <= max(ALLOWED, 2 * seen.own)
        results[row.what] = asdict(seen)
        kept = {row.what: results[row.what] for row in ROWS if row.what in results}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(page(results))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
