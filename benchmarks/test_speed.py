"""For developers: `make bench` keeps these timings, so that two versions of the code can be compared.

Not part of `make test`. The report (`make report`) compares with others; this compares with yesterday.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .suite import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


CALLS = [
    pytest.param(op, case, contender, id=f"{name}-{case.name}-{contender.name}")
    for name, op in OPERATORS.items()
    for case in op.cases(DEVICE)
    for contender in (op.LAYERS if getattr(case, "module", "") else op.CONTENDERS)
    if contender.kind == "ours"
]


@pytest.mark.parametrize(("op", "case", "contender"), CALLS)
def test_speed(benchmark: Callable[..., Any], op: Any, case: Any, contender: Any) -> None:
    inputs = op.Inputs(case, DEVICE)
    _, call = next(op.calls(case, [inputs], [contender]))
    if isinstance(call, str):
        pytest.skip(call)

    def run() -> None:
        call(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = case.bytes_moved
    benchmark(run)
