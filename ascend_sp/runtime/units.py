"""Numbers with a unit, as reports print them."""

from __future__ import annotations


def mib(n: float) -> str:
    """Bytes in MiB."""
    return f"{n / 2**20:.1f}"
