"""``check_numerics``: the model's own graph runs beside the compiled one, on the same inputs.

Where the results differ, the check looks for the pass to blame, by bisection over the program as it
was after each, and in that program for the first node whose value differs. All of it is the same
work on all ranks, in the same order, since the programs hold real collectives.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_sp.compiler import _pytorch
from ascend_sp.compiler.numerics import lockstep
from ascend_sp.compiler.numerics.lockstep import Difference
from ascend_sp.compiler.numerics.rounding import Rounded
from ascend_sp.compiler.report.diagnostics import Dump
from ascend_sp.compiler.strides import keep_strides
from ascend_sp.graph.border import Border
from ascend_sp.graph.context import is_random, source_line
from ascend_sp.runtime import guards
from ascend_sp.runtime.errors import NumericsError
from ascend_sp.runtime.ops import split_attention
from ascend_sp.runtime.topology import Topology

STEP = guards.Step(
    "compares the numbers of a run",
    "differ in the numbers of a run",
    "They died, or did not start this run: all ranks must call the model the same number of times.",
    " (option check_timeout)",
)
WAYS_AROUND = {
    "lower_attention": "ASCEND_SP_ATTENTION=math",
    "fuse_attention": "ASCEND_SP_ATTENTION=math",
    "respell_for_ge": "ASCEND_SP_TARGET=eager",
    "decompose_unsupported": "ASCEND_SP_TARGET=eager",
}
"""What leaves a pass out that `skip_passes` cannot; one rank without sharding, if nothing else."""

NOISE = 2.0
"""How much farther off than by the last bits of all values results may be."""
SHOWN = 8
"""Nodes between the last right values and the first wrong one that an error lists."""


@dataclass
class Snapshot:
    """The program after some passes."""

    passes: tuple[str, ...]
    """Those since the snapshot before."""
    gm: fx.GraphModule
    border: Border

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Its results, op by op; with real collectives."""
        run = self.border.wrap(lambda args: list(self.gm(*args)))
        return list(run(list(values)))


