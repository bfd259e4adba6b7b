"""`ascend_sp.explain` says what a compile would do, without ranks, numbers or memory."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ascend_sp
from ascend_sp.command import explain as command
from ascend_sp.compiler._pytorch import FakeTensorMode
from ascend_sp.compiler.fakes import twins
from models import flux, flux_inputs, wan
from quantised import Int8Weight, quantise
from simulator import capture, compile_rank
from toy import SelfAttention

INT_MM = torch.ops.aten._int_mm.default
RECIPES = Path(__file__).parent.parent / "examples/explain_inputs.py"


def meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def test_it_says_what_a_compile_does() -> None:
    model, inputs = flux(1, 1, 3), flux_inputs(1, 17, 7)
    options = {"ranks": 4, "device": "cpu", "strategy": "separate"}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = ascend_sp.explain(model, **inputs, explain_options=options)
    (report,) = found.reports

    config = ascend_sp.Config(strategy="separate", cost_model="cpu")
    captured = capture(lambda **k: model(**k)[0], **inputs)
    program, ctx = compile_rank(captured, 0, 4, config)
    from ascend_sp.compiler.report.facts import collectives

    facts = ("op", "dtype", "numel", "bytes")
    expected = [tuple(getattr(row, k) for k in facts) for row in collectives(program)]
    assert [tuple(getattr(row, k) for k in facts) for row in report.collectives] == expected
    assert len(report.attentions) == 2 and not report.whole
    assert {a.runs_as for a in report.attentions} == {"sdpa"}
    assert all("transformer_flux.py" in a.called_at for a in report.attentions)
    assert report.target == "inductor" and not found.remarks
    assert [n.text for n in report.notes] == [n.text for n in ctx.notes]

    # The model is as it was, and runs.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert model(**inputs)[0].isfinite().all()

    told = json.loads(found.to_json())
    assert told["ranks"] == 4 and len(told["graphs"][0]["collectives"]) == 9
    assert "2 of 2 attentions are split" in str(found)
    out = io.StringIO()
    found.show(out)
    assert "8 all-to-alls" in out.getvalue()


@pytest.mark.slow
def test_weights_of_a_class_of_their_own_stay_what_they_are(tmp_path: Path) -> None:
    model, inputs = quantise(flux(1, 1, 3)), flux_inputs(1, 17, 7)
    options = {"ranks": 2, "device": "cpu", "strategy": "separate", "dump_dir": str(tmp_path)}
    found = ascend_sp.explain(model, **inputs, explain_options=options)
    (report,) = found.reports
    captured = capture(lambda **k: model(**k)[0], **inputs)
    program, _ = compile_rank(captured, 0, 2, ascend_sp.Config(strategy="separate"))
    from ascend_sp.compiler.report.facts import collectives

    said = [(row.op, row.bytes) for row in report.collectives]
    assert said == [(row.op, row.bytes) for row in collectives(program)]
    (code,) = tmp_path.glob("graph_*/rank_0/00_captured.py")
    products = len(captured.gm.graph.find_nodes(op="call_function", target=INT_MM))
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert code.read_text().count("aten._int_mm.default(") == products == linears
    assert all(type(m.weight) is Int8Weight for m in model.modules() if isinstance(m, nn.Linear))


def test_a_parameter_of_a_class_of_its_own_is_copied_as_one() -> None:
    first = quantise(nn.Sequential(nn.Linear(4, 3)))[0]
    first.tied = first.weight
    with torch.device("meta"):
        nowhere = Int8Weight(torch.empty(3, 4, dtype=torch.int8), torch.empty(3))
    mode = FakeTensorMode()
    copied, there = twins(mode, "cpu", first, nowhere)
    assert copied.weight is copied.tied and isinstance(copied.weight, nn.Parameter)
    assert not copied.weight.requires_grad and "weight" in dict(copied.named_parameters())
    for weight in (copied.weight, there):
        assert type(weight) is Int8Weight and weight.shape == (3, 4)
        assert weight.values.fake_mode is weight.scale.fake_mode is mode
        assert weight.device == weight.values.device == torch.device("cpu")
    assert copied.weight.values.dtype == torch.int8


class Opaque(nn.Parameter):
    """It has ops of its own, and does not tell what is in it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class OpaqueTensor(Tensor):
    """The same by dispatch."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A class that changes nothing."""


