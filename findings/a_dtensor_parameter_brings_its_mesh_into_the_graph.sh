#!/usr/bin/env bash
# A DTensor parameter is one input of an ATen graph, or two: newer AOTAutograd adds the device mesh.
#
# Version: torch 2.10.0 and 2.13.0 (2.15.0 as 2.13.0), any build, on a CPU.
# Behaviour: a backend of torch.compile whose graph reads a parameter that is a DTensor gets the
#   rank's part of it as an input. From some version after 2.10 on, an input follows that is no
#   tensor and that nothing in the graph uses: the DeviceMesh, as a fake script object. A backend
#   that asks every input for what tensors have breaks on it; torchair of torch_npu 2.13.0 does
#   ("'DeviceMesh' object has no attribute 'is_npu'").
# Output seen:
#   torch 2.10.0: FakeTensor, FakeTensor
#   torch 2.13.0: FakeTensor, FakeScriptObject, FakeTensor
# For users: ascend_sp leaves such inputs out of the graphs that it gives to torchair, so weights
#   sharded by `shard_weights`, or as SimpleFSDP does, run there (compiler/targets/host.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 2.10.0 2.13.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "torch==$version" numpy
  "$folder/$version/bin/python" - <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = init_device_mesh("cpu", (2,))


class Sharded(nn.Module):
    def __init__(self):
        super().__init__()
        part = DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0)], run_check=False)
        self.weight = nn.Parameter(part, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.redistribute(placements=[Replicate()]).to_local()


kinds = []


def look(graph, inputs):
    nodes = graph.graph.find_nodes(op="placeholder")
    kinds.extend(type(n.meta["val"]).__name__ for n in nodes)
    unused = [type(n.meta["val"]).__name__ for n in nodes if not n.users]
    assert unused == [k for k in kinds if k != "FakeTensor"]
    return graph


with torch.no_grad():
    torch.compile(Sharded(), backend=aot_autograd(fw_compiler=look))(torch.randn(3, 4))
version = torch.__version__.split("+")[0]
print(f"torch {version}: {', '.join(kinds)}")
seen = {
    "2.10.0": ["FakeTensor", "FakeTensor"],
    "2.13.0": ["FakeTensor", "FakeScriptObject", "FakeTensor"],
}
if kinds != seen[version]:
    sys.exit("this has changed")
PYTHON
done
