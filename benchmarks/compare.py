"""Two runs side by side: what got slower or faster by more than the noise of both, and what takes more memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from . import suite


def _timed(results: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, float]]]:
    for kind in ("timings", "growth", "shared"):
        for row in results.get(kind, []):
            if row["seconds"] is not None:
                yield (kind, row["case"], row["contender"]), row["seconds"]
    for row in results.get("times", []):
        if "seconds" in row:
            what = f"{row['level']}, H = {row['width']}, n = {row['length']}, {row['what']}"
            yield ("layers", what, f"{row['name']}, {row['by']}"), row["seconds"]
    for kind in ("decoding", "rotary"):
        for row in results.get(kind, []):
            if "seconds" in row:
                yield (kind, str(row.get("length", "")), row["name"]), row["seconds"]


def _held(results: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    for kind in ("memory", "training"):
        for row in results.get(kind, []):
            who = row.get("contender") or f"{row['name']}, {row['by']}"
            what = row.get("case") or f"{row['level']}, H = {row['width']}, n = {row['length']}"
            for which in ("peak", "saved"):
                if row.get(which) is not None:
                    yield (f"{kind}, {which}", what, who), row[which]


def bytes_rows(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Each size that both have: new over old, which has no noise."""
    before, found = dict(_held(old)), []
    for key, now in _held(new):
        if key in before:
            was = before[key]
            ratio = now / was if was else math.inf if now else 1.0
            found.append(
                {"key": key, "ratio": ratio, "change": "more" if ratio > 1 else "less" if ratio < 1 else "same"}
            )
    return found


def rows(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Each time that both have: new over old, and the same of opposite quartiles."""
    before, found = dict(_timed(old)), []
    for key, now in _timed(new):
        if key in before:
            was = before[key]
            ratio = now["median"] / was["median"]
            low, high = now["low"] / was["high"], now["high"] / was["low"]
            change = "slower" if low > 1 else "faster" if high < 1 else "within noise"
            found.append({"key": key, "ratio": ratio, "low": low, "high": high, "change": change})
    return found


def table(old: dict[str, Any], device: str, quick: bool) -> str:
    """An earlier run beside the one that is kept of the same on this device."""
    new_file = suite.kept_file(old["op"], device, quick)
    if not new_file.exists():
        raise SystemExit(f"{new_file} does not exist: measure {old['op']} first")
    new = json.loads(new_file.read_text())
    found = rows(old, new) + bytes_rows(old, new)
    shown = [
        [*r["key"], f"{r['ratio']:.2f}" + (f" ({r['low']:.2f}–{r['high']:.2f})" if "low" in r else ""), r["change"]]
        for r in sorted(found, key=lambda r: -abs(r["ratio"] - 1))
    ]
    where = [f"{r['environment']['device']}, commit {r['environment']['commit']}" for r in (old, new)]
    head = f"{old['op']}: {where[1]}, over {where[0]}\n"
    if not found:
        return head + "there are no times or sizes that both have"
    return head + tabulate(shown, ["part", "case", "contender", "new / old (opposite quartiles)", "change"])
