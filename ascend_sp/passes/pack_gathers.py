"""Values that are needed whole at one place are gathered in one all-gather, where that is cheaper.

What a graph returns (the residuals of a ControlNet, the pictures of a batch), or what one op reads,
is gathered value by value, each for the latency of a collective. One all-gather has that once. But
it begins when the last value is there, and costs copies: shards are put behind each other, and what
arrives lies rank by rank. So the scheduler that will order the program is asked which values
should wait for each other. Those that are there last have the least to hide behind: of n values
that belong together the last n, n/2, n/4... are tried.

Values belong together if one collective is the first that needs any of them, or none does. So none
of them is needed for another, and nothing is sent later because they travel together.

Weights of which a rank has a part wait for nothing, so the smallest are tried, and no more than
make one as large as the largest weight: what is gathered at once takes memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import fx

from ascend_sp.graph.context import NoteKind, PassContext, is_random
from ascend_sp.graph.cost.estimate import bytes_of, is_free, shape_of
from ascend_sp.graph.emitter import Emitter, same_strides
from ascend_sp.graph.families import VIEWS
from ascend_sp.graph.origin import MATERIALISE, exchange_of, origin_of, set_origin
from ascend_sp.passes.overlap.memory import made_of_weights
from ascend_sp.passes.overlap.packing import Packed, Trial
from ascend_sp.passes.overlap.scheduler import Task
from ascend_sp.passes.sharding import redistribute
from ascend_sp.runtime.ops import ALL_GATHER, STARTS, WAIT


def pack_gathers(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Make one of all-gathers whose results are needed together, by estimated cost."""
    kinds: dict[object, list[list[fx.Node]]] = {}
    for group in _together(gm.graph):
        alike = tuple((n.meta.get("stack_trace"), shape_of(_sent(n))) for n in group)
        kinds.setdefault((_sent(group[0]).dtype, alike), []).append(group)
    if not kinds:
        return gm
    trial = _Trial(gm, ctx)
    emit = Emitter(gm, "pack_gathers")
    decided = [(groups, *trial.best(groups)) for groups in kinds.values()]
    for groups, packed, text in decided:
        for i, group in enumerate(groups):
            ctx.note(NoteKind.PACKED, _pack(emit, packed[i], ctx) if packed else group[0], text)
    return gm


def _operand(gather: fx.Node) -> fx.Node:
    x = gather.args[0]
    assert isinstance(x, fx.Node)
    return x


def _sent(gather: fx.Node) -> torch.Tensor:
    value: torch.Tensor = _operand(gather).meta["val"]
    return value


