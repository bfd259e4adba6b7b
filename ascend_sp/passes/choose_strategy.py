"""Each attention gets the strategy that makes the estimated step shortest.

Before anything is expanded, the graph becomes tasks once for each candidate, with what the strategy
would add in the place of the attention: its packing, its transfers, its groups. The scheduler that
will order the real program orders these, and what comes out is compared. Attentions of one shape
that one call of the model's code makes (the blocks of a loop) are given one strategy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from ascend_sp.graph.attention import Attention
from ascend_sp.graph.context import NoteKind, PassContext
from ascend_sp.graph.cost.estimate import Estimator, shape_of
from ascend_sp.graph.layout import INPUTS, Sequence
from ascend_sp.graph.sizes import row_major
from ascend_sp.passes.exchange import rows_before_padding
from ascend_sp.passes.overlap.scheduler import Task, schedule, simulate
from ascend_sp.passes.overlap.strategies import (
    GATHER,
    MOST_GROUPS,
    PACKED,
    SEPARATE,
    STRATEGY,
    Strategy,
    parse,
    refusal,
)
from ascend_sp.passes.overlap.tasks import Behind, add_tasks, neutral_seconds
from ascend_sp.runtime.ops import split_attention

WORTH = 0.002
"""Share of a step that another strategy must save, by estimate, before it replaces `separate`."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for the attentions of one kind."""

    nodes: tuple[str, ...]
    strategy: Strategy
    estimates: dict[str, float]
    """Seconds of a step under each strategy, the other kinds of attention as chosen."""
    refused: dict[str, str]
    """Strategies that these cannot take, and why."""
    forced: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {
            "n": len(self.nodes),
            "strategy": str(self.strategy),
        }

    def __str__(self) -> str:
        best = min(self.estimates.values(), default=0.0)
        told = [f"{name} {t / best - 1:+.1%}" for name, t in self.estimates.items() if best]
        told += [f"no {name}: {why}" for name, why in self.refused.items()]
        how = "asked for" if self.forced else "chosen"
        return f"{self.strategy} ({how}; estimated step: {', '.join(told)})"


