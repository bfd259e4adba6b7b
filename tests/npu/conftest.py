"""Every test here needs torch_npu over the simulated CANN; without it there is nothing to run."""

import os

import simulated_npu  # noqa: F401

# See tests/cann/README.md.
collect_ignore_glob = [] if "CANNSIM_LIB_DIR" in os.environ else ["test_*.py"]
