"""What stays whole although several ranks are there is told: once a process, or as an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import ascend_sp
import combinations
from ascend_sp.compiler.pieces import Pieces
from ascend_sp.graph.context import PassContext
from ascend_sp.passes.overlap.saving import Saving
from ascend_sp.runtime import unsplit
from ascend_sp.runtime.topology import Topology
from processes import run, values
from simulator import capture, compile_rank
from toy import Attention, Block, SelfAttention

X = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(0))


class Stack(nn.Module):
    """Blocks that are compiled one by one, as `compile_repeated_blocks` does it."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttention(12, 3) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Heads(nn.Module):
    """Queries, keys and values of three heads; what attends is another class's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.more = nn.Linear(12, 36), nn.Parameter(torch.randn(3, 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Flex(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)


class Written(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.arange(q.shape[2]).to(q.dtype)
        weights = (q @ k.transpose(-2, -1) * 0.5 + bias).softmax(-1)
        return weights @ v


class Einsum(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        scores = scores.masked_fill(torch.eye(q.shape[2], dtype=torch.bool), -1e9)
        weights = F.softmax(scores.double(), -1).to(q.dtype)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


class Region(Heads):
    """A region that is compiled once and called from several places."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("ascend_sp_tests::own_attn", mutates_args=())
def own_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@own_attn.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class Library(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own_attn(q, k, v)


class Read(nn.Module):
    """The weights of the attention are read, so it is made of products."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x, x, x)


class Router(nn.Module):
    """A softmax between products, of tokens with weights: a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.experts = nn.Parameter(torch.randn(12, 4)), nn.Linear(12, 48)

    def forward(self, x: Tensor) -> Tensor:
        share = (x @ F.normalize(self.keys, dim=0)).softmax(-1)
        return (share.unsqueeze(-2) @ self.experts(x).unflatten(-1, (4, 12))).squeeze(-2)


class Tables(Heads):
    """An attention of weights over weights: a table that all calls share."""

    def forward(self, x: Tensor) -> Tensor:
        t = self.more
        return x + ((t @ t.transpose(1, 2)).softmax(-1) @ t).transpose(0, 1).flatten(1)


class Classifier(nn.Module):
    """No attention; a softmax behind a product, with none behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return (y @ y.transpose(1, 2)).softmax(-1)


class InPieces(SelfAttention):
    """Dynamo breaks each block around its attention."""

    def __init__(self) -> None:
        super().__init__(12, 3)
        for block in self.blocks:
            block.attention = Broken(12, 3)


class Broken(Attention):
    def forward(self, x: Tensor, *args: object) -> Tensor:
        q = self.q(x).unflatten(-1, (3, 4)).transpose(1, 2)
        torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, q, q)
        torch._dynamo.graph_break()
        return self.out(y.transpose(1, 2).flatten(2))


def call(model: nn.Module, calls: int = 1, **options: Any) -> tuple[list[str], str]:
    """What is warned of while a model is compiled and called, and what is raised."""
    torch._dynamo.reset()  # what was compiled before is told nothing of
    compiled = torch.compile(model, backend="ascend_sp", options={"target": "eager", **options})
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        want, error = model(X), ""
        try:
            for _ in range(calls):
                got = compiled(X)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        else:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return [text for w in caught if (text := str(w.message)).startswith("ascend_sp")], error


def whole(rank: int, world: int) -> dict[str, tuple[list[str], str]]:
    """Every case on real ranks; the order matters, since causes are told once."""
    torch.manual_seed(0)
    out = {
        "flex, error": call(Flex(), on_unsharded="error"),
        "flex": call(Flex(), 2),
        "flex again": call(nn.Sequential(Flex(), Flex())),
        "another cause": call(Written()),
        "pieces, error": call(InPieces(), on_unsharded="error"),
        "pieces": call(InPieces(), 2),
        "pieces again": call(InPieces()),
        # Nothing to tell:
        "split": call(SelfAttention(12, 3)),
        "no attention": call(Classifier()),
    }
    unsplit.forget()
    out["off"] = call(InPieces(), sequence_parallel=False)
    out["off, flex"] = call(Flex(), sequence_parallel=False, on_unsharded="error")
    out["degree 1"] = call(InPieces(), degree=1, on_unsharded="error")

    # The launcher has started several processes, and nobody has joined them.
    dist.destroy_process_group()
    model = SelfAttention(12, 3)
    out["alone, error"] = call(model, on_unsharded="error")
    out["alone"] = call(model)
    out["alone again"] = call(SelfAttention(12, 3))
    unsplit.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ascend_sp.parallelize_text_encoder(model)
    out["encoder alone"] = [str(w.message) for w in caught], ""
    return out


@pytest.mark.parametrize("size", [None, "", "1", "many", "2"])
def test_one_process(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    unsplit.forget()
    told, error = call(Classifier())
    assert len(told) == (size == "2") and not error
    for options in ({"degree": 1}, {"sequence_parallel": False}) if size == "2" else ():
        assert call(Classifier(), on_unsharded="error", **options) == ([], "")
    unsplit.forget()


def test_what_stays_whole_is_told_once_on_each_rank() -> None:
    for got in values(run(whole, 2, timeout=200, WORLD_SIZE="2")):
        for name in ("flex", "another cause", "pieces"):
            (text,), error = got[name]
            assert not error and "sequence_parallel=False" in text, text
        assert "flex_attention is not split" in got["flex"][0][0]
        assert "test_unsplit.py" in got["flex"][0][0]
        assert "written out in products" in got["another cause"][0][0]
        for remedy in ("splitting InPieces costs more than it saves", "on each of 2 ranks", "one"):
            assert remedy in got["pieces"][0][0]
            assert remedy in got["pieces, error"][1]
        # Where, and how often: both blocks, or what was compiled of them up to the error.
        assert "graph_break()" in got["pieces"][0][0]
        for name in ("flex, error", "pieces, error", "alone, error"):
            told, error = got[name]
            assert not told and "UnshardedError" in error
        silent = {"flex again", "pieces again", "split", "no attention"}
        for name in silent | {"off", "off, flex", "degree 1", "alone again"}:
            assert got[name] == ([], ""), name
        (text,), none = got["alone"]
        assert not none and got["encoder alone"] == got["alone"]
        for told in (text, got["alone, error"][1]):
            assert "WORLD_SIZE=2" in told and "init_process_group" in told and "degree=1" in told


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Flex(), "flex_attention is not split"),
        (Written(), "written out in products"),
        (Einsum(), "written out in products"),
        (Read(), "written out in products"),
        (nn.Sequential(Region(), Region()), "a graph of its own, inside of invoke_subgraph"),
        (Library(), "said to attend by its name"),
        (Router(), ""),
        (Tables(), ""),
        (Classifier(), ""),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_attention_in_another_form(model: nn.Module, words: str) -> None:
    options: dict[str, Any] = {"ranks": 2, "device": "cpu"}
    found = ascend_sp.explain(model.eval(), X, explain_options=options)
    notes = [n.text for r in found.reports for n in r.notes if n.kind == "unsharded"]
    assert all(words in text for text in notes) and bool(notes) == bool(words)
    if words:
        options["on_unsharded"] = "error"
        with pytest.raises(ascend_sp.UnshardedError, match=words):
            ascend_sp.explain(model, X, explain_options=options)


def test_sizes_that_are_not_known_are_no_data() -> None:
    captured = capture(Written().eval(), X, dynamic=True, ranks=2)
    _, ctx = compile_rank(captured, 0, 2)
    assert "written out in products" in ctx.results.get(unsplit.Unsplit).text


def wide(model: Callable[[], nn.Module], **options: Any) -> Any:
    """What is said of a model as wide as real ones, on eight NPUs."""
    with torch.device("meta"):
        made, x = model().bfloat16(), torch.empty(1, 4608, 3072, dtype=torch.bfloat16)
    options = {"ranks": 8, "device": "910B4", **options}
    return ascend_sp.explain(made, x, explain_options=options)


class Wide(nn.Module):
    """Blocks between which Dynamo breaks, or within which it does."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(3072, 24) for _ in range(2))
        for block in self.blocks if within else ():
            block.attention.__class__ = WideBroken

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


class WideBroken(Attention):
    def forward(self, x: Tensor, *args: object) -> Tensor:
        q, k, v = (f(x) for f in (self.q, *[self.q] * 2))
        torch._dynamo.graph_break()
        q, k, v = (t.unflatten(-1, (24, 128)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch._dynamo.graph_break()
        return self.out(y)


def test_large_models_are_told_of_by_what_the_pieces_cost() -> None:
    """Gathers between blocks cost little; products that every rank runs whole cost much."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ascend_sp")  # explain has remarks
        unsplit.forget()
        between, within = wide(lambda: Wide(False)), wide(lambda: Wide(True))
    assert not [r for r in between.remarks if "pieces" in r]
    (remark,) = [r for r in within.remarks if "pieces" in r]
    assert "Splitting Wide saves little" in remark and "for 910B4" in remark
    assert "may not gain in one graph" not in remark
    with pytest.raises(ascend_sp.UnshardedError, match="saves little"):
        wide(lambda: Wide(True), on_unsharded="error")


def blocks_alone(rank: int, world: int, blocks: int) -> tuple[list[str], float]:
    torch.manual_seed(0)
    model = Stack(blocks)
    options = {"target": "eager", "strategy": "separate"}
    want = model(X)
    for block in model.blocks:
        block.compile(backend="ascend_sp", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            error = (model(X) - want).abs().max().item()
    return [str(w.message) for w in caught if "ascend_sp" in str(w.message)], error


@pytest.mark.parametrize("blocks", [2, 4])
def test_blocks_that_are_compiled_one_by_one_are_told_of_once(blocks: int) -> None:
    for told, error in values(run(blocks_alone, 2, blocks)):
        assert error < 1e-5
        assert len(told) == (1 if blocks > 2 else 0)
        for text in told:
            assert "SelfAttention is compiled by itself and called with the weights of" in text
            assert "torch.compile(pipe.transformer" in text


def test_one_model_is_told_of_once_however_many_places_break_it() -> None:
    unsplit.forget()
    ctx = PassContext(Topology(0, 2, "simulated", (0, 1)))
    ctx.results.put(Saving(whole=1.0, step=2.0, gathers=0.5, gathered=9, split=True))
    told = []
    for model in (Pieces("First"), Pieces("Second"), Pieces("Third")):
        model.broken["hooks" if model.name != "Third" else "something else"] += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for graph in range(3):
                model.tell(graph, ctx)
                model.broken["another hook"] += 1
        told.append(len(caught))
    assert told == [1, 0, 1]
    unsplit.forget()


@pytest.fixture
def strict() -> Iterator[None]:
    unsplit.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    unsplit.forget()


def test_where_warnings_are_errors_each_is_one(strict: None) -> None:
    for address in ("0x7f1", "0x7f2"):
        with pytest.raises(UserWarning, match="text"):
            unsplit.Unsplit([f"at {address}"], "text").tell(error=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for address in ("0x7f1", "0x7f2"):
            unsplit.Unsplit([f"at {address}"], "text").tell(error=False)
    assert len(caught) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("regional compile", ""),
        ("offload: groups of leaves", "since Dynamo has broken it into pieces"),
        ("offload: sequential", "since Dynamo has broken it into pieces"),
        ("casting: fp8 layer by layer", "since Dynamo has broken it into pieces"),
        ("attention: `flex`", "nothing is split"),
    ],
)
def test_rows_of_the_page_of_combinations(what: str, told: str) -> None:
    seen = combinations.observed(next(row for row in combinations.ROWS if row.what == what))
    assert not seen.failed and seen.error <= combinations.ALLOWED
    assert [told in text for text in seen.told] == [True] * bool(told)
