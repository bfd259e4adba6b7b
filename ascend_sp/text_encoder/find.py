"""Find what can be split, from shapes and numbers alone; nothing is run, no model is known.

A module that owns several `nn.Linear` is a pair of projections if the outputs of all but one of
them feed the last. The first are split by rows, the last by columns, as in Megatron-LM (arXiv
1909.08053). What is found here is a hypothesis: `verify` proves it with numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn

from ascend_sp.text_encoder.split import Cut
from ascend_sp.text_encoder.structure import INNER, KV, QUERY, Found, Structure


def find(encoder: nn.Module, excluded: Sequence[str]) -> tuple[list[Found], dict[str, str]]:
    """Modules that can be split, and the reason for each that owns Linears and cannot.

    Args:
        encoder: any module; parameters may be on ``meta``.
        excluded: names or patterns of modules to leave alone, with all that is in them.
    """
    uses = Counter(id(p) for _, p in encoder.named_parameters(remove_duplicate=False))
    aliases = Counter(id(m) for _, m in encoder.named_modules(remove_duplicate=False))
    found, whole = [], {}
    for name, module in encoder.named_modules():
        linears = {n: c for n, c in module.named_children() if isinstance(c, nn.Linear)}
        if not linears:
            continue
        inside = [f"{name}.{child}".lstrip(".") for child in linears]
        if any(is_excluded(n, excluded) for n in (name, *inside)):
            whole[name] = "excluded"
            continue
        try:
            structure = _structure(module, linears)
            for parameter, _ in structure.cuts(module):
                if uses[id(module.get_parameter(parameter))] > aliases[id(module)]:
                    raise _Whole(f"{parameter} is tied to another parameter")
            found.append(Found(name, module, structure))
        except _Whole as reason:
            whole[name] = str(reason)
    return found, whole


def is_excluded(name: str, excluded: Sequence[str]) -> bool:
    """Whether `excluded` names a module or what it is in; ``*`` stands for anything."""
    return any(fnmatch(name, e) or fnmatch(name, f"{e}.*") for e in excluded)


class _Whole(Exception):  # noqa: N818
    """Why a module stays whole."""


def _structure(module: nn.Module, linears: dict[str, nn.Linear]) -> Structure:
    for name, child in linears.items():
        if type(child) is not nn.Linear:
            raise _Whole(f"{name} is a {type(child).__name__}, not a plain nn.Linear")
        if not child.weight.is_floating_point():
            raise _Whole(f"{name} holds {str(child.weight.dtype)[6:]}: quantized")
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise _Whole("a list of Linears, which another module calls")
    if isinstance(module, nn.Sequential) and len(linears) > 2:
        raise _Whole(f"a chain of {len(linears)} Linears")
    if len(linears) < 2:
        raise _Whole("one Linear, and nothing to pair it with")
    numbers = {n: v for n, v in _integers(module).items() if "head" in n}
    sizes = [(c.in_features, c.out_features) for c in linears.values()]
    fused = len(linears) == 2 and sizes[0][1] > 2 * sizes[1][0]
    if numbers or fused or len(linears) == 4:
        return _attention(module, linears, numbers or _config_numbers(module))
    return _feed_forward(module, linears)


def _feed_forward(module: nn.Module, linears: dict[str, nn.Linear]) -> Structure:
    row, columns = _pair(linears, lambda inner, outs: set(outs) == {inner} or outs == [2 * inner])
    if len(columns) > 2:
        raise _Whole(f"{len(columns)} equal Linears, and no number of heads that tells their roles")
    inner = linears[row].in_features
    for name, parameter in module.named_parameters():
        if name.split(".")[0] not in linears:
            raise _Whole(f"{name} {list(parameter.shape)} stands between its Linears")
    blocks = {c: (INNER,) * (linears[c].out_features // inner) for c in columns}
    outside = {linears[columns[0]].in_features, linears[row].out_features}
    attributes = {n: INNER for n, v in _integers(module).items() if v == inner and v not in outside}
    return Structure("feed-forward", blocks, row, {INNER: inner}, 1, attributes=attributes)


def _attention(
    module: nn.Module, linears: dict[str, nn.Linear], numbers: dict[str, int]
) -> Structure:
    def feeds(inner: int, outs: list[int]) -> bool:
        rest = sorted(outs)[:-1]
        if len(outs) == 1:
            return outs[0] > inner and (outs[0] - inner) % 2 == 0
        return len(outs) == 3 and max(outs) == inner and rest[0] == rest[1]

    row, columns = _pair(linears, feeds)
    inner = linears[row].in_features
    outs = {c: linears[c].out_features for c in columns}
    of_kv = (outs[columns[0]] - inner) // 2 if len(columns) == 1 else min(outs.values())
    width = _head_dim(inner, of_kv, {n: v for n, v in numbers.items() if v != inner})
    heads, kv_heads = inner // width, of_kv // width
    if heads < 2:
        raise _Whole("it has one head")
    blocks: dict[str, tuple[str, ...]] = {
        c: (QUERY, KV, KV) if len(columns) == 1 else (QUERY if n == inner else KV,)
        for c, n in outs.items()
    }
    tables, own = _per_head(module, linears, heads, kv_heads, width)
    model = linears[columns[0]].in_features
    return Structure(
        "attention",
        blocks,
        row,
        {QUERY: heads, KV: kv_heads},
        width,
        tables,
        own,
        _counting_attributes(module, heads, kv_heads, width, model),
    )


def _pair(linears: dict[str, nn.Linear], feeds: Any) -> tuple[str, list[str]]:
    """The child that the others feed, and the others; of square ones, the last."""
    for row in reversed(linears):
        columns = [n for n in linears if n != row]
        if len({linears[c].in_features for c in columns}) == 1 and feeds(
            linears[row].in_features, [linears[c].out_features for c in columns]
        ):
            return row, columns
    sizes = ", ".join(f"{n} {c.in_features}->{c.out_features}" for n, c in linears.items())
    raise _Whole(f"no Linear's input fits the outputs of the others: {sizes}")


def _head_dim(inner: int, of_kv: int, numbers: dict[str, int]) -> int:
    """The one head dim that agrees with all the module's numbers about heads."""
    dims = {n for n in numbers if _is_size(n)}
    counts = {v for n, v in numbers.items() if n not in dims}
    candidates = {numbers[n] for n in dims} | {inner // v for v in counts if v > 0}
    fits = []
    for d in candidates:
        if d < 1 or inner % d or of_kv % d or (inner // d) % (of_kv // d):
            continue
        heads, kv = inner // d, of_kv // d
        if counts <= {heads, kv, heads // kv} and all(numbers[n] == d for n in dims):
            fits.append(d)
    if len(fits) != 1:
        raise _Whole(
            f"its numbers of heads ({numbers or 'none'}) do not fit projections to {inner} and "
            f"{of_kv} features"
        )
    return fits[0]


def _per_head(
    module: nn.Module, linears: dict[str, nn.Linear], heads: int, kv_heads: int, width: int
) -> tuple[dict[str, Cut], dict[str, Cut]]:
    """Tables and parameters with a value for each head; refuses what mixes heads."""
    tables, own = {}, {}
    for name, child in module.named_children():
        if type(child) is nn.Embedding and child.embedding_dim == heads:
            tables[name] = Cut(1, (QUERY,), 1)
        elif name not in linears:
            for p_name, p in child.named_parameters():
                if {heads * width, kv_heads * width} & set(p.shape) - {width}:
                    raise _Whole(f"{name}.{p_name} {list(p.shape)} mixes the heads")
    for name, p in module.named_parameters(recurse=False):
        dims = [d for d, n in enumerate(p.shape) if n == heads]
        if len(dims) != 1:
            raise _Whole(f"its parameter {name} {list(p.shape)} is not one value for each head")
        own[name] = Cut(dims[0], (QUERY,), 1)
    return tables, own


def _counting_attributes(
    module: nn.Module, heads: int, kv_heads: int, width: int, model: int
) -> dict[str, str]:
    kinds = {}
    for name, value in _integers(module).items():
        if "head" in name and value in (heads, kv_heads) and not _is_size(name):
            kinds[name] = QUERY if value == heads else KV
        elif "group" in name and value == heads // kv_heads:
            kinds[name] = "group"
        elif value == heads * width and (value != model or "inner" in name or "all" in name):
            kinds[name] = INNER
    return kinds


def _is_size(name: str) -> bool:
    return any(word in name for word in ("dim", "size", "width"))


def _integers(module: nn.Module) -> dict[str, int]:
    return {n: v for n, v in vars(module).items() if type(v) is int and not n.startswith("_")}


def _config_numbers(module: nn.Module) -> dict[str, int]:
    config = getattr(module, "config", None)
    values = vars(config) if hasattr(config, "__dict__") else {}
    return {n: v for n, v in values.items() if type(v) is int and "head" in n}
