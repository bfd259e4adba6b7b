"""A model with torch_npu's quantised linears, from Dynamo to what runs, on simulated NPUs."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import simulated_npu
import torch
from cannsim import quantised
from cannsim.attention import IllegalCallError
from torch import Tensor, nn

HALF = torch.float16
QUANTISED = ("npu_dynamic_quant", "npu_quant_matmul", "npu_weight_quant_batchmatmul")


class Linear(nn.Module):
    """What `nn.Linear` becomes on Ascend: 8-bit weights, and 8-bit activations if it is `dynamic`.

    Halves go in and come out, which is what the ops take; around them the model stays float32.
    """

    def __init__(self, linear: nn.Linear, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        weight = linear.weight.detach().t()
        scale = weight.abs().amax(0) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale if dynamic else scale.to(HALF))
        self.register_buffer("bias", linear.bias.detach().to(HALF))

    def forward(self, x: Tensor) -> Tensor:
        import torch_npu

        rows = x.to(HALF).flatten(0, -2)
        if not self.dynamic:
            out = torch_npu.npu_weight_quant_batchmatmul(
                rows, self.weight, self.scale, bias=self.bias
            )
        else:
            values, scale = torch_npu.npu_dynamic_quant(rows)
            out = torch_npu.npu_quant_matmul(
                values,
                self.weight,
                self.scale,
                pertoken_scale=scale,
                bias=self.bias,
                output_dtype=HALF,
            )
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


def model(dynamic_mlp: bool) -> nn.Module:
    """Two blocks whose linears have 8-bit activations; or those of the attentions only."""
    from toy import SelfAttention

    torch.manual_seed(0)
    made = SelfAttention(24, 3)
    for block in made.blocks:
        block.attention.q = Linear(block.attention.q, True)
        block.attention.kv = Linear(block.attention.kv, True)
        block.attention.out = Linear(block.attention.out, True)
        for i in (0, 2):
            block.mlp[i] = Linear(block.mlp[i], dynamic_mlp)
    return made


def compiled(
    rank: int, world: int, target: str, dynamic_mlp: bool, refused: str = ""
) -> dict[str, Any]:
    import cannsim

    from ascend_sp.graph.layout import PLACEMENTS, Shard

    placed: Counter = Counter()

    def observer(name: str, gm: Any, _: object) -> None:
        if name == "materialise_sharding":
            for node in gm.graph.nodes:
                op = str(node.target).split(".")[1:2]
                if op and op[0] in QUANTISED:
                    on_shards = all(isinstance(p, Shard) for p in node.meta[PLACEMENTS])
                    placed[op[0], on_shards] += 1

    made = model(dynamic_mlp).to("npu")
    options = {"target": target, "strategy": "separate", "observer": observer}
    program = torch.compile(made, backend="ascend_sp", options=options)
    errors = []
    with warnings.catch_warnings(record=bool(refused)) as told:
        # No other target may take over, or the next one has to.
        warnings.filterwarnings("always" if refused else "error", "ascend_sp")
        for seed in (1, 2):
            x = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(seed)).to("npu")
            want, got = made(x).cpu(), program(x).cpu()
            errors.append(((got - want).norm() / want.norm()).item())
    found: dict[str, Any] = {"errors": errors, "placed": dict(placed)}
    if refused:
        found["told"] = [str(w.message) for w in told or () if refused in str(w.message)]
    elif target == "torchair":
        types = cannsim.ge.graphs()[-1].types()
        found["runs"] = [types[t] for t in ("DynamicQuant", "QuantBatchMatmulV3")]
        found["runs"] += [types["WeightQuantBatchMatmulV2"]]
        found["sent"] = [types["HcomAllToAll"], types["HcomAllGather"]]
    else:
        trace = cannsim.trace.captured_graphs()[-1]
        assert trace.races() == []
        found["runs"] = [len(trace.find(name)) for name in QUANTISED]
        found["sent"] = [len(trace.find(name)) for name in ("alltoall", "allgather")]
    return found


ON_SHARDS = {
    # Queries and what keys and values are made of are the same tokens, quantised once.
    False: {
        ("npu_dynamic_quant", True): 4,
        ("npu_quant_matmul", True): 6,
        ("npu_weight_quant_batchmatmul", True): 4,
    },
    True: {("npu_dynamic_quant", True): 8, ("npu_quant_matmul", True): 10},
}


@pytest.mark.parametrize(("target", "dynamic_mlp"), [("npugraph_ex", True), ("torchair", False)])
def test_quantised_linears_run_on_shards(target: str, dynamic_mlp: bool) -> None:
    for found in simulated_npu.run(compiled, 2, target, dynamic_mlp, timeout=200):
        expected = ON_SHARDS[dynamic_mlp]
        assert found["placed"] == expected
        assert found["runs"] == [expected.get((name, True), 0) for name in QUANTISED]
        assert found["sent"] == [8, 1]
        # A half may be rounded to its neighbour, and then to another of 255 integers.
        assert max(found["errors"]) <= 1e-3


def test_weights_in_8_bits_alone_run_op_by_op_where_npugraph_ex_breaks() -> None:
    """See `test_npugraph_ex_breaks_on_8_bit_weights`."""
    refused = "npu_weight_quant_batchmatmul.default is an error in this torch_npu's npugraph_ex"
    for found in simulated_npu.run(compiled, 2, "npugraph_ex", False, refused, timeout=200):
        assert len(found["told"]) == 1
        # Once for each of the two targets.
        assert found["placed"] == {k: 2 * v for k, v in ON_SHARDS[False].items()}
        assert max(found["errors"]) <= 1e-3


def quant_matmul(**changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "x1": torch.ones(5, 8, dtype=torch.int8),
        "x2": torch.ones(8, 6, dtype=torch.int8),
        "scale": torch.ones(6),
        "pertoken_scale": torch.ones(5),
        "output_dtype": 5,
    }
    return quantised.quant_matmul(**given | changes)


def test_quantised_product_by_its_documents() -> None:
    assert quant_matmul().dtype == HALF
    assert (quant_matmul(scale=torch.full((1,), 2.0), pertoken_scale=torch.arange(5.0)) == (
        torch.arange(5)[:, None] * 16
    )).all()  # fmt: skip
    with_bias = quant_matmul(bias=torch.ones(6, dtype=torch.int32), scale=torch.full((6,), 2.0))
    assert (with_bias == 18).all()
    assert (quant_matmul(bias=torch.ones(6), scale=torch.full((6,), 2.0)) == 17).all()
    integers = quant_matmul(output_dtype=None, pertoken_scale=None, offset=torch.ones(6))
    assert integers.dtype == torch.int8 and (integers == 9).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"x1": torch.ones(5, 8)},
        {"pertoken_scale": torch.ones(4)},
        {"pertoken_scale": torch.ones(5, dtype=HALF)},
        {"scale": torch.ones(5)},
        {"scale": torch.ones(6, dtype=HALF)},
        {"output_dtype": 6},
        {"output_dtype": 3},
        {"offset": torch.ones(6)},
        {"bias": torch.ones(5)},
        {"bias": torch.ones(6, dtype=torch.bfloat16)},
    ],
    ids=lambda c: " ".join(f"{k} {getattr(v, 'shape', v)}" for k, v in c.items()),
)
def test_illegal_quantised_products_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(IllegalCallError):
        quant_matmul(**changes)


def test_other_illegal_calls_are_refused() -> None:
    x = torch.ones(5, 64, dtype=HALF)
    weight, scale = torch.ones(64, 6, dtype=torch.int8), torch.ones(6, dtype=HALF)
    for call in (
        lambda: quantised.dynamic_quant(x.float()),
        lambda: quantised.dynamic_quant(x, smooth_scales=torch.ones(5, dtype=HALF)),
        lambda: quantised.weight_quant_batchmatmul(x, weight, scale.float()),
        lambda: quantised.weight_quant_batchmatmul(x, weight, scale, antiquant_group_size=16),
        lambda: quantised.weight_quant_batchmatmul(x, weight, scale, bias=torch.ones(6)),
        lambda: quantised.quantize(x, torch.ones(5), None, 1, -1),
        lambda: quantised.anti_quant(weight, scale),
    ):
        with pytest.raises(IllegalCallError):
            call()
