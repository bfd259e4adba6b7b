"""What models compute on the CPU stays there, and is done anew on every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ascend_sp.compiler.targets.host import split_host


class Tables(nn.Module):
    """A table in host memory, sliced there, and numbers from there that the device uses as is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(24.0).view(6, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, at: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        first, _, last = self.table.split(2)
        rows = torch.cat([first, last + at]).to(x.device)
        return self.linear(x) + rows * factor, at * 2


@pytest.mark.parametrize("target", ["npugraph_ex", "torchair"])
def test_host_values_are_fresh_on_every_call(target: str) -> None:
    import cannsim

    torch._dynamo.reset()
    cannsim.trace.forget()
    cannsim.ge.forget()
    torch.manual_seed(0)
    model = Tables().to("npu")
    compiled = torch.compile(model, backend="ascend_sp", options={"target": target})
    x = torch.randn(4, 4).to("npu")
    with torch.no_grad():
        for i in range(3):
            at, factor = torch.tensor(float(i)), torch.tensor(2.0 + i)
            got, want = compiled(x + i, at, factor), model(x + i, at, factor)
            for a, b in zip(got, want, strict=True):
                assert a.device == b.device
                torch.testing.assert_close(a, b)
    if target == "npugraph_ex":
        (trace,) = cannsim.trace.captured_graphs()
        assert not any(op.kind == "memcpy" for op in trace.ops)
    else:
        (graph,) = cannsim.ge.graphs()
        assert graph.runs == 3


@pytest.mark.parametrize("target", ["npugraph_ex", "torchair"])
def test_results_of_earlier_calls_stay_as_they_were(target: str) -> None:
    """Classifier-free guidance holds two results of one graph, the second beside the first."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Linear(4, 4).to("npu")
    compiled = torch.compile(model, backend="ascend_sp", options={"target": target})
    inputs = [torch.randn(3, 4).to("npu") for _ in range(4)]
    with torch.no_grad():
        got = [compiled(x) for x in inputs]
        want = [model(x) for x in inputs]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert len({a.data_ptr() for a in got}) == len(got)


def test_a_graph_without_host_work_is_left_whole() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda x: (x.sin() + 1,), tracing_mode="fake")(torch.randn(3).to("npu"))
    parts = split_host(gm, [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")])
    assert parts.host is None and parts.kept == (0,)
    assert parts.static([0]) == [0]
