"""How numbers are told to people."""

from __future__ import annotations


def short(value: float) -> str:
    """Three digits, without an exponent where the number is a large one."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _scaled(value: float, units: dict[str, float]) -> str:
    """In the largest unit that leaves at least 1, or the smallest."""
    name, unit = next(((n, u) for n, u in units.items() if abs(value) >= 0.9995 * u), list(units.items())[-1])
    return f"{short(value / unit)} {name}"


def time(seconds: float) -> str:
    return _scaled(seconds, {"s": 1, "ms": 1e-3, "µs": 1e-6})


def size(count: float) -> str:
    """Of bytes."""
    return _scaled(count, {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1})
