"""Errors of a run say what failed: an op, the network, or another rank; and never what is over."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ascend_sp.compiler import ladder
from ascend_sp.compiler.report.ranges import Interpreter
from ascend_sp.graph.origin import set_origin
from ascend_sp.runtime.stopped import Program, Where, where
from processes import run, values
from toy import SelfAttention

REFUSES: dict[str, Exception] = {}
"""What the op below raises in this process: nothing, if it is empty."""


@torch.library.custom_op("ascend_sp_tests::refuses", mutates_args=())
def refuses(x: Tensor) -> Tensor:
    for error in REFUSES.values():
        raise error
    return x + 1


@refuses.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Between(SelfAttention):
    """The op stands between collectives, or behind them, which Inductor compiles sooner."""

    more = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = refuses(x)
        return self.blocks[1](x) if self.more else x


class Alone(nn.Module):
    """There are no collectives."""

    def forward(self, x: Tensor) -> Tensor:
        return refuses(x) * 2


class Scaled(SelfAttention):
    """Other ranks have another program."""

    scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


def compiled(model: nn.Module, target: str, **options: Any) -> Callable[..., Any]:
    options = {"target": target, "check_timeout": 100, "strategy": "separate", **options}
    return torch.compile(model, backend="ascend_sp", options=options, dynamic=False)


def x(seed: int = 0, rows: int = 7) -> Tensor:
    return torch.randn(1, rows, 12, generator=torch.Generator().manual_seed(seed))


def error_of(call: Callable[[], Any]) -> str:
    """The text of the error that `call` raises; empty if it raises none."""
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def refusing(error: Exception, call: Callable[[], Any]) -> str:
    REFUSES["now"] = error
    try:
        return error_of(call)
    finally:
        REFUSES.clear()


def many_errors(rank: int, world: int, target: str, ends: str) -> dict[str, str]:
    """A server that catches what is raised, until rank 1 fails for good."""
    torch.manual_seed(0)
    out = {}
    if target == "eager":
        # Rank 1 comes too late for the first step; the next one is taken by all.
        late = compiled(SelfAttention(12, 3), target, check_timeout=1)
        if rank == 1:
            dist.barrier()
        out["late"] = error_of(lambda: late(x()))
        if rank != 1:
            dist.barrier()
        other = Scaled(12, 3)
        other.scale += rank
        out["program"] = error_of(lambda: compiled(other, target)(x()))
    model = Between(12, 3)
    model.more = target == "eager"
    between = compiled(model, target)
    out["seed"] = error_of(lambda: between(x(rank)))
    out["works"] = error_of(lambda: between(x()))
    if target == "eager":
        strict = compiled(Between(12, 3), target, on_unsharded="error")
        out["compile"] = error_of(lambda: strict(x(rows=8)))
    alone = compiled(Alone(), target)
    alone(x())
    if rank == 1:  # the others know nothing of it
        out["one rank, no collectives"] = refusing(ValueError("of its own"), lambda: alone(x()))
    else:
        alone(x())
    out["works again"] = error_of(lambda: between(x()))
    out["all, no collectives"] = refusing(ValueError("not this"), lambda: alone(x()))
    out["all"] = refusing(IndexError("out of range"), lambda: between(x()))
    out["works at last"] = error_of(lambda: between(x()))
    if ends == "refuses" and rank == 1:
        out["end"] = refusing(RuntimeError("the last one"), lambda: between(x()))
        return out
    if ends == "dies" and rank == 1:
        os._exit(1)
    out["end"] = error_of(lambda: between(x()))
    return out


PLACE = "It was in refuses (ascend_sp_tests.refuses.default"
OLD = ("inputs", "of its own", "not this", "out of range", "late", "no sharding rule", "program")


@pytest.mark.parametrize(
    ("world", "target", "ends"),
    [(3, "eager", "refuses"), pytest.param(2, "inductor", "dies", marks=pytest.mark.slow)],
)
def test_errors_name_their_own_cause(world: int, target: str, ends: str) -> None:
    lost = [1] if ends == "dies" else []
    ranks = list(range(world))
    got = values(run(many_errors, world, target, ends, lost=lost, timeout=280))
    for rank, texts in zip([r for r in ranks if r not in lost], got, strict=True):
        assert not any(texts[name] for name in texts if name.startswith("works")), texts
        if target == "eager":
            early = "and rank(s) [1] did not within 1 s"
            late = "and rank(s) [0, 2] did so earlier and timed out: this rank came too late"
            assert (late if rank == 1 else early) in texts["late"], texts["late"]
            assert "Reported by" not in texts["late"] or rank == 1
            assert "do not compile the same program" in texts["program"]
            assert "no sharding rule for ascend_sp_tests.refuses.default" in texts["compile"]
        assert "do not have the same inputs" in texts["seed"]
        for name, word in (("all", "out of range"), ("all, no collectives", "not this")):
            text = texts[name]
            assert re.match(
                rf"OpError: graph \d+ failed on rank {rank} of ranks {re.escape(str(ranks))}, in "
                rf"its run \d: {word}\n",
                text,
            ), text
            assert PLACE in text and "refuses(x)" in text  # the user's line
            assert "All other ranks stopped there, too: it is an error of this op, not" in text
            assert "network between" not in text and "Reported by" not in text
        if rank != 1:
            text = texts["end"]
            assert text.startswith("CollectiveError"), text
            assert not any(w in text for w in OLD), text
            if ends == "dies":
                assert "No rank reported a cause." in text
                continue
            # The cause goes first, and what this rank saw of it behind.
            assert re.match(
                r".*, in its run \d\.\nReported by another rank: rank 1 failed in graph \d+, "
                rf"run \d: the last one\n{re.escape(PLACE)}.*\nThis rank: ",
                text,
            ), text
        elif "end" in texts:
            assert texts["end"].startswith("OpError"), texts["end"]
            assert PLACE in texts["end"] and "the last one" in texts["end"]
            assert "of its own" in texts["one rank, no collectives"]
            assert PLACE in texts["one rank, no collectives"]


@pytest.mark.parametrize("interpreted", [False, True])
def test_where_a_run_stopped(interpreted: bool) -> None:
    """Named with the pass that made it; of a function nobody knows what else it does."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    op = graph.call_function(torch.ops.ascend_sp_tests.refuses.default, (x,))
    set_origin(op, "ulysses", "attention_1")
    op.meta["stack_trace"] = 'File "model.py", line 3, in forward\n    y = attend(x)'
    graph.output(graph.call_function(fails, (op,)))
    gm = fx.GraphModule(nn.Module(), graph)
    program = Program((), ladder._ops(gm))

    def stopped() -> Where:
        try:
            (Interpreter(gm, {}).run if interpreted else gm.forward)(torch.ones(2))
        except Exception as e:
            return where(e.__traceback__, program)
        raise AssertionError

    assert not stopped().itself and stopped().text == "It was in fails (fails)."
    REFUSES["now"] = ValueError("here")
    try:
        assert stopped().itself and stopped().text == (
            "It was in refuses_default (ascend_sp_tests.refuses.default, made by "
            "ulysses(attention_1)), at model.py:3: y = attend(x)."
        )
    finally:
        REFUSES.clear()


