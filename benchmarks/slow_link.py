"""How much of the communication is hidden: two ranks joined by a slow link, programs in turns.

    .venv/bin/python benchmarks/slow_link.py                   # communication is 30 % of a step
    .venv/bin/python benchmarks/slow_link.py --share 0.4 --models flux qwen --rounds 20
    .venv/bin/python benchmarks/slow_link.py --compute 0.7     # a link that takes no computing time
    .venv/bin/python benchmarks/slow_link.py --rate none       # loopback: no link, no root needed

Two network namespaces are joined by a veth pair whose two ends let `--rate` through, a rank runs in
each, and every round runs each program once. The rate is chosen so that communication takes
`--share` of a synchronous step. "No communication" is the synchronous program with a local copy in
place of each collective: it computes as much, and nothing that it could wait for.

    hidden = (synchronous - program) / (synchronous - no communication)

Sockets are served by the core that computes, and no order hides that. "Of what needs no CPU" is the
same, but to "no communication" is added the CPU time that a rank of the synchronous program needs
more. With `--compute 0.7` the thread that computes gets 70 % of its core, in all programs alike,
and the sockets are served in the other 30 %, and at once: the nearest that a CPU comes to a device
whose link moves bytes by itself. Then what is hidden needs no such correction.

What a rank waits for the other to come counts as communication, and no order hides it: on a busy
machine all programs look worse than they are. More rounds help little there; a quiet machine does.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cores import spare_cores
from namespaces import ADDRESSES, SlowLink, missing
from quota import QuotaError
from ranks import WORLD, Prepared, Ranks, Times

from ascend_sp.graph.cost.device import DEVICES, DeviceModel

LOCAL, SYNCHRONOUS = "no communication", "synchronous"
LIMIT = "no communication, and the CPU time of it"
PLAIN = {"async": False, "strategy": "separate"}
"""Every operation where the program has it: nothing stands between a start and its wait."""
PROGRAMS: dict[str, dict[str, Any]] = {
    LOCAL: PLAIN,
    SYNCHRONOUS: PLAIN,
    "separate": {"strategy": "separate"},
    "packed": {"strategy": "packed"},
    "pipelined:2": {"strategy": "pipelined:2"},
    "pipelined:4": {"strategy": "pipelined:4"},
    "default": {},
}
"""Program -> options of the backend. One whose options do not exist is left out, and said so."""
MODELS = ("flux", "qwen", "z_image", "flux_wide")
SIZES = [1 << 18, 1 << 20, 1 << 22]
"""Bytes of the transfers that check the link; an all-to-all of the models is about the second."""

TRIES, TOLERANCE = 3, 0.05
"""How often, and how well, the rate is adjusted to the share that is asked for."""

Series = dict[str, list[float]]
"""A number for each round of each program."""


def slowest(times: list[Times]) -> Series:
    """Wall seconds of each step: both ranks have to be done."""
    return {
        n: [max(pair) for pair in zip(*(t.wall[n] for t in times), strict=True)]
        for n in times[0].wall
    }


def summed(times: list[Times]) -> Series:
    """CPU seconds of each step, of both ranks together."""
    return {
        n: [sum(pair) for pair in zip(*(t.cpu[n] for t in times), strict=True)]
        for n in times[0].cpu
    }


def limit(wall: Series, cpu: Series) -> list[float]:
    """Wall seconds of each step if nothing had to be waited for, but sockets have to be served."""
    rounds = zip(wall[LOCAL], cpu[LOCAL], cpu[SYNCHRONOUS], strict=True)
    return [local + max(with_it - without, 0) / 2 for local, without, with_it in rounds]


def ratios(series: Series, name: str, rounds: list[int] | None = None) -> list[float]:
    """`name` to the synchronous program, round by round."""
    rounds = list(range(len(series[name]))) if rounds is None else rounds
    return [series[name][r] / series[SYNCHRONOUS][r] for r in rounds]


def hidden(wall: Series, name: str, rounds: list[int] | None = None, best: str = LOCAL) -> float:
    """The share that `name` hides of the communication (of what `best` lacks), by medians.

    Of medians, not a median: in one round the difference below the line may be next to nothing.
    """
    saved = 1 - statistics.median(ratios(wall, name, rounds))
    communication = 1 - statistics.median(ratios(wall, best, rounds))
    return saved / communication if communication else float("nan")


def hidden_at_best(wall: Series, name: str) -> float:
    """The same by each program's fastest round, which other work on the machine disturbed least."""
    synchronous = min(wall[SYNCHRONOUS])
    communication = synchronous - min(wall[LOCAL])
    return (synchronous - min(wall[name])) / communication if communication else float("nan")


