"""`python -m benchmarks report`: measure, then draw. `measure` and `render` do one half each.

`picture` draws, and photographs the first screen for the README. What measures is a process of its own, which is begun
again if a contender crashes it.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tabulate import tabulate

from . import compare, suite
from .claims import Claim, all_claims
from .claims.evidence import Evidence
from .environment import ROOT, device_name

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # by which a user ends a process
ENDS = 20  # of a measuring process, that one command gets over
GRACE = 3.0  # seconds: a terminal interrupts both processes, `kill` this one alone


def ended(command: Sequence[str]) -> int:
    """Runs it; the status that it ended with, negative for a signal. What stops this process stops it too."""
    child = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(GRACE)
        child.send_signal(signal.SIGINT)
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def survive(command: Callable[[bool], Sequence[str]]) -> None:
    """Runs it, given whether it is the first time, and again while it ends by a signal that is not the user's."""
    for turn in range(ENDS):
        status = ended(command(turn == 0))
        if status >= 0 or -status in STOPS:
            break
        print(f"\nmeasuring ended by {signal.Signals(-status).name}: it goes on", file=sys.stderr)
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def measuring(options: argparse.Namespace, first: bool) -> list[str]:
    """The command that measures what these options say, in a process of its own."""
    given = [sys.executable, "-m", "benchmarks", "measure", "--here", "--device", options.device]
    given += [word for name in options.only or () for word in ("--only", name)]
    given += [] if options.seconds is None else ["--seconds", str(options.seconds)]
    return given + ["--quick"] * options.quick + ["--fresh"] * (options.fresh and first)


def measure(options: argparse.Namespace, names: Sequence[str], claims: Sequence[Claim]) -> None:
    """Whole runs of these names, and what all these claims need at once."""
    how = (options.device, options.quick, options.fresh)
    for name, results in (suite.run(names, *how, None, options.seconds) if names else {}).items():
        file = suite.kept_file(name, options.device, options.quick).relative_to(ROOT)
        print(f"measured in {results['wall_seconds']:.0f} s: {file}")
        for failure in results["failed"]:
            print(f"  not measured: {failure['step']}: {failure['reason']}")
    if claims:
        places, parts = {x for c in claims for x in c.needs}, {x for c in claims for x in c.asks()}
        asked = suite.Asked([c.id for c in claims], places, parts)
        evidence = Evidence(suite.run(holders(claims), *how, asked, options.seconds))
        for claim in claims:
            print(answers(claim, evidence))


def holders(claims: Sequence[Claim]) -> list[str]:
    return list(dict.fromkeys(suite.holder(claim.needs) for claim in claims))


def files_of(claims: Sequence[Claim], options: argparse.Namespace) -> list[Path]:
    """That what these claims need is kept in."""
    ids = [claim.id for claim in claims]
    return [suite.kept_file(name, options.device, options.quick, ids) for name in holders(claims)]


def timed(files: Sequence[Path], seconds: float) -> None:
    """Keeps the time of the whole command, crashes and what a step lost included, with what it measured."""
    for file in filter(Path.exists, files):
        results = json.loads(file.read_text())
        results["environment"]["command_seconds"] = round(seconds, 1)
        suite.write(file, json.dumps(results, indent=1) + "\n")


def answers(claim: Claim, evidence: Evidence) -> str:
    """What was measured says to the claim."""
    row = claim.row(evidence)
    table = tabulate([list(a.values()) for a in row["answers"]], ["read as", "measured", "verdict", "why"])
    return (
        f"{claim.id}: {claim.says} ({claim.source})\npredicted: {claim.predicted}\ncounted: {row['counted']}\n{table}"
    )


def main() -> None:
    begin = time.perf_counter()
    every = all_claims()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=["report", "measure", "render", "picture"])
    parser.add_argument(
        "--only", choices=[*suite.NAMES, *(claim.id for claim in every)], action="append", metavar="NAME",
        help=f"{', '.join(suite.NAMES)}, or the number of a claim: what to measure (everything)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, wider spreads; kept apart in report/")
    parser.add_argument(
        "--seconds", type=float,
        help=f"that measuring may take ({suite.WHOLE_SECONDS:g}; --quick: {suite.QUICK_SECONDS:g})",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")
    parser.add_argument("--here", action="store_true", help="measure in this process, which a crash ends")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what changed since an earlier run")
    options = parser.parse_args()
    old = json.loads(options.compare.read_text()) if options.compare else None  # before it is measured again
    if old and not options.only:
        options.only = [old["op"]]
    claims = [claim for claim in every if claim.id in (options.only or ())]
    names = [name for name in suite.NAMES if name in (options.only or suite.NAMES)]
    if options.what in ("report", "measure"):
        if options.here:
            measure(options, names, claims)
        else:
            survive(functools.partial(measuring, options))
            files = [suite.kept_file(name, options.device, options.quick) for name in names]
            timed([*files, *files_of(claims, options)], time.perf_counter() - begin)
    if old:
        print(compare.table(old, options.device, options.quick))
    if options.what != "measure":
        from .render import render

        mine = None if options.what == "picture" else device_name(options.device)
        only = [claim.id for claim in claims] if options.what == "report" else []
        written = render(ROOT / "report", quick=options.quick, mine=mine) if names or not only else []
        if only:
            written += render(ROOT / "report" / "-".join(only), files=files_of(claims, options), only=only)
        if options.what == "picture":
            from .picture import take, verdicts

            written += [take(written[0], ROOT / "docs" / "report.png"), verdicts(ROOT / "README.md")]
        for file in written:
            print(f"written: {file.relative_to(ROOT)}")
    if options.what in ("report", "measure") and not options.here:
        print(f"in {time.perf_counter() - begin:,.0f} s, start to end")


if __name__ == "__main__":
    main()
