"""Settings that every test shares."""

from __future__ import annotations

import os

# Read when Inductor is imported. Without it every process that compiles, so each rank of each test,
# tries the processor's instruction sets in further processes, which import PyTorch for that.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import hypothesis
import pytest
import torch

from processes import collect_rarely

collect_rarely()
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    database=None,
    # No shrinking: one example compiles a model for up to eight ranks.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Same seed, one thread, and nothing that Dynamo remembers of another test."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.reset()
