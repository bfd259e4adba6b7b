"""The cost model: rooflines by hand, what is free, what fuses, links, files and their errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ascend_sp.graph.cost.device import DEVICES, DeviceModel, find
from ascend_sp.graph.cost.estimate import Estimator, attention_flops
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.ops import STARTS, attention, split_attention
from simulator import capture, compile_rank
from toy import SelfAttention

# Round numbers, so that each test can be worked out by hand: 1 flop is 1 s, 1 byte 1 us...
DEVICE = DeviceModel(
    name="toy",
    matmul={"float32": 1.0, "bfloat16": 2.0},
    attention={"float32": 0.5},
    memory=1e6,
    transcendental=4.0,
    launch=0.25,
    link_latency=0.5,
    link_bandwidth=8.0,
    shared_link=False,
    link_launch=0.125,
    link_work=1 / 32,
)
US = 1e-6


def graph(fn: Callable[..., Any], *args: Tensor, mode: str = "fake") -> list[fx.Node]:
    """The calls of the ATen graph of `fn`."""
    with torch.no_grad():
        gm = make_fx(fn, tracing_mode=mode)(*args)
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def costs(
    fn: Callable[..., Any], *args: Tensor, fuses: bool = False, device: DeviceModel = DEVICE
) -> list[float]:
    """Seconds of each node, without the launch of the kernel."""
    estimator = Estimator(device, 2, fuses)
    spent = [estimator.seconds(n) for n in graph(fn, *args)]
    return [s - device.launch if s else 0.0 for s in spent]


# Compute ----------------------------------------------------------------------------------------

A, B = torch.ones(4, 6), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("fn", "args", "seconds"),
    [
        (torch.mm, (A, B), 2 * 4 * 6 * 8),
        (lambda c, a, b: torch.addmm(c, a, b), (torch.ones(8), A, B), 2 * 4 * 6 * 8),
        (torch.bmm, (A.expand(3, 4, 6), B.expand(3, 6, 8)), 3 * 2 * 4 * 6 * 8),
        (torch.mm, (A.bfloat16(), B.bfloat16()), 4 * 6 * 8),
        # A dtype that is not listed is as slow as the slowest.
        (torch.mm, (A.half(), B.half()), 2 * 4 * 6 * 8),
        # Whole numbers of 8 bits are as fast as the fastest.
        (torch._int_mm, (A.to(torch.int8), B.to(torch.int8)), 4 * 6 * 8),
        (torch.ops.aten.linear.default, (A, B.t().contiguous()), 2 * 4 * 6 * 8),
        (lambda x, w: torch.conv2d(x, w), (torch.ones(1, 3, 4, 4), torch.ones(5, 3, 2, 2)), 1080),
        (torch.exp, (A,), 24 / 4),
        (F.gelu, (A,), 24 / 4),
        (lambda x: torch.pow(x, 0.5), (A,), 24 / 4),
        # Memory: what is read and what is written.
        (lambda x: torch.pow(x, 2), (A,), 2 * 96 * US),
        (torch.add, (A, A * 2), 3 * 96 * US),
        (lambda x: x + x, (A,), 2 * 96 * US),
        (torch.add, (A.bfloat16(), A.bfloat16()), 3 * 48 * US),
        (lambda x: x.sum(0), (A,), (96 + 24) * US),
    ],
)
def test_an_op_takes_as_long_as_its_arithmetic_or_its_bytes(
    fn: Callable[..., Tensor], args: tuple[Tensor, ...], seconds: float
) -> None:
    assert sum(costs(fn, *args)) == pytest.approx(seconds, abs=1e-12)


def test_a_product_of_one_row_is_bound_by_its_weights() -> None:
    device = replace(DEVICE, matmul={"float32": 1e9})
    (seconds,) = costs(torch.mm, torch.ones(1, 64), torch.ones(64, 64), device=device)
    assert seconds == pytest.approx((64 + 64 * 64 + 64) * 4 * US)


def test_every_kernel_has_a_launch() -> None:
    (node,) = graph(torch.neg, A)
    assert Estimator(DEVICE, 2, False).seconds(node) == pytest.approx(0.25 + 2 * 96 * US)


Q, K, V = torch.ones(2, 4, 6, 8), torch.ones(2, 4, 10, 8), torch.ones(2, 4, 10, 16)
FLOPS = 2 * 2 * 4 * 6 * 10 * (8 + 16)


@pytest.mark.parametrize("op", [attention, split_attention])
def test_attention_is_two_products_at_its_own_rate(op: Any) -> None:
    gm = fx.Graph()
    q, k, v = (gm.placeholder(n) for n in "qkv")
    for x, val in zip((q, k, v), (Q, K, V), strict=True):
        x.meta["val"] = val
    node = gm.call_function(op, (q, k, v))
    node.meta["val"] = torch.ones(2, 4, 6, 16)
    causal = gm.call_function(op, (q, k, v), {"is_causal": True})
    causal.meta["val"] = node.meta["val"]
    estimator = Estimator(DEVICE, 2, False)
    assert estimator.seconds(node) == pytest.approx(FLOPS / 0.5 + 0.25)
    assert estimator.seconds(causal) == pytest.approx(FLOPS / 2 / 0.5 + 0.25)
    for c, n in ((False, node), (True, causal)):
        what_if = estimator.attention_seconds(2, 4, 6, 10, 8, 16, torch.float32, causal=c)
        assert what_if == pytest.approx(estimator.seconds(n))


def test_pytorchs_attention_counts_like_ours() -> None:
    (flash,) = [
        f
        for n in graph(F.scaled_dot_product_attention, Q, K, K)
        if (f := attention_flops(n)) is not None
    ]
    assert flash == 2 * 2 * 4 * 6 * 10 * (8 + 8)


NPU = (
    "npu::{}(Tensor query, Tensor key, Tensor value, {}str input_layout='BSH') -> (Tensor, Tensor)"
)


@pytest.mark.parametrize(
    ("name", "layout", "shape"),
    [
        ("npu_fusion_attention", "BNSD", lambda x: x),
        ("npu_fused_infer_attention_score_v2", "BSND", lambda x: x.transpose(1, 2)),
        ("npu_fused_infer_attention_score", "BSH", lambda x: x.transpose(1, 2).flatten(2)),
        ("npu_prompt_flash_attention", "SBH", lambda x: x.permute(2, 0, 1, 3).flatten(2)),
        ("npu_fused_infer_attention_score", "BNSD_BSND", lambda x: x),
    ],
)
def test_ascends_attention_counts_like_ours(
    name: str, layout: str, shape: Callable[[Tensor], Tensor]
) -> None:
    def op() -> None: ...

    op._schema = torch._C.parse_schema(NPU.format(name, "int n, *, "))  # torch_npu is not here
    gm = fx.Graph()
    args = [gm.placeholder(n) for n in "qkv"]
    for x, val in zip(args, (Q, K, V), strict=True):
        x.meta["val"] = shape(val)
    node = gm.call_function(op, (*args, 4), {"input_layout": layout})
    assert attention_flops(node) == FLOPS


def test_copies_read_and_write() -> None:
    assert Estimator(DEVICE, 2, False).copy_seconds(1000) == pytest.approx(2000 * US + 0.25)


# What is free, what fuses ------------------------------------------------------------------------


def test_views_and_sizes_are_free() -> None:
    def views(x: Tensor) -> Any:
        a, b = x.view(2, 2, 6).transpose(0, 1).split(1)
        c = a.unsqueeze(0).expand(3, 1, 2, 6)[1:].select(0, 0).squeeze(0)
        return c, b.permute(2, 0, 1), x.detach(), x.t(), x.reshape(24), x.unbind(0)[1]

    assert len(graph(views, A)) > 12
    assert set(costs(views, A)) == {0.0}


def test_a_reshape_that_must_copy_costs_a_copy() -> None:
    assert sum(costs(lambda x: x.t().reshape(24), A)) == pytest.approx(2 * 96 * US)


def test_an_expanded_operand_is_read_once() -> None:
    ones = torch.ones(1, 6)
    here = sum(costs(lambda x: x.expand(4, 6) + 1, ones))
    before = sum(costs(lambda x: x + torch.ones(4, 1), ones.expand(4, 6)))
    assert here == pytest.approx((24 + 96) * US)
    assert before == pytest.approx((16 + 24 + 16 + 96) * US)  # 16 to make the other operand


def test_a_table_is_read_where_it_is_looked_up() -> None:
    table, at = torch.ones(1000, 6), torch.zeros(2, dtype=torch.int64)
    assert sum(costs(lambda t, i: t[i], table, at)) == pytest.approx((48 + 16 + 48) * US)


def test_two_views_of_one_tensor_are_it_once_at_most() -> None:
    halves = sum(costs(lambda x: x[:2] * x[2:], A))
    same = sum(costs(lambda x: x[:3] * x[1:], A))
    assert halves == pytest.approx((96 + 48) * US)
    assert same == pytest.approx((96 + 72) * US)


def test_a_fused_chain_reads_its_inputs_and_writes_its_result() -> None:
    def chain(x: Tensor, y: Tensor) -> Tensor:
        return ((x * y).view(24) + 1).view(4, 6) * y

    apart, fused = costs(chain, A, A * 2), costs(chain, A, A * 2, fuses=True)
    assert sum(apart) == pytest.approx((3 + 2 + 3) * 96 * US)
    assert fused == pytest.approx([0, 0, 0, 0, 3 * 96 * US])


def test_an_rms_norm_is_one_kernel() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    fused = costs(norm, A, torch.ones(6), fuses=True)
    assert [s for s in fused if s] == pytest.approx([(2 * 96 + 24) * US])


def test_fusing_keeps_the_arithmetic() -> None:
    fused = costs(lambda x: torch.exp(torch.exp(x) + 1), A, fuses=True)
    assert fused == pytest.approx([0, 0, 2 * 24 / 4])


def test_a_tensor_with_two_kernels_as_users_is_written() -> None:
    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y @ w, y * 2

    product = 2 * 4 * 6 * 8
    assert costs(two, A, B, fuses=True) == pytest.approx([2 * 96 * US, product, 2 * 96 * US])


def test_products_do_not_fuse() -> None:
    fused = costs(lambda x, w: torch.relu((x * 2) @ w), A, B, fuses=True)
    assert fused == pytest.approx([2 * 96 * US, 2 * 4 * 6 * 8, 2 * 128 * US])


# A rank's program --------------------------------------------------------------------------------


def test_transfers_of_a_program_and_nothing_else_but_compute() -> None:
    gm, _ = compile_rank(capture(SelfAttention(12, 3), torch.ones(1, 10, 12)), 0, 2)
    estimator = Estimator(DEVICE, 2, False)
    starts = [n for n in gm.graph.nodes if n.target in STARTS]
    assert len(starts) > 4
    for n in starts:
        x = n.args[0].meta["val"]
        share = 1 if "gather" in str(n.target) else 2
        sent = x.numel() * 4 / share
        assert estimator.transfer(n) == pytest.approx((0.5 + sent / 8, 0.125 + sent / 32))
        assert estimator.seconds(n) == 0.0
    for n in gm.graph.nodes:
        if n not in starts:
            assert estimator.transfer(n) == (0.0, 0.0)
    waits = [n for n in gm.graph.nodes if "wait_tensor" in str(n.target)]
    assert len(waits) == len(starts) and all(estimator.seconds(n) == 0.0 for n in waits)


def test_fused_work_is_less_work_and_all_of_it_is_there() -> None:
    gm, _ = compile_rank(capture(SelfAttention(12, 3), torch.ones(1, 10, 12)), 0, 2)
    fast = replace(DEVICE, launch=1e-9, transcendental=1e12)
    apart, fused = (
        sum(Estimator(fast, 2, f).seconds(n) for n in gm.graph.nodes) for f in (False, True)
    )
    products = sum(
        Estimator(fast, 2, False).seconds(n) for n in gm.graph.nodes if "mm" in str(n.target)
    )
    assert products < fused < apart


def test_two_estimates_are_equal_to_the_bit() -> None:
    captured = capture(SelfAttention(12, 3), torch.ones(1, 10, 12))
    lists = []
    for rank in (0, 1):
        gm, _ = compile_rank(captured, rank, 2)
        for fuses in (False, True):
            e = Estimator(DEVICES["910B4"], 2, fuses)
            spent = [e.seconds(n) + e.transfer(n).seconds for n in gm.graph.nodes]
            lists.append((fuses, spent))
    assert lists[0] == lists[2] and lists[1] == lists[3]
    assert sum(lists[0][1]) > 0


def test_symbolic_sizes_count_as_their_hints() -> None:
    nodes = graph(lambda x, w: torch.exp(x @ w), A, B, mode="symbolic")
    symbolic = [n for n in nodes if isinstance(n.meta["val"], Tensor)]
    assert any(isinstance(s, torch.SymInt) for n in symbolic for s in n.meta["val"].shape)
    estimator = Estimator(DEVICE, 2, False)
    env = symbolic[0].meta["val"].shape[0].node.shape_env
    guards = len(env.guards)
    spent = [estimator.seconds(n) for n in nodes if estimator.seconds(n)]
    assert spent == pytest.approx([2 * 4 * 6 * 8 + 0.25, 32 / 4 + 0.25])
    assert len(env.guards) == guards


# Links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "mesh", "shared"), [(1, 0, 0), (2, 4, 4), (4, 2, 6), (8, 1, 7)])
def test_all_to_all_by_ranks(ranks: int, mesh: float, shared: float) -> None:
    latency = 0.5 if ranks > 1 else 0
    nic = replace(DEVICE, shared_link=True)
    work = 0.125 + shared / 4 if ranks > 1 else 0  # whichever way they go, all bytes are moved
    assert DEVICE.all_to_all(64, ranks) == pytest.approx((mesh + latency, work))
    assert nic.all_to_all(64, ranks) == pytest.approx((shared + latency, work))


def test_gathers_and_sums() -> None:
    nic = replace(DEVICE, shared_link=True)
    assert DEVICE.all_gather(64, 4) == pytest.approx((0.5 + 8, 0.125 + 6))
    assert nic.all_gather(64, 4) == pytest.approx((0.5 + 3 * 8, 0.125 + 6))
    assert DEVICE.all_reduce(64, 4) == pytest.approx((0.5 + 2 * 64 / 4 / 8, 0.125 + 3))
    assert nic.all_reduce(64, 4) == pytest.approx((0.5 + 3 * 2 * 64 / 4 / 8, 0.125 + 3))


# The table and files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "soc", "name"),
    [
        ("cpu", "", "cpu"),
        ("npu", "Ascend910B3", "910B3"),
        ("npu", "Ascend910B4", "910B4"),
        ("npu", "Ascend910_9391", "910B4"),
        ("npu", "", "910B4"),
        ("cuda", "", "910B4"),
    ],
)
def test_auto_goes_by_the_device(device: str, soc: str, name: str) -> None:
    assert find("auto", device, soc) is DEVICES[name]


def test_every_device_has_its_sources_and_a_name() -> None:
    for name, device in DEVICES.items():
        assert device.name == name and device.sources
        assert find(name, "cpu") is device


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    for device in (*DEVICES.values(), DEVICE):
        path.write_text(device.to_json())
        assert find(str(path), "npu") == device


def test_a_file_may_leave_out_what_a_link_needs_of_the_device() -> None:
    given = json.loads(DEVICE.to_json())
    del given["link_launch"], given["link_work"], given["sources"]
    assert DeviceModel.from_json(json.dumps(given)) == replace(DEVICE, link_launch=0, link_work=0)


GOOD = json.loads(DEVICE.to_json())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not JSON", "calibrate"]),
        ("[1]", ["[1]", "not a JSON object"]),
        ({"memory": None, "drop": True}, ["lacks memory", "transcendental"]),
        ({"memroy": 1.0}, ["unknown memroy", "memory"]),
        ({"memory": 0}, ["memory is 0", "number > 0"]),
        ({"launch": -1.0}, ["launch is -1.0", "number > 0"]),
        ({"link_bandwidth": "fast"}, ["link_bandwidth is 'fast'", "number > 0"]),
        ({"link_latency": True}, ["link_latency is True", "number > 0"]),
        ({"link_latency": float("nan")}, ["link_latency is nan", "number > 0"]),
        ({"link_work": -1e-9}, ["link_work is -1e-09", "number >= 0"]),
        ({"link_launch": False}, ["link_launch is False", "number >= 0"]),
        ({"transcendental": float("inf")}, ["transcendental is inf", "number > 0"]),
        ({"matmul": {}}, ["matmul is {}", "bfloat16"]),
        ({"matmul": 3.0}, ["matmul is 3.0", "bfloat16"]),
        ({"attention": {"bf16": 1.0}}, ["attention is {'bf16': 1.0}", "dtype of torch"]),
        ({"attention": {"float32": 0}}, ["attention is {'float32': 0}", "> 0"]),
        ({"shared_link": 1}, ["shared_link is 1", "true or false"]),
        ({"name": ""}, ["name is ''", "a name"]),
        ({"sources": "mine"}, ["sources is 'mine'", "list of texts"]),
    ],
)
def test_bad_files(tmp_path: Path, text: Any, words: list[str]) -> None:
    path = tmp_path / "bad.json"
    if isinstance(text, dict):
        dropped = text.pop("drop", False)
        given = {k: v for k, v in GOOD.items() if not (dropped and k in text)}
        text = json.dumps(given if dropped else given | text)
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        find(str(path), "npu")
    for word in (*words, str(path), "ascend_sp calibrate"):
        assert word in str(e.value)


@pytest.mark.parametrize("name", ["911", "no/such/file.json", "."])
def test_no_such_device(name: str) -> None:
    with pytest.raises(ConfigError, match=r"910B3, 910B4, cpu, or a file.*calibrate") as e:
        find(name, "npu")
    assert repr(name) in str(e.value)
