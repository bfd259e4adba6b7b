"""npugraph_ex: the graph is captured as one ACL graph and replayed, kernels as PyTorch picks them.

Functional collectives stay as they are: a start is enqueued on HCCL's stream, and its wait makes
the compute stream wait for HCCL's event, so what stands between the two runs beside the transfer.
Where npugraph_ex is left to itself it decomposes all-to-alls into ones that wait at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ascend_sp.compiler.targets import _torch_npu
from ascend_sp.compiler.targets.base import Runnable, Target
from ascend_sp.compiler.targets.host import split_host, stays_on_host
from ascend_sp.graph._pytorch import OpOverload, free_unbacked_symbols, has_kernel, tree_leaves
from ascend_sp.graph.context import is_random
from ascend_sp.passes.npu.factories import give_factories_a_tensor
from ascend_sp.runtime.npu import DEVICE, Ascend
from ascend_sp.runtime.ops import STARTS

OLDEST_CANN = "8.5.0"
"""torch_npu documents the backend from TorchNPU 7.3.0 on, which comes with this CANN."""

BREAKS_IT = "npu::npu_weight_quant_batchmatmul"
"""For which npugraph_ex switches an option off, one that its configuration may not have."""

SIZED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


def lower(gm: fx.GraphModule, inputs: Sequence[Any], static_inputs: Sequence[int]) -> Runnable:
    """Hand the graph to npugraph_ex, with parameters marked as never moving."""
    groups = {n.args[-1] for n in gm.graph.nodes if n.target in STARTS}
    for name in sorted(map(str, groups)):
        _torch_npu.make_communicator(name)
    give_factories_a_tensor(gm)
    parts = split_host(gm, inputs)
    return parts.run_with(
        _torch_npu.npugraph_ex(parts.device, parts.inputs, parts.static(static_inputs))
    )


def missing(ascend: Ascend) -> str | None:
    """What is too old here."""
    if not ascend.has_cann(OLDEST_CANN):
        return f"it needs CANN {OLDEST_CANN}, and this is {ascend.cann or 'of unknown version'}"
    return None


def refuses(gm: fx.GraphModule) -> list[str]:
    """What a captured graph cannot replay: random numbers, and whatever the host must look at."""
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or stays_on_host(node):
            continue
        values = tree_leaves(node.meta.get("val"))
        if is_random(node.target):
            found[str(node.target)] = "draws random numbers, which a replay would repeat"
        elif any(free_unbacked_symbols(x) for x in values if isinstance(x, SIZED)):
            found[str(node.target)] = "has a size or value that only the device knows"
        elif isinstance(node.target, OpOverload) and not has_kernel(node.target, "PrivateUse1"):
            found[str(node.target)] = "has no kernel for NPUs and falls back to the CPU"
        elif _name(node) == BREAKS_IT and not _torch_npu.has_view_option():
            found[str(node.target)] = "is an error in this torch_npu's npugraph_ex"
        elif any(isinstance(x, torch.Tensor) and x.device.type != DEVICE for x in values):
            found[str(node.target)] = "brings a value of the device to the host"
    return [f"{op} {why}" for op, why in found.items()]


def _name(node: fx.Node) -> str:
    return node.target.name() if isinstance(node.target, OpOverload) else ""


NPUGRAPH_EX = Target("npugraph_ex", lower, missing=missing, refuses=refuses)