def spread(wall: Series, name: str, samples: int = 1000) -> tuple[float, float]:
    """What `hidden` is for nine of ten random draws of as many rounds, with repetition."""
    draw = random.Random(0)
    count = len(wall[name])
    found = sorted(hidden(wall, name, draw.choices(range(count), k=count)) for _ in range(samples))
    return found[samples // 20], found[-samples // 20]


def table(
    prepared: Prepared, times: list[Times], with_hidden: bool, compute: float | None = None
) -> str:
    """The measurement of one model as Markdown; `compute` as in `Ranks`."""
    wall, cpu = slowest(times), summed(times)
    wall_and_limit = wall | {LIMIT: limit(wall, cpu)}
    share, waits = (1 - statistics.median(ratios(wall_and_limit, n)) for n in (LOCAL, LIMIT))
    lines = [
        f"{prepared.model}: {len(wall[LOCAL])} rounds; communication is {share:.0%} of the "
        f"synchronous step, "
        + (f"{waits:.0%} without its CPU time." if compute is None else _given(compute)),
        "| program | wall / synchronous, median (quartiles) "
        "| communication hidden (90 % interval), fastest rounds"
        f"{', of what needs no CPU' if compute is None else ''} "
        "| CPU of both ranks / synchronous | largest difference |",
        "|---|---|---|---|---|",
    ]
    for name in wall:
        own = ratios(wall, name)
        low, _, high = statistics.quantiles(own, n=4)
        cells = [f"{statistics.median(own):.3f} ({low:.3f} .. {high:.3f})", ""]
        if with_hidden and name not in (LOCAL, SYNCHRONOUS):
            low, high = spread(wall, name)
            cells[1] = f"{hidden(wall, name):.0%} ({low:.0%} .. {high:.0%})"
            cells[1] += f", {hidden_at_best(wall, name):.0%}"
            if compute is None:
                cells[1] += f", {hidden(wall_and_limit, name, best=LIMIT):.0%}"
        cells.append(f"{statistics.median(ratios(cpu, name)):.3f}")
        cells.append(f"{prepared.errors[name]:.0e}" if name in prepared.errors else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | not there: {why} | | | |" for name, why in prepared.absent.items()]
    return "\n".join(lines)


def _given(compute: float) -> str:
    return f"with {compute:.0%} of a core to compute and the rest for the sockets."


def find_rate(ranks: Ranks, link: SlowLink, prepared: Prepared, share: float) -> float:
    """Bits/s at which communication takes `share` of a synchronous step; the link is left at it."""
    link.limit(None)
    alone = statistics.median(slowest(ranks.ask("measure", names=[LOCAL], rounds=5))[LOCAL])
    sent = prepared.bytes[SYNCHRONOUS] * 8
    # Twice the bytes: what gloo mostly needs of two ranks of which one is late (see `check`).
    rate = 2 * sent / (alone * share / (1 - share))
    link.limit(rate)
    for _ in range(TRIES):
        wall = slowest(ranks.ask("measure", names=[LOCAL, SYNCHRONOUS], rounds=5))
        seen = 1 - statistics.median(ratios(wall, LOCAL))
        if abs(seen - share) < TOLERANCE:
            break
        # The time of communication goes with 1 / rate.
        longer = (seen / (1 - seen)) / (share / (1 - share))
        rate *= min(max(longer, 0.5), 2.0)
        link.limit(rate)
    return rate


def check(ranks: Ranks, rate: float) -> tuple[dict[int, float], dict[int, list[float]]]:
    """Seconds over bytes / rate: of sockets, both directions at once, and of gloo's all-to-all.

    Gloo asks for data on the connection that it sends data on. A rank that comes later than the
    other has its own data on the way before it asks for the other's, which then follows instead of
    passing it: twice the time. So two ranks' all-to-all takes 1 to 2 times bytes / rate.
    """
    sockets = ranks.ask("sockets", sizes=SIZES, address=ADDRESSES[0])
    gloo = ranks.ask("all_to_alls", sizes=SIZES)
    return (
        {n: max(s[n] for s in sockets) * rate / 8 / n for n in SIZES},
        {n: sorted(t * rate / 8 / n for t in gloo[0][n]) for n in SIZES},
    )


def as_device(ranks: Ranks) -> DeviceModel:
    """The cost model of this CPU with the link as it is now: a line through its all-to-alls."""
    times = {n: statistics.median(t) for n, t in ranks.ask("all_to_alls", sizes=SIZES)[0].items()}
    small, large = SIZES[0], SIZES[-1]
    each = max((times[large] - times[small]) / (large - small), 1e-12)
    latency = max(times[small] - small * each, 1e-5)
    cpu, share = DEVICES["cpu"], ranks.compute
    if share is not None:
        cpu = replace(
            cpu,
            matmul={dtype: rate * share for dtype, rate in cpu.matmul.items()},
            attention={dtype: rate * share for dtype, rate in cpu.attention.items()},
            memory=cpu.memory * share,
            transcendental=cpu.transcendental * share,
        )
    if share is not None or spare_cores(WORLD) >= WORLD:
        cpu = replace(cpu, link_work=0.0)
    return replace(
        cpu,
        name="this CPU and a slow link",
        link_latency=latency,
        link_bandwidth=1 / each,
        sources=("table of the package", "all-to-alls measured over the link"),
    )


def check_text(ranks: Ranks, rate: float) -> str:
    """`check` as Markdown."""
    sockets, gloo = check(ranks, rate)
    lines = [
        "| bytes each way | a socket, time * rate / bytes | gloo's all-to-all |",
        "|---|---|---|",
    ]
    for n in SIZES:
        lines.append(f"| {n} | {sockets[n]:.2f} | {gloo[n][0]:.2f} .. {gloo[n][-1]:.2f} |")
    return "\n".join(lines)


def measured(
    ranks: Ranks,
    link: SlowLink | None,
    model: str,
    small: bool,
    rate: float | None,
    share: float,
    rounds: int,
    programs: dict[str, dict[str, Any]],
) -> tuple[Prepared, list[Times], float | None]:
    """Compile and time one model's programs; with the rate in bits/s, chosen by `share` if None."""
    first = {n: o for n, o in programs.items() if n in (LOCAL, SYNCHRONOUS)}
    ask = partial(ranks.ask, "prepare", timeout=900, model=model, small=small, local=[LOCAL])
    prepared: Prepared = ask(programs=first)[0]
    if link and rate is None:
        rate = find_rate(ranks, link, prepared, share)
    elif link:
        link.limit(rate)
    rest = {n: o for n, o in programs.items() if n not in first}
    with TemporaryDirectory() as folder:
        if link:  # so that programs are made for this link
            device = Path(folder) / "device.json"
            device.write_text(as_device(ranks).to_json())
            rest = {n: o | {"cost_model": str(device)} for n, o in rest.items()}
        prepared = ask(programs=rest, more=True)[0]
    names = [n for n in programs if n not in prepared.absent]
    times = ranks.ask("measure", timeout=60 * rounds, names=names, rounds=rounds)
    return prepared, times, rate


def _rate(text: str) -> float | None:
    return None if text == "none" else float(text) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["flux"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--share", type=float, default=0.3, help="of a synchronous step, 0 .. 0.9")
    parser.add_argument("--rate", help="Mbit/s instead of --share, or none: loopback, no link")
    parser.add_argument("--compute", type=float, help="share of a core, 0.1 .. 1")
    parser.add_argument("--small", action="store_true", help="small models, for a quick look")
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    args = parser.parse_args()
    if not 0 < args.share < 0.9:
        parser.error("--share must lie between 0 and 0.9")
    if args.compute is not None and not 0.1 <= args.compute <= 1:
        parser.error("--compute must lie between 0.1 and 1")
    if args.rounds < 2:
        parser.error("--rounds must be 2 or more")
    rate = _rate(args.rate) if args.rate else None
    loopback = args.rate == "none"
    lacks = None if loopback else missing()
    if lacks:
        print(f"skipped: no slow link here: {lacks}. --rate none measures without a link.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    programs = {n: o for n, o in PROGRAMS.items() if n in (LOCAL, SYNCHRONOUS, *args.programs)}
    with ExitStack() as stack:
        link = None if loopback else stack.enter_context(SlowLink())
        try:
            ranks = stack.enter_context(Ranks(link, args.compute))
        except QuotaError as e:
            print(f"skipped: {e}. Without --compute the sockets share the core that computes.")
            return
        for model in args.models:
            print(f"{model}: {len(programs)} programs to compile ...", file=sys.stderr)
            prepared, times, at = measured(
                ranks, link, model, args.small, rate, args.share, args.rounds, programs
            )
            print(
                table(prepared, times, with_hidden=link is not None, compute=args.compute),
                flush=True,
            )
            if at is not None:
                print(f"\nThe link, at the rate used:\n{check_text(ranks, at)}", flush=True)


if __name__ == "__main__":
    main()
