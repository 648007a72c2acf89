from __future__ import annotations

from torch import Tensor

from ._problem import RopeProblem


def unsupported(p: RopeProblem) -> str | None:
    return "not written yet"


def run(p: RopeProblem, inplace: bool) -> list[Tensor]:
    raise AssertionError
