"""What is said about these operators, and what this machine says to it.

A claim's number is the one of the project's list: C of cost, D of quality. Sources: K and a number is an article of
Jianlin Su's Scientific Spaces (kexue.fm/archives/number); the papers by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ..fits import Interval, of_means
from .evidence import Asking

HOLDS, FAILS, OPEN = "holds", "fails", "cannot be decided here"


def within(found: Interval, low: float, high: float) -> str:
    """The verdict on a number that is said to lie between the two: none unless all of the interval agrees."""
    if low <= found.low and found.high <= high:
        return HOLDS
    return FAILS if found.high < low or found.low > high else OPEN


Sampled = tuple[Mapping[str, Any], str]  # a row of an experiment, and a number of it


def mean(row: Mapping[str, Any], key: str, by: Callable[..., float] = lambda x: x, *others: Sampled) -> Interval:
    """Of what each seed, or sequence of text, gave; `by`: a function of that mean, and of others over the same."""
    found = []
    for kept, name in ((row, key), *others):
        if name not in kept.get("samples", {}):
            raise LookupError(f"{name}: what each seed, or sequence of text, gave was not kept")
        found.append(kept["samples"][name])
    return of_means(*found, statistic=by)


def less(mine: Sampled, than: Sampled) -> str:
    """The verdict on a mean that is said to be less than another over the same."""
    return within(mean(*mine, lambda x, y: x - y, than), -math.inf, math.nextafter(0, -1))


def worst(verdicts: Iterable[str]) -> str:
    """Of something that is said of several lengths."""
    given = set(verdicts)
    return next((v for v in (FAILS, OPEN) if v in given), HOLDS)


def best(verdicts: Iterable[str]) -> str:
    """Of something that is said of one of several."""
    given = set(verdicts)
    return next((v for v in (HOLDS, OPEN) if v in given), FAILS)


@dataclass(frozen=True)
class Answer:
    """`of`: against whom, or in which reading; `why`: what decides, or what is missing."""

    of: str
    measured: str
    verdict: str
    why: str


def missed(of: str, missing: LookupError) -> Answer:
    return Answer(of, "–", OPEN, str(missing).strip("'\""))


def each(readings: Iterable[tuple[str, tuple[Any, ...]]], answer: Callable[..., Answer]) -> Iterator[Answer]:
    """An answer for each reading, by name and what it depends on; one whose rows are missing says so."""
    for of, key in readings:
        try:
            yield answer(of, *key)
        except LookupError as missing:
            yield missed(of, missing)


@dataclass(frozen=True)
class Claim:
    id: str
    says: str
    source: str
    predicted: str
    needs: tuple[str, ...]  # the places of what was measured that it is answered from
    counted: Callable[[], str]
    answers: Callable[[Any], Iterable[Answer]]  # given the evidence of one device

    def asks(self) -> set[tuple[Any, ...]]:
        """The parts whose times and sizes it is answered from, as `suite.Asked` has them."""
        evidence = Asking()
        with suppress(LookupError):  # what is measured whole is not there
            list(self.answers(evidence))
        return evidence.asked

    def row(self, evidence: Any) -> dict[str, Any]:
        """JSON-ready."""
        try:
            answers = list(self.answers(evidence))
        except LookupError as missing:  # what it needs was not measured
            answers = [missed("", missing)]
        row = {"id": self.id, "says": self.says, "source": self.source, "predicted": self.predicted}
        return row | {"counted": self.counted(), "answers": [asdict(a) for a in answers]}


def all_claims() -> list[Claim]:
    from . import cost, quality

    return [*cost.CLAIMS, *quality.CLAIMS]
