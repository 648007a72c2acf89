"""Goals, and what the measurements say about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]
Measured = tuple[float, float, float]  # median, lower and upper quartile


@dataclass(frozen=True)
class Where:
    """The machines that a goal is about."""

    name: str
    fits: Callable[[dict[str, Any]], bool]  # given an environment


@dataclass(frozen=True)
class Goal:
    what: str
    where: Where
    case: str
    target: float
    unit: str
    value: Callable[[Results], Measured | None]
    at_most: bool = False  # else at least

    def _measured(self, result: Results) -> Measured | None:
        try:
            return self.value(result)
        except KeyError:  # a step left nothing
            return None

    def verdict(self, results: list[Results]) -> dict[str, str]:
        """The row of the report: what was measured on the machines the goal is about, if any was at hand. It holds if
        both quartiles meet it, fails if neither does, and is at its edge if one does.
        """
        row = {
            "goal": f"{'≤' if self.at_most else '≥'} {self.target:g} {self.unit} {self.what}",
            "case": self.case,
            "on": self.where.name,
            "measured": "–",
            "verdict": "not measured here",
        }
        for result in results:
            measured = self._measured(result) if self.where.fits(result["environment"]) else None
            if measured is not None:
                median, low, high = measured
                row["measured"] = f"{median:.2f} ({low:.2f}–{high:.2f}) {self.unit}"
                met = sum(x <= self.target if self.at_most else x >= self.target for x in (low, high))
                row["verdict"] = ("fails", "at its edge", "holds")[met]
                break
        return row
