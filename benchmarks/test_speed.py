"""For developers: `make bench` keeps these timings, so that two versions of the code can be compared.

Not part of `make test`. The report (`make report`) compares with others; this compares with yesterday.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", rope.cases(DEVICE), ids=lambda case: case.name)
@pytest.mark.parametrize("contender", [c for c in rope.CONTENDERS if c.kind == "ours"], ids=lambda c: c.name)
def test_rope(benchmark: Callable[..., Any], case: rope.Case, contender: rope.Contender) -> None:
    inputs = rope.Inputs(case, DEVICE)
    _, call = next(rope.calls(case, [inputs], [contender]))
    if isinstance(call, str):
        pytest.skip(call)

    def run() -> None:
        call(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["bytes"] = case.bytes_moved
    benchmark(run)
