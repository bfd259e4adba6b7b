"""What `parallelize_text_encoder` did, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from ascend_sp.runtime.units import mib


@dataclass(frozen=True)
class Row:
    """One module that owns Linears."""

    name: str
    """Its name in the encoder."""
    module: str
    """Its class."""
    how: str
    """How it is split, or why it is not."""
    whole_bytes: int
    """Bytes of its parameters in the whole encoder."""
    local_bytes: int
    """Bytes of them that this rank holds."""


@dataclass(frozen=True)
class TextEncoderReport:
    """What `parallelize_text_encoder` did; print it for a table."""

    ranks: int
    """P: ranks that share the weights."""
    split: tuple[Row, ...]
    """Modules that are split."""
    whole: tuple[Row, ...]
    """Modules with Linears or embeddings that every rank holds whole, and why."""
    whole_bytes: int
    """Bytes of all parameters of the encoder."""
    local_bytes: int
    """Bytes of the parameters that this rank holds."""
    sharded_bytes: int
    """Bytes, in the whole encoder, of the parameters that are split."""
    sharded_local_bytes: int
    """Bytes of those that this rank holds, padding included."""

    def __str__(self) -> str:
        lines = [
            f"{self.ranks} rank(s); weights in MiB: {mib(self.whole_bytes)} in all, "
            f"{mib(self.local_bytes)} on this rank. Split: {mib(self.sharded_bytes)}, of which "
            f"{mib(self.sharded_local_bytes)} on this rank.",
            *_table("split", self.split),
            *_table("whole", self.whole),
        ]
        return "\n".join(lines)


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    """A line for all modules of one class that are treated alike."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.module, row.how), []).append(row)
    lines = []
    for (module, how), same in alike.items():
        whole, local = (sum(getattr(r, f"{k}_bytes") for r in same) for k in ("whole", "local"))
        first = same[0].name or "(root)"
        names = first if len(same) == 1 else f"{first}, ... ({len(same)})"
        lines.append(f"  {title}  {mib(whole)} -> {mib(local)}  {module}  {names}: {how}")
    return lines


def held_bytes(encoder: nn.Module) -> dict[str, int]:
    """Bytes that this rank holds of each parameter."""
    return {
        n: (p.to_local() if isinstance(p, DTensor) else p).nbytes
        for n, p in encoder.named_parameters()
    }


def make_report(
    encoder: nn.Module,
    ranks: int,
    split: Mapping[str, str],
    whole: Mapping[str, str],
    before: Mapping[str, int],
    parameters: Collection[str],
) -> TextEncoderReport:
    """The report, from what was done.

    Args:
        encoder: as it is now.
        ranks: P.
        split: how each module is split, by name.
        whole: why each other one is not.
        before: bytes of each parameter of the whole.
        parameters: names of those that are split.
    """
    after = held_bytes(encoder)

    def row(name: str, how: str) -> Row:
        """A module with the bytes of its own parameters, and of its Linears' and tables'."""
        module = encoder.get_submodule(name)
        mine = [n for n, _ in module.named_parameters(recurse=False)]
        for child, m in module.named_children():
            if isinstance(m, nn.Linear) or f"{name}.{child}.weight" in parameters:
                mine += [f"{child}.{n}" for n, _ in m.named_parameters()]
        full = [f"{name}.{n}".lstrip(".") for n in mine]
        sizes = (sum(bytes_.get(n, 0) for n in full) for bytes_ in (before, after))
        return Row(name, type(module).__name__, how, *sizes)

    return TextEncoderReport(
        ranks=ranks,
        split=tuple(row(n, how) for n, how in split.items()),
        whole=tuple(row(n, why) for n, why in whole.items()),
        whole_bytes=sum(before.values()),
        local_bytes=sum(after.values()),
        sharded_bytes=sum(before.get(n, 0) for n in parameters),
        sharded_local_bytes=sum(after.get(n, 0) for n in parameters),
    )
