"""Attention of every kind as Ascend's fused ops: which op runs, with which words, which numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cannsim
import pytest
import simulated_npu
import torch

import attention_cases
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import PASSES, compile_aten
from ascend_sp.graph.context import PassContext
from ascend_sp.runtime.npu import Ascend, npu_op
from ascend_sp.runtime.ops import attention
from attention_cases import CASES
from simulator import Captured, capture

DTYPE = torch.float16
V2 = "npu_fused_infer_attention_score_v2"
V1 = "npu_fused_infer_attention_score"
PROMPT = "npu_prompt_flash_attention"
FUSED = [name for name, case in CASES.items() if not case.spelled]
MASKED = [name for name in FUSED if CASES[name].mask is not None]


@pytest.fixture(scope="module")
def operands() -> list[list[torch.Tensor]]:
    return [[x.to("npu") for x in xs] for xs in attention_cases.inputs(DTYPE)]


@pytest.fixture(scope="module")
def captured(operands: list) -> Captured:
    return capture(attention_cases.run, operands)


def fuse(captured: Captured, cann: str) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The graph after the pass alone; by case, the note of it and the op that attends."""
    ctx = PassContext(device="npu", target="npugraph_ex", ascend=Ascend(cann=cann))
    only = tuple(p for p in PASSES if p.name == "fuse_attention")
    gm = compile_aten(captured.copy(), ctx, Config(), passes=only)
    ops = [npu_op(op) for op in (V2, V1, PROMPT)]
    nodes = [n for n in gm.graph.nodes if n.target in (*ops, attention)]
    notes = [n.text for n in ctx.notes if n.kind == "attention"]
    return (
        gm,
        dict(zip(CASES, notes, strict=True)),
        dict(zip(CASES, nodes, strict=True)),
    )


@pytest.mark.parametrize(("cann", "op"), [("9.1.0", V2), ("8.2.RC1", V1), ("8.0.RC3", PROMPT)])
def test_the_pass_alone(captured: Captured, operands: list, cann: str, op: str) -> None:
    gm, notes, nodes = fuse(captured, cann)
    for name, case in CASES.items():
        if case.spelled or (op == PROMPT and name in MASKED):
            assert nodes[name].target == attention
            assert notes[name].startswith("not fused"), name
            assert case.spelled in notes[name], name
        else:
            assert nodes[name].target == npu_op(op), name
            assert notes[name].startswith(f"runs as {op}"), name
    # The ops that run here refuse calls that their documents forbid.
    got = gm(*captured.inputs)
    assert not attention_cases.wrong(got, attention_cases.expected(operands), DTYPE)


def test_words_of_the_calls(captured: Captured) -> None:
    _, _, nodes = fuse(captured, "9.1.0")
    calls = {name: nodes[name].kwargs for name in FUSED}
    assert {c["input_layout"] for c in calls.values()} == {"BSND"}
    assert calls["no mask"]["softmax_scale"] == 0.25
    assert calls["scale"]["softmax_scale"] == 0.6
    grouped = calls["grouped"]
    assert (grouped["num_query_heads"], grouped["num_key_value_heads"]) == (6, 2)
    for name, call in calls.items():
        causal = CASES[name].more.get("is_causal", False)
        assert call["sparse_mode"] == (2 if causal else 0), name
        # Only the row correction makes zeros of a query that sees nobody.
        assert call["inner_precise"] == (2 if name in MASKED else 0), name
        if name in MASKED:
            mask = call["atten_mask"].meta["val"]
            q, k = (nodes[name].args[i].meta["val"] for i in (0, 1))
            assert mask.is_contiguous()
            assert mask.shape[0] in (1, q.shape[0])
            assert mask.shape[1:] == (1, q.shape[1], k.shape[1]), name
    # Rows as projections leave them go in as they are.
    for node in nodes["no mask"].args[:3]:
        assert node.op == "placeholder"


def test_bfloat16(operands: list) -> None:
    rows = [[x.bfloat16() if x.is_floating_point() else x for x in xs] for xs in operands]
    captured = capture(attention_cases.run, rows)
    gm, _, nodes = fuse(captured, "9.1.0")
    assert sum(n.target == npu_op(V2) for n in nodes.values()) == len(FUSED)
    got = gm(*captured.inputs)
    assert not attention_cases.wrong(got, attention_cases.expected(rows), torch.bfloat16)


