"""What the nodes of one rank's ATen graph take on a device, estimated from shapes alone.

A roofline: an op takes as long as its arithmetic or its memory traffic, whichever is longer, and
the launch of a kernel. Nothing is measured here and nothing depends on the rank, so all ranks come
to the same numbers. `docs/cost_model.md` says what is left out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from ascend_sp.graph._pytorch import OpOverload, is_pointwise, tree_leaves
from ascend_sp.graph.cost.device import DeviceModel, LinkCost
from ascend_sp.graph.families import QUANTISED, name_of
from ascend_sp.graph.npu_names import OPS as NPU_ATTENTION
from ascend_sp.graph.sizes import row_major
from ascend_sp.runtime.ops import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, STARTS, WAIT

aten = torch.ops.aten

LINEAR = frozenset({"aten::linear", "aten::matmul"})
"""Products that the registry of PyTorch's flop counter does not have, besides quantised ones."""
TRANSCENDENTAL = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "sin", "cos", "tan", "atan2", "pow"),
        *("tanh", "sigmoid", "silu", "gelu", "erf", "softplus", "mish", "elu", "_softmax"),
        *("softmax", "_safe_softmax", "_log_softmax"),
    }
)
"""Ops that evaluate a function for every element. A power with a whole exponent is a product."""
FUSIBLE = frozenset(
    {
        *("cat", "stack", "clone", "constant_pad_nd", "_to_copy", "select_scatter", "repeat"),
        *("slice_scatter", "index", "embedding", "arange", "full", "full_like", "new_full"),
        *("zeros", "ones", "scalar_tensor", "native_layer_norm", "layer_norm", "_softmax"),
        *("softmax", "_safe_softmax", "rms_norm", "_fused_rms_norm", "native_group_norm", "flip"),
    }
)
"""Ops that Inductor fuses with their neighbours, besides those tagged pointwise or reduction."""
LOOKUPS = frozenset({"index", "embedding", "index_select", "gather"})
"""Ops that read of their largest operand only what they yield."""


