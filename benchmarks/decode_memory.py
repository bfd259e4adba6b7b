"""Peak of intermediate results of a VAE's decode on each rank, beside that of one rank.

    .venv/bin/python benchmarks/decode_memory.py --size 1024

AutoencoderKL with the sizes of SDXL's and FLUX's, on as many ranks as `--ranks` says. The programs
are those that `explain` makes for a 910B4: every rank's own, in the order in which it runs. They
are run op by op on tensors without data, and counted are the bytes of all tensors that are held at
once, but for weights and the latents: each storage from the op that makes it until nothing refers
to it any more, as eager mode and captured graphs hold it. What kernels need inside of them, and
what a compiler that fuses them spares, is not in it.
"""

from __future__ import annotations

import argparse
import weakref
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ascend_sp

MEGA = 1e6


class Held(TorchDispatchMode):
    """Bytes of the storages that ops have made and that are referred to."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in given}
        self.now = self.peak = 0
        self.at = self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        if self.now > self.peak:
            self.peak, self.where = self.now, self.at
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Watched(fx.Interpreter):
    """Says which node runs."""

    def __init__(self, gm: fx.GraphModule, held: Held) -> None:
        super().__init__(gm)
        self.held = held

    def run_node(self, n: fx.Node) -> Any:
        """As it is, said to `held`."""
        self.held.at = f"{n.name} ({n.target})"
        return super().run_node(n)


class Decode(nn.Module):
    """A picture of latents."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """``[1, 4, h, w] -> [1, 3, 8 h, 8 w]``."""
        return self.vae.decode(z, return_dict=False)[0]


def program(size: int, dtype: torch.dtype, ranks: int, rank: int) -> fx.GraphModule:
    """What `rank` runs for a picture of `size` x `size`."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        model = Decode(vae).to(dtype).eval()
        z = torch.randn(1, 4, size // 8, size // 8, dtype=dtype)
    found: list[fx.GraphModule] = []
    options = {
        "ranks": ranks,
        "rank": rank,
        "device": "910B4",
        "observer": lambda name, gm, ctx: found.append(gm),
    }
    ascend_sp.explain(model, z, explain_options=options)
    return found[-1]


def peak(gm: fx.GraphModule) -> tuple[int, str]:
    """Bytes, and the node that comes to them."""
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    held = Held([v for v in values if isinstance(v, torch.Tensor)])
    mode = next(v for v in values if isinstance(v, torch.Tensor)).fake_mode
    with torch.no_grad(), mode, held:
        Watched(gm, held).run(*values, enable_io_processing=False)
    return held.peak, held.where


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    whole, where = peak(program(args.size, dtype, 1, 0))
    print("| ranks | rank | peak, MB | share of one rank's | times 1 / P | where |")
    print("|---|---|---|---|---|---|")
    print(f"| 1 | 0 | {whole / MEGA:.0f} | 1 | 1 | {where} |", flush=True)
    for ranks in args.ranks:
        for rank in range(ranks):
            own, where = peak(program(args.size, dtype, ranks, rank))
            share = own / whole
            print(
                f"| {ranks} | {rank} | {own / MEGA:.0f} | {share:.3f} | {share * ranks:.3f} "
                f"| {where} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
