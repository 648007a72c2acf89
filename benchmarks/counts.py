"""Launches and bytes of each pass, counted. `python -m benchmarks.counts OP cpu` prints JSON.

Triton's kernels are counted under its interpreter, which has to be on from the start; CUDA's launches on the emulation.
Both need no GPU, and where there is one they are left out: its report is about time.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from kx_kernels._core import native
from kx_kernels._core.spec import OpSpec, all_specs
from kx_kernels.testing.emulation import emulated_cuda
from kx_kernels.testing.metering import metered

from . import interpreter


def rows(spec: OpSpec) -> list[dict[str, Any]]:
    """One row per backend, call and pass. `least`: bytes, each input read once and each output written once."""
    api = importlib.import_module(spec.function.__module__)
    backends = {b.name: b for b in api.backends()}
    found = []
    for case, call in spec.metered().items():
        problem = api.problem(**call)
        with metered() as meter:
            before = (0, 0, 0, 0)
            for name in spec.passes(backends["triton"], problem):
                now = (meter.launches, meter.loaded, meter.stored, meter.dot_flops)
                launches, loaded, stored, flops = (b - a for a, b in zip(before, now, strict=True))
                row = {"backend": "triton", "case": case, "pass": name, "launches": launches}
                least = spec.bytes(call) if name == "forward" else None
                found.append(row | {"loaded": loaded, "stored": stored, "dot_flops": flops, "least": least})
                before = now
        emulation = native.load("_emulation")
        if emulation is None:
            continue
        with emulated_cuda():
            before_cuda = emulation.launches()
            for name in spec.passes(backends["cuda"], problem):
                row = {"backend": "cuda", "case": case, "pass": name, "launches": emulation.launches() - before_cuda}
                found.append(row | dict.fromkeys(("loaded", "stored", "dot_flops", "least")))
                before_cuda = emulation.launches()
    return found


def measure(op: str, device: str) -> list[dict[str, Any]]:
    return interpreter.rows("benchmarks.counts", op, device) if device == "cpu" else []


def main() -> None:
    op, _ = sys.argv[1:]
    print(json.dumps(rows(next(spec for spec in all_specs() if spec.name == op))))


if __name__ == "__main__":
    main()
