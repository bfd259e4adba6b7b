"""Requests whose prompts all have other lengths, one after the other, as a server meets them."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from models import flux, flux_inputs, qwen, qwen_inputs, z_image, z_image_inputs

LENGTHS = random.Random(0).sample(range(5, 1025), 60)
CAPACITY = 128
"""Of which number capacities are multiples; eight hold all lengths."""

FALLS_BACK = r"(?s)ascend_sp.*(uncompiled|takes over|run as they are)"
"""What ascend_sp warns of then. These small models do not gain by a split, which it says, too."""


@dataclass(frozen=True)
class Model:
    """How a model is made, and the arguments of a call with a prompt of some tokens."""

    make: Callable[[], nn.Module]
    arguments: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


MODELS = {
    "flux": Model(lambda: flux(1, 1, 3), lambda n: ((), flux_inputs(1, 64, n))),
    "qwen": Model(lambda: qwen(3, 1), lambda n: ((), qwen_inputs(1, ((6, 6), (5, 6)), n))),
    "z_image": Model(lambda: z_image(3, 1), lambda n: (z_image_inputs(((12, 16),), (n,)), {})),
}


def answer(name: str, options: dict[str, Any], device: str, *, eager: bool) -> dict[str, Any]:
    """Seconds for all requests, compiles, and the largest difference to the model itself.

    That anything falls back is an error. Without `eager` nothing is compared, and Dynamo may
    compile as often as there are requests.
    """
    from torch._dynamo.utils import counters

    import ascend_sp  # noqa: F401

    model, of = MODELS[name].make().to(device), MODELS[name].arguments
    torch._dynamo.config.recompile_limit = 8 if eager else 64
    # What knows no buckets is left to do as it does by itself, which is quicker there.
    dynamic = True if "buckets" in options else None
    compiled = torch.compile(model, backend="ascend_sp", options=options, dynamic=dynamic)
    worst, seconds = 0.0, 0.0
    with warnings.catch_warnings(), torch.no_grad():
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), of(LENGTHS[0]))
        model(*args, **kwargs)  # some move tables of their own to the device in their first call
        warnings.filterwarnings("error", FALLS_BACK)
        for n in LENGTHS:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), of(n))
            start = time.perf_counter()
            got = [x.cpu() for x in tree_leaves(compiled(*args, **kwargs))]
            seconds += time.perf_counter() - start
            want = tree_leaves(model(*args, **kwargs)) if eager else []
            for g, w in zip(got, want, strict=False):
                worst = max(worst, (g - w.cpu()).abs().max().item())
    return {"seconds": seconds, "compiles": counters["ascend_sp"]["graphs"], "worst": worst}
