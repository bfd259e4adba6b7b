"""The invariants that hold after every pass."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from ascend_sp.graph._pytorch import (
    HigherOrderOperator,
    OpOverload,
    statically_known_true,
    tree_leaves,
)
from ascend_sp.graph.context import PassContext, source_line
from ascend_sp.graph.emitter import Emitter, same_strides
from ascend_sp.graph.layout import GLOBAL_SHAPES, PLACEMENTS, local_shape
from ascend_sp.graph.sizes import Size, as_shape, same_shape
from ascend_sp.runtime.errors import VerificationError


def verify(gm: fx.GraphModule, ctx: PassContext, pass_name: str) -> None:
    """Check the graph that `pass_name` left.

    The graph is well formed; every recorded fake value is what the node yields on its operands'
    values; and every value with a placement has the local shape of its global shape.

    Raises:
        VerificationError: names the pass and the node.
    """
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as e:
        raise VerificationError(f"after {pass_name}: the graph is not well formed: {e}") from e
    emit = Emitter(gm, "verify")
    seen = ctx.results.get(_Verified) or _Verified()
    ctx.results.put(seen)
    for node in gm.graph.nodes:
        # Higher-order ops hold graphs of their own, and run on whole operands.
        if node.op == "call_function" and not isinstance(node.target, HigherOrderOperator):
            # A node on which nothing has changed since the last pass needs no second look.
            now = _Seen(node)
            if seen.get(node) != now:
                _check_value(emit, node, pass_name)
                seen[node] = now
        _check_placement(node, ctx.topology.size, pass_name)


class _Verified(dict[fx.Node, "_Seen"]):
    """What each node was like when it was checked last."""


class _Seen:
    """Everything that the value of a node depends on; holds it, so that identity means equality."""

    def __init__(self, node: fx.Node) -> None:
        self.call = (node.target, node.args, node.kwargs)
        self.values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Seen)
            and self.call == other.call
            and len(self.values) == len(other.values)
            and all(a is b for a, b in zip(self.values, other.values, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]


def _check_value(emit: Emitter, node: fx.Node, pass_name: str) -> None:
    if "val" not in node.meta:
        if isinstance(node.target, OpOverload) and not node.target._schema.returns:
            return  # an assertion, say: it yields nothing
        raise _broken(node, pass_name, "it has no fake value")
    try:
        found = emit.evaluate(node)
    except Exception as e:
        raise _broken(node, pass_name, f"it fails on its operands' fake values: {e}") from e
    recorded, yielded = _tensors(node.meta["val"]), _tensors(found)
    if len(recorded) != len(yielded):
        count = f"it is recorded as {len(recorded)} tensors and yields {len(yielded)}"
        raise _broken(node, pass_name, count)
    for have, now in zip(recorded, yielded, strict=True):
        if not _is_shape(have, as_shape(now.shape)) or have.dtype != now.dtype:
            raise _broken(
                node,
                pass_name,
                f"it is recorded as {have.dtype} {list(have.shape)} "
                f"and yields {now.dtype} {list(now.shape)}",
            )
        if _static(have) and not same_strides(have.shape, have.stride(), now.stride()):
            raise _broken(
                node,
                pass_name,
                f"it is recorded with strides {have.stride()} and yields {now.stride()}",
            )


def _check_placement(node: fx.Node, world: int, pass_name: str) -> None:
    if PLACEMENTS not in node.meta:
        return
    values, placements = _tensors(node.meta.get("val")), node.meta[PLACEMENTS]
    if len(values) != len(placements):
        count = f"it has {len(placements)} placements and {len(values)} tensors"
        raise _broken(node, pass_name, count)
    for value, placement, whole in zip(values, placements, node.meta[GLOBAL_SHAPES], strict=True):
        wanted = local_shape(whole, placement, world)
        if not _is_shape(value, wanted):
            raise _broken(
                node,
                pass_name,
                f"it is {placement} of {list(whole)}, so each of {world} ranks holds "
                f"{list(wanted)}; its shape is {list(value.shape)}",
            )


def _static(value: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def _is_shape(value: torch.Tensor, wanted: tuple[Size, ...]) -> bool:
    if same_shape(as_shape(value.shape), wanted):
        return True
    # Symbolic sizes may be equal only by what the program's guards say about its inputs.
    shape_env = value.fake_mode.shape_env  # type: ignore[attr-defined]
    if shape_env is None or len(wanted) != value.dim():
        return False
    sizes = [
        shape_env.create_symintnode(w, hint=None) if isinstance(w, sympy.Expr) else w
        for w in wanted
    ]
    return all(statically_known_true(a == b) for a, b in zip(value.shape, sizes, strict=True))


def _tensors(value: object) -> list[torch.Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def _broken(node: fx.Node, pass_name: str, what: str) -> VerificationError:
    where = source_line(node)
    return VerificationError(
        f"after {pass_name}: {node.format_node()}: {what}."
        + (f" It comes from {where}." if where else "")
        + " This is a bug in ascend_sp; sequence_parallel=False works around it."
    )
