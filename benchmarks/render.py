"""Draws what was measured: one page that holds everything it needs, and a summary in Markdown."""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from .suite import OPERATORS, RESULTS

TEMPLATES = Path(__file__).parent / "templates"
OURS = ["#2563eb", "#60a5fa", "#1e40af", "#93c5fd", "#0ea5e9"]
OTHERS = ["#6b7280", "#9ca3af", "#a8a29e", "#78716c", "#cbd5e1", "#94a3b8"]


def _figure(**layout: Any) -> go.Figure:
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


def _html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def _colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Blues for ours, greys for the others."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ours = [name for name in names if name.startswith("kx")]
    others = [name for name in names if name not in ours]
    return dict(zip(ours, itertools.cycle(OURS), strict=False)) | dict(
        zip(others, itertools.cycle(OTHERS), strict=False)
    )


def _wrapped(text: str) -> str:
    return "<br>".join(textwrap.wrap(text, 24))


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["seconds"] is not None]


def speed_plot(results: dict[str, Any]) -> str:
    """Bars: the fraction of the limit's rate, one group per case."""
    rows = [r for r in _measured(results["timings"]) if r["contender"] != results["limit"]]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    figure = _figure(barmode="group", height=160 + 120 * len(cases), bargap=0.25)
    for name, colour in _colours(rows).items():
        mine = [r for r in rows if r["contender"] == name]
        of = [r["of_limit"] for r in mine]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[_wrapped(r["case"]) for r in mine],
            x=[f["median"] for f in of],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [f["high"] - f["median"] for f in of],
                "arrayminus": [f["median"] - f["low"] for f in of],
                "color": "rgba(128,128,128,0.9)",
                "thickness": 1,
            },
            marker_color=colour,
            customdata=[[r["seconds"]["median"] * 1e3, r["rate"] / 1e9] for r in mine],
            hovertemplate="%{x:.3f} of the limit<br>%{customdata[0]:.4g} ms<br>%{customdata[1]:.1f} "
            + f"G{results['unit']}/s",
        )
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[_wrapped(case) for case in cases])
    figure.update_xaxes(title=f"of the rate of {results['limit']}", rangemode="tozero")
    figure.add_vline(x=1, line={"dash": "dot", "color": "rgba(128,128,128,0.9)"})
    return _html(figure)


def growth_plot(results: dict[str, Any]) -> str:
    """Lines: time against length, both logarithmic."""
    rows = results["growth"]
    figure = _figure(height=420)
    for name, colour in _colours(_measured(rows)).items():
        mine = sorted((r for r in _measured(rows) if r["contender"] == name), key=lambda r: r["length"])
        figure.add_scatter(
            name=name,
            x=[r["length"] for r in mine],
            y=[r["seconds"]["median"] * 1e3 for r in mine],
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": "dot" if name == results["limit"] else "solid"},
            hovertemplate="T = %{x}: %{y:.4g} ms",
        )
    figure.update_xaxes(type="log", title="tokens T")
    figure.update_yaxes(type="log", title="milliseconds")
    return _html(figure)


def table_plot(rows: list[dict[str, Any]]) -> str:
    """Lines: the largest error of a cosine up to a position."""
    figure = _figure(height=380)
    for key, name, colour in (("float32_phase", "phase in float32", OTHERS[0]), ("ours", "kx.rope_tables", OURS[0])):
        figure.add_scatter(
            name=name,
            x=[r["position"] for r in rows],
            y=[r[key] for r in rows],
            mode="lines+markers",
            line={"color": colour, "width": 2.5},
            hovertemplate="position %{x}: %{y:.2g}",
        )
    figure.update_xaxes(type="log", title="position")
    figure.update_yaxes(type="log", title="largest error of cos", exponentformat="power")
    return _html(figure)


def load() -> list[dict[str, Any]]:
    """Every result that is kept, newest first."""
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/*.json"))]
    return sorted(results, key=lambda r: r["environment"]["date"], reverse=True)


def render(folder: Path) -> list[Path]:
    """Writes index.html and summary.md into `folder`."""
    results = load()
    if not results:
        raise SystemExit("nothing has been measured: run `python -m benchmarks measure` first")
    goals = [
        goal.verdict([r for r in results if r["op"] == name]) for name, op in OPERATORS.items() for goal in op.goals()
    ]
    plots = [
        {
            "speed": speed_plot(r),
            "growth": growth_plot(r),
            "tables": table_plot(r["tables"]) if "tables" in r else "",
        }
        for r in results
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for template, name in (("report.html", "index.html"), ("summary.md", "summary.md")):
        text = environment.get_template(template).render(
            results=results, plots=plots, goals=goals, plotly=get_plotlyjs() if name.endswith("html") else ""
        )
        (folder / name).write_text(text)
        written.append(folder / name)
    return written