def choose_strategy(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Leave a `Strategy` on every `split_attention`, and what it was compared with."""
    kinds: dict[object, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=split_attention):
        shapes = tuple(shape_of(x.meta["val"]) for x in node.all_input_nodes)
        kinds.setdefault((node.meta.get("stack_trace"), shapes), []).append(node)
    asked = parse(ctx.strategy)
    neutral = ctx.estimator(fuses=False)
    chosen: dict[fx.Node, Strategy] = dict.fromkeys(
        (n for nodes in kinds.values() for n in nodes), SEPARATE
    )
    for nodes in kinds.values():
        refused, candidates = _candidates(nodes[0], asked, ctx)
        estimates = {}
        for strategy in candidates:
            trial = chosen | dict.fromkeys(nodes, strategy)
            estimates[strategy] = _step(gm, ctx, neutral, trial)
        best = candidates[-1] if asked else min(candidates, key=estimates.__getitem__)
        if not asked and estimates[best] > estimates[SEPARATE] * (1 - WORTH):
            best = SEPARATE
        for node in nodes:
            chosen[node] = node.meta[STRATEGY] = best
        named = {str(s): t for s, t in estimates.items()}
        names = tuple(n.name for n in nodes)
        ctx.results.add(Choice(names, best, named, refused, asked is not None))
        for name in refused if asked else ():
            ctx.note(
                NoteKind.STRATEGY,
                nodes[0],
                f"{name} was asked for, and is not possible: {refused[name]}",
            )
    return gm


def _candidates(
    node: fx.Node, asked: Strategy | None, ctx: PassContext
) -> tuple[dict[str, str], list[Strategy]]:
    """What `node` cannot take, with the reasons, and what it can."""
    every = [PACKED, *(Strategy("pipelined", n) for n in range(2, MOST_GROUPS + 1)), GATHER]
    if asked is not None:
        every = [asked] if asked != SEPARATE else []
    elif not ctx.overlap:
        every = []  # what is not hidden anyway gains nothing by being cut
    queries, keys, *_ = node.meta[INPUTS]
    refused, candidates = {}, [SEPARATE]
    for strategy in every:
        why = refusal(strategy, node, queries.seq, keys.seq, ctx.topology.size)
        if not why and asked is None and strategy.gathers and _heads_divide(node, ctx):
            why = f"heads divide by {ctx.topology.size} ranks, and keys of all ranks take memory"
        if why:
            refused[str(strategy)] = why
        else:
            candidates.append(strategy)
    return refused, candidates


def _heads_divide(node: fx.Node, ctx: PassContext) -> bool:
    """Whether an exchange of heads computes no padding.

    Then to gather is at most a little shorter by estimate, but keeps the keys and values of all
    ranks in memory, for which the order of the whole program may then have no room.
    """
    q, k, *_ = Attention.of(node)
    return all(shape_of(x.meta["val"])[1] % ctx.topology.size == 0 for x in (q, k))


def _step(
    gm: fx.GraphModule, ctx: PassContext, estimator: Estimator, chosen: dict[fx.Node, Strategy]
) -> float:
    """Estimated seconds of a step."""
    tasks: list[Task] = []

    def expand(node: fx.Node, behind: Behind) -> frozenset[int]:
        return _Template(node, behind, estimator, ctx.topology.size, tasks).add(chosen[node])

    add_tasks(
        gm.graph.nodes,
        neutral_seconds(estimator),
        estimator,
        fuses=ctx.fuses,
        tasks=tasks,
        static_inputs=ctx.static_inputs,
        expand={split_attention: expand},
    )
    order = schedule(tasks) if ctx.overlap else range(len(tasks))
    return simulate(tasks, order).makespan


class _Template:
    """The tasks that one attention will be."""

    def __init__(
        self, node: fx.Node, behind: Behind, estimator: Estimator, world: int, tasks: list[Task]
    ) -> None:
        self.node, self.behind, self.estimator = node, behind, estimator
        self.world, self.tasks = world, tasks
        q, k, v, self.mask, causal, _, _ = Attention.of(node)
        self.operands: list[fx.Node] = [q, k, v]
        self.causal = bool(causal)
        self.ordered = self.causal or self.mask is not None
        self.dtype = q.meta["val"].dtype
        shapes = [list(shape_of(x.meta["val"])) for x in self.operands]
        self.heads = shapes[0][1]
        if any(s[1] % world for s in shapes):
            for s in shapes:
                s[1] = -(-shapes[0][1] // world) * world
        self.batch, _, self.rows, self.dim = shapes[0]
        self.keys, self.out_dim = shapes[1][2], shapes[2][3]
        self.shares = [s[1] // world for s in shapes]
        self.widths = [s[0] * s[2] * s[3] * world * self.dtype.itemsize for s in shapes]

    def add(self, strategy: Strategy) -> frozenset[int]:
        """Append the tasks; what the result stands on."""
        return self._gather() if strategy.gathers else self._exchange(strategy)

    def _gather(self) -> frozenset[int]:
        """Keys and values come to this rank's queries."""
        needs = set(self.behind[self.operands[0]])
        if self.mask is not None:
            needs |= self.behind[self.mask]
        for x in dict.fromkeys(self.operands[1:]):
            value = x.meta["val"]
            size = math.prod(shape_of(value)) * value.element_size()
            start = self.behind[x]
            if not row_major(value.transpose(1, 2)):
                start = frozenset({self._task("pack", self.estimator.copy_seconds(size), start)})
            seconds, work = self.estimator.device.all_gather(size, self.world)
            needs.add(self._task("all_gather", seconds, start, transfer=True, work=work))
            if self._reorders():
                arrived = self.estimator.copy_seconds(size * self.world)
                needs.add(self._task("unpack", arrived, frozenset({len(self.tasks) - 1})))
        seconds = self.estimator.attention_seconds(
            self.batch,
            self.heads,
            self.rows,
            self.keys * self.world,
            self.dim,
            self.out_dim,
            self.dtype,
        )
        return frozenset({self._task("attention", seconds, frozenset(needs), fills=True)})

    def _reorders(self) -> bool:
        """Whether what arrives must be copied before it is attended."""
        keys: Sequence = self.node.meta[INPUTS][1].seq
        if self.batch > 1:
            return True
        if self.ordered:
            return len(keys.lengths) > 1
        return rows_before_padding(keys, self.world) is None

    def _exchange(self, strategy: Strategy) -> frozenset[int]:
        """Rows are exchanged for heads, and back."""
        groups = range(strategy.groups)
        heads = [[self._heads(strategy, share, g) for share in self.shares] for g in groups]
        sent: list[list[int]] = [[] for _ in groups]
        if strategy.kind == "packed":
            needs = frozenset[int]().union(*(self.behind[x] for x in self.operands))
            size = sum(n * width for n, width in zip(self.shares, self.widths, strict=True))
            sent = [[self._send(size, needs)]]
        else:
            for i, x in enumerate(self.operands):
                for g in groups:
                    sent[g].append(self._send(heads[g][i] * self.widths[i], self.behind[x]))
        each = self.batch * self.rows * self.world * self.out_dim * self.dtype.itemsize
        mask = self.behind[self.mask] if self.mask is not None else frozenset[int]()
        out = []
        for g, starts in enumerate(sent):
            seconds = self.estimator.attention_seconds(
                self.batch,
                heads[g][0],
                self.rows * self.world,
                self.keys * self.world,
                self.dim,
                self.out_dim,
                self.dtype,
                self.causal,
            )
            attended = self._task("attention", seconds, frozenset(starts) | mask, fills=True)
            out.append(self._send(heads[g][0] * each, frozenset({attended})))
        return frozenset(out)

    @staticmethod
    def _heads(strategy: Strategy, share: int, group: int) -> int:
        first, last = strategy.heads(share, group)
        return int(last) - int(first)

    def _send(self, size: float, needs: frozenset[int]) -> int:
        packed = self._task("pack", self.estimator.copy_seconds(size), needs)
        seconds, work = self.estimator.device.all_to_all(size, self.world)
        return self._task("all_to_all", seconds, frozenset({packed}), transfer=True, work=work)

    def _task(
        self,
        name: str,
        seconds: float,
        needs: frozenset[int],
        *,
        transfer: bool = False,
        work: float = 0.0,
        fills: bool = False,
    ) -> int:
        serves = self.node.name if transfer else ""
        self.tasks.append(Task(name, seconds, tuple(sorted(needs)), transfer, work, serves, fills))
        return len(self.tasks) - 1
