"""What a sharding rule is: the question it is asked, its answers, and the table of all rules.

A rule looks at one ATen op whose operands have placements and says how to run it on shards. It
sees global shapes only and never touches a graph. Its answer is one of three:

* `Local`: run the op on each rank's shards, with these placements of the operands;
* `Reshard`: the op is understood, but needs the whole sequence;
* `Unsupported`: nothing is known about this op, or about this form of it.

`docs/writing_a_rule.md` is the guide, `tests/test_rules.py` proves every rule by brute force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ascend_sp.graph._pytorch import OpOverload, tree_leaves
from ascend_sp.graph.arguments import argument, position_of
from ascend_sp.graph.layout import REPLICATE, Placement, Seam, Shard
from ascend_sp.graph.sizes import Size, product


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its global shape, and where it lies."""

    shape: tuple[Size, ...]
    placement: Placement = REPLICATE
    index: int = 0
    """Position among the tensor arguments of the call, in pytree order."""

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def numel(self) -> Size:
        """Number of elements of the whole tensor."""
        return product(self.shape)

    @property
    def shard(self) -> Shard:
        """The placement of an operand that is known to be sharded."""
        assert isinstance(self.placement, Shard)
        return self.placement


@dataclass(frozen=True)
class Call:
    """One op of the global program, with every tensor argument replaced by its `Operand`."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[tuple[Size, ...], ...]
    """Global shapes of the tensors that the op returns."""
    world: int
    """Number of ranks."""

    @property
    def operands(self) -> list[Operand]:
        """The tensor arguments in pytree order."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [x for x in leaves if isinstance(x, Operand)]

    @property
    def sharded(self) -> list[Operand]:
        """The operands that are sharded."""
        return [x for x in self.operands if isinstance(x.placement, Shard)]

    @property
    def leader(self) -> Operand:
        """The largest sharded operand: the one whose split the others follow."""
        # SymInt sizes have no order that is known now; the first sharded operand serves then.
        sizes = [x.numel for x in self.sharded]
        if not all(isinstance(n, int) for n in sizes):
            return self.sharded[0]
        return self.sharded[max(range(len(sizes)), key=lambda i: (sizes[i], -i))]

    def argument(self, name: str) -> Any:
        """An argument by its name in the op's schema, whose default it is if it is not given."""
        return argument(self.op, self.args, self.kwargs, name)

    def has(self, name: str) -> bool:
        """Whether the op's schema has an argument of this name."""
        return position_of(self.op, name) is not None


@dataclass(frozen=True)
class Local:
    """Run the op on the shards."""

    inputs: tuple[Placement, ...]
    """Placement that each operand must have, in the order of `Call.operands`."""
    outputs: tuple[Placement, ...]
    """Placement of each tensor that comes out."""
    args: Mapping[int, Any] = field(default_factory=dict)
    """Positional arguments that differ on the shards (sizes, offsets), by position."""
    op: OpOverload | None = None
    """The op to run on the shards, if it is another one."""
    mask_padding: bool = False
    """Whether padding rows of the operands must be zero, because the op adds rows up (or takes them
    for positions in a table). See `can_zero_padding`."""


@dataclass(frozen=True)
class Reshard:
    """The op needs its operands whole."""

    reason: str
    seams: tuple[Seam, ...] = ()
    """Cuts that, were they borders of segments, would spare it."""


@dataclass(frozen=True)
class Unsupported:
    """No rule covers the op, or this form of it."""

    reason: str


Answer: TypeAlias = "Local | Reshard | Unsupported"
Rule: TypeAlias = Callable[[Call], Answer]

RULES: dict[OpOverload, Rule] = {}
BY_NAME: dict[str, Rule] = {}
"""Rules of ops that a package which may be absent defines, as ``namespace::op``."""


def rule(*ops: OpOverload | str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of `ops`; each op has at most one.

    An op of a package that may be absent is given by its name, ``namespace::op``.
    """

    def register(fn: Rule) -> Rule:
        for op in ops:
            table: dict[Any, Rule] = BY_NAME if isinstance(op, str) else RULES
            if op in table:
                raise ValueError(f"{op} has a rule already: {table[op].__name__}")
            table[op] = fn
        return fn

    return register


TAKES_WINDOWS: set[Rule] = set()
"""Rules that know what to do with an operand that is `Padded`; others are told that it is whole."""


def takes_windows(fn: Rule) -> Rule:
    """Say that the decorated rule reads windows, of operands with rows around them, too."""
    TAKES_WINDOWS.add(fn)
    return fn


def normal_dim(dim: int, ndim: int) -> int:
    """`dim` counted from the front."""
    return dim + ndim if dim < 0 else dim


def normal_dims(dims: int | Iterable[int] | None, ndim: int) -> set[int]:
    """`dims` counted from the front; all of them when None or empty, as ATen reductions do."""
    if isinstance(dims, int):
        return {normal_dim(dims, ndim)}
    chosen = {normal_dim(d, ndim) for d in dims or ()}
    return chosen or set(range(ndim))


def can_zero_padding(split: Shard, world: int) -> bool:
    """Whether `Local.mask_padding` can be asked for: of a dim of its own, and of known length."""
    known = all(isinstance(n, int) for n in split.seq.lengths)
    return not split.seq.padded(world) or (split.whole_dim() and known)


def unary(call: Call, output: Placement | None, **more: Any) -> Local:
    """An answer for an op with one operand, which stays where it is."""
    x = call.operands[0]
    out = x.placement if output is None else output
    return Local((x.placement,), tuple(out for _ in call.outputs), **more)


def named(call: Call, *names: str) -> list[Any]:
    """The arguments that the schema has by these names, however they are passed."""
    return [call.argument(name) for name in names]


def inputs_of(call: Call, wanted: Mapping[int, Placement]) -> tuple[Placement, ...]:
    """What `Local.inputs` is: the operands with these indices placed so, the others whole."""
    return tuple(wanted.get(x.index, REPLICATE) for x in call.operands)


def rows(call: Call, split: Shard, *leading: Operand) -> Local:
    """These operands split alike, the others whole, and everything that comes out split so too."""
    inputs = inputs_of(call, {x.index: split for x in leading})
    return Local(inputs, tuple(split for _ in call.outputs))
