"""Which tensor of a file is which of the encoder: by name, or by the end of the name.

Files may hold the same weights under another prefix: that of a part of the model, or of an older
release of its code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ascend_sp.runtime.errors import TextEncoderError

_REMEDY = (
    "Pass the files of this model, or rename=..., a function from their names to the encoder's."
)


def match(
    wanted: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    there: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """The name in the files for each wanted tensor.

    A name that is not there is taken to be the one that shares the longest end with it, if only
    one does, the rest has no other numbers, and no other tensor takes it.

    Args:
        wanted: the encoder's tensors, each with its names; tied weights have several.
        shapes: the shape of each name in the encoder.
        there: the shape of each name in the files.

    Raises:
        TextEncoderError: a tensor has no name there, several, or another shape.
    """
    exact = [next((n for n in names if n in there), None) for names in wanted]
    taken = {n for names in wanted for n in names}
    free = [k for k in there if k not in taken]
    missing = [i for i, name in enumerate(exact) if name is None]
    by_leaf: dict[str, list[str]] = {}
    for key in free:
        by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
    found = {i: _nearest(wanted[i], by_leaf) for i in missing}
    lost = [wanted[i][0] for i in missing if not found[i]]
    if lost:
        raise TextEncoderError(
            f"{len(lost)} of {len(wanted)} tensors are not in the files, such as {lost[:4]}; the "
            f"files have {len(there)}, unused are {free[:4]}. {_REMEDY}"
        )
    chosen = [name or found[i] for i, name in enumerate(exact)]
    for i in missing:
        if chosen.count(found[i]) > 1:
            raise TextEncoderError(
                f"{found[i]} in the files could be {wanted[i][0]}, and another tensor. {_REMEDY}"
            )
    for names, key in zip(wanted, chosen, strict=True):
        if there[key] != shapes[names[0]]:
            raise TextEncoderError(
                f"{names[0]} has shape {list(shapes[names[0]])} in the encoder, and {key} has "
                f"{list(there[key])} in the files. Build the encoder with the config that belongs "
                "to the weights."
            )
    return chosen


def _nearest(names: Collection[str], by_leaf: Mapping[str, list[str]]) -> str:
    """The name there that shares the longest end with one of `names`; empty if none or several."""
    best: dict[int, set[str]] = {}
    for name in names:
        for key in by_leaf.get(name.rpartition(".")[2], ()):
            common = _common_end(name, key)
            if common > 1:
                best.setdefault(common, set()).add(key)
    longest = best[max(best)] if best else set()
    return longest.pop() if len(longest) == 1 else ""


def _common_end(a: str, b: str) -> int:
    """How many parts the ends of two names share; 0 if the rest has other numbers."""
    x, y = a.split("."), b.split(".")
    n = 0
    while n < min(len(x), len(y)) and x[-1 - n] == y[-1 - n]:
        n += 1
    rest = [[p for p in z[: len(z) - n] if p.isdigit()] for z in (x, y)]
    return n if rest[0] == rest[1] else 0
