"""Kernels by family. A kernel does what GE documents for the op, not what ATen's namesake does."""

from cannsim.ge.ops import (
    attention,
    collectives,
    create,
    elementwise,
    indexing,
    linear,
    norms,
    quantised,
    reduce,
    shapes,
)

__all__ = ["attention", "collectives", "create", "elementwise", "indexing", "linear", "norms",
           "quantised",
           "reduce", "shapes"]  # fmt: skip
