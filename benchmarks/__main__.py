"""`python -m benchmarks report`: measure, then draw. `measure` and `render` do one half each.

`picture` draws, and photographs the first screen for the README.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tabulate import tabulate

from . import compare, suite
from .claims import Claim, all_claims
from .claims.evidence import Evidence
from .environment import ROOT, device_name


def answers(claim: Claim, options: argparse.Namespace) -> str:
    """Measures what a claim needs, beside what is kept, and tells what it says to the claim."""
    name = suite.holder(claim.needs)
    row = claim.row(
        Evidence(suite.run([name], options.device, options.quick, options.fresh, claim.needs, options.seconds))
    )
    table = tabulate([list(a.values()) for a in row["answers"]], ["read as", "measured", "verdict", "why"])
    return (
        f"{claim.id}: {claim.says} ({claim.source})\npredicted: {claim.predicted}\ncounted: {row['counted']}\n{table}"
    )


def main() -> None:
    claims = {claim.id: claim for claim in all_claims()}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=["report", "measure", "render", "picture"])
    parser.add_argument(
        "--only", choices=[*suite.NAMES, *claims], action="append", metavar="NAME",
        help=f"{', '.join(suite.NAMES)}, or the number of a claim: what to measure (everything)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, wider spreads; kept apart in report/")
    parser.add_argument(
        "--seconds", type=float,
        help=f"that measuring may take ({suite.WHOLE_SECONDS:g}; --quick: {suite.QUICK_SECONDS:g})",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what changed since an earlier run")
    options = parser.parse_args()
    old = json.loads(options.compare.read_text()) if options.compare else None  # before it is measured again
    if old and not options.only:
        options.only = [old["op"]]
    if options.what in ("report", "measure"):
        names = [name for name in options.only or suite.NAMES if name not in claims]
        for name, results in suite.run(
            names, options.device, options.quick, options.fresh, None, options.seconds
        ).items():
            file = suite.kept_file(name, options.device, options.quick).relative_to(ROOT)
            print(f"measured in {results['wall_seconds']:.0f} s: {file}")
            for failure in results["failed"]:
                print(f"  not measured: {failure['step']}: {failure['reason']}")
        for name in options.only or ():
            if name in claims:
                print(answers(claims[name], options))
    if old:
        print(compare.table(old, options.device, options.quick))
    if options.what != "measure":
        from .render import render

        mine = None if options.what == "picture" else device_name(options.device)
        written = render(ROOT / "report", quick=options.quick, mine=mine)
        if options.what == "picture":
            from .picture import take, verdicts

            written += [take(written[0], ROOT / "docs" / "report.png"), verdicts(ROOT / "README.md")]
        for file in written:
            print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
