"""Plots, each as HTML that takes its colours from the page. Beside each stands a table for those who cannot see it."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

OURS = ["#2563eb", "#60a5fa", "#1e40af", "#93c5fd", "#0ea5e9"]
OTHERS = ["#6b7280", "#b45309", "#a8a29e", "#78716c", "#d97706", "#94a3b8"]
GREY = "rgba(128,128,128,0.9)"


@dataclass(frozen=True)
class Figure:
    """A plot, what to see in it, and its numbers."""

    html: str
    see: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    colours: dict[str, str] = field(default_factory=dict)


def empty(**layout: Any) -> go.Figure:
    figure = go.Figure()
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        hoverlabel={"font": {"color": "white"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(**layout)
    return figure


def to_html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def ours(name: str) -> bool:
    return name.startswith("kx") or name.endswith("ours")


def colours(names: Iterable[str]) -> dict[str, str]:
    """Blues for ours, greys and browns for the others."""
    mine, others = itertools.cycle(OURS), itertools.cycle(OTHERS)
    return {name: next(mine if ours(name) else others) for name in dict.fromkeys(names)}


def wrapped(text: str) -> str:
    return "<br>".join(textwrap.wrap(text, 24))


def lines(
    series: Mapping[str, Mapping[int, float]],
    see: str,
    x: str,
    y: str,
    *,
    height: int = 400,
    dotted: Iterable[str] = (),
    legend: bool = True,
    logarithmic: bool = True,
) -> Figure:
    """Values against sizes."""
    figure, dotted = empty(height=height, showlegend=legend), set(dotted)
    for name, colour in colours(series).items():
        points = sorted(series[name].items())
        figure.add_scatter(
            name=name,
            x=[n for n, _ in points],
            y=[value for _, value in points],
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": "dot" if name in dotted else "solid"},
            marker={"size": 5},
            hovertemplate=f"{name}<br>{x} %{{x:,}}: %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(type="log", title=x)
    figure.update_yaxes(type="log" if logarithmic else "linear", title=y)
    sizes = sorted({n for points in series.values() for n in points})
    rows = [[f"{n:,}", *(f"{points[n]:.4g}" if n in points else "–" for points in series.values())] for n in sizes]
    return Figure(to_html(figure), see, [x, *series], rows, colours(series))


def median_milliseconds(times: Mapping[int, Iterable[float]]) -> dict[int, float]:
    return {n: statistics.median(rounds) * 1e3 for n, rounds in times.items()}