def test_a_weight_that_does_not_tell_what_is_in_it_is_refused() -> None:
    model = SelfAttention(12, 3)
    linear = model.blocks[1].mlp[0]
    weight = linear.weight
    x = torch.randn(1, 5, 12)
    linear.weight = Opaque(weight.detach())
    with pytest.raises(ascend_sp.AscendSPError, match=r"test_explain\.Opaque.*before its weights"):
        ascend_sp.explain(model, x)
    linear.weight = weight
    with pytest.raises(ascend_sp.AscendSPError, match=r"test_explain\.OpaqueTensor: the class has"):
        ascend_sp.explain(model, x.as_subclass(OpaqueTensor))
    linear.weight = nn.Parameter(weight.detach().as_subclass(Named))
    (report,) = ascend_sp.explain(model, x).reports
    assert not report.whole


def test_attention_to_keys_that_all_ranks_have_counts_as_split() -> None:
    model, inputs = wan()
    found = ascend_sp.explain(model, **inputs, explain_options={"ranks": 2, "device": "cpu"})
    (report,) = found.reports
    assert [len(x) for x in (report.attentions, report.local, report.whole)] == [2, 2, 0]
    assert "4 of 4 attentions are split" in str(found)
    assert "| no | local | 0 |" in str(found)


def test_a_model_on_meta_is_explained_for_npus() -> None:
    model = SelfAttention(12, 3)
    x = torch.randn(2, 7, 12)
    there = ascend_sp.explain(model, x, explain_options={"device": "910B4"})
    with torch.device("meta"):
        nowhere = SelfAttention(12, 3)
    found = ascend_sp.explain(nowhere, meta(x))
    assert found.device == "910B4" and found.reports[0].target == "npugraph_ex"
    assert "torch_npu" in found.remarks[0]
    assert found.reports[0].attentions == there.reports[0].attentions
    one = found.reports[0].one_rank
    assert one is not None and one > 0


class Printing(nn.Module):
    """Two graphs, and a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(12, 3), SelfAttention(12, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x)
        print("between")
        return self.second(x)


def test_graph_breaks_and_buffers(capsys: pytest.CaptureFixture[str]) -> None:
    model = Printing()
    found = ascend_sp.explain(model, torch.randn(1, 5, 12))
    assert [len(r.attentions) for r in found.reports] == [2, 2]
    assert model.calls == 0
    assert "## Graph breaks (1)" in str(found) and "print" in str(found)


class Looking(nn.Module):
    """Its Python looks at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SelfAttention(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.inner(x) if x.sum().item() > 0 else x


def test_a_model_that_looks_at_numbers_is_explained_up_to_there() -> None:
    found = ascend_sp.explain(Looking(), torch.randn(1, 5, 12), explain_options={"device": "cpu"})
    assert [len(r.attentions) for r in found.reports] == [2]
    assert "test_explain.py" in found.remarks[0] and "reads a tensor's value" in str(found)


def test_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rich", "rich.console", "rich.markdown"):
        monkeypatch.setitem(sys.modules, name, None)
    ascend_sp.explain(SelfAttention(12, 3), torch.randn(1, 5, 12)).show()
    assert "**2 of 2 attentions are split**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 2}, "ranks=N instead of degree"),
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": 2, "rank": 2}, "must be 0 to 1"),
        ({"device": "H100"}, "there is no device 'H100'"),
        ({"stratgy": "packed"}, "unknown option 'stratgy'"),
        ({"device": "cpu", "target": "torchair"}, "is for Ascend"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ascend_sp.ConfigError, match=message):
        ascend_sp.explain(SelfAttention(12, 3), torch.randn(1, 5, 12), explain_options=options)


def test_errors_of_a_compile_are_raised() -> None:
    options = {"on_unsharded": "error"}

    def mixes(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (3, 4)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q)
        z = y.cumsum(2)
        return nn.functional.scaled_dot_product_attention(z, q, q)

    with pytest.raises(ascend_sp.UnshardedError, match="cumsum"):
        ascend_sp.explain(mixes, torch.randn(1, 6, 12), explain_options=options)


SMALL = ["--num_layers", "1", "--num_single_layers", "1", "--height", "256", "--width=256"]


def test_a_budget_of_weights() -> None:
    model, x = SelfAttention(12, 3), torch.randn(1, 6, 12)
    found = {}
    for budget in ("least", 1.0):
        options = {"ranks": 2, "device": "910B4", "budget": budget}
        (report,) = ascend_sp.explain(model, x, explain_options=options).reports
        found[budget] = report.weights
    least, whole = found["least"], found[1.0]
    assert least.whole == sum(p.nbytes for p in model.parameters())
    assert least.gathers > 0 == least.kept and least.resident == least.least == least.whole / 2
    assert whole.gathers == 0 and whole.kept == whole.parts and whole.resident == whole.whole
    with pytest.raises(ascend_sp.ConfigError, match="the least that 2 rank"):
        ascend_sp.explain(model, x, explain_options={"budget": 10})


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GB", 24 * 10**9), ("20GiB", 20 << 30), ("0.5", 0.5), ("123", 123), ("least", "least")],
)
def test_sizes_of_a_budget(text: str, value: Any) -> None:
    assert command._budget(text) == value


