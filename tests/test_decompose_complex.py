"""Complex numbers as pairs of real ones: op by op against eager, and nothing complex left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.pipeline import compile_aten
from ascend_sp.graph.border import border
from ascend_sp.graph.context import PassContext
from ascend_sp.runtime.topology import Topology
from checks import complex_nodes, only, text
from simulator import Captured, capture


def rewrite(captured: Captured) -> tuple[fx.GraphModule, PassContext]:
    ctx = PassContext(Topology(0, 2, "simulated", (0, 1)))
    passes = only("decompose_complex")
    return compile_aten(captured.copy(), ctx, Config(), passes=passes), ctx


def call(gm: fx.GraphModule, ctx: PassContext, inputs: list[Any]) -> Any:
    return border(ctx).wrap(lambda args: gm(*args))(list(inputs))


def rotary(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs.unsqueeze(1)).flatten(3).type_as(x)


def test_rotary_is_real_arithmetic() -> None:
    x, freqs = torch.randn(1, 5, 3, 4), torch.polar(torch.ones(5, 2), torch.randn(5, 2))
    captured = capture(rotary, x, freqs)
    gm, ctx = rewrite(captured)
    assert border(ctx).inputs == (1,)
    assert text(gm) == "\n".join(
        [
            "select.int [5, 2]",
            "select.int [5, 2]",
            "view [1, 5, 3, 2, 2]",
            "select.int [1, 5, 3, 2]",
            "select.int [1, 5, 3, 2]",
            "unsqueeze [5, 1, 2]",
            "unsqueeze [5, 1, 2]",
            "neg [1, 5, 3, 2]",
            "stack [1, 5, 3, 2, 2]",
            "stack [5, 1, 2, 2]",
            "mul.Tensor [1, 5, 3, 2, 2]",
            "stack [5, 1, 2, 2]",
            "mul.Tensor [1, 5, 3, 2, 2]",
            "add.Tensor [1, 5, 3, 2, 2]",
            "view [1, 5, 3, 4]",
        ]
    )
    got = call(gm, ctx, captured.inputs)[0]
    torch.testing.assert_close(got, rotary(x, freqs))
    # The same numbers as (ac - bd, ad + bc), to the last bit.
    (a, b), (c, s) = (
        x.reshape(1, 5, 3, 2, 2).unbind(-1),
        torch.view_as_real(freqs)[:, None].unbind(-1),
    )
    assert torch.equal(got, torch.stack([a * c - b * s, a * s + b * c], -1).flatten(3))


def test_all_blocks_rotate_by_the_same_tables() -> None:
    def blocks(x: Tensor, freqs: Tensor) -> Tensor:
        return rotary(rotary(x, freqs) * 2, freqs)

    x, freqs = torch.randn(1, 5, 3, 4), torch.polar(torch.ones(5, 2), torch.randn(5, 2))
    gm, _ = rewrite(capture(blocks, x, freqs))
    tables = [line for line in text(gm).splitlines() if line == "stack [5, 1, 2, 2]"]
    assert len(tables) == 2


def tables(n: Tensor) -> Tensor:
    """The way rotary tables are made: polar, parts by position, one behind the other."""
    angle = torch.outer(torch.arange(6.0), n)
    table = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    a, b = table.split([1, 2], dim=1)
    rows = a[:4].view(1, 4, 1, -1).expand(2, 4, 3, -1)
    both = torch.cat([rows, b[-3:].view(1, 1, 3, -1).expand(2, 4, 3, -1)], -1)
    return torch.view_as_real(both.reshape(24, -1).clone()[torch.tensor([0, 5, 23])])


def padded(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([a, b], batch_first=True, padding_value=0.5)


g = torch.Generator().manual_seed(0)
Z = torch.view_as_complex(torch.randn(2, 3, 2, generator=g))
W = torch.view_as_complex(torch.randn(2, 3, 2, generator=g))
R = torch.randn(2, 3, generator=g)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (tables, (torch.randn(3, generator=g),)),
        (padded, (Z, W[:1])),
        (lambda z, w: z * w, (Z, W)),
        (lambda z, w: z * w.conj(), (Z, W)),
        (lambda z, r: z * r, (Z, R)),
        (lambda r, z: r * z, (R, Z)),
        (lambda z: z * 2.5, (Z,)),
        (lambda z: z * (1 - 2j), (Z,)),
        (lambda r: r * 1j, (R,)),
        (lambda z, r: z / r, (Z, R)),
        (lambda z, w: z + w, (Z, W)),
        (lambda z, r: z - r, (Z, R)),
        (lambda z, w: torch.add(z, w, alpha=2), (Z, W)),
        (lambda z: z + 1, (Z,)),
        (lambda z: z - (2.5 - 1j), (Z,)),
        (lambda z: z + torch.arange(3), (Z,)),
        (lambda z, r: torch.where(r > 0, z, torch.arange(3)), (Z, R)),
        (lambda z: torch.cat([z, torch.arange(6).view(2, 3)], 1), (Z,)),
        (lambda z: z.gather(1, torch.tensor([[2, 0], [1, 1]])), (Z,)),
        (lambda z: -z, (Z,)),
        (lambda z: z.real + z.imag, (Z,)),
        (lambda a, b: torch.complex(a, b).mT, (R, R)),
        (lambda r: r.to(torch.complex64), (R,)),
        (lambda z: z.to(torch.complex128), (Z,)),
        (lambda z, r: torch.cat([z, r.to(torch.complex64)], 1), (Z, R)),
        (lambda z, w: torch.stack([z, w]), (Z, W)),
        (lambda z, w, r: torch.where(r > 0, z, w), (Z, W, R)),
        (lambda z: z.unbind(1), (Z,)),
        (lambda z: torch.nn.functional.pad(z, (0, 2), value=3.0), (Z,)),
        (lambda z: z.new_zeros(4, 2), (Z,)),
        (lambda z: torch.zeros(2, 2, dtype=torch.complex64) + z[:, :2], (Z,)),
        (lambda z: z.sum(1), (Z,)),
        (lambda z: z.t().flatten(), (Z,)),
        (lambda z: z.expand(4, 2, 3).reshape(8, 3)[1:], (Z,)),
        (lambda z: z.index_select(0, torch.tensor([1, 0, 1])), (Z,)),
    ],
)
def test_equals_eager(fn: Callable[..., Any], args: tuple) -> None:
    captured = capture(fn, *args)
    gm, ctx = rewrite(captured)
    assert complex_nodes(gm) == []
    assert ctx.notes == []
    want = fn(*args)
    want = list(want) if isinstance(want, tuple) else [want]
    for got, w in zip(call(gm, ctx, captured.inputs), want, strict=True):
        torch.testing.assert_close(got, w.resolve_conj())


def test_what_moves_values_is_exact() -> None:
    captured = capture(padded, Z, W)
    gm, ctx = rewrite(captured)
    assert torch.equal(call(gm, ctx, captured.inputs)[0], padded(Z, W))


@pytest.mark.parametrize("fn", [torch.exp, lambda z: z.abs(), lambda z: z @ z.mT])
def test_an_unknown_op_stays_complex_and_is_reported(fn: Callable) -> None:
    def around(z: Tensor) -> Tensor:
        return fn(z * 2) * 3

    captured = capture(around, Z)
    gm, ctx = rewrite(captured)
    assert {n.kind for n in ctx.notes} == {"complex"}
    torch.testing.assert_close(call(gm, ctx, captured.inputs)[0], around(Z))


def test_a_conjugated_input_is_not_taken_for_its_memory() -> None:
    captured = capture(lambda z: z * 2, Z)
    gm, ctx = rewrite(captured)
    torch.testing.assert_close(call(gm, ctx, [Z.conj()])[0], (Z.conj() * 2).resolve_conj())


def test_an_input_that_is_written_to_stays_what_it_is() -> None:
    def write(z: Tensor, w: Tensor) -> Tensor:
        z.mul_(w)
        return z + 1

    model = torch.compile(write, backend=complex_backend)
    z, other = Z.clone(), Z.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(z, W), write(other, W))
    torch.testing.assert_close(z, other)


def complex_backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    def compile_graph(aten_gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        captured = Captured(aten_gm, list(inputs))
        rewritten, ctx = rewrite(captured)
        return border(ctx).wrap(lambda args: rewritten(*args))

    return _pytorch.to_aten(gm, example_inputs, compile_graph)


def test_symbolic_sizes() -> None:
    x, freqs = torch.randn(1, 5, 3, 4), torch.polar(torch.ones(5, 2), torch.randn(5, 2))
    captured = capture(rotary, x, freqs, dynamic=True)
    gm, ctx = rewrite(captured)
    assert complex_nodes(gm) == []
    torch.testing.assert_close(call(gm, ctx, captured.inputs)[0], rotary(x, freqs))


def test_a_graph_without_complex_numbers_is_left_alone() -> None:
    captured = capture(lambda r: r * 2, R)
    gm, ctx = rewrite(captured)
    assert text(gm) == text(captured.gm)
    assert not border(ctx).inputs
