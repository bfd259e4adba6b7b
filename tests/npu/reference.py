"""What CPUs compute eagerly, found in a process that has no torch_npu.

Where torch_npu is imported, diffusers calls its ops, on CPU tensors too, and they fail there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import models

MODELS: dict[str, Any] = {
    "flux": lambda: models.flux(1, 1, 3),
    "qwen": lambda: models.qwen(heads=3, layers=1),
    "z_image": lambda: models.z_image(heads=3, layers=1),
}
INPUTS: dict[tuple[str, str], Any] = {
    ("flux", "uneven"): lambda: models.flux_inputs(1, 33, 7),
    ("flux", "even"): lambda: models.flux_inputs(2, 16, 8),
    ("qwen", "uneven"): lambda: models.qwen_inputs(),
    ("qwen", "even"): lambda: models.qwen_inputs(2, ((4, 4), (2, 4)), 8, mask=(8, 5)),
    ("z_image", "uneven"): lambda: models.z_image_inputs(),
    ("z_image", "even"): lambda: models.z_image_inputs(((16, 16),), (32,)),
}
"""Fewer tokens than ranks divide, heads too, and lengths and a mask where both divide."""


def build(name: str, case: str, dtype: torch.dtype) -> tuple[Any, tuple, dict[str, Any]]:
    """A model, and arguments for it."""
    given = INPUTS[name, case]()
    args, kwargs = (given, {}) if isinstance(given, tuple) else ((), given)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.dtype == torch.float32 else t

    args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
    return MODELS[name]().to(dtype), args, kwargs


def first(output: Any) -> torch.Tensor:
    """The one tensor that counts of what a model returns."""
    return tree_leaves(output)[0]


def main(path: str) -> None:
    """Write all references."""
    found = {}
    with torch.no_grad():
        for name, case in INPUTS:
            for dtype in (torch.float32, torch.bfloat16):
                model, args, kwargs = build(name, case, dtype)
                found[name, case, str(dtype)] = first(model(*args, **kwargs)).float()
    torch.save(found, path)


def compute(path: Path) -> dict[tuple[str, str, str], torch.Tensor]:
    """The references by model, case and dtype, computed in a clean process."""
    site = os.environ["PYTHONPATH"].split(os.pathsep)
    tests = str(Path(__file__).parent.parent)
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(
        [tests, *(p for p in site if not (Path(p) / "torch_npu").exists())]
    )
    subprocess.run([sys.executable, __file__, str(path)], env=env, check=True, timeout=200)
    return torch.load(path)


if __name__ == "__main__":
    main(sys.argv[1])
