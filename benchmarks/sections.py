"""What the page draws beside claims: operators, whole layers, and small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from . import figures, fits, measure, models, nystrom_attention, units
from .claims import FAILS, HOLDS
from .claims import figures as claim_figures
from .claims.cost import added, place
from .figures import Figure, Measured, of_bound

Results = dict[str, Any]
BESIDE = ("attention", "feed-forward", "projections")  # drawn in eager torch as well
DRAWN = {*BESIDE, "linear attention", "Performer", "Nyström, m = 64", "GAU", "FLASH", "GAU × 2", "FLASH × 2"}
SAME_LOSS = 1e-5  # nats per byte
BEYOND = 1.1  # of its roofline: more is no noise


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("seconds")]


def _quartiles(spread: dict[str, float], factor: float = 1.0) -> Measured:
    return spread["median"] * factor, spread["low"] * factor, spread["high"] * factor


def known(rows: list[dict[str, Any]]) -> str:
    """How many medians are known as well as rounds try to, and how well the worst is."""
    found = [measure.precision(row["times"]) for row in measured(rows) if "times" in row]
    if not found:
        return ""
    enough, limit = sum(x <= measure.PRECISION for x in found), 100 * measure.PRECISION
    return f" {enough} of {len(found)} medians are known to {limit:g} %, the worst to {100 * max(found):.2g} %."


def beyond(results: Results) -> str:
    """How many times are less than their roofline allows, if any are."""
    places = ("timings", "growth", "shared", "times", "decoding", "rotary")
    rows = [row for place in places for row in measured(results.get(place, [])) if row.get("bound")]
    count = sum(row["bound"] > BEYOND * row["seconds"]["median"] for row in rows)
    why = "it was measured in slow moments, or what they read was in caches"
    return f"{count} of {len(rows)} times are shorter than their roofline by more than 10 %: {why}." if count else ""


# Operators


def speed(results: Results) -> Figure | None:
    """The fraction of the limit's rate, one group per case."""
    series: dict[str, dict[str, Measured]] = {}
    notes: dict[str, dict[str, str]] = {}
    versions: dict[str, str] = {}
    for row in measured(results.get("timings", [])):
        if row["contender"] != results["limit"]:
            series.setdefault(row["contender"], {})[row["case"]] = _quartiles(row["of_limit"])
            note = f"{units.time(row['seconds']['median'])}, {row['rate'] / 1e9:.1f} G{results['unit']}/s"
            note += f", {of_bound(row)} of its roofline" if of_bound(row) else ""
            notes.setdefault(row["contender"], {})[row["case"]] = note
            versions |= {row["contender"]: row["version"]} if row.get("version") else {}
    if not series:
        return None
    does = "moves as many bytes" if results["unit"] == "B" else "is the products alone"
    see = (
        f"Further right is faster. What lies on the dotted line is as fast as {results['limit']}, which {does}; "
        "whiskers are quartiles."
    )
    return figures.dots(series, see, "rate, of the limit's", notes=notes, versions=versions, line=1)


def variant(row: dict[str, Any]) -> str:
    """What is special about a case of growing length: "full" of "full, n = 512"."""
    return row["case"].rpartition(", ")[0]


def variants(results: Results, rows: str) -> list[str]:
    return list(dict.fromkeys(variant(row) for row in results.get(rows, [])))


def grown(results: Results, rows: str) -> list[tuple[str, Figure]]:
    """Titles and figures of times against lengths, one of each variant."""
    found = [(name, growth(results, rows=rows, of=name)) for name in variants(results, rows)]
    return [(name, figure) for name, figure in found if figure is not None]


def overtaken(results: Results, of: str) -> str:
    """From which length on the fastest of ours is faster than softmax attention, if both were measured."""
    times: dict[str, dict[int, list[float]]] = {}
    for row in measured(results["growth"]):
        if variant(row) == of and "times" in row:
            times.setdefault(row["contender"], {})[row["length"]] = row["times"]
    softmax = times.get("softmax attention (SDPA)", {})
    mine = next((times[name] for name in times if figures.ours(name) and "reference" not in name), {})
    found = fits.crossover(softmax, mine)
    return f" Ours overtakes softmax attention {place(found).replace('n =', 'at n =', 1)}." if found else ""


