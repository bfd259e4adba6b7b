"""The parts of torch_npu, torchair and npugraph_ex that the targets stand on, public and not.

`tests/npu/test_torch_npu_pins.py` fails when a new wheel moves any of it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import operator
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from ascend_sp.compiler import _pytorch
from ascend_sp.runtime._pytorch import group_by_name, tag_of
from ascend_sp.runtime.errors import LoweringError
from ascend_sp.runtime.npu import DEVICE

SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": lambda *sizes: functools.reduce(torch.sym_max, sizes),
    "Min": lambda *sizes: functools.reduce(torch.sym_min, sizes),
}
"""What PyTorch writes in sizes that are calculated, beside Python's operators."""


def npugraph_ex(
    gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]
) -> Callable[..., Any]:
    """``torch.npu.npugraph_ex.compile_fx`` on a finished ATen graph."""
    backend: Any = torch.npu.npugraph_ex  # type: ignore[attr-defined]
    _name_size_functions()
    inputs = _marked(inputs, static_inputs)
    with _pytorch.own_tracing_context(inputs):
        # A replay writes to the memory of the one before; a caller may still hold that result
        # (classifier-free guidance calls twice before it uses either).
        return backend.compile_fx(gm, list(inputs), {"clone_output": True})


def _name_size_functions() -> None:
    """Add what is missing where npugraph_ex evaluates the text of a size.

    There it is a `NameError` (torch_npu 2.13.0).
    """
    import torch_npu.dynamo  # type: ignore[import-not-found]  # noqa: F401

    where = importlib.import_module("npugraph_ex._acl_concrete_graph.acl_graph")
    for name, function in SIZE_FUNCTIONS.items():
        vars(where).setdefault(name, function)


def has_view_option() -> bool:
    """Whether npugraph_ex's configuration has the option that it sets for some ops.

    Not in torch_npu 2.10 to 2.14, where setting it is an `AttributeError`.
    """
    import torch_npu.dynamo  # type: ignore[import-not-found]  # noqa: F401
    from npugraph_ex.configs.compiler_config import CompilerConfig  # type: ignore[import-not-found]

    return hasattr(CompilerConfig(), "experimental_config")


def torchair(
    gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]
) -> Callable[..., Any]:
    """Torchair's compiler on a finished ATen graph; GE sees it on the first call."""
    import torchair  # type: ignore[import-not-found]
    from torchair.configs.compiler_config import CompilerConfig  # type: ignore[import-not-found]

    _load_converters()
    config = CompilerConfig()
    config.experimental_config.topology_sorting_strategy = "StableRDFS"
    config.experimental_config.frozen_parameter = True
    inputs = _marked(inputs, static_inputs)
    with _pytorch.own_tracing_context(inputs):
        try:
            return torchair.get_compiler(config)(gm, list(inputs))
        except Exception as e:  # whatever a converter raises about its arguments
            raise LoweringError(f"its conversion fails: {str(e).strip()[:400]}") from e


def make_communicator(group_name: str) -> None:
    """Have HCCL's communicator of a group made now; all its ranks call this.

    HCCL makes it at a group's first collective, and for that the ranks meet on the host, which a
    capture does not allow.
    """
    backend: Any = group_by_name(group_name)._get_backend(torch.device(DEVICE))
    backend.get_hccl_comm_name(dist.get_rank(), init_comm=True)


def _marked(inputs: Sequence[Any], static_inputs: Sequence[int]) -> list[Any]:
    """`inputs`, with the parameters among them marked the way both compilers look for."""
    out = list(inputs)
    for i in static_inputs:
        if isinstance(out[i], torch.Tensor):
            out[i]._torchair_is_parameter = True
    return out


def use_torchair_all_to_all(graph: fx.Graph, node: fx.Node) -> None:
    """Replace one ``_c10d_functional.all_to_all_single`` by torchair's own op, operand 1-D."""
    x, received, sent, name = node.args
    assert isinstance(name, str)
    group = group_by_name(name)
    ranks = dist.get_process_group_ranks(group)

    def offsets(sizes: Any) -> list[Any]:
        return list(itertools.accumulate(sizes[:-1], plus, initial=0))

    def plus(a: Any, b: Any) -> Any:
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a + b
        if a == 0:
            return b
        out = graph.call_function(operator.add, (a, b))
        out.meta["val"] = sum(n.meta["val"] if isinstance(n, fx.Node) else n for n in (a, b))
        return out

    with graph.inserting_before(node):
        new = graph.call_function(
            torch.ops.npu_define.all_to_all_single_npu.default,
            (x, sent, offsets(sent), received, offsets(received), tag_of(group), ranks, len(ranks)),
        )
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def has_ge_converter(op: Any) -> bool:
    """Whether torchair has a converter for `op` that does more than raise."""
    _load_converters()
    converter = getattr(op, "_ge_converter", None)
    return converter is not None and not _only_raises(inspect.unwrap(converter))


@functools.cache
def _load_converters() -> None:
    """Those of torch_npu's own ops do not come with torchair itself."""
    for name in ("ge_converter", "ge_converter.custom", "ge_converter.experimental"):
        importlib.import_module(f"torchair._ge_concrete_graph.{name}")


@functools.cache
def _only_raises(converter: Any) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(converter)))
    except (OSError, SyntaxError, TypeError):
        return False
    body = [n for n in tree.body[0].body if not _is_text(n)]  # type: ignore[attr-defined]
    return bool(body) and isinstance(body[0], ast.Raise)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
