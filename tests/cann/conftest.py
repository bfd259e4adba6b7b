"""Tests of the simulated CANN need it; without it only those of its tools are collected."""

import os
from pathlib import Path

import simulated_npu  # noqa: F401

TOOLS = {"test_cuda_build.py"}

# See README.md.
collect_ignore = (
    []
    if "CANNSIM_LIB_DIR" in os.environ
    else [p.name for p in Path(__file__).parent.glob("test_*.py") if p.name not in TOOLS]
)
