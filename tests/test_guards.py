"""Each guard on real gloo processes with a fault put in; every run is bounded by a timeout."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from processes import run, values
from toy import SelfAttention


def compiled(
    model: nn.Module | None = None, seed: int = 0, dynamic: bool | None = None, **options: Any
) -> Callable[..., Any]:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    if model is None:
        model = SelfAttention(12, 3)
    options = {"target": "eager", "check_timeout": 100, "strategy": "separate", **options}
    return torch.compile(model, backend="ascend_sp", options=options, dynamic=dynamic)


def x(seed: int = 0, rows: int = 17) -> Tensor:
    return torch.randn(1, rows, 12, generator=torch.Generator().manual_seed(seed))


def error_of(call: Callable[[], Any]) -> str:
    """The text of the error that `call` raises; empty if it raises none."""
    try:
        call()
    except RuntimeError as e:
        return f"{type(e).__name__}: {e}"
    return ""


# Programs ---------------------------------------------------------------------------------------


class Scaled(SelfAttention):
    scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = x * self.scale
        return self.blocks[1](x)


class Longer(SelfAttention):
    more = False

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.relu() if self.more else x


def other_programs(rank: int, world: int) -> list[str]:
    torch.manual_seed(0)
    scaled, longer = Scaled(12, 3), Longer(12, 3)
    scaled.scale += rank
    longer.more = rank == 1
    return [error_of(lambda m=m: compiled(m)(x())) for m in (scaled, longer)]  # type: ignore[misc]


def test_programs_that_differ_name_the_first_operation_and_its_line() -> None:
    for scaled, longer in values(run(other_programs, 2)):
        for text in (scaled, longer):
            assert "do not compile the same program" in text
            assert "the first that differs, on rank(s) [0]: " in text
        assert "program on rank(s) [0]" in scaled and "operations on" not in scaled
        assert ", 2.0), kwargs = {})" in scaled and ", 3.0), kwargs = {})" in scaled
        assert scaled.count("x = x * self.scale") == 2  # the user's own line
        assert "operations on rank(s) [0]" in longer
        assert "x.relu() if self.more else x" in longer


# Inputs -----------------------------------------------------------------------------------------


class Many(SelfAttention):
    def forward(self, x: Tensor, others: dict[str, Tensor], times: int) -> Tensor:
        for o in others.values():
            o = torch.view_as_real(o).sum(-1) if o.is_complex() else o
            x = x + o.sum().to(x.dtype).nan_to_num() * times
        return super().forward(x)


class NoAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def every_kind(rank: int) -> dict[str, Tensor]:
    """The same values on both ranks, with another NaN and another zero."""
    strange = torch.tensor([float("nan"), 0.0, 1.0])
    return {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(3, dtype=torch.complex64),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(3),
        "empty": torch.empty(0),
        "strided": x().transpose(1, 2),
        "strange": torch.stack([-strange[0], -strange[1], strange[2]]) if rank else strange,
    }


def other_inputs(rank: int, world: int) -> dict[str, str]:
    """Faults on rank 1; errors come before any collective, so one group serves for all."""
    out = {}
    once, always = compiled(), compiled(check_inputs="always")
    out["seed"] = error_of(lambda: once(x(rank)))
    out["the same run again"] = error_of(lambda: once(x(rank)))
    out["same"] = error_of(lambda: once(x()))
    out["not checked any more"] = error_of(lambda: once(x(rank)))
    out["always, same"] = error_of(lambda: always(x()))
    out["always"] = error_of(lambda: always(x(rank)))
    out["off"] = error_of(lambda: compiled(check_inputs="off")(x(rank)))
    out["weights"] = error_of(lambda: compiled(seed=rank)(x()))
    out["no collectives"] = error_of(lambda: compiled(NoAttention())(x(rank)))
    many = compiled(Many(12, 3), check_inputs="always")
    out["kinds, same"] = error_of(lambda: many(x(), every_kind(rank), 2))
    changed = every_kind(rank) | {"mask": torch.tensor([True, rank == 1])}
    out["kinds"] = error_of(lambda: many(x(), changed, 2))
    return out


def test_inputs_that_differ() -> None:
    got = values(run(other_inputs, 2))
    for texts in got:
        for name in ("same", "not checked any more", "always, same", "off", "no collectives"):
            assert texts[name] == "", name
        assert texts["kinds, same"] == ""
        for name in ("seed", "the same run again", "always"):
            text = texts[name]
            assert text.startswith("RankMismatchError: the ranks of group")
            graph = 1 if name == "always" else 0
            assert f"do not have the same inputs for graph {graph}: 1 of 29 differ" in text, text
            assert "\n  x: float32[1, 17, 12] " in text
            assert " on rank(s) [0]; float32[1, 17, 12] " in text and " on rank(s) [1]\n" in text
            assert "manual_seed" in text and "ASCEND_SP_CHECK_INPUTS=off" in text
        text = texts["weights"]
        assert "self.blocks.0.norm1" not in text  # ones and zeros on all ranks
        assert "\n  parameter self.blocks.0.attention.q.weight: float32[12, 12] " in text
        assert "and 12 more" in text and "LoRA" in text and "generator" not in text
        assert "\n  others['mask']: bool[2] " in texts["kinds"]
    assert got[0] == got[1]


# Ranks that die or stall ------------------------------------------------------------------------


def _stop(value: Tensor, how: str) -> Tensor:
    if os.environ.get("STOP") == "now":
        if how == "dies":
            os._exit(1)
        if how == "raises":
            raise RuntimeError("something of its own")
        time.sleep(60)
    return value


def stops(rank: int, world: int, how: str, target: str) -> str:
    """Rank 1 stops in its second run, before it starts the third collective."""
    from ascend_sp.compiler import ladder
    from ascend_sp.compiler.targets import EAGER
    from ascend_sp.runtime.ops import ALL_TO_ALL

    def stopping(gm: fx.GraphModule, inputs: Any, static: Any) -> Any:
        node = gm.graph.find_nodes(op="call_function", target=ALL_TO_ALL)[2]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(_stop, (node.args[0], how))
        new.meta["val"] = node.args[0].meta["val"]
        node.replace_input_with(node.args[0], new)
        gm.recompile()
        return EAGER.lower(gm, inputs, static)

    if rank == 1:
        faulty = replace(EAGER, name=target, lower=stopping)
        ladder.targets.ladder = lambda *_: (faulty,)  # type: ignore[assignment]
    program = compiled(target=target)
    program(x())
    os.environ["STOP"] = "now"
    start = time.monotonic()
    text = error_of(lambda: program(x()))
    assert time.monotonic() - start < float(os.environ["GROUP_TIMEOUT"]) + 5
    return text


WAITED = r"It waited for the result of collective 3 of 9: all_to_all_single_default_2 of \d+ "
# What a process had not yet sent goes down with it: collectives that it had started fail as well.
ANY_WAITED = (
    r"It waited for the result of collective [123] of 9: all_to_all_single_default(_\d)? of "
)


@pytest.mark.parametrize(
    ("how", "world", "target"),
    [
        ("dies", 3, "eager"),
        ("sleeps", 2, "eager"),
        pytest.param("sleeps", 2, "inductor", marks=pytest.mark.slow),
        pytest.param("dies", 2, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_stops_during_a_run(how: str, world: int, target: str) -> None:
    got = values(run(stops, world, how, target, lost=[1], GROUP_TIMEOUT="5"))
    for rank, text in zip([0, 2], got, strict=False):
        assert text.startswith(f"CollectiveError: graph 0 failed on rank {rank} of ranks [0, 1")
        assert "in its run 1: " in text
        waited = ANY_WAITED if how == "dies" else WAITED
        assert re.search(waited, text) and "toy.py" in text, text
        assert "Rank(s) [1] did not report a failure: they died, are stuck" in text
        assert "No rank reported a cause" in text


def test_a_rank_that_fails_by_itself_says_why() -> None:
    first, second = values(run(stops, 2, "raises", "eager", GROUP_TIMEOUT="5"))
    assert "graph 0 failed on rank 1 of ranks [0, 1], in its run 1: something of its own" in second
    assert "not known which of its 9 collectives it was in, if any" in second
    assert re.search(WAITED, first), first
    assert "another rank: rank 1 failed in graph 0, run 1: something of its own" in first


# Numbers ----------------------------------------------------------------------------------------


def another_value(gm: fx.GraphModule, attention: Any) -> None:
    """The second attention's values are half as large again."""
    node = gm.graph.find_nodes(op="call_function", target=attention)[1]
    value: Any = node.args[2]
    with gm.graph.inserting_before(node):
        larger = gm.graph.call_function(torch.ops.aten.mul.Tensor, (value, 1.5))
    larger.meta.update(value.meta)
    node.replace_input_with(value, larger)