@dataclass
class NumericCheck:
    """What one compiled graph is compared with."""

    original: fx.GraphModule
    """The graph before all passes, on whole tensors; this owns it."""
    topology: Topology
    name: str
    target: str
    optional: Sequence[str]
    """Passes that `skip_passes` may name."""
    inexact: Sequence[str]
    """Passes that may change last bits."""
    timeout: float
    dump: Dump
    snapshots: list[Snapshot] = field(default_factory=list)
    _passes: tuple[str, ...] = ()
    """Those that changed the program since the last snapshot."""
    _captured: str = ""
    _code: str = ""
    _runs: int = 0

    def __post_init__(self) -> None:
        """Make the graph one that runs op by op."""
        self._captured = self.original.code
        keep_strides(self.original)

    def restart(self, target: str) -> None:
        """The passes run anew, for `target`."""
        self.snapshots.clear()
        self._passes, self._code, self.target = (), self._captured, target

    def record(self, name: str, gm: fx.GraphModule, border: Border) -> None:
        """Keep the program as `name` left it, if that changed it and it can run."""
        now = _pytorch.copy_of(gm)
        if now.code == self._code:
            return
        self._code = now.code
        self._passes += (name,)
        if not gm.graph.find_nodes(op="call_function", target=split_attention):
            self.snapshots.append(Snapshot(self._passes, keep_strides(now), border))
            self._passes = ()

    def wrap(
        self, run: Callable[[list[Any]], Sequence[Any]]
    ) -> Callable[[list[Any]], Sequence[Any]]:
        """`run`, compared with the model's graph each time; takes more than twice the time."""
        random = next((n for n in self.original.graph.nodes if is_random(n.target)), None)
        if random is not None:
            warnings.warn(
                f"ascend_sp: check_numerics skips {self.name}: {random.target} draws random "
                f"numbers, which differ from run to run. At {source_line(random)}",
                stacklevel=2,
            )
            return run
        allowed = lockstep.tolerance(self.original)

        def checked_run(args: list[Any]) -> Sequence[Any]:
            values = list(args)
            got = list(run(args))
            with torch.no_grad():
                want = list(self.original(*values))
                errors = self._told(_worst(got, want))
                worst = max(e for _, e in errors)
                if allowed < worst < float("inf"):
                    noise = max(self._told(self._noise(values, want)))
                    if worst > max(allowed, NOISE * noise):
                        self._blame(values, want, errors, max(allowed, NOISE * noise))
                    warnings.warn(
                        f"ascend_sp: {self.name}, run {self._runs}: results differ by {worst:.2g}, "
                        f"more than {allowed:g}. But a change of each value of the model's own "
                        f"graph by its last bit changes them by {noise:.2g}: on these inputs, "
                        "rounding explains the difference. Try it in float32.",
                        stacklevel=2,
                    )
                elif worst > allowed:
                    self._blame(values, want, errors, allowed)
            self._runs += 1
            return got

        return checked_run

    def _noise(self, values: list[Any], want: list[Any]) -> float:
        """How far the last bit of each value brings the results."""
        _, error = _worst(list(Rounded(self.original).run(*values)), want)
        return error if error < float("inf") else 0.0

    def _told(self, word: Any) -> list[Any]:
        """What every rank has to say here."""
        if self.topology.size == 1:
            return [word]
        words = guards.exchange(self.topology, json.dumps(word), self.timeout, STEP)
        return [json.loads(w) for w in words]

    def _blame(self, values: list[Any], want: list[Any], errors: list[Any], allowed: float) -> None:
        """Find the pass and the node.

        Raises:
            NumericsError: with what was found.
        """
        right, wrong = -1, len(self.snapshots)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            told = self._told(_worst(self.snapshots[middle].run(values), want))
            if max(e for _, e in told) > allowed:
                wrong = middle
            else:
                right = middle
        lines = [
            f"{self.name}, run {self._runs}: the compiled program's results differ from those of "
            "the model's own graph on the same inputs (check_numerics).",
            *self._outputs(errors, allowed),
        ]
        if wrong == len(self.snapshots):
            lines += [
                "The program is right after every pass, run op by op; what target "
                f"{self.target} compiles it to is not."
                + ("" if self.target == "eager" else " ASCEND_SP_TARGET=eager works around it.")
            ]
        else:
            guilty = self.snapshots[wrong]
            done = [p for s in self.snapshots[: right + 1] for p in s.passes]
            lines.append(
                f"Right after {done[-1] if done else 'capture'}; wrong after "
                f"{', then '.join(guilty.passes)}."
            )
            found = lockstep.first_difference(
                self.original,
                values,
                guilty.gm,
                guilty.border.real_inputs(values),
                self.topology,
                allowed,
            )
            lines += self._first(self._told(asdict(found) if found else None))
            rounds = [p for p in guilty.passes if p in self.inexact]
            if rounds:
                names = ", ".join(rounds)
                lines.append(f"By design {names} may change last bits; this is more than that.")
            lines.append(self._way_around(guilty.passes))
        lines.append(
            "This is a bug in ascend_sp: please report it, with the dump folder "
            "(ASCEND_SP_DUMP_DIR)."
        )
        error = NumericsError("\n".join(lines))
        self.dump.write("numerics.txt", f"{error}\n")
        raise error

    def _outputs(self, errors: list[Any], allowed: float) -> list[str]:
        output = self.original.graph.output_node()
        results: Any = output.args[0]
        lines = []
        for i in sorted({i for i, e in errors if e > allowed}):
            ranks = [r for r, (j, e) in zip(self.topology.ranks, errors, strict=True) if j == i]
            worst = max(e for j, e in errors if j == i)
            where = source_line(results[i]) if isinstance(results[i], fx.Node) else ""
            lines.append(
                f"  output {i}: relative error {worst:.2g} on rank(s) {ranks}, allowed "
                f"{allowed:.2g}" + (f"; it is {where}" if where else "")
            )
        return lines

    def _first(self, told: list[dict[str, Any] | None]) -> list[str]:
        found = [Difference(**t) for t in told if t]
        if not found:
            return ["No single value differs by more than is allowed: the errors add up."]
        first = min(found, key=lambda f: f.place)
        ranks = [
            r
            for r, t in zip(self.topology.ranks, told, strict=True)
            if t and t["place"] == first.place
        ]
        lines = [f"The first value that differs, on rank(s) {ranks}, error {first.error:.2g}:"]
        lines.append(f"  {first.node}" + (f"\n    at {first.source}" if first.source else ""))
        if len(first.suspects) > 1:
            lines.append("It is computed from values that are right, through:")
            lines += [f"  {s}" for s in first.suspects[-SHOWN:]]
            if len(first.suspects) > SHOWN:
                lines.append(f"  (the last {SHOWN}; suspects.txt in the dump folder has all)")
                self.dump.write("suspects.txt", "\n".join(first.suspects) + "\n")
        return lines

    def _way_around(self, passes: Sequence[str]) -> str:
        skip = [p for p in passes if p in self.optional]
        ways = [f"ASCEND_SP_SKIP_PASSES={','.join(skip)}"] if skip else []
        ways += [WAYS_AROUND[p] for p in passes if p in WAYS_AROUND]
        ways = list(dict.fromkeys(ways)) or ["ASCEND_SP_SEQUENCE_PARALLEL=0"]
        return f"{' or '.join(ways)} works around it."


def _worst(got: Sequence[Any], want: Sequence[Any]) -> tuple[int, float]:
    """The result that is farthest off, and how far."""
    if len(got) != len(want):
        raise AssertionError(f"{len(got)} results, and {len(want)} were expected")
    errors = [lockstep.distance(g, w) for g, w in zip(got, want, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__, default=0)
    return worst, errors[worst] if errors else 0.0
