"""Time of 60 requests of 60 lengths, compiles included, beside an older build that has no buckets.

    git worktree add OLDER 5c5aa5b^
    PYTHONPATH=.npu/site CANNSIM_LIB_DIR=.npu/cann TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
        .venv/bin/python benchmarks/prompts.py --than OLDER --target npugraph_ex torchair

(`make .npu/.ready` and `tests/cann/build.py` make the simulated NPUs; `--target inductor` runs on
CPU ranks and needs none.) The builds run in turns, each in processes of its own on two ranks. The
older one compiles as often as it meets a new length: Dynamo's recompile limit is raised to 64, so
that it runs no request uncompiled. Printed is a row for each model and target, with the ratio of
the two times on the slower rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE / "tests"), str(HERE / "tests" / "cann")]


def rank(rank: int, world: int, model: str, target: str, buckets: bool) -> dict[str, Any]:
    """All requests on one rank."""
    from prompts import CAPACITY, answer

    options: dict[str, Any] = {"target": target}
    if buckets:
        options["buckets"] = CAPACITY
    return answer(model, options, "cpu" if target == "inductor" else "npu", eager=False)


def alone(model: str, target: str, buckets: bool) -> None:
    """Print what the slower of two ranks took, with the build on the path."""
    if target == "inductor":
        from processes import run as on_cpu
        from processes import values

        found = values(on_cpu(rank, 2, model, target, buckets, timeout=3000))
    else:
        import simulated_npu

        found = simulated_npu.run(rank, 2, model, target, buckets, timeout=3000)
    print(json.dumps(max(found, key=lambda f: f["seconds"])))


def measure(build: Path, model: str, target: str, buckets: bool) -> dict[str, Any]:
    """The same with the build that lies in a folder."""
    paths = [str(build), *filter(None, [os.environ.get("PYTHONPATH")])]
    line = [sys.executable, __file__, "--alone", "--models", model, "--target", target]
    done = subprocess.run(
        [*line, *(["--buckets"] if buckets else [])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=3600,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--than", type=Path, help="a checkout of an older commit")
    parser.add_argument("--models", nargs="+", default=["flux", "qwen", "z_image"])
    parser.add_argument("--target", nargs="+", default=["npugraph_ex"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--buckets", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args.models[0], args.target[0], args.buckets)
        return
    print("| model | target | compiles | of the older build | time, ratio |\n|---|---|---|---|---|")
    for model in args.models:
        for target in args.target:
            rows = [
                (measure(HERE, model, target, True), measure(args.than, model, target, False))
                for _ in range(args.rounds)
            ]
            ratio = statistics.median(new["seconds"] / old["seconds"] for new, old in rows)
            compiles = " | ".join(str(x["compiles"]) for x in rows[0])
            print(f"| {model} | {target} | {compiles} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
