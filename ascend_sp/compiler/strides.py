"""Strides that the traced graph promises, also in dims of one element, where nothing lies.

Programs do not keep those by themselves: of a padded sequence they cut the padding off, and
PyTorch's fake view yields others there than the real one (before 2.15). But all strides are looked
at. Ops tell channels-last tensors from others by them: when traced, a group norm at batch 1 finds
its operand in order, and lacks the copy that it then needs. And Dynamo compiles the next block of a
model once more if the one before returns others than it was first called with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ascend_sp.compiler._pytorch import compiled_kernels
from ascend_sp.compiler.input_symbols import InputSymbols
from ascend_sp.graph.emitter import Emitter
from ascend_sp.graph.families import VIEWS
from ascend_sp.graph.sizes import Size, as_shape, symbols_of, value_of

aten = torch.ops.aten


def keep_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Put ``as_strided`` behind each view that would have other strides than its fake value."""
    emit = Emitter(gm, "keep_strides")
    changed = False
    for node in [n for n in gm.graph.nodes if n.target in VIEWS]:
        value = node.meta["val"]
        if _real_strides(node.args[0].meta["val"], value) in (None, known(value.stride())):
            continue
        sizes = ([emit.argument(s) for s in sizes] for sizes in (value.shape, value.stride()))
        with gm.graph.inserting_after(node):
            # Named after the view, so that it has the same name in each of a model's graphs.
            new = gm.graph.create_node(
                "call_function",
                aten.as_strided.default,
                (node, *sizes),
                name=f"{node.name}_as_traced",
            )
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        new.meta.update(node.meta)
        changed = True
    if changed:
        gm.recompile()
    return gm


class Promised:
    """The strides of a graph's results, for the program that is made of it.

    They are put right on what the program returns, not in it: ``as_strided`` is a kernel in a graph
    of GE, and what a target makes of a view is its own affair. It costs no device time, and keeps
    the memory, so what shares memory with an input still does. Strides of dims with more than one
    element are the program's business: others would take a copy.

    Args:
        gm: the graph as it was traced. Only what it says now is kept.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.symbols = InputSymbols(gm)
        results: Any = gm.graph.output_node().args[0]
        self.strides: dict[int, tuple[Size, ...]] = {}
        for i, x in enumerate(results):
            value = x.meta.get("val") if isinstance(x, fx.Node) else None
            if not isinstance(value, torch.Tensor) or not {0, 1} & set(as_shape(value.shape)):
                continue
            strides = as_shape(value.stride())
            # A symbol that no input has is only known while the program runs.
            if all(s in self.symbols for s in symbols_of(strides)):
                self.strides[i] = strides
        used = {s for strides in self.strides.values() for s in symbols_of(strides)}
        self.used = sorted(used, key=str)
        self._numbers = lru_cache(maxsize=256)(self._evaluate)

    def kept_by(
        self, run: Callable[[list[Any]], Sequence[Any]]
    ) -> Callable[[list[Any]], Sequence[Any]]:
        """`run` of the program, with these strides."""
        if not self.strides:
            return run

        def call(args: list[Any]) -> Sequence[Any]:
            wanted = self._numbers(*self.symbols.read(self.used, args))
            out = list(run(args))
            for i, strides in wanted:
                if out[i].stride() != strides:
                    out[i] = _restrided(out[i], strides)
            return out

        return call

    def _evaluate(self, *sizes: int) -> list[tuple[int, tuple[int, ...]]]:
        values = dict(zip(self.used, sizes, strict=True))
        return [
            (i, tuple(value_of(s, values) for s in strides)) for i, strides in self.strides.items()
        ]


def _restrided(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    lies = all(n <= 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))
    return x.as_strided(x.shape, strides) if lies else x


def _real_strides(source: torch.Tensor, view: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of the view of a tensor without numbers; None if its sizes are not known."""
    numbers = [known(x) for x in (source.shape, source.stride(), view.shape)]
    if None in numbers:
        return None
    shape, strides, new = numbers
    with compiled_kernels():
        try:
            return torch.empty_strided(shape, strides, device="meta").view(new).stride()  # type: ignore[arg-type]
        except RuntimeError:
            return None  # the op itself will say so


def known(sizes: Any) -> tuple[int, ...] | None:
    """Sizes as numbers: those of this call, where they are symbols; None if some are not known."""
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in sizes]
    return None if None in hints else tuple(map(int, hints))