def no_bias(gm: fx.GraphModule) -> None:
    """The last projection leaves its bias out."""
    node = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)[-1]
    node.kwargs = {"beta": 0}


def put_fault_in(name: str) -> None:
    """Break a pass of this process's compiler, or its lowering."""
    from ascend_sp.compiler import ladder, pipeline
    from ascend_sp.compiler.targets import EAGER

    if name == "lowering":
        wrong = replace(EAGER, lower=lambda gm, *_: lambda args: [gm(*args)[0] * 1.01])
        ladder.targets.ladder = lambda *_: (wrong,)  # type: ignore[assignment]
        return

    def broken(p: pipeline.Pass) -> pipeline.Pass:
        @wraps(p.run)
        def fault(gm: fx.GraphModule, ctx: Any) -> fx.GraphModule:
            gm = p.run(gm, ctx)
            if name == "ulysses":
                another_value(gm, torch.ops.ascend_sp.attention.default)
            elif ctx.topology.rank == 1:
                no_bias(gm)
            return gm

        return replace(p, run=fault) if p.name == name else p

    passes = tuple(map(broken, pipeline.PASSES))
    ladder.compile_aten = partial(pipeline.compile_aten, passes=passes)


def numbers(rank: int, world: int, fault: str, folder: str, dynamic: bool) -> list[str]:
    options = {"check_numerics": True, "verify": False, "dump_dir": folder, "dynamic": dynamic}
    right = []
    if fault != "lowering":
        program = compiled(**options)
        right = [error_of(lambda: program(x())), error_of(lambda: program(x(1)))]
    put_fault_in(fault)
    return [*right, error_of(lambda: compiled(**options)(x()))]