def test_command_with_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, dump = tmp_path / "out.json", tmp_path / "dump"
    line = [f"{RECIPES}:flux", *SMALL, "--ranks", "8", "--json", str(out), "--dump", str(dump)]
    assert command.main(line) == 0
    said = capsys.readouterr().out
    assert "2 of 2 attentions are split" in said.replace("\n", " ")
    assert "512+256 rows, 24 x 128 heads" in said.replace("\n", " ")
    assert json.loads(out.read_text())["device"] == "910B4"
    assert list(dump.glob("graph_*/rank_0/summary.md"))


def test_command_with_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "x", "num_layers": 1, "attention_head_dim": 8}))
    inputs = ["hidden_states=f32[1,4,8,8]", "encoder_hidden_states=f32[1,7,32]"]
    inputs += ["pooled_projections=f32[1,16]", "timestep=f32[1]", "return_dict=False"]
    sizes = {"sample_size": 8, "in_channels": 4, "num_attention_heads": 3, "out_channels": 4}
    sizes |= {"joint_attention_dim": 32, "caption_projection_dim": 24, "pooled_projection_dim": 16}
    line = ["SD3Transformer2DModel", "--config", str(config), "--device", "cpu", "--full"]
    line += [word for k, v in sizes.items() for word in ("--config", f"{k}={v}")]
    assert command.main([*line, *(w for text in inputs for w in ("--input", text))]) == 0
    said = capsys.readouterr().out
    assert "1 of 1 attentions are split" in said.replace("\n", " ") and "Options" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["NoSuchTransformer"], "has no NoSuchTransformer"),
        (["nosuch.Model"], "nosuch"),
        ([f"{RECIPES}:nothing"], "has no nothing. It has"),
        (["missing.py:flux"], "no file"),
        ([f"{RECIPES}:flux", "--input", "x=f32[1]"], "are for a class"),
        (["SD3Transformer2DModel", "--height", "3"], "unknown: --height"),
        (["SD3Transformer2DModel", "--input", "x=float33[1]"], "is no dtype"),
        (["SD3Transformer2DModel", "--config", "nothing"], "not NAME=VALUE"),
        ([f"{RECIPES}:flux", *SMALL, "--device", "H100"], "no device 'H100'"),
    ],
)
def test_command_used_wrongly(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(line) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["flux", "qwen_image_edit", "z_image"])
def test_recipes_at_full_depth(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert command.main([f"{RECIPES}:{recipe}", "--ranks", "8", "--json", str(out)]) == 0
    (graph,) = json.loads(out.read_text())["graphs"]
    assert len(graph["attentions"]) >= 30 and not graph["whole"]