def fails(x: Tensor) -> Tensor:
    raise RuntimeError(x.shape)


class Picture(nn.Module):
    """Attention over the pixels of a picture, and a group norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x.flatten(2).transpose(1, 2)).unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)
        return self.norm(y.transpose(1, 2).reshape(x.shape) + x)


def picture(rank: int, world: int) -> list[float]:
    """With batch 1, sizes of both kinds, and the graph that numbers are compared with."""
    out = []
    torch.manual_seed(0)
    model = Picture()
    options = {"target": "eager", "check_numerics": True}
    program = torch.compile(model, backend="ascend_sp", options=options)
    for width in (3, 5, 6):  # the last two by one program, for any width
        picture = torch.randn(1, 8, 4, width, generator=torch.Generator().manual_seed(0))
        out.append((program(picture) - model(picture)).abs().max().item())
    return out


def test_an_op_that_looks_at_strides_runs_op_by_op() -> None:
    for errors in (*values(run(picture, 2)), one_rank(picture)):
        assert len(errors) == 3 and max(errors) <= 1e-5


def one_rank(fn: Callable[[int, int], Any]) -> Any:
    with torch.no_grad():
        return fn(0, 1)


def test_the_vae_of_diffusers_runs_op_by_op() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    ).eval()
    program = torch.compile(vae.decode, backend="ascend_sp", options={"target": "eager"})
    latents = torch.randn(1, 4, 4, 5)
    with torch.no_grad():
        got, want = program(latents).sample, vae.decode(latents).sample
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
