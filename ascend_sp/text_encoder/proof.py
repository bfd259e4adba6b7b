"""The proof: a module split over P ranks computes what the whole computes.

On the encoder's first call, one module of each kind gets a whole copy with random weights and P
local copies cut from it; all run here, on that call's inputs, with sums in place of all-reduces.
Nothing is sent, and since the inputs are the same on every rank, so is the verdict.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ascend_sp.runtime._pytorch import tree_leaves, tree_map
from ascend_sp.runtime.errors import TextEncoderError
from ascend_sp.text_encoder.compare import TOLERANCE, close, error, held, same
from ascend_sp.text_encoder.split import Share, piece_of
from ascend_sp.text_encoder.structure import Found

# Tensors that hold only a rank's heads: what they are, which dim, and who holds which heads.
Headed = dict[int, tuple[Any, int, Share]]


class Proof:
    """What is needed to prove one module's split, taken before it is split."""

    def __init__(self, found: Found, ranks: int) -> None:
        self.name, self.live, self.structure = found.name, found.module, found.structure
        self.ranks, self.shares = ranks, found.structure.shares(ranks)
        self.skeleton = _skeleton(found.module)

    def check(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], headed: Headed
    ) -> dict[int, tuple[int, Share]] | None:
        """Compare the whole with the parts.

        Returns:
            Which of the outputs hold only a rank's heads, by number; None if these inputs prove
            nothing, such as a single token.

        Raises:
            TextEncoderError: they differ, or cannot be run.
        """
        inputs = (args, kwargs)
        device = next((x.device for x in tree_leaves(inputs) if isinstance(x, Tensor)), None)
        weights = self._weights(device or torch.device("cpu"))
        try:
            whole = self._run(self._copy(weights), inputs, headed, None)
            if not self._tells_apart(weights, inputs, headed, whole):
                return None
            parts = [self._part(weights, r) for r in range(self.ranks)]
            for r, (part, _) in enumerate(parts):
                self._run(part, inputs, headed, r)
            seen = [row.seen for _, row in parts]
            totals = [functools.reduce(torch.add, sums) for sums in zip(*seen, strict=True)]
            for _, row in parts:
                row.totals = iter(totals)
            got = [self._run(part, inputs, headed, r) for r, (part, _) in enumerate(parts)]
        except Exception as e:
            raise self._error(f"running it on a rank's heads or features failed: {e}") from e
        return self._compare(whole, got)

    def _weights(self, device: torch.device) -> dict[str, Tensor]:
        """Random weights of the whole, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, p in self.skeleton.named_parameters():
            value = torch.randn(p.shape, generator=generator)
            # Features of order one: attention is neither flat nor all on one key.
            weights[name] = (value * p.shape[-1] ** -0.5 if p.ndim > 1 else value).to(device)
        return weights

    def _part(self, weights: dict[str, Tensor], rank: int) -> tuple[nn.Module, _Row]:
        local = dict(weights)
        for name, cut in self.structure.cuts(self.skeleton):
            local[name] = piece_of(cut, self.shares, rank, weights[name].shape).take(weights[name])
        part = self._copy(local)
        for name, value in self.structure.local_attributes(self.shares).items():
            setattr(part, name, value)
        name = self.structure.row
        row = _Row(local[f"{name}.weight"], local.get(f"{name}.bias"))
        part._modules[name] = row
        return part, row

    def _copy(self, weights: dict[str, Tensor]) -> nn.Module:
        new = _skeleton(self.skeleton)
        for path, module in new.named_modules():
            module._buffers = dict(self.live.get_submodule(path)._buffers)
            prefix = f"{path}." if path else ""
            for name in module._parameters:
                if f"{prefix}{name}" in weights:
                    value = nn.Parameter(weights[f"{prefix}{name}"], requires_grad=False)
                    module._parameters[name] = value
        return new.eval()

    def _run(self, module: nn.Module, inputs: Any, headed: Headed, rank: int | None) -> list[Any]:
        """The leaves of what `module` returns; `rank` None is the whole."""

        def fresh(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x if isinstance(x, (int, float, str, type(None))) else _deepcopy(x)
            known = headed.get(id(x))
            if known is None or known[0]() is not x:
                return x.detach().float() if x.is_floating_point() else x.detach()
            _, dim, share = known
            shape = [share.total if d == dim else n for d, n in enumerate(x.shape)]
            value = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.device)
            return value if rank is None else held(value, dim, share.ranks[rank])

        args, kwargs = tree_map(fresh, inputs)
        with torch.no_grad():
            out = tree_leaves(module(*args, **kwargs))
        if not any(isinstance(x, Tensor) for x in out):
            raise ValueError("it returns no tensor to compare")
        return [x.clone() if isinstance(x, Tensor) else x for x in out]

    def _tells_apart(
        self, weights: dict[str, Tensor], inputs: Any, headed: Headed, whole: list[Any]
    ) -> bool:
        """Whether a wrong split of each projection would show with these inputs."""
        for child, blocks in self.structure.columns.items():
            name = f"{child}.weight"
            sizes = [self.structure.totals[kind] * self.structure.width for kind in blocks]
            for i in range(len(blocks)):
                parts = list(weights[name].split(sizes))
                parts[i] = parts[i].roll(1, 0)
                other = self._copy({**weights, name: torch.cat(parts)})
                if same(whole, self._run(other, inputs, headed, None)):
                    return False
        return True

    def _compare(self, whole: list[Any], parts: list[list[Any]]) -> dict[int, tuple[int, Share]]:
        headed: dict[int, tuple[int, Share]] = {}
        for i, want in enumerate(whole):
            got = [part[i] for part in parts]
            if not isinstance(want, Tensor) or all(close(g, want) for g in got):
                continue
            split = self._as_heads(want, got)
            if split is None:
                off = max(error(g, want) if g.shape == want.shape else torch.inf for g in got)
                raise self._error(
                    f"its output {i} {list(want.shape)} is {list(got[0].shape)} there, off by "
                    f"{off:.2g} of its largest value (limit {TOLERANCE:g})"
                )
            headed[i] = split
        return headed

    def _as_heads(self, want: Tensor, got: list[Tensor]) -> tuple[int, Share] | None:
        """(dim, who holds what) if the parts hold their own heads of `want`."""
        for share in self.shares.values():
            for dim in range(want.ndim):
                if want.shape[dim] == share.total and all(
                    close(g, want, dim, share.ranks[r]) for r, g in enumerate(got)
                ):
                    return dim, share
        return None

    def _error(self, what: str) -> TextEncoderError:
        s = self.structure
        return TextEncoderError(
            f"{self.name or 'the encoder'} ({type(self.live).__name__}) was taken for "
            f"{s.described(self.shares)}, which is wrong: {what}. Load the "
            f"encoder again and call parallelize_text_encoder(..., exclude=[{self.name!r}]) to "
            "leave it whole; a * in the name matches the same module of other layers."
        )


class _Row(nn.Module):
    """The projection that sums over ranks: notes its part, and later returns the sum instead."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.seen: list[Tensor] = []
        self.totals: Any = None

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight)
        if self.totals is None:
            self.seen.append(part)
            return part
        total = next(self.totals)
        return total if self.bias is None else total + self.bias


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy with parameters on ``meta``, without hooks; it shares everything else."""
    new = type(module).__new__(type(module))
    new.__dict__ = {
        k: type(v)() if k.startswith(("_forward_", "_backward_")) and isinstance(v, dict) else v
        for k, v in vars(module).items()
        if k != "forward"
    }
    new._parameters = {
        n: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for n, p in module._parameters.items()
    }
    new._buffers = dict(module._buffers)
    new._modules = {n: None if m is None else _skeleton(m) for n, m in module._modules.items()}
    return new


def _deepcopy(x: Any) -> Any:
    try:
        return copy.deepcopy(x)
    except Exception:  # a handle, a stream: shared
        return x
