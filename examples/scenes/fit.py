"""How a module is trained here: optimisers, learning rate, mean weights, several processes."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))


class Average:
    """The running mean of a module's weights, which is better than the last ones."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = copy.deepcopy(module).eval(), decay, 0

    def add(self, module: nn.Module) -> None:
        """Move towards the weights of now."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        with torch.no_grad():
            for mine, new in zip(self.module.parameters(), module.parameters(), strict=True):
                mine.lerp_(new, 1 - decay)


def schedule(step: int, steps: int, peak: float, warm: int = 100) -> float:
    """The learning rate: up in a line, down in a cosine."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))))


def say(text: str) -> None:
    """Print once."""
    if RANK == 0:
        print(text, flush=True)


def fit(
    module: nn.Module, steps: int, peak: float, loss: Callable[[], torch.Tensor], name: str
) -> Iterator[tuple[int, nn.Module]]:
    """Minimise a loss: after each step, how many are done, and the module with mean weights.

    Matrices in the middle of a transformer are moved by Muon, everything else by AdamW.
    """
    inner = [p for n, p in module.named_parameters() if p.ndim == 2 and "blocks." in n]
    known = {id(p) for p in inner}
    outer = [p for p in module.parameters() if id(p) not in known]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(outer, peak, betas=(0.9, 0.99))]
    if inner:
        muon = torch.optim.Muon(inner, peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimisers.append(muon)
    average, begin, recent = Average(module, 0.998), time.time(), 0.0
    for step in range(steps):
        value = loss()
        module.zero_grad(set_to_none=True)
        value.backward()
        mean_gradients(module)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = schedule(step, steps, peak)
            optimiser.step()
        average.add(module)
        recent += (value.item() - recent) * max(0.01, 1 / (step + 1))
        if step % 50 == 49:
            minutes = (time.time() - begin) / 60
            say(f"{name} {step + 1}/{steps}: {recent:.4f}, {minutes:.1f} minutes")
        yield step + 1, average.module


def mean_gradients(module: nn.Module) -> None:
    """Over the processes."""
    if WORLD > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g)).div_(WORLD)
