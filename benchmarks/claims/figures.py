"""What claims look like: a plot for those that are about growth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .. import figures, layers, units
from ..figures import Figure
from .cost import NYSTROM, PAPER, added, layer, scaled
from .evidence import Evidence, H

MS = "milliseconds"


def _times(e: Evidence, chosen: list[tuple[str, str, str]], see: str) -> Figure:
    """chosen: level, name, by; those that were not measured are left out."""
    series = {}
    for level, name, by in chosen:
        try:
            series[f"{name}, {by}"] = figures.median_milliseconds(e.times(level, name, by))
        except LookupError:
            continue
    if not series:
        raise LookupError("nothing was measured")
    return figures.lines(series, see, "tokens n", MS)


def feed_forward(e: Evidence) -> Figure:
    chosen = [("layer", "feed-forward", "eager"), ("layer", "attention", "eager"), ("layer", "attention", "fused")]
    see = "Attention costs more from where it crosses the feed-forward layer: n = 1,536 is said for H = 768."
    return _times(e, chosen, see)


def mixing(e: Evidence) -> Figure:
    rest = added(e.times("layer", "projections", "eager"), e.times("layer", "feed-forward", "eager"))
    series = {"projections and feed-forward": rest}
    for by in ("eager", "fused"):
        series[f"mixing, {by}"] = e.times("mixing", "attention", by)
    shown = {name: figures.median_milliseconds(t) for name, t in series.items()}
    return figures.lines(
        shown,
        "Mixing tokens is the larger part of a layer where its line is the upper one: beyond n = 4,608, it is said.",
        "tokens n",
        MS,
    )


def ceiling(e: Evidence) -> Figure:
    rest = figures.median_milliseconds(
        added(e.times("layer", "projections", "eager"), e.times("layer", "feed-forward", "eager"))
    )
    series = {"1 + n/(6H)": {n: 1 + n / (6 * H) for n in rest}}
    for by in ("eager", "fused"):
        whole = figures.median_milliseconds(layer(e, by))
        series[f"measured, {by}"] = {n: whole[n] / rest[n] for n in whole if n in rest}
    see = "How many times as fast a layer is without any mixing; dotted: by its products."
    return figures.lines(series, see, "tokens n", "times", dotted=["1 + n/(6H)"])


def linear(e: Evidence) -> Figure:
    names = ("linear attention", "linear attention, keys 4d", "linear attention, keys and values 4d")
    chosen = [("mixing", "attention", "eager"), ("mixing", "attention", "fused")]
    chosen += [("mixing", name, by) for name in names for by in ("eager", "ours")]
    return _times(
        e,
        chosen,
        "Linear attention pays from where softmax attention crosses its line: at n = 64 for keys of d, it is said.",
    )


def nystrom(e: Evidence) -> Figure:
    chosen = [("mixing", "attention", "eager"), ("mixing", "attention", "fused")]
    chosen += [("mixing", f"Nyström, m = {m}", "ours") for m in layers.LANDMARKS]
    said = ", ".join(f"{n:,} (m = {m})" for m, n in NYSTROM.items())
    return _times(e, chosen, f"Landmarks pay from where attention crosses their line: at n = {said}, it is said.")


def table_of_the_paper(e: Evidence) -> Figure:
    chosen = [("attention", "eager"), *((name, "ours") for name in PAPER if name.startswith("Nyström"))]
    series = {f"{name}, {by}": figures.median_milliseconds(e.times("mixing", name, by)) for name, by in chosen}
    paper = {f"{name}, paper": {n: ms for n, (_, ms) in rows.items()} for name, rows in PAPER.items()}
    see = "The paper's milliseconds (dotted) are of a GPU and of whole modules: compare how far lines lie apart."
    return figures.lines(series | paper, see, "tokens n", MS, dotted=paper)


def pair(e: Evidence) -> Figure:
    series = {f"attention and feed-forward, {by}": layer(e, by) for by in ("eager", "fused")}
    for name in ("GAU × 2", "FLASH × 2"):
        series |= {f"{name}, {by}": e.times("layer", name, by) for by in ("eager", "ours")}
    shown = {name: figures.median_milliseconds(t) for name, t in series.items()}
    see = "Two units beside attention and a feed-forward layer, H = 768: eager against eager, fused against ours."
    return figures.lines(shown, see, "tokens n", MS)


def performer(e: Evidence) -> Figure:
    forward = e.times("layer", "feed-forward", "eager")
    series = {
        "attention, fused, and feed-forward": layer(e, "fused"),
        "attention, eager, and feed-forward": layer(e, "eager"),
    }
    series["Performer and feed-forward, ours"] = added(e.times("layer", "Performer", "ours"), forward)
    series["1.5 times Performer's"] = scaled(series["Performer and feed-forward, ours"], 1.5)
    shown = {name: figures.median_milliseconds(t) for name, t in series.items()}
    see = "The advantage is clear where attention is above the dotted line."
    return figures.lines(shown, see, "tokens n", MS, dotted=["1.5 times Performer's"])


def decoder(name: str) -> str:
    return f"{name}, ours" if name.startswith("linear attention") else name


def decoding(e: Evidence) -> Figure:
    rows = [r for r in e.rows("decoding") if "times" in r]
    series = {
        decoder(name): figures.median_milliseconds({r["length"]: r["times"] for r in rows if r["name"] == name})
        for name in dict.fromkeys(r["name"] for r in rows)
    }
    cells: dict[str, dict[int, str]] = {name: {} for name in series}
    for r in rows:
        told, share = units.time(r["seconds"]["median"]), figures.of_bound(r)
        cells[decoder(r["name"])][r["length"]] = f"{told} ({share})" if share else told
    see = "A level line takes the same time after any context; one that doubles with the context reads all of it."
    see += " In the table, in brackets: how much of its roofline each time is." if "bound" in rows[0] else ""
    return figures.lines(series, see, "context", MS, cells=cells)


def decay(e: Evidence) -> Figure:
    rows = [r for r in e.computed("decay") if r["distance"] > 0]
    series = {
        "the bound": {int(r["distance"]): r["bound"] for r in rows},
        "scores of random q and k": {int(r["distance"]): r["scores"] for r in rows},
    }
    see = "What decays with distance falls to the right: the bound is what is derived, scores are what attention sees."
    return figures.lines(series, see, "distance", "score", logarithmic="x")


def real_decay(e: Evidence) -> Figure:
    rows = [r for r in e.computed("real_decay") if r["distance"] > 0]
    series = {"mean over heads": {int(r["distance"]): r["score"] for r in rows}}
    see = "Queries and keys of a trained model: mean scores at a distance, over their root mean square in a head."
    return figures.lines(series, see, "distance", "score", logarithmic="x")


def _by_length(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    names = [name for name in rows[0] if name not in ("length", "samples")]
    return {name: {int(r["length"]): r[name] for r in rows} for name in names}


def lengths(e: Evidence) -> Figure:
    see = "What four keys that matter contribute among n: 1 is right at every length."
    return figures.lines(_by_length(e.computed("lengths")), see, "tokens n", "output")


def noise(e: Evidence) -> Figure:
    see = "What the other keys add to it, whose values are ± 1: less is better."
    return figures.lines(_by_length(e.computed("noise")), see, "tokens n", "standard deviation")


def smoothness(e: Evidence) -> Figure:
    rows = [r for r in e.computed("landmarks") if r["inverse"] == "per_matrix"]
    series = {
        f"each token {smooth} of the one before": {
            int(r["landmarks"]): r["error"] for r in rows if r["smooth"] == smooth
        }
        for smooth in dict.fromkeys(r["smooth"] for r in rows)
    }
    see = "How near to softmax attention so many landmarks come: at 1 the error is as large as the output itself."
    return figures.lines(series, see, "landmarks m", "error, of the output")


def approximations(e: Evidence) -> Figure:
    rows = e.computed("approximations")
    series = {
        f"{by}, n = {n}{', ours' if by == 'Nyström' else ''}": {
            r["size"]: r["error"] for r in rows if (r["by"], r["length"]) == (by, n) and r["size"] < n
        }
        for by in ("Nyström", "Performer")
        for n in (256, 512, 1024)
    }
    see = (
        "Activations of a trained model: at 1 the error is as large as the output itself. Where there are as many "
        "landmarks as tokens attention is exact, which is left out."
    )
    return figures.lines(series, see, "landmarks, or features", "error, of the output", logarithmic="x")


def beyond(e: Evidence) -> Figure:
    named = {"roformer": "softmax attention", "gau": "GAU, ours", "linear": "linear attention, ours"}
    named |= {
        "roformer, log n": "softmax attention, log n",
        "roformer, softmax_plus": "softmax_plus",
        "gau, n fixed": "GAU, n fixed, ours",
    }
    series = {named.get(name, name): points for name, points in _by_length(e.computed("beyond")).items()}
    see = "Small models of bytes trained at 512: what longer text does to their loss."
    return figures.lines(series, see, "tokens n", "nats per byte", logarithmic="x")


FIGURES: dict[str, tuple[Callable[[Evidence], Figure], ...]] = {
    "C1": (feed_forward,),
    "C2": (mixing,),
    "C4": (ceiling,),
    "C5": (linear,),
    "C7": (performer,),
    "C14": (decoding,),
    "C15": (table_of_the_paper,),
    "C16": (nystrom,),
    "C17": (approximations,),
    "C18": (pair,),
    "D2": (decay, real_decay),
    "D6": (lengths, noise, beyond),
    "D10": (smoothness,),
}
"""By the first claim that a figure belongs to."""


def of_claim(name: str, e: Evidence) -> Iterator[Figure]:
    """Those whose numbers were measured; of the others the claim's answers say why."""
    for draw in FIGURES.get(name, ()):
        with contextlib.suppress(LookupError):
            yield draw(e)
