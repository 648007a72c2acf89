"""How far each backend is from float64, on cases of its spec. `python -m benchmarks.accuracy OP DEVICE` prints JSON.

Without a GPU it wants TRITON_INTERPRET=1 from the start, so that Triton's kernels run; the CUDA kernels run on the
emulation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kx_kernels as kx
from kx_kernels._core import native
from kx_kernels._core.spec import Call, OpSpec, all_specs
from kx_kernels.testing.budget import budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.emulation import emulated_cuda

from . import interpreter


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def _errors(spec: OpSpec, case: str, dtype: torch.dtype, device: str, backend: str) -> tuple[float, float]:
    """The largest error of an output and its budget, both in roundings of the output's largest value."""
    call = spec.call(case, dtype, device)

    def compute(function: Any, c: Call) -> list[Tensor]:
        return _tensors(function(**c))

    outs = _tensors(spec.function(**call, backend=backend))
    worst = (0.0, 0.0)
    for i, (y, pair) in enumerate(zip(outs, exact_and_eager(spec, call, dtype, backend, compute), strict=True)):
        if y.numel() == 0:
            continue
        exact, eager = pair
        error, allowed = (y.double() - exact).abs().max().item(), budget(exact, eager, dtype)
        if error > allowed:  # one draw of eager PyTorch's error can be small by luck
            near = neighbours(spec, call, dtype, backend, compute, i)
            allowed = max(allowed, *(budget(*other, dtype) for other in near))
        unit = torch.finfo(dtype).eps * exact.abs().max().item()
        if unit > 0:
            worst = max(worst, (error / unit, allowed / unit))
    return worst


def rows(spec: OpSpec, device: str, cases: Sequence[str], seconds: float = math.inf) -> list[dict[str, Any]]:
    """One row per backend and dtype: the worst of the cases and its budget, or why it was not measured.

    Each row has its share of the seconds, and of the cases as many as it has time for, but one at least.
    """
    found: list[dict[str, Any]] = []
    begin, count = time.perf_counter(), len(spec.backends) * len(spec.dtypes)
    for backend in spec.backends:
        for dtype in spec.dtypes:
            end = begin + seconds * (len(found) + 1) / count
            row: dict[str, Any] = {"op": spec.name, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
            emulate = device == "cpu" and backend == "cuda" and native.load("_emulation") is not None
            how = {"cuda": "emulated", "triton": "interpreted"} if device == "cpu" else {}
            row["how"] = how.get(backend, "")
            try:
                with emulated_cuda() if emulate else contextlib.nullcontext():
                    errors: dict[str, tuple[float, float]] = {}
                    for case in cases:
                        if not errors or time.perf_counter() < end:
                            errors[case] = _errors(spec, case, dtype, device, backend)
            except kx.UnsupportedError as error:
                reason = next(line for line in str(error).splitlines() if line.strip().startswith(f"{backend}:"))
                row |= {"error": None, "reason": reason.split(":", 1)[1].strip()}
            else:
                case = max(errors, key=lambda name: errors[name][0])
                row |= {"error": errors[case][0], "budget": errors[case][1], "case": case, "cases": len(errors)}
            found.append(row)
    return found


def _spec(op: str) -> OpSpec:
    return next(spec for spec in all_specs() if spec.name == op)


def measure(op: str, device: str, quick: bool, seconds: float) -> list[dict[str, Any]]:
    """quick: in one case, and without Triton's interpreter."""
    if quick:
        spec = _spec(op)
        return rows(spec, device, [spec.example])
    return interpreter.rows("benchmarks.accuracy", op, device, str(seconds))


def main() -> None:
    op, device, *seconds = sys.argv[1:]
    spec = _spec(op)
    # The example first, then the others in an order that has nothing to do with what they are.
    cases = sorted(spec.cases, key=lambda case: (case != spec.example, hashlib.sha256(case.encode()).digest()))
    print(json.dumps(rows(spec, device, cases, *map(float, seconds))))


if __name__ == "__main__":
    main()
