"""How one module splits: which of its children and parameters, by what, into how many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ascend_sp.text_encoder.split import Cut, Share, share_evenly, share_heads

QUERY, KV, INNER = "query", "kv", "inner"


@dataclass(frozen=True)
class Structure:
    """How one module splits."""

    kind: str
    """``attention`` or ``feed-forward``."""
    columns: dict[str, tuple[str, ...]]
    """Children split by rows, with the blocks of their output."""
    row: str
    """The child that is split by columns, and sums over ranks."""
    totals: dict[str, int]
    """How many units of each kind the whole has."""
    width: int
    """Elements of one unit: the head dim, or 1."""
    tables: dict[str, Cut] = field(default_factory=dict)
    """Embeddings with a value for each head, by child."""
    own: dict[str, Cut] = field(default_factory=dict)
    """The module's own parameters with a value for each head."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Integer attributes that count what a rank holds, and what they count."""

    def cuts(self, module: nn.Module) -> Iterator[tuple[str, Cut]]:
        """(name of the parameter in the module, its cut) for all that is split."""
        for child, blocks in self.columns.items():
            for name, _ in module.get_submodule(child).named_parameters():
                yield f"{child}.{name}", Cut(0, blocks, self.width)
        yield f"{self.row}.weight", Cut(1, (self.inner,), self.width)
        for child, cut in self.tables.items():
            yield f"{child}.weight", cut
        yield from self.own.items()

    @property
    def inner(self) -> str:
        """What the last projection takes in: query heads, or features."""
        return QUERY if self.kind == "attention" else INNER

    def shares(self, ranks: int) -> dict[str, Share]:
        """Who holds what."""
        if self.kind == "attention":
            query, kv = share_heads(self.totals[QUERY], self.totals[KV], ranks)
            return {QUERY: query, KV: kv}
        return {INNER: share_evenly(self.totals[INNER], ranks)}

    def local_attributes(self, shares: dict[str, Share]) -> dict[str, int]:
        """The attributes as each rank must have them."""
        values = {kind: share.local for kind, share in shares.items()}
        if self.kind == "attention":
            values["group"] = values[QUERY] // values[KV]
            values[INNER] = values[QUERY] * self.width
        return {name: values[kind] for name, kind in self.attributes.items()}

    def described(self, shares: dict[str, Share]) -> str:
        """How it is split, in words."""
        per_rank = {kind: share.local for kind, share in shares.items()}
        if self.kind == "attention":
            q, kv = self.totals[QUERY], self.totals[KV]
            return f"attention, {q} heads, {kv} K/V: {per_rank[QUERY]} and {per_rank[KV]} a rank"
        return f"feed-forward, {self.totals[INNER]} features: {per_rank[INNER]} a rank"


@dataclass(frozen=True)
class Found:
    """A module that can be split."""

    name: str
    module: nn.Module
    structure: Structure

    @property
    def signature(self) -> Any:
        """Equal for modules that one proof covers."""
        shapes = tuple((n, tuple(p.shape)) for n, p in self.module.named_parameters())
        return type(self.module), shapes, repr(self.structure)
