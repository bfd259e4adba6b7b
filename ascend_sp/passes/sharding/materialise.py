"""Materialisation: the graph becomes the program of one rank, as the plan says.

Every node keeps its identity; its operands are brought to the placements that its rule asked for,
its size arguments become local ones, and its fake value is recomputed. Attention over a split
sequence stays one opaque node, `split_attention`, with the placements of its operands beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_sp.graph._pytorch import HigherOrderOperator, tree_map
from ascend_sp.graph.context import NoteKind, PassContext
from ascend_sp.graph.emitter import Emitter, same_strides
from ascend_sp.graph.layout import (
    GLOBAL_SHAPES,
    INPUTS,
    PARTIAL,
    PLACEMENTS,
    REPLICATE,
    Padded,
    Partial,
    Placement,
    Shard,
    Window,
    same,
)
from ascend_sp.graph.origin import MATERIALISE
from ascend_sp.graph.sizes import as_size
from ascend_sp.passes.sharding import halo, redistribute
from ascend_sp.passes.sharding.plan import Plan, operand_nodes, shapes


def materialise_sharding(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Rewrite `gm` in place into the program of rank ``ctx.topology.rank``."""
    plan = ctx.results.get(Plan)
    assert plan is not None
    Materialiser(gm, plan, ctx).run()
    return gm


