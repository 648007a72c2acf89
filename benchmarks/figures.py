"""Plots, each as HTML that takes its colours from the page. Beside each stands a table for those who cannot see it."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from . import fits
from .units import short, time

# Every colour is to be seen on white and on the dark page; no two series of a plot share colour and symbol.
OURS = ("#2563eb", "#0891b2", "#7c3aed", "#0d9488", "#6366f1")
OTHERS = ("#6b7280", "#b45309", "#db2777", "#4d7c0f", "#d97706")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "hexagon", "x")
GREY = "rgba(128,128,128,0.9)"

Measured = tuple[float, float, float]  # median, lower and upper quartile


@dataclass(frozen=True)
class Figure:
    """A plot, what to see in it, its numbers, and the laws that they follow."""

    html: str
    see: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    laws: list[list[str]] = field(default_factory=list)


def of_bound(row: Mapping[str, Any]) -> str:
    """How much of its roofline a time is, if that was measured."""
    return f"{row['bound'] / row['seconds']['median']:.2f}" if row.get("bound") else ""


def wrapped(text: str) -> str:
    return "<br>".join(textwrap.wrap(text, 22))


def ours(name: str) -> bool:
    return name.startswith("kx") or name.endswith("ours")


def styles(names: Iterable[str], dotted: Iterable[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """How each series is drawn: ours in blues, solid and filled; others in other colours, dashed and open."""
    mine, others = (zip(itertools.cycle(c), itertools.cycle(SYMBOLS), strict=False) for c in (OURS, OTHERS))
    for name in dict.fromkeys(names):
        colour, symbol = next(mine if ours(name) else others)
        dash = "dot" if name in dotted else "solid" if ours(name) else "dash"
        marker = {"size": 7, "symbol": symbol if ours(name) else f"{symbol}-open", "color": colour}
        yield name, {"marker": marker, "line": {"color": colour, "width": 2, "dash": dash}}


def _empty(height: int, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        margin={"l": 10, "r": 14, "t": 6, "b": 6},
        hoverlabel={"bgcolor": "#111827", "font": {"color": "white"}},
        legend={"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0, "xanchor": "left", "maxheight": 1},
        **layout,
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False, automargin=True)
    return figure


def _html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def _powers(values: Iterable[float], most: int) -> dict[str, Any]:
    """Ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or powers alone. Plotly's own say "2" for 200."""
    low, high = min(values := [v for v in values if v > 0]), max(values)
    for digits in ((1, 2, 5), (1,)):
        ticks = [d * 10.0**p for p in range(-12, 13) for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) <= most:
            break
    return {"tickvals": ticks, "ticktext": [f"{t:,g}" if t >= 1e-4 else f"{t:g}" for t in ticks]}


