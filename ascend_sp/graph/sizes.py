"""Sizes that are known at compile time: Python ints, or sympy expressions of symbolic dims.

Everything that decides a layout calculates with these and never with `torch.SymInt`, because
comparing SymInts installs guards, and an analysis must not specialise the program it looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import sympy
import torch

from ascend_sp.graph._pytorch import FloorDiv, free_unbacked_symbols, statically_known_true

Size: TypeAlias = "int | sympy.Expr"


def as_size(value: int | torch.SymInt | sympy.Expr) -> Size:
    """`value` as an int where it is one, else as a sympy expression."""
    if isinstance(value, int):
        return value
    expr = value.node.expr if isinstance(value, torch.SymInt) else value
    return int(expr) if expr.is_Integer else expr


def as_int(size: object) -> int:
    """A size that is known to be a number."""
    assert isinstance(size, int)
    return size


def as_shape(shape: Iterable[int | torch.SymInt | sympy.Expr]) -> tuple[Size, ...]:
    """Each size of `shape` through `as_size`."""
    return tuple(as_size(s) for s in shape)


def symbols_of(sizes: Iterable[object]) -> set[sympy.Symbol]:
    """The symbols in those of `sizes` that have some."""
    out: set[sympy.Symbol] = set()
    for size in sizes:
        found = as_size(size) if isinstance(size, (torch.SymInt, sympy.Expr)) else 0
        if isinstance(found, sympy.Expr):
            out |= found.free_symbols  # type: ignore[arg-type]
    return out


def value_of(size: Size, values: Mapping[sympy.Symbol, int]) -> int:
    """What `size` is where its symbols have these values."""
    if isinstance(size, int):
        return size
    return int(size.xreplace({s: sympy.Integer(values[s]) for s in symbols_of([size])}))


def has_unbacked(size: Size) -> bool:
    """Whether `size` depends on the data, and so is known only while the program runs."""
    return isinstance(size, sympy.Expr) and bool(free_unbacked_symbols(size))


def product(sizes: Iterable[Size]) -> Size:
    """The product of `sizes`; 1 when there are none."""
    out: Size = 1
    for s in sizes:
        out = out * s
    return as_size(out)


def total(sizes: Iterable[Size]) -> Size:
    """The sum of `sizes`; 0 when there are none."""
    out: Size = 0
    for s in sizes:
        out = out + s
    return as_size(out)


def equal(a: Size, b: Size) -> bool:
    """Whether `a` and `b` are equal for every value of the symbols (False when not provable)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


def same_shape(a: Iterable[Size], b: Iterable[Size]) -> bool:
    """`equal`, dim by dim."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def ceil_div(a: Size, b: int) -> Size:
    """Ceiling of `a / b`."""
    return -(-a // b) if isinstance(a, int) else as_size(FloorDiv(a + (b - 1), b))


def divide(a: Size, b: Size) -> Size | None:
    """`a / b` if that is provably a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if equal(b, 0):
        return None
    # Not `sympy.fraction`, which takes (s + 2) / 2, kept as the sum s/2 + 1, for whole.
    numerator, denominator = sympy.cancel(sympy.sympify(a) / b).as_numer_denom()
    return as_size(numerator) if denominator == 1 else None


def row_major(value: torch.Tensor) -> bool | None:
    """Whether `value` lies in row-major order without gaps; None if its symbols decide that.

    `torch.Tensor.is_contiguous` would ask what it is in this call, and make a program for such
    sizes only.
    """
    answer: bool | None = True
    below: int | torch.SymInt = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == below):
            if statically_known_true(size != 1) and statically_known_true(stride != below):
                return False
            answer = None
        below = below * size
    return answer
