"""Which of Ascend's attention ops is chosen, and what is said of those that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from ascend_sp.graph.npu_names import OPS
from ascend_sp.passes.npu.attention_table import KERNELS, Form, choose
from ascend_sp.runtime.npu import Ascend

V2 = "npu_fused_infer_attention_score_v2"
V1 = "npu_fused_infer_attention_score"
PROMPT = "npu_prompt_flash_attention"
N = sympy.Symbol("n", positive=True, integer=True)

PLAIN = Form(
    dtype=torch.bfloat16, heads=24, groups=24, queries=4608, keys=4608, dim=128, value_dim=128
)


def chosen(form: Form, cann: str = "9.1.0", lacks: tuple[str, ...] = ()) -> str | None:
    kernel, _ = choose(form, Ascend(cann=cann), lambda op: op not in lacks)
    return kernel and kernel.op


@pytest.mark.parametrize(
    ("cann", "op"),
    [
        ("9.1.0", V2),
        ("8.10.0", V2),
        ("8.5.0", V2),
        ("8.3.RC1", V2),
        ("8.2.RC1", V1),
        ("8.2.RC1.alpha003", V1),
        ("8.1.RC1", V1),
        ("8.0.RC3", PROMPT),
        ("8.0.RC1", PROMPT),
        ("7.0.RC1", None),
        ("7.0.0", None),
        ("", None),
    ],
)
def test_by_version_of_cann(cann: str, op: str | None) -> None:
    kernel, reasons = choose(PLAIN, Ascend(cann=cann), lambda _: True)
    assert (kernel and kernel.op) == op
    ops = [k.op for k in KERNELS]
    before = ops[: ops.index(op)] if op else ops
    have = cann or "a CANN of unknown version"
    needs = {V2: "8.3.RC1", V1: "8.1.RC1", PROMPT: "8.0.RC1"}
    assert reasons == [f"{o}: it needs CANN {needs[o]}, and this is {have}" for o in before]


@pytest.mark.parametrize(
    "form",
    [
        PLAIN,
        replace(PLAIN, dtype=torch.float16),
        replace(PLAIN, groups=1),
        replace(PLAIN, dim=16, value_dim=16),
        replace(PLAIN, dim=512, value_dim=512),
        replace(PLAIN, heads=256, groups=256),
        replace(PLAIN, queries=2, keys=1),
        replace(PLAIN, queries=N, keys=N + 7),
        replace(PLAIN, keys=20 * 1024 * 1024),
        replace(PLAIN, mask=torch.bool),
    ],
)
def test_taken(form: Form) -> None:
    assert choose(form, Ascend(cann="9.1.0"), lambda _: True) == (KERNELS[0], [])


LIMITS = {
    "float32": (
        replace(PLAIN, dtype=torch.float32),
        "it takes float16 and bfloat16, not float32",
    ),
    "other values": (replace(PLAIN, value_dim=64), "values have 64 channels, keys 128"),
    "unaligned": (
        replace(PLAIN, dim=40, value_dim=40),
        "40 channels a head are not known to be a multiple of 16",
    ),
    "symbolic channels": (
        replace(PLAIN, dim=N, value_dim=N),
        "n channels a head are not known to be a multiple of 16",
    ),
    "large heads": (
        replace(PLAIN, dim=528, value_dim=528),
        "528 channels a head are more than 512",
    ),
    "many heads": (replace(PLAIN, heads=257, groups=257), "257 heads are more than 256"),
    "symbolic heads": (
        replace(PLAIN, heads=N),
        "the number of heads is not known at compile time",
    ),
    "symbolic groups": (
        replace(PLAIN, groups=N),
        "the number of heads is not known at compile time",
    ),
    "long": (replace(PLAIN, keys=20971521), "a sequence of more than 20971520 tokens"),
    "one query": (
        replace(PLAIN, queries=1),
        "one query runs another kernel, with other rules for masks",
    ),
    "float mask": (
        replace(PLAIN, mask=torch.bfloat16),
        "an additive mask may hold other values than 0 and -inf",
    ),
    "mask per head": (
        replace(PLAIN, mask=torch.bool, mask_heads=True),
        "the mask differs between heads",
    ),
    "broadcast": (
        replace(PLAIN, broadcast=True),
        "operands are broadcast over the batch or the heads",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_refused_by_every_kernel(case: str) -> None:
    form, why = LIMITS[case]
    kernel, reasons = choose(form, Ascend(cann="9.1.0"), lambda _: True)
    assert kernel is None
    assert reasons == [f"{k.op}: {why}" for k in KERNELS]


def test_no_mask_where_a_query_may_see_nobody() -> None:
    form = replace(PLAIN, mask=torch.bool)
    kernel, reasons = choose(form, Ascend(cann="8.0.RC3"), lambda _: True)
    assert kernel is None
    assert reasons[-1].startswith(
        f"{PROMPT}: it is undefined for a query whose keys are all masked"
    )
    assert chosen(form, "8.1.RC1") == V1


def test_a_kernel_that_torch_npu_lacks_is_skipped() -> None:
    assert chosen(PLAIN, lacks=(V2,)) == V1
    assert chosen(PLAIN, lacks=(V2, V1)) == PROMPT
    kernel, reasons = choose(PLAIN, Ascend(cann="9.1.0"), lambda _: False)
    assert kernel is None
    assert reasons == [f"{k.op}: this torch_npu does not have it" for k in KERNELS]


def test_every_kernel_can_be_called() -> None:
    assert {k.op for k in KERNELS} <= set(OPS)