def growth(results: Results, *, rows: str = "growth", of: str = "", small: bool = False) -> Figure | None:
    """Time against length; small: ours, the limit, and two rivals."""
    limit = results["limit"]
    series: dict[str, dict[int, float]] = {}
    cells: dict[str, dict[int, str]] = {}
    times: dict[str, dict[int, list[float]]] = {}
    versions: dict[str, str] = {}
    for row in sorted(measured(results.get(rows, [])), key=lambda r: r["length"]):
        if variant(row) != of:
            continue
        name, n, seconds = row["contender"], row["length"], row["seconds"]["median"]
        series.setdefault(name, {})[n] = seconds * 1e3
        cells.setdefault(name, {})[n] = f"{units.time(seconds)}, {units.short(row['rate'] / 1e9)} G{results['unit']}/s"
        cells[name][n] += f" ({of_bound(row)})" if of_bound(row) else ""
        versions |= {name: row["version"]} if row.get("version") else {}
        if "times" in row:
            times.setdefault(name, {})[n] = row["times"]
    if limit not in series:
        return None
    see = "Look whether, past a fixed cost, a line is parallel to the limit's, whose work grows as the operator's."
    if small:
        rivals = [n for n in series if not figures.ours(n) and n != limit][:2]
        mine = [n for n in series if figures.ours(n) and "reference" not in n][:1]
        series = {n: series[n] for n in (*mine, limit, *rivals)}
        see, times = f"{results['op']}: milliseconds against tokens, by {', '.join(series)}", {}
    elif rows == "shared":
        see = "The same number of tokens in longer and fewer sequences: what is level is linear in n."
    else:
        see += overtaken(results, of)
    see += "" if small else known([row for row in results[rows] if variant(row) == of])
    return figures.lines(
        series,
        see,
        "tokens n",
        "milliseconds",
        dotted=[limit],
        small=small,
        cells=cells,
        versions=versions,
        times=times,
    )


def landmarks(results: Results) -> Figure | None:
    """Of Nyström attention: time against landmarks, of cases that differ by these alone."""
    where, sizes = nystrom_attention.over_landmarks(results["environment"]["device_kind"])
    times: dict[str, dict[int, list[float]]] = {}
    versions: dict[str, str] = {}
    for row in measured(results.get(where, [])):
        if row["case"] in sizes and "times" in row and row["contender"] != results["limit"]:
            times.setdefault(row["contender"], {})[sizes[row["case"]]] = row["times"]
            versions |= {row["contender"]: row["version"]} if row.get("version") else {}
    series = {name: figures.median_milliseconds(mine) for name, mine in times.items()}
    if not series:
        return None
    see = "Look whether a line rises with the landmarks or faster: products with them grow as m, the inverse as m³."
    see += known([row for row in results[where] if row["case"] in sizes])
    return figures.lines(series, see, "landmarks m", "milliseconds", versions=versions, times=times)


