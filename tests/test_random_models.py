"""Random small transformers equal eager on every rank, or say why they are not split."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, seed, settings
from torch import fx

from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import PASSES
from ascend_sp.graph.context import PassContext
from ascend_sp.graph.layout import Shard
from ascend_sp.passes.sharding.plan import Plan
from ascend_sp.runtime.errors import UnshardedError
from ascend_sp.runtime.ops import STARTS, attention, split_attention
from checks import missing, swapped, worst
from random_blocks import build
from random_models import (
    MASKS,
    MIXES,
    OUTS,
    POOLS,
    Attend,
    Mix,
    Mlp,
    Program,
    Split,
    draw_program,
    programs,
    simpler,
)
from simulator import Break, Captured, capture, compile_rank, run_ranks, simulate

# Relative to the largest value.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
PROPAGATE = tuple(p for p in PASSES if p.name in ("decompose_complex", "propagate_sharding"))
STRICT = Config(on_unsharded="error")


# The property ------------------------------------------------------------------------------------


def check_program(p: Program, broken: Break | None = None) -> Counter:
    """Prove that `p` does on every rank what eager does; how many attentions ran in which way."""
    model, inputs = build(p)
    with torch.no_grad():
        reference = model(*inputs)
    wanted = reference if isinstance(reference, tuple) else (reference,)
    assert all(x.isfinite().all() for x in wanted), "the model itself is wrong"
    captured = capture(model, *inputs, dynamic=p.dynamic)
    assert captured.graphs == 1, "the model breaks its graph"
    outputs, graphs, ctx, network = simulate(captured, p.ranks, broken=broken)
    notes = "\n".join(str(n) for n in ctx.notes)
    for rank, out in enumerate(outputs):
        for got, want in zip(out, wanted, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype), f"rank {rank}"
    error = worst(outputs, wanted)
    assert error <= TOLERANCE[p.dtype], f"off by {error} of the largest value\n{notes}"
    assert len({tuple(collectives(gm)) for gm in graphs}) == 1, "ranks disagree on collectives"
    found = kinds_of_attention(captured, ctx)
    # Nothing travels but for an attention, or with a reason.
    assert network.calls["all_to_all_single"] == 4 * found["all-to-all"], notes
    told = Counter(n.kind for n in ctx.notes)
    assert network.calls["all_gather_into_tensor"] <= told["gather"], notes
    assert network.calls["all_reduce"] <= told["all_reduce"], notes
    check_refusals(captured, p, ctx)
    return found


def collectives(gm: fx.GraphModule) -> list[tuple]:
    """The order in which a rank starts its collectives."""
    return [(n.target, str(n.meta["val"].shape)) for n in gm.graph.nodes if n.target in STARTS]


def kinds_of_attention(captured: Captured, ctx: PassContext) -> Counter:
    """How the attentions of a program run. A whole one has its reason in the notes."""
    found: Counter = Counter()
    for node, answer in ctx.results.get(Plan).answers.items():
        if node.target in (attention, split_attention) and isinstance(answer.outputs[0], Shard):
            if answer.op is split_attention:
                found["all-to-all"] += 1
            else:
                found["batch" if answer.outputs[0].dim == 0 else "queries"] += 1
    attentions = captured.gm.graph.find_nodes(op="call_function", target=attention)
    names = {n.name for n in attentions}
    whole = [n for n in ctx.notes if n.kind == "unsharded" and n.node in names]
    assert sum(found.values()) + len(whole) == len(attentions)
    assert sum(n.kind == "attention" for n in ctx.notes) == sum(found.values())
    assert all(n.text.strip().split(": ", 1)[1] and n.source for n in whole)
    found["whole"] = len(whole)
    return found


def check_refusals(captured: Captured, p: Program, ctx: PassContext) -> None:
    """What runs whole before the last attention, or has no rule, is an error if one asks for it."""
    attentions = captured.gm.graph.find_nodes(op="call_function", target=attention)
    nodes = {n.name: i for i, n in enumerate(captured.gm.graph.nodes)}
    last = max((nodes[n.name] for n in attentions), default=-1)
    bad = [n for n in ctx.notes if n.kind == "unsharded" and nodes.get(n.node, -1) <= last]
    if not bad:
        return
    with pytest.raises(UnshardedError) as e:
        compile_rank(captured, 0, p.ranks, STRICT, PROPAGATE)
    for note in bad:
        assert note.node in str(e.value)
        assert note.source.split(": ")[0] in str(e.value)
        assert "random_" in note.source


# Random programs ---------------------------------------------------------------------------------


def prove(count: int, first: int, most: int) -> Counter:
    """Check `count` programs of up to `most` steps; fails with the simplest that it finds."""
    found: Counter = Counter()
    seen: set[Program] = set()

    @seed(first)
    @settings(max_examples=count)
    @given(programs(most))
    def examples(p: Program) -> None:
        if p in seen:
            return
        seen.add(p)
        torch._dynamo.reset()
        try:
            found.update(check_program(p))
        except Exception as e:
            small, why = minimise(p, e)
            text = f"{small}: {type(why).__name__}: {why}\nfound as {p}"
            raise AssertionError(text) from why

    examples()
    found["programs"] = len(seen)
    return found


def minimise(p: Program, error: Exception, tries: int = 40) -> tuple[Program, Exception]:
    """A simple program that fails in the same way, and how it fails."""
    for q in simpler(p):
        if tries == 0:
            break
        try:
            model, inputs = build(q)
            model(*inputs)
        except Exception:
            continue  # the step is not possible without the one that was taken out
        tries -= 1
        try:
            check_program(q)
        except Exception as e:
            if type(e) is type(error):
                return minimise(q, e, tries)
    return p, error


def report(found: Counter) -> None:
    """Shown by ``pytest -s``."""
    print(dict(found))
    split = found["all-to-all"] + found["queries"] + found["batch"]
    assert split > 4 * found["whole"], f"most attentions are split, but here: {found}"


def test_random_programs() -> None:
    found = prove(6, first=1, most=3)
    assert found["programs"] >= 5
    report(found)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10, 20))
def test_many_random_programs(first: int) -> None:
    found = prove(53, first, most=4)
    assert found["programs"] >= 50
    report(found)


# What was found, kept ----------------------------------------------------------------------------


def test_one_value_that_is_queries_and_keys() -> None:
    """The padding of its rows was attended to; tests/test_ulysses.py has it in short."""
    check_program(Program((1, 13), (Mix(0, "fold"),), out="first"))
    check_program(Program((9,), (Mix(0, "fold"), Attend((0,))), ranks=8, batch=2))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(9, 2), (3, 2)])
def test_a_symbol_that_gets_a_value_while_the_graph_is_rewritten(lengths: tuple[int, ...]) -> None:
    """A stream as long as the batch has its symbol; on a shard of one row, its value is known.

    Each rank has its own capture, as it has in a process of its own: what is learned of a symbol
    is kept in the capture.
    """
    p = Program(lengths, (Attend((1, 0)), Attend((0, 1), mask="outer")), batch=2, dynamic=True)
    model, inputs = build(p)
    with torch.no_grad():
        reference = model(*inputs)
    captured = [capture(model, *inputs, dynamic=True) for _ in range(p.ranks)]
    graphs = [compile_rank(c, r, p.ranks)[0] for r, c in enumerate(captured)]
    outputs, _ = run_ranks(graphs, captured[0].inputs)
    assert worst(outputs, reference) <= 1e-5


# That it can fail, and that it sees much ---------------------------------------------------------


BREAKABLE = [
    Program((13,), (Attend((0,), project="chunk", norm="rms"),), heads=3),
    Program((9, 4), (Attend((1, 0), join="bhsd", rotary="half", mask="key_bool"),), ranks=3),
    Program((11,), (Mlp(0, modulated=True), Attend((0,), groups=1, mask="causal"))),
    Program((8, 5), (Attend((0, 1), beside=True), Split(0, 3)), batch=2, heads=4, out="cat"),
]


@pytest.mark.parametrize("broken", [swapped, missing])
@pytest.mark.parametrize("p", BREAKABLE, ids=range(len(BREAKABLE)))
def test_a_broken_all_to_all_makes_the_property_fail(p: Program, broken: Break) -> None:
    with pytest.raises(AssertionError, match="off by"):
        check_program(p, broken)


def test_every_kind_of_step_and_option_is_drawn() -> None:
    r = Random(0)
    drawn = [draw_program(r) for _ in range(600)]
    steps = [s for p in drawn for s in p.steps]
    attends = [s for s in steps if isinstance(s, Attend)]
    assert {p.out for p in drawn} == set(OUTS)
    assert {s.mask for s in attends} == {"", *MASKS}
    assert {s.how for s in steps if type(s).__name__ == "Mix"} == set(MIXES)
    assert {s.how for s in steps if type(s).__name__ == "Pool"} == set(POOLS)
    assert {s.rotary for s in attends} == {"", "interleaved", "half", "complex", "written"}
    assert {s.join for s in attends} == {"rows", "bshd", "bhsd"}
    assert len({type(s) for s in steps}) == 10
    assert any(n < p.ranks for p in drawn for n in p.lengths)
    assert any(p.heads % p.ranks for p in drawn)
    assert len(set(drawn)) == len(drawn)


def test_a_description_is_the_code_that_makes_it() -> None:
    import random_models

    r = Random(1)
    for p in (draw_program(r) for _ in range(50)):
        assert eval(repr(p), vars(random_models)) == p