def _together(graph: fx.Graph) -> list[list[fx.Node]]:
    """All-gathers that can be one, two or more of one dtype, each group in program order."""
    nodes = list(graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    # Of each node the first collective, or random number, that needs it.
    first: dict[fx.Node, int] = {}
    groups: dict[object, list[fx.Node]] = {}
    for node in reversed(nodes):
        barriers = (
            place[u] if u.target in STARTS or is_random(u.target) else first[u] for u in node.users
        )
        first[node] = min(barriers, default=len(nodes))
        # Those of an attention's keys and values are apart because that was estimated to be best.
        if exchange_of(node) or node.target is not ALL_GATHER:
            continue
        if all(u.target is WAIT for u in node.users):
            value = _sent(node)
            if value.dim() == 1:
                key = (first[node], value.dtype, value.device, node.args[1:])
                groups.setdefault(key, []).insert(0, node)
    return [group for group in reversed(groups.values()) if len(group) > 1]


class _Trial(Trial):
    """Estimated steps of a graph with some of its gathers packed."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        super().__init__(gm, ctx)
        self.chosen: list[Packed] = []
        self.seconds: float | None = None
        """Of a step with what is chosen so far."""

    def best(self, groups: list[list[fx.Node]]) -> tuple[list[list[fx.Node]], str]:
        """Of each group of one kind what to pack, or nothing of any; and how that was decided."""
        n = len(groups[0])
        sizes = [k for k in _sizes(n) if self._can_pay(groups[0], k) and self._fits(groups, k)]
        if not sizes:
            return [], f"none of {n} values travel in one: what is saved is less than its copies"
        apart, order = self.apart[0], self._order(groups[0])
        tried: dict[int, tuple[float, list[Packed]]] = {}
        for k in sizes:
            packed = [self._packed([group[i] for i in sorted(order[n - k :])]) for group in groups]
            tried[k] = self.step([*self.chosen, *packed])[0], packed
        tried[0] = apart if self.seconds is None else self.seconds, []
        best = min(tried, key=lambda k: tried[k][0])  # of equals the first: fewest collectives
        self.seconds, packed = tried[best]
        self.chosen += packed
        told = [f"{k or 'none'} {t / self.seconds - 1:+.2%}" for k, (t, _) in tried.items()]
        nodes = self.program.node_of
        return (
            [[nodes[t] for t in p.members] for p in packed],
            f"{best or 'none'} of {n} values travel in one (estimated step: {', '.join(told)})",
        )

    def _order(self, group: Sequence[fx.Node]) -> list[int]:
        """The members of `group`, those last that are packed first."""
        if group[0] in self.weights:
            return sorted(range(len(group)), key=lambda i: (-bytes_of(_sent(group[i])), i))
        ready = self.apart[1]
        return sorted(range(len(group)), key=lambda i: (ready[self.index[group[i]]], i))

    def _fits(self, groups: Sequence[Sequence[fx.Node]], k: int) -> bool:
        """Whether `k` of each group make no larger weight than there is."""
        if not any(n in self.weights for group in groups for n in group):
            return True
        largest = max(bytes_of(_sent(n)) for n in self.weights if n.target is ALL_GATHER)
        return all(sum(sorted(bytes_of(_sent(n)) for n in g)[:k]) <= largest for g in groups)

    @cached_property
    def weights(self) -> set[fx.Node]:
        """What parameters alone decide."""
        return made_of_weights(list(self.gm.graph.nodes), self.ctx.static_inputs)

    def _can_pay(self, group: Sequence[fx.Node], k: int) -> bool:
        """Whether the copies for `k` of `group` may cost less than what `k` collectives do."""
        saved = (k - 1) * sum(self.estimator.device.all_gather(0, self.ctx.topology.size))
        least = sorted(group, key=lambda n: bytes_of(_sent(n)))[:k]
        return saved > sum(self._copies(least))

    def _copies(self, group: Sequence[fx.Node]) -> tuple[float, float]:
        """Seconds to put shards behind each other, and to make values of what arrives."""
        e, ranks = self.estimator, self.ctx.topology.size
        sizes = [bytes_of(_sent(n)) for n in group]
        # Where ranks' rows are put in order anyway, it costs nothing more.
        moved = [n * ranks for n, g in zip(sizes, group, strict=True) if _in_place(g)]
        return e.copy_seconds(sum(sizes)), sum(map(e.copy_seconds, moved))

    def _packed(self, group: Sequence[fx.Node]) -> Packed:
        pack, unpack = self._copies(group)
        size = sum(bytes_of(_sent(n)) for n in group)
        cost = self.estimator.device.all_gather(size, self.ctx.topology.size)
        return Packed(
            tuple(self.index[n] for n in group),
            (
                Task("pack", pack),
                Task("all_gather", cost.seconds, transfer=True, work=cost.work),
                Task("unpack", unpack),
            ),
        )


def _sizes(n: int) -> Iterator[int]:
    while n > 1:
        yield n
        n = (n + 1) // 2


def _reorders(node: fx.Node) -> bool:
    """Whether `node` is of what makes a whole tensor of the shards that have arrived."""
    origin = origin_of(node)
    return origin is not None and origin.made_by == MATERIALISE


def _in_place(gather: fx.Node) -> bool:
    """Whether what arrives is the whole tensor already, or a view of it."""
    below = list(gather.users)
    while below:
        node = below.pop()
        if not is_free(node):
            return False
        below += [u for u in node.users if _reorders(u)]
    return True


def _pack(emit: Emitter, group: Sequence[fx.Node], ctx: PassContext) -> fx.Node:
    """One all-gather for `group`, where the last of them is; the start of it."""
    last, late = group[-1], _needing(group)
    before = last.prev
    with emit.at(last):
        start, parts = redistribute.gather_flat(emit, list(map(_operand, group)), ctx.topology)
    node, origin = before.next, _origin(group)
    while node is not last:
        set_origin(node, "pack_gathers", origin)
        node = node.next
    for node in late:
        last.prepend(node)
    for gather, part in zip(group, parts, strict=True):
        for wait in list(gather.users):
            with emit.at(wait):
                viewed = all(u.target in VIEWS for u in wait.users)
                new = part if viewed else emit.view(part, (wait.meta["val"].numel(),))
            wait.replace_all_uses_with(new)
            emit.graph.erase_node(wait)
        emit.graph.erase_node(gather)
    _refresh(emit, parts)
    return start


def _needing(group: Sequence[fx.Node]) -> list[fx.Node]:
    """What stands in front of the last of `group` and needs another of them."""
    found = dict.fromkeys(group[:-1])
    node = group[0]
    while node is not group[-1]:
        if node not in found and any(x in found for x in node.all_input_nodes):
            found[node] = None
        node = node.next
    return [n for n in found if n not in group]


def _origin(group: Sequence[fx.Node]) -> str:
    """Which values are gathered."""
    origin = origin_of(group[0])
    return f"{origin.of if origin else group[0].name} and {len(group) - 1} more"


def _refresh(emit: Emitter, changed: Sequence[fx.Node]) -> None:
    """Bring the values behind `changed` up to date, up to where their strides are the old ones."""
    todo = {user for x in changed for user in x.users}
    while todo:
        node = min(todo)
        todo.remove(node)
        if node.op == "output":
            continue
        old = node.meta["val"]
        emit.refresh_after_move(node)
        if same_strides(old.shape, node.meta["val"].stride(), old.stride()):
            continue
        if all(_reorders(user) for user in node.users):
            todo.update(node.users)
            continue
        users = list(node.users)
        with emit.at(node.next, origin=node):
            new = emit.restride(node, old.stride())
        for user in users:
            user.replace_input_with(node, new)