class Estimator:
    """Costs of the nodes of a graph. Make a new one after edges of the graph have changed.

    Args:
        device: the rates.
        ranks: how many ranks a collective joins.
        fuses: whether the target fuses pointwise ops and reductions into one kernel (Inductor).
    """

    def __init__(self, device: DeviceModel, ranks: int, fuses: bool) -> None:
        self.device, self.ranks, self.fuses = device, ranks, fuses
        self._kernels: dict[fx.Node, list[fx.Node]] = {}
        self._seconds: dict[fx.Node, float] = {}

    def seconds(self, node: fx.Node) -> float:
        """Time of a node that computes; 0.0 for views, waits, collectives and sizes.

        With `fuses`, a node whose result is used within one kernel only costs nothing itself; the
        last node of that kernel bears its cost.
        """
        if node not in self._seconds:
            self._seconds[node] = self._kernel_seconds(node)
        return self._seconds[node]

    def _kernel_seconds(self, node: fx.Node) -> float:
        if is_free(node) or node.target in STARTS:
            return 0.0
        kernel = self.kernel(node)
        if not kernel:
            return 0.0
        d = self.device
        compute = sum(self._compute(n) for n in kernel)
        return max(compute, _traffic(kernel) / d.memory) + d.launch

    def transfer(self, node: fx.Node) -> LinkCost:
        """What a collective takes of the link and of the device; nothing for every other node."""
        if node.target not in STARTS:
            return LinkCost(0.0, 0.0)
        size = sum(bytes_of(v) for v in tensors_of(node.args[0]))
        d = self.device
        blocks: Any = node.args[2] if node.target is ALL_TO_ALL else ()
        if len(set(blocks)) > 1:  # sorted, so that all ranks come to the same bits
            return d.exchange(sorted(n * size / sum(blocks) for n in blocks))
        time = {ALL_TO_ALL: d.all_to_all, ALL_GATHER: d.all_gather, ALL_REDUCE: d.all_reduce}
        return time[node.target](size, self.ranks)

    def attention_seconds(
        self,
        batch: int,
        heads: int,
        rows: int,
        keys: int,
        dim: int,
        out_dim: int,
        dtype: torch.dtype,
        causal: bool = False,
    ) -> float:
        """Time of fused attention of ``[batch, heads, rows, dim]`` over `keys` keys."""
        d = self.device
        moved = batch * heads * (rows + keys) * (dim + out_dim) * dtype.itemsize
        flops = _attention_flops(batch, heads, rows, keys, dim, out_dim, causal)
        return max(flops / d.attention_rate(dtype), moved / d.memory) + d.launch

    def copy_seconds(self, nbytes: float) -> float:
        """Time of a kernel that copies `nbytes` bytes."""
        return 2 * nbytes / self.device.memory + self.device.launch

    def _compute(self, node: fx.Node) -> float:
        """Seconds of arithmetic."""
        outputs = tensors_of(node)
        if not outputs:
            return 0.0
        flops = attention_flops(node)
        if flops is not None:
            return flops / self.device.attention_rate(outputs[0].dtype)
        flops = product_flops(node)
        if flops is not None:
            d = self.device
            # The units that multiply numbers of fewer bits are at least as fast as all others.
            fewer_bits = name_of(node) in QUANTISED
            rate = max(d.matmul.values()) if fewer_bits else d.product_rate(outputs[0].dtype)
            return flops / rate
        if _name(node) not in TRANSCENDENTAL or _is_whole_power(node):
            return 0.0
        return _numel(outputs[0]) / self.device.transcendental

    def kernel(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the kernel that `node` is the last of; none if it is not the last."""
        if not self.fuses:
            return [node]
        if node not in self._kernels:
            self._kernels = _fuse(node.graph)
        return self._kernels[node]


def _fuse(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The kernels of a graph: by their last node, the nodes in them; an empty list for others.

    A fusible node goes into the kernel in which all its users are, if they are in one, views in
    between not counted. That leaves out what Inductor does besides: kernels with several results,
    and cheap nodes computed once for each of several kernels.
    """
    last: dict[fx.Node, fx.Node] = {}
    kernels: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        into = {last[user] for user in node.users}
        own = not is_free(node) and not (
            len(into) == 1 and is_fusible(node) and is_fusible(next(iter(into)))
        )
        # A view is where its users are; if they are in several kernels, in none of them.
        last[node] = node if own or len(into) != 1 else next(iter(into))
        kernels.setdefault(node, [])
        if not is_free(node):
            kernels.setdefault(last[node], []).append(node)
    return kernels


def is_fusible(node: fx.Node) -> bool:
    """Whether Inductor writes the kernel of `node` itself, with what stands around it."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    made_by_it = is_pointwise(target) or torch.Tag.reduction in target.tags
    return made_by_it or _name(node) in FUSIBLE


def _traffic(kernel: Sequence[fx.Node]) -> int:
    """Bytes that a kernel reads and writes, each tensor once; the first node is the last to run."""
    inside = set(kernel)
    read: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in kernel:
        for x in node.all_input_nodes:
            base = owner_of(x)
            if base not in inside:
                size = sum(bytes_of(v) for v in tensors_of(x))
                if _name(node) in LOOKUPS:
                    size = min(size, sum(bytes_of(v) for v in tensors_of(node)))
                read.setdefault(base, {})[x] = size
    total = sum(bytes_of(v) for v in tensors_of(kernel[0]))
    for base, views in read.items():
        # Two views of one tensor may be the same part of it.
        total += min(sum(views.values()), sum(bytes_of(v) for v in tensors_of(base)))
    return total


def owner_of(node: fx.Node) -> fx.Node:
    """The node whose memory `node` is a view of."""
    while node.op == "call_function" and is_free(node):
        if not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def is_free(node: fx.Node) -> bool:
    """Whether nothing runs on the device for `node`."""
    target: Any = node.target
    if node.op != "call_function" or target is operator.getitem or target is WAIT:
        return True
    if not tensors_of(node):
        return True
    if not isinstance(target, OpOverload):
        return False
    if target is aten._unsafe_view.default:
        return True
    alias = [r.alias_info for r in target._schema.returns]
    if not alias or any(a is None or a.is_write for a in alias):
        return False
    # `reshape` and `contiguous` may be views and may copy.
    if target in (aten.reshape.default, aten.contiguous.default):
        x: Any = node.args[0]
        return bool(row_major(x.meta["val"]))
    return True


def attention_flops(node: fx.Node) -> float | None:
    """Floating point operations of a fused attention; None if `node` is none.

    Known are ``attention(q, k, v, ...)`` with heads in front of rows, whoever's op it is, and the
    ops of torch_npu in their dense layouts.
    """
    name = _name(node)
    if name in NPU_ATTENTION:
        return _npu_attention_flops(node)
    if name not in ("attention", "split_attention") and "scaled_dot_product" not in name:
        return None
    q, k, v = (shape_of(_argument(node, i).meta["val"]) for i in range(3))
    *batch, heads, rows, dim = q
    keys, out_dim = k[-2], v[-1]
    causal = bool(_argument(node, "is_causal"))
    return _attention_flops(_product(batch), heads, rows, keys, dim, out_dim, causal)


def _attention_flops(
    batch: int, heads: int, rows: int, keys: int, dim: int, out_dim: int, causal: bool
) -> float:
    """Two products; kernels leave out about half of the keys under a causal mask."""
    return 2.0 * batch * heads * rows * keys * (dim + out_dim) * (0.5 if causal else 1.0)


def _npu_attention_flops(node: fx.Node) -> float:
    layout = str(_argument(node, "input_layout") or "BSH")
    q, k, v = (shape_of(_argument(node, i).meta["val"]) for i in range(3))
    # Where the rows are: BSH, BSND, SBH, TND (all sequences as one: too much), else BNSD.
    at = 0 if layout[0] in "ST" else 1 if layout.startswith("BS") else 2
    return 2.0 * _product(q) * k[at] * (1 + v[-1] / k[-1])


def product_flops(node: fx.Node) -> float | None:
    """Floating point operations of a matrix product or a convolution; None if `node` is none."""
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    out = tensors_of(node)
    name = name_of(node)
    if name in LINEAR or name in QUANTISED:
        x: Any = node.args[0]
        return 2.0 * _numel(out[0]) * shape_of(x.meta["val"])[-1]
    formula = flop_registry.get(target.overloadpacket)
    if formula is None:
        return None
    # The formulas take shapes as well as tensors; plain numbers install no guards.
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(n.meta.get("val")))
    return float(formula(*args, **kwargs, out_val=shape_of(out[0])))


def _value(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return shape_of(val)
    return _hint(val) if isinstance(val, torch.SymInt) else val


def _argument(node: fx.Node, which: str | int) -> Any:
    """An argument of an op by name or place, or its default; None if the op has no such one."""
    target: Any = node.target
    for i, a in enumerate(target._schema.arguments):
        if which in (i, a.name):
            return node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
    return None


def _is_whole_power(node: fx.Node) -> bool:
    exponent = node.args[1] if _name(node) == "pow" else None
    return isinstance(exponent, int | float) and float(exponent).is_integer()


def _name(node: fx.Node) -> str:
    """Name of an op without namespace and overload."""
    return name_of(node).split("::")[-1]


def tensors_of(node: Any) -> list[torch.Tensor]:
    """The tensors that a node yields."""
    return list(_leaves(node.meta.get("val"))) if isinstance(node, fx.Node) else []


def _leaves(val: Any) -> Iterator[torch.Tensor]:
    return (v for v in tree_leaves(val) if isinstance(v, torch.Tensor))


def _hint(size: Any) -> int:
    """A size as a number: of a symbolic one the value at compile time, which all ranks share.

    1 for a size that is known only when the program runs.
    """
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return 1 if hint is None else int(hint)
    return int(size)


def shape_of(val: torch.Tensor) -> tuple[int, ...]:
    """The shape of a fake tensor as numbers, see `_hint`."""
    return tuple(_hint(n) for n in val.shape)


def _product(sizes: Sequence[int]) -> int:
    out = 1
    for n in sizes:
        out *= n
    return out


def _numel(val: torch.Tensor) -> int:
    return _product(shape_of(val))


def bytes_of(val: torch.Tensor) -> int:
    """Bytes of what `val` holds in memory; dims that were expanded hold nothing."""
    sizes = zip(shape_of(val), val.stride(), strict=True)
    held = _product([n for n, stride in sizes if _hint(stride) != 0])
    return held * val.element_size()
