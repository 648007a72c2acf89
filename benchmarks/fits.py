"""What times say about growth, and samples about a mean: with intervals from resampled rounds, or samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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

    def told(self, tell: Callable[[float], str]) -> str:
        between = f" ({tell(self.low)}–{tell(self.high)})" if self.low < self.high else ""
        return tell(self.value) + between

    def __str__(self) -> str:
        return self.told("{:.3g}".format)


def _bootstrap(
    samples: Sequence[Sequence[float]],
    statistic: Callable[..., np.ndarray],
    middle: Callable[..., np.ndarray] = np.median,
    paired: bool = False,
) -> Interval:
    """Of a function of medians, or of another middle, or of arrays of them; each sample resampled for itself unless
    they are paired.
    """
    (found,) = _bootstraps(samples, lambda *middles: statistic(*middles)[None], middle, paired)
    return found


def _bootstraps(
    samples: Sequence[Sequence[float]],
    statistics: Callable[..., np.ndarray],
    middle: Callable[..., np.ndarray] = np.median,
    paired: bool = False,
) -> list[Interval]:
    """The same of several functions at once: the rows of what `statistics` returns."""

    def of_middles(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistics(*(middle(x, axis=axis) for x in resampled))

    arrays = [np.asarray(x) for x in samples]
    values = of_middles(*arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of the spread of values that are infinite
        found = scipy.stats.bootstrap(
            arrays,
            of_middles,
            vectorized=True,
            paired=paired,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    ends = zip(values, *found.confidence_interval, strict=True)
    return [Interval(float(x), float(min(low, x)), float(max(high, x))) for x, low, high in ends]


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    return _bootstrap([above, below], lambda a, b: a / b)


def of_means(*samples: Sequence[float], statistic: Callable[..., float] = lambda x: x) -> Interval:
    """Of a function of means, all of the same sequences or seeds, which are resampled together."""
    if min(len(x) for x in samples) < 2:
        raise LookupError("one sample alone has no interval")
    return _bootstrap(samples, np.vectorize(statistic, otypes=[float]), np.mean, paired=True)


def crossover(above: Times, below: Times) -> Interval | None:
    """The size from which `above` takes longer than `below` at all sizes that were measured, between two of which it is
    interpolated in logarithms. 0 if it does at all of them, infinite if at the largest it does not: then the interval
    begins at the largest, or ends at the smallest, as nothing is known beyond.
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

    found = _bootstrap([above[n] for n in sizes] + [below[n] for n in sizes], np.vectorize(where, otypes=[float]))
    return Interval(found.value, min(found.low, sizes[-1]), max(found.high, sizes[0]))


@dataclass(frozen=True)
class PowerLaw:
    """t = a + b · nᵖ, fitted in relative error over `sizes`; `residual` is the largest relative one. Each resampling
    has an a, b and p of its own.
    """

    fixed: Interval
    factor: Interval
    exponent: Interval
    residual: float
    sizes: tuple[int, ...]


def _affine(n: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """a, b, p of least squares in (a + b nᵖ)/t - 1 for each row of t [..., sizes], and the largest of these; for every
    p, a and b are a linear fit.
    """
    p = np.arange(10, 401) / 100
    u, powers = 1 / t, n[:, None] ** p  # [..., sizes], [sizes, P]
    uu, sum_u = (u * u).sum(-1, keepdims=True), u.sum(-1, keepdims=True)
    ux, xx, sum_x = (u * u) @ powers, (u * u) @ powers**2, u @ powers  # [..., P], of x = nᵖ/t
    det = uu * xx - ux**2
    a, b = (xx * sum_u - ux * sum_x) / det, (uu * sum_x - ux * sum_u) / det
    proportional = (a < 0) | (b < 0)
    a, b = np.where(proportional, 0, a), np.where(proportional, sum_x / xx, b)
    squares = a * a * uu + b * b * xx + 2 * (a * b * ux - a * sum_u - b * sum_x)  # and one for each size
    best = squares.argmin(-1)[..., None]
    a, b = (np.take_along_axis(y, best, -1) for y in (a, b))
    off = (a + b * n ** p[best]) * u - 1
    return a[..., 0], b[..., 0], p[best[..., 0]], np.abs(off).max(-1)


def power_law(times: Times) -> PowerLaw | None:
    """None for fewer sizes than the law has parameters, and one."""
    sizes = sorted(times)
    if len(sizes) < 4:
        return None
    n = np.asarray(sizes, dtype=float) / sizes[-1]

    def law(*medians: np.ndarray) -> np.ndarray:
        a, b, p, residual = _affine(n, np.stack(medians, -1))
        return np.stack((a, b / sizes[-1] ** p, p, residual))

    fixed, factor, exponent, residual = _bootstraps([times[size] for size in sizes], law)
    return PowerLaw(fixed, factor, exponent, residual.value, tuple(sizes))


def local_slope(times: Times, size: int) -> Interval | None:
    """d log t / d log n between the sizes before and after."""
    sizes = sorted(times)
    if size not in sizes[1:-1]:
        return None
    before, after = sizes[sizes.index(size) - 1], sizes[sizes.index(size) + 1]
    return _bootstrap([times[before], times[after]], lambda a, b: np.log(b / a) / np.log(after / before))
