#!/usr/bin/env bash
# Inductor merges kernels across a functional collective, and so starts it later than written.
#
# Version: torch 2.13.0 (2.10.0 and 2.15.0 as well), any build, on a CPU.
# Behaviour: written is: project queries, rotate them, start their all-to-all; project keys, rotate
#   them, start theirs. Both rotations read the same table, so Inductor makes one kernel of them,
#   behind both projections: queries are sent only when keys have been projected, and nothing is left
#   to compute while they travel. Without the shared table the order is as written.
# Output seen:
#   one table: mm, kernel, mm, kernel, all_to_all, all_to_all
#   two tables: mm, kernel, all_to_all, mm, kernel, all_to_all
# For users: ascend_sp makes each kernel that Inductor does not write depend on the one before, which
#   keeps the order (compiler/_inductor.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PYTHON'
import re
import sys

import torch
import torch.distributed as dist
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
c10d = torch.ops._c10d_functional
group = dist.group.WORLD.group_name


def rotate(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def start(x):
    half = [x.numel() // 2] * 2
    return c10d.all_to_all_single(x.flatten(), half, half, group)


def project(x, queries, keys, first, second):
    q = start(rotate(x @ queries, *first))
    k = start(rotate(x @ keys, *second))
    return c10d.wait_tensor(q), c10d.wait_tensor(k)


def order(first, second):
    torch._dynamo.reset()
    x, queries, keys = torch.randn(64, 32), torch.randn(32, 32), torch.randn(32, 32)
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(project), x, queries, keys, first, second)
    calls = code[code.index("def call(") :]
    what = r"extern_kernels\.(mm)|(cpp_fused)\w*\(|= \S*(all_to_all)_single\.default\("
    names = ["".join(m) for m in re.findall(what, calls)]
    return [n.replace("cpp_fused", "kernel") for n in names]


tables = [(torch.randn(64, 32), torch.randn(64, 32)) for _ in range(2)]
one, two = order(tables[0], tables[0]), order(tables[0], tables[1])
print("one table:", ", ".join(one))
print("two tables:", ", ".join(two))
late = one.index("all_to_all") > max(i for i, n in enumerate(one) if n == "mm")
early = two.index("all_to_all") < max(i for i, n in enumerate(two) if n == "mm")
if not late or not early:
    sys.exit("this has changed")
PYTHON
