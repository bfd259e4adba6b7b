"""What `parallelize_text_encoder` did, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One module that owns Linears."""

    name: str
    """Its name in the encoder."""
    module: str
    """Its class."""
    how: str
    """How it is split, or why it is not."""
    bytes_whole: int
    """Bytes of its parameters in the whole encoder."""
    bytes_local: int
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
    bytes_whole: int
    """Bytes of all parameters of the encoder."""
    bytes_local: int
    """Bytes of the parameters that this rank holds."""
    bytes_sharded: int
    """Bytes, in the whole encoder, of the parameters that are split."""
    bytes_sharded_local: int
    """Bytes of those that this rank holds, padding included."""

    def __str__(self) -> str:
        lines = [
            f"{self.ranks} rank(s); weights in MiB: {_mib(self.bytes_whole)} in all, "
            f"{_mib(self.bytes_local)} on this rank. Split: {_mib(self.bytes_sharded)}, of which "
            f"{_mib(self.bytes_sharded_local)} on this rank.",
            *_table("split", self.split),
            *_table("whole", self.whole),
        ]
        return "\n".join(lines)


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f}"


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    """A line for all modules of one class that are treated alike."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.module, row.how), []).append(row)
    lines = []
    for (module, how), same in alike.items():
        whole, local = (sum(getattr(r, f"bytes_{k}") for r in same) for k in ("whole", "local"))
        first = same[0].name or "(root)"
        names = first if len(same) == 1 else f"{first}, ... ({len(same)})"
        lines.append(f"  {title}  {_mib(whole)} -> {_mib(local)}  {module}  {names}: {how}")
    return lines
