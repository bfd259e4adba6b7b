"""The ways in which an attention's queries meet keys of other ranks, and which it can take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ascend_sp.graph.attention import Attention
from ascend_sp.graph.emitter import as_shape_of
from ascend_sp.graph.layout import Sequence
from ascend_sp.graph.sizes import Size, ceil_div, equal

STRATEGY = "ascend_sp_strategy"
"""Meta key of a `split_attention` node: the `Strategy` that was chosen for it."""
GATHER_KIND = "gather"
KINDS = ("separate", "packed", "pipelined", GATHER_KIND)
MOST_GROUPS = 4
"""How many groups of heads the choice by cost considers; more can be asked for by name."""


@dataclass(frozen=True)
class Strategy:
    """Which of queries, keys and values travel to whom, how, and how the result comes back."""

    kind: str
    groups: int = 1
    """Groups of heads that travel and attend one after the other; 1 unless `kind` is pipelined."""

    @property
    def gathers(self) -> bool:
        """Whether keys and values of all ranks come to each, and queries stay where they are."""
        return self.kind == GATHER_KIND

    def heads(self, share: Size, group: int) -> tuple[Size, Size]:
        """The heads ``[first, last)`` of a group, of the `share` that one rank has."""
        if self.groups == 1:
            return 0, share
        assert isinstance(share, int)
        return share * group // self.groups, share * (group + 1) // self.groups

    def __str__(self) -> str:
        return f"pipelined:{self.groups}" if self.kind == "pipelined" else self.kind


SEPARATE = Strategy("separate")
PACKED = Strategy("packed")
GATHER = Strategy(GATHER_KIND)


def parse(text: str) -> Strategy | None:
    """A strategy by its name, ``pipelined:N`` with a number of groups; None for ``auto``.

    Raises:
        ValueError: no such strategy.
    """
    kind, _, number = text.partition(":")
    if text == "auto":
        return None
    if kind == "pipelined" and (not number or (number.isdecimal() and int(number) >= 2)):
        return Strategy(kind, int(number or 2))
    if text in ("separate", "packed", GATHER_KIND):
        return Strategy(text)
    raise ValueError(text)


def refusal(
    strategy: Strategy, node: fx.Node, queries: Sequence, keys: Sequence, world: int
) -> str:
    """Why the attention `node` cannot take `strategy`, or ``""``."""
    q, k, v, *_ = Attention.of(node)
    shapes = [as_shape_of(x) for x in (q, k, v)]
    if strategy.kind == "packed":
        same = queries.lengths == keys.lengths and equal(shapes[0][0], shapes[1][0])
        if not same or not all(equal(s[3], shapes[0][3]) for s in shapes):
            return "queries and keys differ in rows, or values in width"
        if len({x.meta["val"].dtype for x in (q, k, v)}) > 1:
            return "queries, keys and values have different dtypes"
    if strategy.kind == "pipelined":
        counts = [s[1] for s in shapes]
        if not all(isinstance(n, int) for n in counts):
            return "the number of heads is symbolic"
        if any(n % world for n in counts):
            counts = counts[:1] * 3  # shared heads are repeated there, one for each of the queries
        shares = [ceil_div(n, world) for n in counts]
        # Each group of queries must find its own keys beside it.
        if len(set(shares)) > 1 and any(n % strategy.groups for n in shares):
            return f"{shares[0]} and {min(shares)} heads a rank do not divide into equal groups"
        if min(shares) < strategy.groups:
            return f"too few heads a rank ({min(shares)}) for {strategy.groups} groups"
    return ""
