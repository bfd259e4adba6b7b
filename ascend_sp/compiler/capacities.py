"""Capacities: the sizes that a program runs with, for requests that have other lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AUTO_SHARE = 16
"""Of a sequence, automatic capacities are at most this part apart."""
AUTO_UNITS = (16, 256)
"""The least and the largest distance between automatic capacities."""


@dataclass(frozen=True)
class Capacities:
    """All multiples of `unit`, or those of them that are `listed`."""

    unit: int
    listed: tuple[int, ...] = ()
    """In ascending order; empty: all."""

    @staticmethod
    def of_list(sizes: tuple[int, ...]) -> Capacities:
        """These sizes only."""
        return Capacities(math.gcd(*sizes), tuple(sorted(set(sizes))))

    def holding(self, length: int) -> int | None:
        """The least capacity of at least `length` and 1; None if all are smaller."""
        length = max(length, 1)
        if self.listed:
            return next((c for c in self.listed if c >= length), None)
        return -(-length // self.unit) * self.unit

    def __str__(self) -> str:
        if self.listed:
            return ", ".join(map(str, self.listed))
        return f"multiples of {self.unit}" if self.unit > 1 else "off"


OFF = Capacities(1)
"""Every length is its own capacity."""


def automatic(tokens: int) -> Capacities:
    """Capacities for lengths that are a part of a sequence of about `tokens`.

    At most a sixteenth of the sequence is then padding, and half of that is usual.
    """
    least, most = AUTO_UNITS
    return Capacities(min(max(2 ** int(math.log2(max(tokens // AUTO_SHARE, 1))), least), most))


@dataclass(frozen=True)
class Buckets:
    """The option: capacities for the lengths of all inputs, or of each; None is automatic."""

    all: Capacities | None = None
    each: Mapping[str, Capacities | None] = field(default_factory=dict)
    """By the name of an input; all others keep their lengths."""

    def automatic(self) -> bool:
        """Whether nothing was asked for."""
        return self.all is None and not self.each

    def off(self) -> bool:
        """Whether all lengths stay as they are."""
        return self.all == OFF and all(c == OFF for c in self.each.values())

    def of(self, inputs: set[str], tokens: int) -> Capacities:
        """Those for a length of the `inputs`, in a sequence of about `tokens`."""
        found: Capacities | None = self.all
        if self.each:
            found = next((c for name, c in self.each.items() if name in inputs), OFF)
        return automatic(tokens) if found is None else found

    def __str__(self) -> str:
        if self.each:
            return "; ".join(f"{name}: {_text(c)}" for name, c in sorted(self.each.items()))
        return _text(self.all)


def parse(value: Any) -> Buckets:
    """`Buckets` of what a user writes.

    Raises:
        ValueError: it is none of ``"auto"``, off, a number, a list of numbers, or a dict of these.
        TypeError: likewise.
    """
    if isinstance(value, Mapping):
        if not value or not all(isinstance(name, str) for name in value):
            raise ValueError
        return Buckets(OFF, {name: _capacities(v) for name, v in value.items()})
    return Buckets(_capacities(value))


def _capacities(value: Any) -> Capacities | None:
    if isinstance(value, str):
        word = value.lower()
        if word == "auto":
            return None
        if word in ("off", "false", "0"):
            return OFF
        numbers = [int(v) for v in value.split(",")]
        value = numbers if len(numbers) > 1 else numbers[0]
    if value is False:
        return OFF
    if isinstance(value, (list, tuple)):
        if not value or not all(map(_is_size, value)):
            raise ValueError
        return Capacities.of_list(tuple(value))
    if not _is_size(value):
        raise ValueError
    return Capacities(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _text(capacities: Capacities | None) -> str:
    return "auto" if capacities is None else str(capacities)
