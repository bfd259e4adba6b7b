"""The private PyTorch that the passes stand on: fake values, pytrees and symbolic sizes.

`tests/test_pytorch_pins.py` fails when PyTorch moves any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, py_sym_types
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

OpOverload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator
encoder_layer = torch.ops.aten._transformer_encoder_layer_fwd.default
"""What the fast path of `nn.TransformerEncoderLayer` calls."""
flex_attention = torch.ops.higher_order.flex_attention
UNTAGGED = frozenset(
    {
        *(torch.ops.aten.rsub.Tensor, torch.ops.aten.hardswish.default),
        # PyTorch 2.10 and 2.11; newer ones tag them.
        *(torch.ops.aten.leaky_relu.default, torch.ops.aten.ldexp.Tensor),
        torch.ops.aten._conj_physical.default,
    }
)
"""Elementwise ops that PyTorch does not tag as such."""
UNBACKED_BINDINGS = "unbacked_bindings"
"""Meta key of a node that makes unbacked symbols: sizes, or numbers, that its data decide."""

NOT_KNOWN = object()
"""What a function of `fake_for_dynamo` returns where the op's own kernel is to say it."""

__all__ = [
    "NOT_KNOWN",
    "UNBACKED_BINDINGS",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "HigherOrderOperator",
    "Mod",
    "OpOverload",
    "OptimizedPythonReferenceAnalysis",
    "PythonMod",
    "decompositions",
    "enable_python_dispatcher",
    "encoder_layer",
    "fake_for_dynamo",
    "flex_attention",
    "free_unbacked_symbols",
    "fx_graph_cse",
    "has_kernel",
    "is_pointwise",
    "py_sym_types",
    "python_kernel",
    "statically_known_true",
    "sympy_interp",
    "trace",
    "tree_leaves",
    "tree_map",
]


def is_pointwise(op: OpOverload) -> bool:
    """Whether `op` computes each element of its result from one of each operand, broadcast."""
    return torch.Tag.pointwise in op.tags or op in UNTAGGED


def has_kernel(op: Any, key: str) -> bool:
    """Whether `op` runs on a backend (``"PrivateUse1"``...) without falling back to the CPU.

    It has a kernel there, or is composed of other ops, itself or in its ``out`` form, which
    functional ops that have no kernel of their own delegate to.
    """
    kernel_for = torch._C._dispatch_has_kernel_for_dispatch_key

    def runs(name: str) -> bool:
        composed = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
        return any(kernel_for(name, k) for k in (key, *composed))

    overload = op._overloadname
    packet = op.overloadpacket
    outs = ("out", f"{overload}_out")
    return runs(op.name()) or any(
        runs(getattr(packet, out).name()) for out in outs if out in packet.overloads()
    )


def python_kernel(op: Any, key: str, kernel: Callable[..., Any]) -> None:
    """Have `kernel` run for `op` in the place of that at `key`, while Dynamo or AOTAutograd traces.

    They switch on the Python dispatcher, without which it is never asked. Where it returns
    NOT_KNOWN, the op's own kernel runs.
    """
    dispatch_key = getattr(torch._C.DispatchKey, key)
    if dispatch_key in op.py_kernels:
        return

    def asked(*args: Any, **kwargs: Any) -> Any:
        found = kernel(*args, **kwargs)
        return op._op_dk(dispatch_key, *args, **kwargs) if found is NOT_KNOWN else found

    op.py_impl(dispatch_key)(asked)


def fake_for_dynamo(op: Any, key: str, fake: Callable[..., Any]) -> None:
    """Have `fake` say what `op` yields, where Dynamo asks, instead of the kernel at `key`.

    Only calls under the Python dispatcher come here, which Dynamo and AOTAutograd switch on while
    they trace; AOTAutograd, which records, gets the op's own kernel.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return NOT_KNOWN if get_proxy_mode() is not None else fake(*args, **kwargs)

    python_kernel(op, key, kernel)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions to the core ATen ops."""
    return core_aten_decompositions()


def trace(
    fn: Callable[..., Any], table: dict[Any, Callable[..., Any]], inputs: Sequence[Any]
) -> fx.GraphModule | None:
    """The ATen graph of `fn` on fake `inputs`; None if it cannot be traced."""
    try:
        return make_fx(fn, decomposition_table=table)(*inputs)
    except Exception:  # an op may have no meta kernel, or look at values
        return None