@pytest.mark.parametrize("target", ["torchair", "npugraph_ex"])
def test_compiled(operands: list, target: str, tmp_path: Path, recwarn: Any) -> None:
    cannsim.ge.forget()
    cannsim.trace.forget()
    options = {"target": target, "dump_dir": str(tmp_path)}
    with torch.no_grad():
        compiled = torch.compile(attention_cases.run, backend="ascend_sp", options=options)
        for _ in range(2):
            got = compiled(operands)
            wrong = attention_cases.wrong(got, attention_cases.expected(operands), DTYPE)
            assert not wrong
    assert not [w for w in recwarn if "ascend_sp" in str(w.message)]  # no other target took over
    if target == "torchair":
        (graph,) = cannsim.ge.graphs()
        assert graph.types()["FusedInferAttentionScore"] == len(FUSED)
        assert graph.types()["SoftmaxV2"] >= len(CASES) - len(FUSED)
    else:
        (trace,) = cannsim.trace.captured_graphs()
        assert len(trace.find(f"{V2}.out")) == len(FUSED)
        assert trace.races() == []
    (summary,) = tmp_path.glob("*/*/summary.md")
    text = summary.read_text()
    assert attention_cases.told(text, f"runs as {V2}") == len(FUSED)
    for case in CASES.values():
        assert case.spelled in text


SHARED: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "no mask": (4, None, {}),
    "scale": (4, None, {"scale": 0.5}),
    "mask B11T": (4, (2, 1, 1, 13), {}),
    "mask B1ST": (4, (2, 1, 13, 13), {}),
    "mask ST": (4, (13, 13), {}),
    "mask per head": (4, (2, 4, 13, 13), {}),
    "causal": (4, None, {"is_causal": True}),
    "grouped": (2, None, {"enable_gqa": True}),
    "grouped to one, masked": (1, (2, 1, 13, 13), {"enable_gqa": True}),
    "one head for all": (1, None, {}),
}
"""On two ranks: number of heads of keys, shape of a mask, what else is passed."""


def joint(x: torch.Tensor, *masks: torch.Tensor) -> list[torch.Tensor]:
    """Self attention of every kind over ``x [2, 13, 64]``, in operations that do not round."""
    left, found = list(masks), []
    for groups, shape, more in SHARED.values():
        q = x.unflatten(2, (4, 16)).transpose(1, 2)
        k = (0.5 * x)[..., 16 * (4 - groups) :].unflatten(2, (groups, 16)).transpose(1, 2)
        v = x[..., : 16 * groups].unflatten(2, (groups, 16)).transpose(1, 2)
        mask = left.pop(0) if shape else None
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **more)
        found.append(y.transpose(1, 2).flatten(2))
    return found


def joint_inputs() -> list[torch.Tensor]:
    torch.manual_seed(4)
    masks = [torch.rand(*shape) > 0.4 for _, shape, _ in SHARED.values() if shape]
    for mask in masks:
        mask[..., 0] = True
        if mask.shape[-2] > 1:
            mask[..., 5, :] = False
    return [(1.5 * torch.randn(2, 13, 64)).to(DTYPE), *masks]


PROGRAMS = [(t, s) for t in ("torchair", "npugraph_ex") for s in ("separate", "gather")]


def run_joint(rank: int, world: int, folder: str) -> dict[str, list[Any]]:
    torch.set_grad_enabled(False)
    results = {}
    for target, strategy in PROGRAMS:
        torch._dynamo.reset()
        place = f"{folder}/{target}-{strategy}"
        options = {"target": target, "strategy": strategy, "dump_dir": place}
        compiled = torch.compile(joint, backend="ascend_sp", options=options)
        got = compiled(*(x.to("npu") for x in joint_inputs()))
        results[f"{target}-{strategy}"] = [x.cpu().numpy() for x in got]
    return results


@pytest.mark.slow
def test_on_two_ranks(tmp_path: Path) -> None:
    x, *masks = joint_inputs()
    want = joint(x.float(), *masks)
    every = simulated_npu.run(run_joint, 2, str(tmp_path), timeout=200)
    for results in every:
        for target, got in results.items():
            for name, a, b in zip(SHARED, got, want, strict=True):
                error = ((torch.from_numpy(a).float() - b).abs() / b.abs().clamp(min=1)).max()
                assert error <= attention_cases.TOLERANCE[DTYPE], (target, name)
    for target, strategy in PROGRAMS:
        for rank in range(2):
            (folder,) = tmp_path.glob(f"{target}-{strategy}/*/rank_{rank}")
            text = (folder / "summary.md").read_text()
            assert attention_cases.told(text, f"runs as {V2}") == len(SHARED) - 1
            assert text.count(attention_cases.HEADS) == 3  # a reason for each kernel

            rows = json.loads((folder / "collectives.json").read_text())
            sent = [r["op"] for r in rows if r["attention"]]
            if strategy == "gather":
                assert sent == ["all_gather_into_tensor"] * 2 * len(SHARED)
            else:
                assert sent == ["all_to_all_single"] * 4 * len(SHARED)