@pytest.mark.parametrize(
    "fault",
    ["ulysses", "lowering", pytest.param("schedule_collectives", marks=pytest.mark.slow)],
)
def test_numbers_that_differ(fault: str, tmp_path: Path) -> None:
    dynamic = fault == "schedule_collectives"
    got = values(run(numbers, 2, fault, str(tmp_path), dynamic))
    assert got[0] == got[1]
    *right, text = got[0]
    assert not any(right)
    graph = 1 if right else 0
    assert text.startswith(
        f"NumericsError: graph {graph}, run 0: the compiled program's results differ"
    )
    assert "allowed 0.001; it is" in text and "return x + self.mlp(self.norm2(x))" in text
    for rank in (0, 1):
        assert (
            f"NumericsError: {(tmp_path / f'graph_{graph}/rank_{rank}/numerics.txt').read_text()}"
            == (text + "\n")
        )
    if fault == "ulysses":
        assert "wrong after materialise_sharding, then ulysses." in text
        assert "made by ulysses(attention_1))\n    at " in text
        assert "y = F.scaled_dot_product_attention(" in text
        assert "ASCEND_SP_SEQUENCE_PARALLEL=0 works around it" in text
        suspects = (tmp_path / "graph_1/rank_0/suspects.txt").read_text()
        assert " (aten.mul.Tensor, made by ulysses(attention_1))\n" in suspects
    elif fault == "schedule_collectives":
        assert "Right after ulysses; wrong after schedule_collectives." in text
        assert re.search(r"on rank\(s\) \[1\], error .*\n  addmm_9 \(aten.addmm.default\)", text)
        assert "ASCEND_SP_SKIP_PASSES=schedule_collectives works around it" in text
    else:
        assert "right after every pass, run op by op; what target eager compiles" in text


def test_numbers_on_one_rank() -> None:
    from ascend_sp.compiler import ladder

    before = ladder.targets.ladder
    with torch.no_grad():
        assert error_of(lambda: compiled(check_numerics=True)(x())) == ""
        put_fault_in("lowering")
        try:
            text = error_of(lambda: compiled(check_numerics=True)(x()))
        finally:
            ladder.targets.ladder = before
    assert "relative error 0.01 on rank(s) [0]" in text


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_random_numbers_cannot_be_checked() -> None:
    with torch.no_grad(), pytest.warns(UserWarning, match=r"skips graph \d+: .*x \+ torch"):
        compiled(Noisy(), check_numerics=True)(x())
