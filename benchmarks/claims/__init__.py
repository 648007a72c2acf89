"""What is said about these operators, and what this machine says to it.

A claim's number is the one of the project's list: C of cost, D of quality. Sources: K and a number is an article of
Jianlin Su's Scientific Spaces (kexue.fm/archives/number); the papers by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

HOLDS, FAILS, OPEN = "holds", "fails", "cannot be decided here"


@dataclass(frozen=True)
class Answer:
    """`of`: against whom, or in which reading; `why`: what decides, or what is missing."""

    of: str
    measured: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Claim:
    id: str
    says: str
    source: str
    predicted: str
    needs: tuple[str, ...]  # the places of what was measured that it is answered from
    counted: Callable[[], str]
    answers: Callable[[Any], Iterable[Answer]]  # given the evidence of one device

    def row(self, evidence: Any) -> dict[str, Any]:
        """JSON-ready."""
        try:
            answers = list(self.answers(evidence))
        except LookupError as missing:  # what it needs was not measured
            answers = [Answer("", "–", OPEN, str(missing).strip("'\""))]
        row = {"id": self.id, "says": self.says, "source": self.source, "predicted": self.predicted}
        return row | {"counted": self.counted(), "answers": [asdict(a) for a in answers]}


def all_claims() -> list[Claim]:
    from . import cost, quality

    return [*cost.CLAIMS, *quality.CLAIMS]