class Materialiser:
    """One walk over the graph, with every version of a value that was needed so far."""

    def __init__(self, gm: fx.GraphModule, plan: Plan, ctx: PassContext) -> None:
        self.gm = gm
        self.plan = plan
        self.ctx = ctx
        self.emit = Emitter(gm, MATERIALISE)
        self.versions: dict[fx.Node, list[tuple[Placement, fx.Node]]] = {}
        self.zeroed: dict[fx.Node, fx.Node] = {}
        self.global_shapes = {n: shapes(n) for n in gm.graph.nodes}
        self.global_strides = {
            n: n.meta["val"].stride()
            for n in gm.graph.nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        }
        self.changed: set[fx.Node] = set()
        """Whole values whose memory order is not the recorded one any more."""

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.gm.graph.nodes):
            self._remember(node)
            if node.op == "call_function":
                self._rewrite(node)
            elif node.op == "output":
                self._output(node)
            self._annotate(node)

    def _remember(self, node: fx.Node) -> None:
        home = REPLICATE if node in self.plan.seeds else self.plan.placement(node)
        self.versions[node] = [(home, node)]

    def _annotate(self, node: fx.Node) -> None:
        if node in self.plan.placements:
            placements = self.plan.placements[node]
            if node in self.plan.seeds:
                placements = (REPLICATE, *placements[1:])
            node.meta[PLACEMENTS] = placements
            node.meta[GLOBAL_SHAPES] = self.global_shapes[node]

    def _rewrite(self, node: fx.Node) -> None:
        if self._made_a_size(node):
            return
        found = self.plan.answers.get(node)
        operands = operand_nodes(node)
        wants = found.inputs if found else [REPLICATE] * len(operands)
        reason = self.plan.refusals.get(node)
        new = [
            self.version(node, x, want, reason.reason if reason else "")
            for x, want in zip(operands, wants, strict=True)
        ]
        if found and found.mask_padding:
            with self.emit.at(node):
                new = [
                    self._zero_padding(x, w) if isinstance(w, Shard) else x
                    for x, w in zip(new, wants, strict=True)
                ]
        if not found and new == operands and not self._touches_changed(node):
            return
        self._replace_operands(node, new)
        if found:
            node.meta[INPUTS] = found.inputs
            node.target = found.op or node.target
            self._localise_arguments(node, dict(found.args))
        self._refresh(node)

    def _made_a_size(self, node: fx.Node) -> bool:
        """Replace a size that is read off a sharded tensor: it still means the global one."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and any(
            isinstance(self.plan.placement(x), Shard) for x in operand_nodes(node)
        ):
            with self.emit.at(node):
                new = self.emit.argument(as_size(val))
            node.replace_all_uses_with(new)
            return True
        return False

    def _touches_changed(self, node: fx.Node) -> bool:
        return any(
            x in self.changed
            or any(isinstance(p, Shard | Padded) for p in self.plan.placements.get(x, ()))
            for x in node.all_input_nodes
        )

    def _output(self, node: fx.Node) -> None:
        new = [
            self._like_eager(node, x, self.version(node, x, REPLICATE, "it leaves the graph"))
            for x in operand_nodes(node)
        ]
        self._replace_operands(node, new)

    def _like_eager(self, node: fx.Node, x: fx.Node, gathered: fx.Node) -> fx.Node:
        """Give an output the memory order that the model's own output has."""
        with self.emit.at(node):
            return self.emit.restride(gathered, self.global_strides[x])

    def version(self, user: fx.Node, x: fx.Node, want: Placement, why: str) -> fx.Node:
        """`x` as `want`, made before `user` if it does not exist yet."""
        have = self.versions[x]
        for placement, node in have:
            if same(self.global_shapes[x][0], placement, want):
                return node
        origin = x if "stack_trace" in x.meta else user
        with self.emit.at(user, origin=origin):
            node = self._make(x, want, user, why)
        have.append((want, node))
        if not (isinstance(want, Window) and PLACEMENTS in node.meta):  # else it is its own rows
            node.meta[PLACEMENTS] = (want,)
            node.meta[GLOBAL_SHAPES] = self.global_shapes[x]
        return node

    def _make(self, x: fx.Node, want: Placement, user: fx.Node, why: str) -> fx.Node:
        home, local = self.versions[x][0]
        if isinstance(want, Partial):
            raise AssertionError(f"{user.name} asks for a partial {x.name}")
        if isinstance(want, Window):
            return self._window(x, want, user)
        assert not isinstance(want, Padded)
        if isinstance(want, Shard):
            if isinstance(home, Shard | Padded):
                self.ctx.note(NoteKind.RESHARD, user, f"{x.name}: {home} -> {want}")
            whole = self.version(user, x, REPLICATE, why)
            return redistribute.scatter(self.emit, whole, want, self.ctx.topology)
        if home == PARTIAL:
            self.ctx.note(
                NoteKind.ALL_REDUCE, x, "a sum over the sequence is added up over the ranks"
            )
            whole = redistribute.add_up(self.emit, local, self.ctx.topology)
            return self._as_recorded(x, whole)
        assert isinstance(home, Shard | Padded)
        self.ctx.note(NoteKind.GATHER, x, f"{home} is gathered for {user.name}: {why}")
        shape = self.global_shapes[x][0]
        if isinstance(home, Padded):
            inside = (*shape[: home.dim], home.split.seq.total * home.split.inner)
            inside = (*inside, *shape[home.dim + 1 :])
            whole = redistribute.gather(self.emit, local, home.split, inside, self.ctx.topology)
            whole = halo.with_margin(self.emit, whole, home, shape[home.dim])
        else:
            whole = redistribute.gather(self.emit, local, home, shape, self.ctx.topology)
        return self._as_recorded(x, whole)

    def _window(self, x: fx.Node, want: Window, user: fx.Node) -> fx.Node:
        """Rows of `x` with some of its neighbours', or cut from the whole of it."""
        home, local = self.versions[x][0]
        if not isinstance(home, Shard | Padded):
            home, local = None, self.version(user, x, REPLICATE, "")  # type: ignore[assignment]
        size = self.global_shapes[x][0][want.dim]
        assert isinstance(size, int)
        found, rows = halo.window(self.emit, local, home, want, size, self.ctx.topology)  # type: ignore[arg-type]
        if rows:
            self.ctx.note(NoteKind.HALO, x, f"{rows} rows of other ranks for {user.name}")
        return found

    def _as_recorded(self, x: fx.Node, whole: fx.Node) -> fx.Node:
        """`whole` in the memory order of the value `x` that it stands for, as far as that goes."""
        whole = self.emit.restride(whole, self.global_strides[x])
        val = whole.meta["val"]
        if not same_strides(val.shape, val.stride(), self.global_strides[x]):
            self.changed.add(whole)
        return whole

    def _zero_padding(self, x: fx.Node, split: Shard) -> fx.Node:
        if x not in self.zeroed:
            self.zeroed[x] = redistribute.zero_padding(self.emit, x, split, self.ctx.topology)
        return self.zeroed[x]

    def _replace_operands(self, node: fx.Node, new: list[fx.Node]) -> None:
        queue = iter(new)

        def swap(value: Any) -> Any:
            is_tensor = isinstance(value, fx.Node) and isinstance(
                value.meta.get("val"), torch.Tensor
            )
            return next(queue) if is_tensor else value

        node.args, node.kwargs = tree_map(swap, (node.args, node.kwargs))

    def _localise_arguments(self, node: fx.Node, changes: dict[int, Any]) -> None:
        if not changes:
            return
        args = list(node.args)
        kwargs = dict(node.kwargs)
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        for position, value in sorted(changes.items()):
            while len(args) < position:
                name = schema[len(args)].name
                args.append(kwargs.pop(name, schema[len(args)].default_value))
            kwargs.pop(schema[position].name, None)
            local = tree_map(self.emit.argument, value)
            args[position : position + 1] = [local]
        node.args, node.kwargs = tuple(args), kwargs

    def _refresh(self, node: fx.Node) -> None:
        """The local value of `node`; a view that its operand's strides forbid gets a copy."""
        if isinstance(node.target, HigherOrderOperator):
            return  # it runs on whole operands, so its value is the recorded one
        self.emit.refresh_after_move(node)
        self.changed.add(node)
