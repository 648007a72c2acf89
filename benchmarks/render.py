"""Draws what was measured: one page that holds everything it needs, and a summary in Markdown."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from . import figures, fits
from .claims import FAILS, HOLDS, OPEN, all_claims
from .claims.evidence import Evidence
from .claims.figures import FIGURES
from .figures import Figure
from .suite import OPERATORS, kept_files

TEMPLATES = Path(__file__).parent / "templates"


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["seconds"] is not None]


def speed_plot(results: dict[str, Any]) -> str:
    """Bars: the fraction of the limit's rate, one group per case."""
    rows = [r for r in _measured(results["timings"]) if r["contender"] != results["limit"]]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    figure = figures.empty(barmode="group", height=160 + 120 * len(cases), bargap=0.25)
    for name, colour in figures.colours(r["contender"] for r in rows).items():
        mine = [r for r in rows if r["contender"] == name]
        of = [r["of_limit"] for r in mine]
        figure.add_bar(
            name=name,
            orientation="h",
            y=[figures.wrapped(r["case"]) for r in mine],
            x=[f["median"] for f in of],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [f["high"] - f["median"] for f in of],
                "arrayminus": [f["median"] - f["low"] for f in of],
                "color": figures.GREY,
                "thickness": 1,
            },
            marker_color=colour,
            customdata=[[r["seconds"]["median"] * 1e3, r["rate"] / 1e9] for r in mine],
            hovertemplate="%{x:.3f} of the limit<br>%{customdata[0]:.4g} ms<br>%{customdata[1]:.1f} "
            + f"G{results['unit']}/s",
        )
    wrapped = [figures.wrapped(case) for case in cases]
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=wrapped)
    figure.update_xaxes(title=f"of the rate of {results['limit']}", rangemode="tozero")
    figure.add_vline(x=1, line={"dash": "dot", "color": figures.GREY})
    return figures.to_html(figure)


def growth_plot(results: dict[str, Any], *, rows: str = "growth", small: bool = False) -> Figure:
    """Lines: time against length; small: ours, the limit, and two rivals, without a legend."""
    series: dict[str, dict[int, float]] = {}
    for row in sorted(_measured(results[rows]), key=lambda r: r["length"]):
        series.setdefault(row["contender"], {})[row["length"]] = row["seconds"]["median"] * 1e3
    if small:
        rivals = [n for n in series if not figures.ours(n) and n != results["limit"]][:2]
        mine = [n for n in series if figures.ours(n) and "reference" not in n][:1]
        series = {n: series[n] for n in (*mine, results["limit"], *rivals)}
    see = "Once a call's fixed cost is paid, a line runs parallel to the limit's, whose work grows as the operator's."
    if rows == "shared":
        see = "The same number of tokens in longer and fewer sequences: what is level is linear in n."
    how: dict[str, Any] = {"height": 220, "legend": False} if small else {"height": 420}
    return figures.lines(series, see, "tokens", "milliseconds", dotted=[results["limit"]], **how)


def growth_fits(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Per contender the law t = a + b nᵖ that its times follow, if they were kept and are enough."""
    times: dict[str, dict[int, list[float]]] = {}
    for row in _measured(results["growth"]):
        if "times" in row:
            times.setdefault(row["contender"], {})[row["length"]] = row["times"]
    found = []
    for contender, mine in times.items():
        law = fits.power_law(mine)
        if law is not None:
            slopes = [fits.local_slope(mine, n) for n in law.sizes[1:-1]]
            found.append({"contender": contender, "law": law, "slopes": [s.value for s in slopes if s is not None]})
    return found


def table_plot(rows: list[dict[str, Any]]) -> Figure:
    """Lines: the largest error of a cosine up to a position."""
    named = {"phase in float32": "float32_phase", "kx.rope_tables": "ours"}
    series = {name: {r["position"]: r[key] for r in rows} for name, key in named.items()}
    see = (
        "A phase computed in float32 loses the fast angles long before position one million; one computed in float64 "
        "stays at the rounding of float32."
    )
    return figures.lines(series, see, "position", "largest error of cos", height=380)


def load(quick: bool) -> list[dict[str, Any]]:
    """Every result that is kept, newest first; quick: of quick runs where there are."""
    results = [json.loads(file.read_text()) for file in kept_files(quick)]
    return sorted(results, key=lambda r: r["environment"]["date"], reverse=True)


def claims(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per device on which layers or quality were measured: its name, rows of claims, and their figures."""
    found = []
    for device in dict.fromkeys(r["environment"]["device"] for r in results):
        mine = {r["op"]: r for r in reversed(results) if r["environment"]["device"] == device}
        if not {"layers", "quality"} & set(mine):
            continue
        evidence = Evidence(mine)
        rows = [claim.row(evidence) for claim in all_claims()]
        for row in rows:
            try:
                row["figure"] = FIGURES[row["id"]](evidence) if row["id"] in FIGURES else None
            except LookupError:  # not measured, as the row says
                row["figure"] = None
        count = Counter(a["verdict"] for row in rows for a in row["answers"])
        newest = max((mine[n]["environment"] for n in ("layers", "quality") if n in mine), key=lambda e: e["date"])
        totals = {"holds": count[HOLDS], "fails": count[FAILS], "open": count[OPEN]}
        found.append({"device": device, "environment": newest, "rows": rows, **totals})
    return found


def render(folder: Path, *, quick: bool = False) -> list[Path]:
    """Writes index.html and summary.md into `folder`."""
    results = load(quick)
    if not results:
        raise SystemExit("nothing has been measured: run `python -m benchmarks measure` first")
    operators = [r for r in results if r["op"] in OPERATORS]
    goals = [
        goal.verdict([r for r in operators if r["op"] == name]) for name, op in OPERATORS.items() for goal in op.goals()
    ]
    plots = [
        {
            "speed": speed_plot(r),
            "growth": growth_plot(r),
            "fits": growth_fits(r),
            "shared": growth_plot(r, rows="shared") if "shared" in r else None,
            "tables": table_plot(r["tables"]) if "tables" in r else None,
        }
        for r in operators
    ]
    first = {name: next((r for r in operators if r["op"] == name), None) for name in OPERATORS}
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
            results=operators,
            plots=plots,
            goals=goals,
            claims=claims(results),
            small={name: growth_plot(r, small=True) for name, r in first.items() if r is not None},
            failed=[(r["op"], f) for r in results for f in r.get("failed", [])],
            plotly=get_plotlyjs() if name.endswith("html") else "",
        )
        (folder / name).write_text(text)
        written.append(folder / name)
    return written
