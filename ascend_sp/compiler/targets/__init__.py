"""Lowering targets: who turns the finished ATen graph of one rank into something that runs.

On Ascend there is a ladder: a target that cannot take a graph names what it is, and the next one
takes over. `docs/ascend.md` says why it is in this order.
"""

from __future__ import annotations

from ascend_sp.compiler.targets.base import Runnable, Target
from ascend_sp.compiler.targets.eager import EAGER
from ascend_sp.compiler.targets.inductor import INDUCTOR
from ascend_sp.compiler.targets.npugraph_ex import NPUGRAPH_EX
from ascend_sp.compiler.targets.torchair import TORCHAIR
from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.npu import DEVICE

__all__ = ["TARGETS", "Runnable", "Target", "ladder"]

TARGETS = {t.name: t for t in (INDUCTOR, NPUGRAPH_EX, TORCHAIR, EAGER)}


def ladder(name: str, device_type: str) -> tuple[Target, ...]:
    """The targets to try, best first, for a graph on `device_type`; the last takes everything.

    Args:
        name: a target, or ``"auto"``: Inductor on CPU and CUDA, npugraph_ex on Ascend.
        device_type: ``"cpu"``, ``"cuda"``, ``"npu"``...

    Raises:
        ConfigError: the target is not for this device.
    """
    if device_type == DEVICE:
        rungs: dict[str, tuple[Target, ...]] = {
            "torchair": (TORCHAIR, NPUGRAPH_EX, EAGER),
            "inductor": (INDUCTOR,),  # torch_npu brings its own code generators for it
            "eager": (EAGER,),
        }
        return rungs.get(name, (NPUGRAPH_EX, EAGER))
    if name in (TORCHAIR.name, NPUGRAPH_EX.name):
        raise ConfigError(
            f"target={name!r} is for Ascend, and the model is on {device_type!r}. Move the model "
            'and its inputs to "npu", or leave target out.'
        )
    if name == "auto":
        name = INDUCTOR.name if device_type in ("cpu", "cuda") else EAGER.name
    return (TARGETS[name],)