def lines(
    series: Mapping[str, Mapping[int, float]],
    see: str,
    x: str,
    y: str,
    *,
    dotted: Iterable[str] = (),
    logarithmic: str = "xy",
    small: bool = False,
    cells: Mapping[str, Mapping[int, str]] | None = None,
    versions: Mapping[str, str] | None = None,
    times: Mapping[str, fits.Times] | None = None,
) -> Figure:
    """Values against sizes.

    Args:
        logarithmic: which axes are.
        small: for the first screen, whose caption names the axes.
        cells: of the table, if it says more than the plot.
        versions: of what series are of, for a column of the table.
        times: of the rounds at each size, which laws are fitted to.
    """
    figure = _empty((190 if small else 320) + 18 * len(series))
    for name, style in styles(series, dotted):
        points = sorted(series[name].items())
        figure.add_scatter(
            name=name,
            x=[n for n, _ in points],
            y=[value for _, value in points],
            mode="lines+markers",
            hovertemplate=f"{name}<br>{x} %{{x:,}}: %{{y:.4g}}<extra></extra>",
            **style,
        )
    sizes = sorted({n for points in series.values() for n in points})
    if "x" in logarithmic:
        step = -(-len(sizes) // (4 if small else 6))
        named = sizes[::-1][::step]  # the longest is
        figure.update_xaxes(type="log", tickvals=named, ticktext=[f"{n:,}" for n in named])
    if "y" in logarithmic:
        values = [value for points in series.values() for value in points.values()]
        figure.update_yaxes(type="log", **_powers(values, 5 if small else 8))
    if small:
        figure.update_layout(font={"size": 11}, showlegend=True)
    else:
        figure.update_xaxes(title=x)
        figure.update_yaxes(title=y)
    if cells is None:
        cells = {name: {n: short(value) for n, value in points.items()} for name, points in series.items()}
    sizes = sorted({n for points in cells.values() for n in points})
    known = {name: [(versions or {}).get(name) or "–"] if versions else [] for name in cells}
    rows = [[name, *known[name], *(points.get(n, "–") for n in sizes)] for name, points in cells.items()]
    columns = [f"{y}, by {x}", *(["version"] if versions else []), *(f"{n:,}" for n in sizes)]
    return Figure(_html(figure), see, columns, rows, laws(times or {}))


def laws(times: Mapping[str, fits.Times]) -> list[list[str]]:
    """Of each series that has enough sizes the law t = a + b nᵖ that its times follow: p, a, b, the largest residual,
    the sizes that it is fitted to, and the slopes between neighbours of those within.
    """
    found = []
    for name, mine in times.items():
        law = fits.power_law(mine)
        if law is not None:
            slopes = (fits.local_slope(mine, n) for n in law.sizes[1:-1])
            told = ", ".join(f"{slope.value:.2f}" for slope in slopes if slope is not None)
            window = f"{law.sizes[0]:,} … {law.sizes[-1]:,}"
            values = [str(law.exponent), law.fixed.told(time), law.factor.told("{:.3g} s".format)]
            numbers = [*values, f"{law.residual:.0%}", window, told]
            found.append([name, *numbers])
    return found


def dots(
    series: Mapping[str, Mapping[str, Measured]],
    see: str,
    x: str,
    *,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    versions: Mapping[str, str] | None = None,
    line: float | None = None,
) -> Figure:
    """Values with their quartiles, on a logarithmic axis, in groups.

    Args:
        notes: what hovering shows besides.
        versions: of what groups, or series, are of, for a column of the table.
    """
    groups = list(dict.fromkeys(group for points in series.values() for group in points))
    several = len(series) > 1
    height = 70 + (18 + 13 * len(series)) * len(groups) + (18 * len(series) if several else 0)
    figure = _empty(height, scattermode="group", scattergap=0.3, showlegend=several)
    for name, style in styles(series):
        points, marker = series[name], style["marker"]
        if not several:
            marker = {key: [s["marker"][key] for _, s in styles(points)] for key in marker}
        spread = any(low < high for _, low, high in points.values())
        figure.add_scatter(
            name=name,
            orientation="h",
            mode="markers",
            x=[value for value, _, _ in points.values()],
            y=[wrapped(group) for group in points],
            error_x={
                "visible": spread,
                "type": "data",
                "symmetric": False,
                "array": [high - value for value, _, high in points.values()],
                "arrayminus": [value - low for value, low, _ in points.values()],
                "thickness": 1.5,
                "width": 3,
            },
            text=[(notes or {}).get(name, {}).get(group, "") for group in points],
            hovertemplate=f"%{{y}}<br>{name}<br>{x}: %{{x:.3g}}<br>%{{text}}<extra></extra>",
            marker=marker,
        )
    labels = [wrapped(group) for group in groups]
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=labels)
    reach = [v for points in series.values() for measured in points.values() for v in measured]
    figure.update_xaxes(title=x, type="log", **_powers(reach if line is None else [*reach, line], 6))
    if line is not None:
        figure.add_vline(x=line, line={"dash": "dot", "color": GREY})
    known = versions or {}
    rows = []
    for group in groups:
        for name in (name for name, points in series.items() if group in points):
            value, low, high = series[name][group]
            told = short(value) + (f" ({short(low)}–{short(high)})" if low < high else "")
            version = [known.get(group) or known.get(name) or "–"] if known else []
            rows.append([group, name, *version, told])
    return Figure(_html(figure), see, ["of", "by", *(["version"] if known else []), x], rows)


def median_milliseconds(times: Mapping[int, Iterable[float]]) -> dict[int, float]:
    return {n: statistics.median(rounds) * 1e3 for n, rounds in times.items()}
