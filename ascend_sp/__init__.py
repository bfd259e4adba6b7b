"""ascend_sp: a `torch.compile` backend that makes diffusion transformers sequence-parallel.

    pipe.transformer = torch.compile(pipe.transformer, backend="ascend_sp")

Nothing need be imported: PyTorch finds the backend by its entry point.
"""

from __future__ import annotations

from ascend_sp.runtime.versions import VERSION, check_torch

check_torch()  # first: with an older one, what follows may fail to import

from ascend_sp.compiler.backend import ascend_sp as backend
from ascend_sp.compiler.config import Config
from ascend_sp.compiler.explain import explain
from ascend_sp.compiler.report.explanation import Explanation
from ascend_sp.compiler.uncompiled import watch
from ascend_sp.compiler.warm_up import WarmUp, warm_up
from ascend_sp.parallelize import Part, PipelineReport, parallelize
from ascend_sp.passes.npu.layouts import keep_layouts_traceable
from ascend_sp.passes.npu.lengths import keep_lengths_symbolic
from ascend_sp.runtime.errors import (
    AscendSPError,
    CollectiveError,
    ConfigError,
    NumericsError,
    OpError,
    RankMismatchError,
    TextEncoderError,
    TopologyError,
    UnshardedError,
    VerificationError,
)
from ascend_sp.text_encoder.apply import parallelize_text_encoder
from ascend_sp.text_encoder.load import LoadReport, load_text_encoder
from ascend_sp.text_encoder.report import TextEncoderReport
from ascend_sp.weights.shard import WeightsReport, shard_weights

__version__ = VERSION

load_weights = load_text_encoder
"""The same for every model that `shard_weights` has sharded."""

# Before Dynamo traces: it calls the backend only when it has.
keep_lengths_symbolic()
keep_layouts_traceable()
watch()

__all__ = [
    "AscendSPError",
    "CollectiveError",
    "Config",
    "ConfigError",
    "Explanation",
    "LoadReport",
    "NumericsError",
    "OpError",
    "Part",
    "PipelineReport",
    "RankMismatchError",
    "TextEncoderError",
    "TextEncoderReport",
    "TopologyError",
    "UnshardedError",
    "VerificationError",
    "WarmUp",
    "WeightsReport",
    "backend",
    "explain",
    "load_text_encoder",
    "load_weights",
    "parallelize",
    "parallelize_text_encoder",
    "shard_weights",
    "warm_up",
]
