#!/usr/bin/env bash
# A group norm behind an attention fails under aot_eager at batch 1, and runs eagerly.
#
# Version: torch 2.13.0 (2.10.0 as well; 2.15.0 runs it), any build, on a CPU.
# Behaviour: the view from [1, C, H * W], channels last in memory as an attention leaves them, to
#   [1, C, H, W] has other strides when traced than when run: PyTorch's fake kernel gives the dim of
#   size 1 the stride 576, its C++ gives 16. By the former the tensor counts as channels-last
#   contiguous and native_group_norm is handed it as it is; the real one is refused. So the graph
#   that torch.compile(..., backend="aot_eager") made of the VAEs of diffusers at batch 1 cannot run.
# Output seen:
#   eager: [1, 16, 6, 6]
#   strides run: (16, 1, 96, 16)
#   strides traced: (576, 1, 96, 16)
#   aot_eager: RuntimeError: Expected X.is_contiguous(memory_format) to be true, but got false.
# For users: ascend_sp gives views the strides that were traced where ops run one by one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx

x = torch.randn(1, 36, 16).transpose(1, 2)
norm = lambda x: torch.nn.functional.group_norm(x.view(1, 16, 6, 6), 4)
print("eager:", list(norm(x).shape))
real = x.view(1, 16, 6, 6).stride()
print("strides run:", real)
graph = make_fx(lambda x: x.view(1, 16, 6, 6), tracing_mode="fake")(x).graph
(traced,) = (n.meta["val"].stride() for n in graph.nodes if n.op == "call_function")
print("strides traced:", traced)
try:
    torch.compile(norm, backend="aot_eager")(x)
    failed = "it ran"
except RuntimeError as e:
    failed = f"RuntimeError: {str(e).split('  (')[0]}"
print("aot_eager:", failed)
expected = "Expected X.is_contiguous(memory_format) to be true, but got false."
if (real, traced) != ((16, 1, 96, 16), (576, 1, 96, 16)) or expected not in failed:
    sys.exit("this has changed")
PYTHON
