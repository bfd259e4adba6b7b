"""Remainders that the guards of a graph say are zero, taken out of its sizes.

A model that fills sequences up to a multiple has another graph for those that are full. There
``n + (-n) % 32`` is ``n``, as a guard says, but sympy does not see it.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ascend_sp.graph._pytorch import Mod, PythonMod, statically_known_true, sympy_interp
from ascend_sp.graph._pytorch import OptimizedPythonReferenceAnalysis as Analysis
from ascend_sp.graph.sizes import as_size


def drop_zero_remainders(gm: fx.GraphModule) -> None:
    """Have fake values of `gm` that have such a remainder in a size say it without that."""
    known: dict[sympy.Expr, bool] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = _value(node.meta["val"], known)


def _value(value: Any, known: dict[sympy.Expr, bool]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_value(v, known) for v in value)
    if isinstance(value, torch.SymInt):
        return _size(value, known)
    if not isinstance(value, torch.Tensor):
        return value
    before = (*value.shape, *value.stride())
    after = [_size(n, known) for n in before]
    if all(a is b for a, b in zip(after, before, strict=True)):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(
            after[: value.dim()], after[value.dim() :], dtype=value.dtype, device=value.device
        )


def _size(size: int | torch.SymInt, known: dict[sympy.Expr, bool]) -> int | torch.SymInt:
    expr = as_size(size)
    if isinstance(expr, int) or not isinstance(size, torch.SymInt):
        return size
    env = size.node.shape_env
    zero = {}
    for remainder in expr.atoms(Mod, PythonMod):
        if remainder not in known:
            known[remainder] = _is_zero(env, remainder)
        if known[remainder]:
            zero[remainder] = sympy.Integer(0)
    if not zero:
        return size
    new = as_size(expr.xreplace(zero))
    if isinstance(new, int):
        return new
    symbols = {s: env.create_symintnode(s, hint=None) for s in new.free_symbols}
    return sympy_interp(Analysis, symbols, new)


def _is_zero(env: Any, remainder: sympy.Expr) -> bool:
    """Whether the guards say so; asking adds none."""
    if not remainder.args[1].is_positive:  # else it may be less than zero
        return False
    number = env.create_symintnode(remainder, hint=None)
    return statically_known_true(number == 0) or statically_known_true(number <= 0)
