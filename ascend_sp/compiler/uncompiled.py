"""No silent fall: code that ascend_sp has compiled, and that Dynamo gives up, is told of.

Dynamo compiles a piece of code for as many forms of its inputs and modules as its limit allows (8).
Any further one runs as the model was written: right, but whole on every rank. It says so in a line
of its log; here it is a warning with what changed and what to do, or an error. Ranks compare that
they come there together, by the same step in which they compare their programs: else one would wait
in a collective for another that has left.
"""

from __future__ import annotations

from dataclasses import dataclass

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler._dynamo import Frame, before_each_compile, errors_are_suppressed
from ascend_sp.compiler.config import Config
from ascend_sp.runtime import guards
from ascend_sp.runtime.topology import Topology
from ascend_sp.runtime.unsplit import Unsplit

SHOWN = 4
"""Forms of an argument, and arguments, that are told."""

SILENCE = (
    "torch.compiler.reset() on all ranks forgets all programs, and the next call compiles anew."
)


@dataclass(frozen=True)
class Terms:
    """How a piece of code was compiled."""

    topology: Topology
    config: Config


_terms: dict[int, Terms] = {}
"""Of the code of which there are graphs, by Dynamo's number of it."""
_sizes: dict[int, list[dict[str, str]]] = {}
"""What each program of a piece of code was compiled for, in that order."""


def watch() -> None:
    """From now on, look at each piece of code that Dynamo compiles or gives up."""
    before_each_compile(_look)


def compiled(topology: Topology, config: Config) -> None:
    """The code that is being compiled has a graph of ours."""
    number = _pytorch.frame()
    if number is not None:
        _terms[number] = Terms(topology, config)


def fails(error: Exception, topology: Topology) -> None:
    """A compile has failed; warn if the code will run uncompiled for it, as users may ask for."""
    if errors_are_suppressed():
        Unsplit(
            [f"suppressed: {error}"],
            f"a graph could not be compiled, and since Dynamo's suppress_errors is set, its code "
            f"runs uncompiled{_whole(topology)}: {error}",
            "Leave suppress_errors off, and the error is raised.",
        ).tell(error=False)


def _look(frame: Frame) -> None:
    if frame.times == 0:  # Dynamo counts anew
        _terms.pop(frame.number, None)
        _sizes.pop(frame.number, None)
    before = _sizes.setdefault(frame.number, [])
    if not frame.limit:
        before.append(dict(frame.sizes))
        return
    terms = _terms.get(frame.number)
    if terms is None:
        return  # another backend's, or code that makes no graph
    config, topology = terms.config, terms.topology
    if topology.size > 1 and config.check_ranks:
        sizes = [f"{n}: {s}" for n, s in frame.sizes.items()]
        facts = {guards.UNCOMPILED: f"{frame.name}, {frame.limit}", "inputs": sizes}
        guards.agree(topology, facts, config.check_timeout)
    if frame.fails:
        return  # Dynamo says it itself, and stops
    Unsplit([f"limit: {frame.name}"], _text(frame, before, topology), SILENCE).tell(
        error=config.on_unsharded == "error"
    )


def _text(frame: Frame, before: list[dict[str, str]], topology: Topology) -> str:
    changed = [
        f"  {name}: {_forms([b.get(name, 'none') for b in before])}; now {size}"
        for name, size in frame.sizes.items()
        if any(b.get(name) != size for b in before)
    ]
    more = len(changed) - SHOWN
    told = changed[:SHOWN] + ([f"  and {more} more"] if more > 0 else [])
    lines = [
        f"{frame.name} has been compiled {len(before)} times, and {frame.limit}. So it is not "
        "compiled again: whatever is new runs uncompiled from now on, as slow as without "
        f"torch.compile{_whole(topology)}.",
        *(["What changed between its programs:", *told] if told else []),
        f"Last reason for a recompile: {frame.reason}",
        "Remedies: for lengths and sizes that change, torch.compile(..., dynamic=True) makes one "
        "program for all of them. For LoRAs, write the new weights into the old ones, which needs "
        "no recompile. For a fixed list of forms, set the limit above their number before the "
        "first call, and ascend_sp.warm_up on all ranks before serving. docs/serving.md says more.",
    ]
    return "\n".join(lines)


def _whole(topology: Topology) -> str:
    return f", and whole on each of {topology.size} ranks" if topology.size > 1 else ""


def _forms(sizes: list[str]) -> str:
    each = list(dict.fromkeys(sizes))
    more = len(each) - SHOWN
    return ", ".join(each[:SHOWN]) + (f" and {more} more" if more > 0 else "")
