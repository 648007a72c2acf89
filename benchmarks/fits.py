"""What times say about growth: power laws and crossovers, with intervals from resampled rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.stats

Times = Mapping[int, Sequence[float]]  # at each size, the seconds of each round
RESAMPLES = 400
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and its bootstrap confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}–{self.high:.3g})"


def _bootstrap(samples: Sequence[Sequence[float]], statistic: Callable[..., float]) -> Interval:
    """Of a function of medians, each sample resampled for itself."""

    of_each = np.vectorize(statistic, otypes=[float])

    def of_medians(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        return of_each(*(np.median(x, axis=axis) for x in resampled))

    arrays = [np.asarray(x) for x in samples]
    value = float(of_medians(*arrays))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of the spread of values that are infinite
        found = scipy.stats.bootstrap(
            arrays,
            of_medians,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = found.confidence_interval
    return Interval(value, float(min(low, value)), float(max(high, value)))


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    return _bootstrap([above, below], lambda a, b: a / b)


def crossover(above: Times, below: Times) -> Interval | None:
    """The size from which `above` takes longer than `below` at all sizes that were measured, between two of which it is
    interpolated in logarithms. 0 if it does at all of them, infinite if at the largest it does not.
    """
    sizes = sorted(set(above) & set(below))
    if len(sizes) < 2:
        return None

    def where(*medians: float) -> float:
        over = [np.log(a / b) for a, b in zip(medians[: len(sizes)], medians[len(sizes) :], strict=True)]
        if over[-1] <= 0:
            return float("inf")
        last = max((i for i, x in enumerate(over) if x <= 0), default=-1)
        if last < 0:
            return 0.0
        share = -over[last] / (over[last + 1] - over[last])
        return float(sizes[last] * (sizes[last + 1] / sizes[last]) ** share)

    return _bootstrap([above[n] for n in sizes] + [below[n] for n in sizes], where)


@dataclass(frozen=True)
class PowerLaw:
    """t = a + b · nᵖ, fitted in relative error over `sizes`; `residual` is the largest relative one."""

    fixed: float
    factor: float
    exponent: Interval
    residual: float
    sizes: tuple[int, ...]


def power_law(times: Times) -> PowerLaw | None:
    """None for fewer sizes than the law has parameters, and one."""
    sizes = sorted(times)
    if len(sizes) < 4:
        return None
    n = np.asarray(sizes, dtype=float) / sizes[-1]

    def fit(*medians: float) -> tuple[np.ndarray, float]:
        t = np.asarray(medians) / medians[-1]

        def off(x: np.ndarray) -> np.ndarray:
            return (x[0] + x[1] * n ** x[2]) / t - 1

        found = scipy.optimize.least_squares(off, (min(t) / 2, 1.0, 1.0), bounds=((0, 0, 0.1), (1, 2, 4)))
        return found.x, float(np.abs(found.fun).max())

    exponent = _bootstrap([times[size] for size in sizes], lambda *medians: float(fit(*medians)[0][2]))
    medians = [float(np.median(times[size])) for size in sizes]
    (fixed, factor, p), residual = fit(*medians)
    scale = medians[-1]
    return PowerLaw(float(fixed * scale), float(factor * scale / sizes[-1] ** p), exponent, residual, tuple(sizes))


def local_slope(times: Times, size: int) -> Interval | None:
    """d log t / d log n between the sizes before and after."""
    sizes = sorted(times)
    if size not in sizes[1:-1]:
        return None
    before, after = sizes[sizes.index(size) - 1], sizes[sizes.index(size) + 1]
    return _bootstrap([times[before], times[after]], lambda a, b: float(np.log(b / a) / np.log(after / before)))
