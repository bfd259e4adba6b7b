"""Wrong use is an error on every rank, with a message that says what to do; nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import ascend_sp
from ascend_sp.runtime.topology import sequence_dim
from processes import errors, run
from toy import SelfAttention


def model_and(options: dict | None = None) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = SelfAttention(12, 3)
    return model, torch.compile(
        model, backend="ascend_sp", options={"target": "eager", **(options or {})}
    )


def different_shapes(rank: int, world: int) -> None:
    model_and()[1](torch.randn(1, 16 + rank, 12))


def different_dtypes(rank: int, world: int) -> None:
    model, compiled = model_and()
    dtype = (torch.float32, torch.bfloat16)[rank]
    model.to(dtype)
    compiled(torch.randn(1, 16, 12, dtype=dtype))


def different_options(rank: int, world: int) -> None:
    model_and({"attention": ("sdpa", "math")[rank]})[1](torch.randn(1, 16, 12))


def test_ranks_with_different_shapes() -> None:
    for text in errors(run(different_shapes, 2)):
        assert "do not compile the same program" in text
        assert "[1, 16, 12]" in text and "[1, 17, 12]" in text


def test_ranks_with_different_dtypes() -> None:
    for text in errors(run(different_dtypes, 2)):
        assert "do not compile the same program" in text
        assert "float32[1, 16, 12]" in text and "bfloat16[1, 16, 12]" in text


def test_ranks_with_different_options() -> None:
    for text in errors(run(different_options, 2)):
        assert "do not compile the same program" in text
        assert "options on rank(s) [0]" in text and "options on rank(s) [1]" in text


def another_order(rank: int, world: int) -> None:
    """Rank 1 has a compiler that starts the second collective first."""
    from dataclasses import replace
    from functools import partial

    from ascend_sp.compiler import ladder, pipeline
    from ascend_sp.runtime.ops import ALL_TO_ALL

    def swapped(gm: fx.GraphModule, ctx: Any) -> fx.GraphModule:
        gm = order(gm, ctx)
        first, second, *_ = (n for n in gm.graph.nodes if n.target is ALL_TO_ALL)
        second.append(first)
        return gm

    if rank == 1:
        (place,) = (i for i, p in enumerate(pipeline.PASSES) if p.name == "schedule_collectives")
        passes = list(pipeline.PASSES)
        order = passes[place].run
        passes[place] = replace(passes[place], run=swapped)
        ladder.compile_aten = partial(pipeline.compile_aten, passes=tuple(passes))
    model_and({"strategy": "separate"})[1](torch.randn(1, 16, 12))


def test_ranks_whose_collectives_come_in_another_order() -> None:
    for text in errors(run(another_order, 2)):
        assert "into different collectives" in text
        assert 'rank(s) [0]: ["all_to_all_single_default of' in text
        assert 'rank(s) [1]: ["all_to_all_single_default_1 of' in text


def later_difference(rank: int, world: int) -> None:
    """Rank 0 still has a program for its shape; rank 1 has to compile a new one."""
    _, compiled = model_and({"check_timeout": 5})
    compiled(torch.randn(1, 16, 12))
    compiled(torch.randn(1, 16 + rank, 12))


def test_ranks_that_part_after_the_first_call() -> None:
    first, second = errors(run(later_difference, 2))
    assert "rank(s) [0] did not within 5 s" in second
    assert "=17, 12]" in second  # a symbolic length by now, with its value
    assert "failed on rank 0" in first
    # The cause goes first.
    assert first.index("Reported by another rank: ") < first.index("\nThis rank: ")
    assert "Reported by another rank: rank 1 compiles its graph 1" in first


def one_rank_only(rank: int, world: int) -> None:
    if rank == 0:
        model_and({"check_timeout": 3})[1](torch.randn(1, 16, 12))
    raise SystemError("gone")


def test_a_rank_that_never_calls() -> None:
    first, _ = errors(run(one_rank_only, 2))
    assert "RankMismatchError" in first
    assert "rank(s) [1] did not within 3 s" in first


def group_is_gone(rank: int, world: int) -> None:
    _, compiled = model_and()
    compiled(torch.randn(1, 16, 12))
    dist.destroy_process_group()
    compiled(torch.randn(1, 16, 12))


def test_a_process_group_that_is_gone() -> None:
    for text in errors(run(group_is_gone, 2)):
        assert "TopologyError" in text
        assert "is gone" in text and "torch.compiler.reset()" in text


def mesh_without_name(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    model_and({"mesh": mesh})[1](torch.randn(1, 16, 12))


def wrong_degree(rank: int, world: int) -> None:
    model_and({"degree": 3})[1](torch.randn(1, 16, 12))


def mesh_and_degree(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model_and({"mesh": init_device_mesh("cpu", (2,)), "degree": 4})[1](torch.randn(1, 16, 12))


def group_as_mesh(rank: int, world: int) -> None:
    model_and({"mesh": dist.group.WORLD})[1](torch.randn(1, 16, 12))


def test_a_process_group_is_no_mesh() -> None:
    for text in errors(run(group_as_mesh, 2)):
        assert "ConfigError" in text and "DeviceMesh.from_group(group, device_type)" in text
    with pytest.raises(ascend_sp.TopologyError, match=r"DeviceMesh\.from_group"):
        sequence_dim(object())  # type: ignore[arg-type]


def halves(rank: int, world: int) -> list[str]:
    """Two prompts on four ranks: of other lengths, of other values, and not side by side."""
    out = []
    torch._dynamo.reset()
    for length, seed in ((16, rank // 2), (16, rank % 2), (16, rank), (17 + rank // 2, 0)):
        x = torch.randn(1, length, 12, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(Exception, match=r"RankMismatch|do not have") as e:
            model_and()[1](x)
        out.append(str(e.value))
    return out


@pytest.mark.slow
def test_ranks_that_agree_in_two_halves() -> None:
    for inputs, others, none, lengths in (o.value for o in run(halves, 4)):
        for text in (lengths, inputs):
            assert "of each of these groups agree: [0, 1], [2, 3]. If each group has" in text
            assert "compile with degree=2 (ASCEND_SP_DEGREE=2)" in text
        assert "agree: [0, 2], [1, 3]" in others and "DeviceMesh (option mesh)" in others
        assert "agree" not in none


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (mesh_without_name, ["['a', 'b']", "'sp'"]),
        (wrong_degree, ["degree=3", "world size 2", "[1, 2]"]),
        (mesh_and_degree, ["degree=4", "mesh of 2 ranks"]),
    ],
)
def test_a_mesh_or_degree_that_does_not_fit(fn: object, words: list[str]) -> None:
    for text in errors(run(fn, 2)):
        assert "TopologyError" in text
        assert all(w in text for w in words), text


@torch.library.custom_op("ascend_sp_tests::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x * 2


@unknown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class WithUnknownOp(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = unknown(x)
        return self.blocks[1](x)


def no_rule(rank: int, world: int, on_unsharded: str) -> float:
    torch.manual_seed(0)
    model = WithUnknownOp(12, 3)
    options = {"target": "eager", "on_unsharded": on_unsharded}
    compiled = torch.compile(model, backend="ascend_sp", options=options)
    x = torch.randn(1, 13, 12, generator=torch.Generator().manual_seed(0))
    return (compiled(x) - model(x)).abs().max().item()


def test_an_op_with_no_rule() -> None:
    for text in errors(run(no_rule, 2, "error")):
        assert "UnshardedError" in text
        assert "no sharding rule for ascend_sp_tests.unknown.default" in text
        assert "x = unknown(x)" in text  # the user's own line
    assert all(o.value is not None and o.value < 1e-5 for o in run(no_rule, 2, "fallback"))


def test_degree_without_a_process_group() -> None:
    with pytest.raises(Exception, match=r"degree=2 needs a process group") as e, torch.no_grad():
        model_and({"degree": 2})[1](torch.randn(1, 16, 12))
    assert "TopologyError" in str(e.value) or isinstance(e.value.__cause__, ascend_sp.TopologyError)


def test_gradients_are_refused() -> None:
    with pytest.raises(Exception, match=r"torch\.no_grad\(\)"):
        model_and()[1](torch.randn(1, 16, 12))


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.25)


def test_dropout_is_refused() -> None:
    compiled = torch.compile(Dropout(), backend="ascend_sp")
    with pytest.raises(Exception, match=r"dropout_p=0\.25 .*scaled_dot_product_attention"):
        compiled(torch.randn(1, 2, 8, 4))


def test_compiling_for_a_file_is_refused() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    with torch._dynamo.config.patch(enable_aot_compile=True):  # off in PyTorch 2.10
        program = torch.compile(double, backend="ascend_sp", fullgraph=True)
    with pytest.raises(ascend_sp.ConfigError, match="aot_compile is not supported"):
        program.aot_compile(((torch.ones(3),), {}))


def test_mode_is_refused() -> None:
    # PyTorch takes mode or options; with a custom backend the mode arrives here.
    with pytest.raises(Exception, match=r"mode='max-autotune' is not supported"), torch.no_grad():
        torch.compile(SelfAttention(12, 3), backend="ascend_sp", mode="max-autotune")(
            torch.randn(1, 16, 12)
        )