def products(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Of each pass that has them: operations as the specification, torch's counter and the meter have them; if they
    differ by what they are said to, and no fewer bytes are moved than have to be, they agree.
    """
    found = []
    for row in rows:
        if "flops" not in row:
            continue
        flops, moved, least = row["flops"], row["loaded"] + row["stored"], row["least"]
        cells = {"call": f"{row['op']}, {row['case']}", "pass": row["pass"], "flops": f"{flops / 1e6:.2f}"}
        cells["moved"] = "–" if least is None else f"{moved / least:.2f}×"
        agree = least is None or moved >= least
        for key, counted in (("torch", row["torch"]), ("triton", row["dot_flops"])):
            beside = row[f"beside_{key}"]
            cells[key] = f"{counted / flops:.2f}×"
            cells[f"beside_{key}"] = "; ".join(f"{extra / flops:+.2f}: {why}" for why, extra in beside.items()) or "–"
            agree = agree and counted == flops + sum(beside.values())
        found.append(cells | {"verdict": HOLDS if agree else FAILS})
    return found


def tables(rows: list[dict[str, Any]]) -> Figure:
    """The largest error of a cosine up to a position."""
    named = {"phase in float32": "float32_phase", "kx.rope_tables": "ours"}
    series = {name: {r["position"]: r[key] for r in rows} for name, key in named.items()}
    last = max(rows, key=lambda r: r["position"])
    told = " and ".join(f"{last[key]:.1g} by {name}" for name, key in named.items())
    see = f"The phase in float32, or in float64 and rounded at the end. At position {last['position']:,}: {told}."
    return figures.lines(series, see, "position", "largest error of cos")


def operator(results: Results) -> dict[str, Any]:
    """Steps that failed left nothing."""
    empty: Results = {"timings": [], "host": [], "memory": [], "accuracy": [], "counts": [], "import": None}
    empty |= {"roofline": None, "machine_code": {"rows": [], "reason": "this step failed"}}
    results = empty | results
    return {
        "results": results | {
            "host": [r for r in results["host"] if "median" in r],
            "memory": [r for r in results["memory"] if "peak" in r],
        },
        "speed": speed(results),
        "growth": grown(results, "growth"),
        "shared": grown(results, "shared"),
        "beyond": beyond(results),
        "landmarks": landmarks(results) if results["op"] == "nystrom_attention" else None,
        "products": products(results["counts"]),
        "tables": tables(results["tables"]) if results.get("tables") else None,
    }  # fmt: skip


# Layers


def _whole(name: str, level: str) -> bool:
    """Whether a part takes a feed-forward layer beside it: two gated units do without."""
    return level == "layer" and name not in ("feed-forward", "projections") and not name.endswith("× 2")


def layer_times(results: Results, level: str, width: int, what: str) -> Figure | None:
    """Times of mixing, or of layers with their feed-forward layer; None where no two lengths were measured."""
    key = (level, width, what)
    rows = [r for r in measured(results["times"]) if (r["level"], r["width"], r["what"]) == key]
    forward = {(r["length"], r["by"]): r for r in rows if r["name"] == "feed-forward"}
    series: dict[str, dict[int, float]] = {}
    cells: dict[str, dict[int, str]] = {}
    times: dict[str, dict[int, list[float]]] = {}
    versions: dict[str, str] = {}
    for row in rows:
        name, n, beside = row["name"], row["length"], []
        if _whole(name, level):
            by = row["by"] if row["by"] == "torch.compile" else "eager"  # like beside like
            if (n, by) not in forward:
                continue
            name, beside = f"{name} and feed-forward", [forward[n, by]]
        name = f"{name}, {row['by']}"
        together = [row, *beside]
        seconds = sum(r["seconds"]["median"] for r in together)
        cells.setdefault(name, {})[n] = units.time(seconds)
        if all(r.get("version") for r in together):
            versions[name] = ", ".join(dict.fromkeys(r["version"] for r in together))
        if all(r.get("bound") for r in together):
            cells[name][n] += f" ({sum(r['bound'] for r in together) / seconds:.2f})"
        if row["name"] in DRAWN and (row["by"] in ("ours", "fused") or row["name"] in BESIDE):
            series.setdefault(name, {})[n] = seconds * 1e3
            times.setdefault(name, {})[n] = added(*({n: r["times"]} for r in together))[n]
    lengths = {n for points in series.values() for n in points}
    if len(lengths) < 2:
        return None
    see = _fastest({name: points for name, points in series.items() if not name.startswith(BESIDE[1:])})
    if any("(" in cell for points in cells.values() for cell in points.values()):
        see += " In the table, in brackets: how much of its roofline each time is."
    see += known(rows)
    return figures.lines(series, see, "tokens n", "milliseconds", cells=cells, versions=versions, times=times)


def _fastest(series: dict[str, dict[int, float]]) -> str:
    """At the longest length that several reached: which of them is the fastest, and what the slowest takes."""
    reached = {n: [name for name in series if n in series[name]] for points in series.values() for n in points}
    n = max((n for n, names in reached.items() if len(names) > 1), default=None)
    if n is None:
        return "Too few were measured to compare them."
    best, *_, last = sorted(reached[n], key=lambda name: series[name][n])
    told = f"At {n:,} tokens {best}, is the fastest of these with {units.time(series[best][n] / 1e3)}"
    return f"{told}; {last}, is the slowest with {units.time(series[last][n] / 1e3)}."


def layer_memory(results: Results, level: str) -> Figure | None:
    """What parts hold, at the longest length that was measured."""
    rows = [r for r in results["memory"] if r["level"] == level and "peak" in r]
    if not rows:
        return None
    n = max(r["length"] for r in rows)
    rows = sorted((r for r in rows if r["length"] == n), key=lambda r: r["saved"])
    named = {"held at most, forward": "peak", "kept for the backward pass": "saved"}
    series: dict[str, dict[str, Measured]] = {
        told: {f"{r['name']}, {r['by']}": (r[key] / 1e6,) * 3 for r in rows if r[key]} for told, key in named.items()
    }
    least, most = (f"{r['name']} ({r['by']}) {units.size(r['saved'])}" for r in (rows[0], rows[-1]))
    see = (
        f"Beyond inputs and weights, at {n:,} tokens of width {rows[0]['width']}. For the backward pass {least} is the "
        f"least that is kept, {most} the most."
    )
    versions = {f"{r['name']}, {r['by']}": r["version"] for r in rows if r.get("version")}
    return figures.dots(series, see, "MB", versions=versions)


BATCH = "Of a batch of 8, if nothing else is said"


def _grown(series: dict[str, dict[int, float]], told: Callable[[float], str]) -> str:
    """What each is at the shortest and at the longest context that it was measured at."""
    ends = {name: (min(points), max(points)) for name, points in series.items()}
    return "; ".join(
        f"{name}, {told(series[name][first])} at {first:,} and {told(series[name][last])} at {last:,}"
        for name, (first, last) in ends.items()
    )


def decoding(results: Results) -> Figure | None:
    rows = measured(results["decoding"])
    times: dict[str, dict[int, list[float]]] = {}
    cells: dict[str, dict[int, str]] = {}
    versions: dict[str, str] = {}
    for row in rows:
        name, n = claim_figures.decoder(row["name"]), row["length"]
        times.setdefault(name, {})[n] = row["times"]
        share = f" ({of_bound(row)})" if of_bound(row) else ""
        cells.setdefault(name, {})[n] = units.time(row["seconds"]["median"]) + share
        versions |= {name: row["version"]} if row.get("version") else {}
    if not rows:
        return None
    series = {name: figures.median_milliseconds(mine) for name, mine in times.items()}
    see = f"{BATCH}: {_grown(series, lambda x: units.time(x / 1e3))}."
    see += " In the table, in brackets: how much of its roofline each time is." if "bound" in rows[0] else ""
    see += known(rows)
    return figures.lines(series, see, "context", "milliseconds", cells=cells, versions=versions, times=times)


def decoding_memory(results: Results) -> Figure:
    series: dict[str, dict[int, float]] = {}
    for row in results["decoding"]:
        series.setdefault(claim_figures.decoder(row["name"]), {})[row["length"]] = row["bytes"] / 1e6
    see = f"{BATCH}: {_grown(series, lambda x: units.size(x * 1e6))}."
    return figures.lines(series, see, "context", "MB")


def rotary(results: Results) -> Figure | None:
    rows = measured(results["rotary"])
    milliseconds = {r["name"]: _quartiles(r["seconds"], 1e3) for r in rows}
    least, added = "an embedding added", milliseconds.get("an embedding added")
    if added is None:
        return None
    told = "; ".join(f"{name} {m[0] / added[0]:.1f}" for name, m in milliseconds.items() if name != least)
    see = f"Positions for q and k of [4, 2048, 12, 64]; times as long as an added embedding: {told}."
    notes = {r["name"]: f"{of_bound(r)} of its roofline" for r in rows if of_bound(r)}
    see += (
        " Of its roofline each is: " + "; ".join(f"{n} {x.split()[0]}" for n, x in notes.items()) + "." if notes else ""
    )
    see += known(rows)
    versions = {r["name"]: r["version"] for r in rows if r.get("version")}
    return figures.dots({"": milliseconds}, see, "milliseconds", notes={"": notes}, versions=versions)


def layers(results: Results) -> list[tuple[str, Figure]]:
    """Titles and figures of whole layers and their parts."""
    times = results.get("times", [])
    found: list[tuple[str, Figure | None]] = []
    for level, name in (("layer", "Layers"), ("mixing", "Mixing tokens alone")):
        for what, passes in (("forward", "forward"), ("both", "forward and backward")):
            for width in sorted({r["width"] for r in times}):
                found.append((f"{name}, width {width}, {passes}", layer_times(results, level, width, what)))
    if "memory" in results:
        found.append(("Memory of layers", layer_memory(results, "layer")))
        found.append(("Memory of mixing tokens", layer_memory(results, "mixing")))
    if "decoding" in results:
        found.append(("Decoding, time per token", decoding(results)))
        found.append(("Decoding, memory", decoding_memory(results)))
    if "rotary" in results:
        found.append(("Rotary embedding", rotary(results)))
    return [(title, figure) for title, figure in found if figure is not None]


def missing(parts: dict[str, Results]) -> list[list[str]]:
    """Rows without a number, beside those of the tables of operators: what, of whom, and why."""
    found = []
    for results in parts.values():
        for where in ("growth", "shared", "host", "memory", "times", "training", "decoding", "rotary"):
            for row in results.get(where, []):
                if "reason" in row and row.get("kind") != "limit":
                    what = row.get("case") or ", ".join(
                        f"{told}{row[key]}"
                        for key, told in (("level", ""), ("width", "H = "), ("length", "n = "), ("what", ""))
                        if key in row
                    )
                    who = row.get("contender") or ", ".join(filter(None, (row["name"], row.get("by"))))
                    found.append([f"{results['op']}, {where}", what, who, row["reason"]])
    return found


# Small models


def logs() -> list[dict[str, Any]]:
    """How each kept model was trained."""
    files = {name: models.WEIGHTS / f"{name}.json" for name in (*models.MODELS, *models.COPYING)}
    return [json.loads(file.read_text()) for file in files.values() if file.exists()]


def training() -> Figure:
    attention = ("roformer", "roformer-masked", "roformer-copy")
    series = {
        log["name"] + (", ours" if log["name"] not in attention else ""): {p["step"]: p["loss"] for p in log["curve"]}
        for log in logs()
    }
    ends = "; ".join(f"{name} {points[max(points)]:.2f}" for name, points in series.items())
    see = f"Nats per byte while training, each point the mean of 50 steps. They end at: {ends}."
    return figures.lines(series, see, "step", "nats per byte", logarithmic="")


def losses(quality: Results | None) -> list[dict[str, Any]]:
    """Of each model, by our operators and by the references: when it was trained, and on this device."""
    here = {r["name"]: r for r in (quality or {}).get("trained", [])}
    found = []
    for log in logs():
        name = log["name"]
        pairs = [("after training", log["held_out"]["ours"], log["held_out"]["reference"])]
        if name in here:
            pairs.append(("on this device", here[name]["loss"], here[name]["reference"]))
        for when, ours, reference in pairs:
            verdict = HOLDS if abs(ours - reference) <= SAME_LOSS else FAILS
            row = {"name": name, "parameters": log["parameters"], "when": when, "ours": ours, "reference": reference}
            found.append({**row, "verdict": verdict})
    return found
