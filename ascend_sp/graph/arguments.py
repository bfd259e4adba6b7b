"""Arguments of a node by the names in its op's schema."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import fx


def argument_of(node: fx.Node, name: str) -> Any:
    """The argument `name` of `node`; the schema's default where it is not given.

    Raises:
        LookupError: the op has no argument of this name, or it has no default and is not given.
    """
    return argument(node.target, node.args, node.kwargs, name)


def argument(target: Any, args: Any, kwargs: Any, name: str) -> Any:
    """The same of a call that is no node."""
    position = position_of(target, name)
    if position is None:
        raise LookupError(f"{target} has no argument {name!r}")
    if position < len(args):
        return args[position]
    if name in kwargs:
        return kwargs[name]
    known = target._schema.arguments[position]
    if not known.has_default_value():
        raise LookupError(f"{name!r} of {target} is not given")
    return known.default_value


@cache
def position_of(target: Any, name: str) -> int | None:
    """Where `name` stands in the schema of an op; None if it has no such argument."""
    names = [a.name for a in target._schema.arguments]
    return names.index(name) if name in names else None
