"""For developers: `make bench` keeps these timings, so that two versions of the code can be compared.

Not part of `make test`. The report (`make report`) compares with others; this compares with yesterday.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import contest, layers
from .suite import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LENGTH = layers.WIDTHS["base"], 1024  # of layers

CALLS = [
    pytest.param(op, case, contender, id=f"{name}-{case.name}-{contender.name}")
    for name, op in OPERATORS.items()
    for case in op.cases(DEVICE)
    for contender in op.contenders(case)
    if contender.kind == "ours"
]
LAYERS = [
    pytest.param(part, what, id=f"{part.name}-{what}")
    for part in layers.parts()
    for what in ("forward", "both")
    if part.level == "layer" and part.by == "ours"
]


def _run(benchmark: Callable[..., Any], call: Callable[[int], object]) -> None:
    def run() -> None:
        call(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)


@pytest.mark.parametrize(("op", "case", "contender"), CALLS)
def test_operator(benchmark: Callable[..., Any], op: Any, case: Any, contender: Any) -> None:
    _, call = next(contest.calls(op, [op.Inputs(case, DEVICE)], [contender]))
    if isinstance(call, str):
        assert not call.startswith(("wrong", "fails")), call
        pytest.skip(call)
    benchmark.extra_info["bytes"] = case.bytes_moved
    _run(benchmark, call)


@pytest.mark.parametrize(("part", "what"), LAYERS)
def test_layer(benchmark: Callable[..., Any], part: layers.Part, what: str) -> None:
    _run(benchmark, layers.call(part, WIDTH, LENGTH, what, DEVICE))
