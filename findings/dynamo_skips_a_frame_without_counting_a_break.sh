#!/usr/bin/env bash
# A graph break in a loop makes Dynamo run the whole frame eagerly, and count no break.
#
# Version: torch 2.13.0 (2.10.0 and 2.15.0 as well), any build, on a CPU.
# Behaviour: a model that runs its blocks in a Python loop, with a break in a block, gets no graph at
#   all, and torch._dynamo.utils.counters["graph_break"], where other breaks are counted, stays
#   empty. The reason is under counters["unimplemented"] only. A transformer whose blocks break (a
#   hook, a cache) is thus not compiled, and looks as if it had no break.
# Output seen:
#   in a loop: 0 graphs, 0 breaks counted
#   without a loop: 2 graphs, 1 break counted
# For users: ascend_sp warns where a model is in pieces; fullgraph=True stops at the break.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
from torch._dynamo.utils import counters

graphs = []


def backend(gm, inputs):
    graphs.append(gm)
    return gm.forward


class Model(torch.nn.Module):
    def __init__(self, loop):
        super().__init__()
        self.loop = loop
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        if self.loop:
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


found = []
for loop in (True, False):
    torch._dynamo.reset()
    counters.clear()
    graphs.clear()
    with torch.no_grad():
        torch.compile(Model(loop), backend=backend)(torch.randn(2, 4))
    found.append((len(graphs), sum(counters["graph_break"].values())))
print("in a loop: %d graphs, %d breaks counted" % found[0])
print("without a loop: %d graphs, %d break counted" % found[1])
if found != [(0, 0), (2, 1)]:
    sys.exit("this has changed")
PYTHON
