"""`python -m benchmarks report`: measure, then draw. `measure` and `render` do one half each."""

from __future__ import annotations

import argparse

import torch

from . import suite
from .environment import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=["report", "measure", "render"])
    parser.add_argument("--op", choices=list(suite.OPERATORS), action="append", help="operators to measure (all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer cases, wider spreads")
    options = parser.parse_args()
    if options.what != "render":
        for op in options.op or suite.OPERATORS:
            print(f"measured: {suite.run(op, options.device, options.quick).relative_to(ROOT)}")
    if options.what != "measure":
        from .render import render

        for file in render(ROOT / "report"):
            print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
