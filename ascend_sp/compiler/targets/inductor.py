"""PyTorch's own compiler, for CPUs and CUDA devices."""

from __future__ import annotations

from ascend_sp.compiler import _inductor
from ascend_sp.compiler.targets.base import Target

INDUCTOR = Target("inductor", _inductor.inductor)
