"""Where a node of a rank's program comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

_KEY = "ascend_sp_origin"

MATERIALISE = "materialise_sharding"
"""The pass that moves shards, by which others know its nodes."""
ULYSSES, GATHER_KEYS = "ulysses", "gather_keys"
EXCHANGES = (ULYSSES, GATHER_KEYS)
"""Passes that bring together the queries and keys of an attention, likewise."""


@dataclass(frozen=True)
class Origin:
    """The pass that made a node, and what it stands for."""

    made_by: str
    """Name of the pass."""
    of: str
    """Name of the node that the pass replaced or served."""
    attention: str = ""
    """Name of the attention whose rows and heads it helps to exchange; empty if of none."""

    def __str__(self) -> str:
        return f"{self.made_by}({self.of})"


def origin_of(node: fx.Node) -> Origin | None:
    """The origin of a node that a pass made; None for one of the model's own."""
    return node.meta.get(_KEY)


def set_origin(node: fx.Node, made_by: str, of: fx.Node | str) -> None:
    """Say that pass `made_by` made `node` out of `of`.

    What a later pass makes of a part of an attention's exchange is a part of it, too.
    """
    name = of if isinstance(of, str) else of.name
    before = None if isinstance(of, str) else origin_of(of)
    attention = before.attention if before else ""
    if made_by in EXCHANGES:
        attention = name
    node.meta[_KEY] = Origin(made_by, name, attention)


def made_by(node: fx.Node) -> str:
    """`origin_of` as text, ``pass(node)``; empty for one of the model's own nodes."""
    return str(origin_of(node) or "")


def exchange_of(node: fx.Node) -> str:
    """Name of the attention for whose exchange a pass made `node`; empty if for none."""
    found = origin_of(node)
    return found.of if found is not None and found.made_by in EXCHANGES else ""
