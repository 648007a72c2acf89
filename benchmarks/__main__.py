"""`python -m benchmarks report`: measure, then draw. `measure` and `render` do one half each."""

from __future__ import annotations

import argparse

import torch

from . import suite
from .environment import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=["report", "measure", "render"])
    parser.add_argument("--only", choices=suite.NAMES, action="append", help="what to measure (everything)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, wider spreads")
    parser.add_argument("--fresh", action="store_true", help="do not go on from an interrupted run")
    options = parser.parse_args()
    if options.what != "render":
        for name in options.only or suite.NAMES:
            file = suite.run(name, options.device, options.quick, options.fresh)
            print(f"measured: {file.relative_to(ROOT)}")
    if options.what != "measure":
        from .render import render

        for file in render(ROOT / "report"):
            print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
