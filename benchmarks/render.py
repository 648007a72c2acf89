"""Draws what was measured: one page that holds everything it needs, and a summary in Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from . import figures, sections, suite, units
from .claims import FAILS, HOLDS, OPEN, all_claims
from .claims.evidence import Evidence
from .claims.figures import of_claim
from .suite import NAMES, OPERATORS

TEMPLATES = Path(__file__).parent / "templates"
Parts = dict[str, dict[str, Any]]  # the results of one device, by what was measured


def load(quick: bool = False, mine: str | None = None, files: Sequence[Path] = ()) -> list[Parts]:
    """The results in these files, or all that are kept: of device `mine` first, then of the best-measured: most whole
    runs, then most rows.
    """
    found: dict[str, Parts] = {}
    for file in files or suite.kept_files(quick):
        results = json.loads(file.read_text())
        found.setdefault(results["environment"]["device"], {})[results["op"]] = results

    def complete(parts: Parts) -> tuple[bool, int, int, int]:
        rows = sum(len(value) for results in parts.values() for value in results.values() if isinstance(value, list))
        is_mine = any(results["environment"]["device"] == mine for results in parts.values())
        return is_mine, sum(not results["quick"] for results in parts.values()), len(parts), rows

    ordered = [{name: parts[name] for name in NAMES if name in parts} for parts in found.values()]
    return sorted(ordered, key=complete, reverse=True)


def _said(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{key} {_said(x)}" for key, x in fact.items())
    return "unknown" if fact is None else ("no", "yes")[fact] if isinstance(fact, bool) else str(fact)


def facts(parts: Parts) -> dict[str, Any]:
    """Of the environment: what all parts share, and what differs between them."""
    beside = ("quick", "wall_seconds", "allowed_seconds")
    environments = {n: r["environment"] | {key: r[key] for key in beside if key in r} for n, r in parts.items()}
    keys = list(dict.fromkeys(key for e in environments.values() for key in e))
    told = {key: [_said(e.get(key)) for e in environments.values()] for key in keys}
    # whose run it was is told of each part, even if all agree
    differ = [key for key in keys if key in ("commit", "uncommitted_changes", "date") or len(set(told[key])) > 1]
    return {
        "same": {key: told[key][0] for key in keys if key not in differ},
        "names": list(parts),
        "differ": {key: told[key] for key in differ},
        "dates": sorted(e["date"] for e in environments.values()),
        "commits": list(dict.fromkeys(e["commit"] or "unknown" for e in environments.values())),
        "changed": [name for name, e in environments.items() if e["uncommitted_changes"]],
    }


def claims(parts: Parts, only: Collection[str] = ()) -> dict[str, Any] | None:
    """Rows of claims, all or only these, and their figures, if layers or quality were measured."""
    if not {"layers", "quality"} & set(parts):
        return None
    evidence = Evidence(parts)
    rows = [claim.row(evidence) for claim in all_claims() if not only or claim.id in only]
    for row in rows:
        row["figures"] = list(of_claim(row["id"], evidence))
    count = Counter(a["verdict"] for row in rows for a in row["answers"])
    return {"rows": rows, "holds": count[HOLDS], "fails": count[FAILS], "open": count[OPEN]}


def device(parts: Parts, only: Collection[str] = ()) -> dict[str, Any]:
    """What the page says of one device."""
    return {
        "name": next(iter(parts.values()))["environment"]["device"],
        "facts": facts(parts),
        "claims": claims(parts, only),
        "layers": sections.layers(parts["layers"]) if "layers" in parts else [],
        "layers_roofline": parts.get("layers", {}).get("roofline"),
        "layers_beyond": sections.beyond(parts.get("layers", {})),
        "losses": sections.losses(parts.get("quality")),
        "operators": [sections.operator(parts[name]) for name in OPERATORS if name in parts],
        "missing": sections.missing(parts),
        "failed": [(name, f) for name, r in parts.items() for f in r.get("failed", [])],
    }


def write(file: Path, text: str) -> None:
    """Whole or not at all; a disk that is full is said in one line."""
    new = file.with_suffix(".new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SystemExit(f"{file} cannot be written: {error.strerror}. What was measured is kept.") from error


def render(
    folder: Path,
    *,
    quick: bool = False,
    mine: str | None = None,
    files: Sequence[Path] = (),
    only: Collection[str] = (),
) -> list[Path]:
    """Writes index.html and summary.md into `folder`.

    Args:
        quick: a quick run's results, where there are some.
        mine: the device that comes first.
        files: of results, if not all that are kept.
        only: claims, if not all.
    """
    kept = load(quick, mine, files)
    if not kept:
        raise SystemExit("nothing has been measured: run `python -m benchmarks measure` first")
    goals = [
        goal.verdict([parts[name] for parts in kept if name in parts])
        for name, op in OPERATORS.items()
        for goal in op.goals()
    ]
    first = {name: sections.growth(kept[0][name], small=True) if name in kept[0] else None for name in OPERATORS}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": units.short, "time": units.time, "size": units.size, "of_bound": figures.of_bound}
    shown = {
        "devices": [device(parts, only) for parts in kept],
        "goals": goals,
        "small": first,
        "training": sections.training(),
    }
    written = []
    for template, name in (("report.html", "index.html"), ("summary.md", "summary.md")):
        text = environment.get_template(template).render(
            **shown, plotly=get_plotlyjs() if name.endswith("html") else ""
        )
        write(folder / name, text)
        written.append(folder / name)
    return written
