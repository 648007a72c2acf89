"""Claims about what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import FAILS, HOLDS, OPEN, Answer, Claim
from .evidence import Evidence


def _holds(condition: bool) -> str:
    return HOLDS if condition else FAILS


def relativity(e: Evidence) -> Iterator[Answer]:
    found = e.computed("rope_relativity")
    told = ", ".join(f"{name} {x:.1e}" for name, x in found.items())
    yield Answer("kx.rope, float32", told, _holds(max(found.values()) <= 1e-4), "errors over |q| |k|; 1e-4 is allowed")


def decay(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("decay")
    bounds = [r["bound"] for r in rows]
    told = ", ".join(f"{r['bound']:.1f} at {r['distance']:,}" for r in rows[::3])
    yield Answer("the bound", told, _holds(bounds[0] > 3 * max(bounds[6:])), "not monotone: it rises again at the end")
    scores = [r["scores"] for r in rows]
    told = f"{min(scores):.1f} … {max(scores):.1f} at every distance"
    yield Answer("scores of random q and k", told, _holds(scores[-1] < 0.8 * scores[0]), "only the bound decays")


def rotated(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("rotated_features")
    told = ", ".join(f"{r['sum']:.2f} at {r['position']}" for r in rows)
    yield Answer(
        "elu + 1", f"weights sum to {told}; {rows[0]['negative']:.1%} negative",
        _holds(rows[-1]["sum"] < 0.5 and rows[0]["negative"] > 0), "for random q and k",
    )  # fmt: skip


def ranks(e: Evidence) -> Iterator[Answer]:
    rows = {r["name"]: r for r in e.computed("ranks")}
    told = ", ".join(f"{name} {r['rank']}" for name, r in rows.items())
    low = rows["linear"]["rank"] == 16 and all(rows[n]["rank"] == 256 for n in ("softmax", "relu²", "causal linear"))
    yield Answer(
        "rank, n = 256, d = 16", told, _holds(low), "bidirectional linear attention has the rank of its features"
    )
    told = ", ".join(f"{name} {r['entropy']:.2f}" for name, r in rows.items() if name != "causal linear")
    flat = rows["linear"]["entropy"] > 0.98 * 5.545 > 1.02 * rows["relu²"]["entropy"]
    yield Answer("entropy of rows", told, _holds(flat), "5.55 is uniform: linear attention is close to mean pooling")


def real_ranks(e: Evidence) -> Iterator[Answer]:
    rows = {r["name"]: r for r in e.computed("real_maps")}
    told = ", ".join(f"{name} {r['rank']:.0f} (effective {r['effective']:.0f})" for name, r in rows.items())
    low = rows["linear"]["rank"] <= 32 < rows["softmax"]["rank"]
    yield Answer("rank in trained models, n = 256, d = 32", told, _holds(low), "means over layers and heads")
    told = ", ".join(f"{name} {r['entropy']:.2f}" for name, r in rows.items())
    flat = rows["linear"]["entropy"] > rows["softmax"]["entropy"]
    yield Answer("entropy in trained models", told, _holds(flat), "5.55 is uniform")


def kinds(e: Evidence) -> Iterator[Answer]:
    losses = {r["name"]: r["loss"] for r in e.computed("trained")}
    causal = losses["linear"] - losses["roformer"]
    masked = losses["linear-masked"] - losses["roformer-masked"]
    told = f"nats per byte lost to linear attention: {causal:.3f} if causal, {masked:.3f} if bidirectional"
    yield Answer("models of bytes", told, _holds(masked > 2 * causal), "more than twice as much is asked for")


def beyond(e: Evidence) -> Iterator[Answer]:
    rows = {r["length"]: r for r in e.computed("beyond")}
    lost = {name: rows[2048][name] - rows[512][name] for name in ("gau", "roformer")}
    told = f"loss from n = 512 to 2,048: relu² {lost['gau']:+.3f}, softmax {lost['roformer']:+.3f}"
    yield Answer("models of bytes, trained at 512", told, _holds(lost["gau"] > lost["roformer"]), "which loses more")


def lengths(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("lengths")
    by_length = {r["length"]: r for r in rows}
    for name, expected in (("relu²/n", "falls as 1/n"), ("relu²/512", "stays"), ("softmax", "stays best")):
        told = ", ".join(f"{r[name]:.3g} at {r['length']:,}" for r in rows)
        change = by_length[8192][name] / by_length[512][name]
        holds = {"relu²/n": change < 0.1, "relu²/512": 0.8 < change < 1.25, "softmax": change > 0.8}[name]
        yield Answer(name, told, _holds(holds), f"{expected} with n; made-up keys, four of which matter")


def entropies(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("entropies")
    change = {name: rows[-1][name] - rows[0][name] for name in rows[0] if name != "length"}
    told = ", ".join(f"{name} + {x:.2f}" for name, x in change.items())
    slower = change["log n/log 512"] < change["1/√d"]
    yield Answer(
        "grows less than with 1/√d", f"n = 64 to 8,192: {told}", _holds(slower), "unit vectors times √d, d = 128"
    )
    yield Answer("does not grow", told, _holds(change["log n/log 512"] < 0.5), "log n only slows the growth")


def initial(e: Evidence) -> Iterator[Answer]:
    found = e.computed("initial_size")
    told = f"E swish {found['mean']:.4f}, E swish² {found['square']:.4f}"
    close = abs(found["mean"] - 0.2066) < 1e-3 and abs(found["square"] - 0.3557) < 1e-3
    yield Answer("moments", told, _holds(close), "0.2066 and 0.3557 are said")
    sizes = found["sizes"]
    told = ", ".join(f"{r['ratio']:.0f} at {r['length']:,}" for r in sizes)
    yield Answer("a token sees itself 69 times as much", told, _holds(all(55 < r["ratio"] < 85 for r in sizes)), "")
    told = ", ".join(f"{r['rms']:.3f} at {r['length']:,}" for r in sizes)
    falls = sizes[-1]["rms"] / sizes[0]["rms"] < 2 * sizes[0]["length"] / sizes[-1]["length"]
    why = "values have a mean, which other tokens add up to" if not falls else ""
    yield Answer("the output falls as 1/n", told, _holds(falls), why)


def probe(e: Evidence) -> Iterator[Answer]:
    for row in e.computed("same_tokens"):
        spread = row["high"] / row["low"] - 1
        holds = spread > 0.01 if row["name"] == "relu²" else spread < 1e-9
        told = f"rows sum to {row['low']:.3g} … {row['high']:.3g}"
        yield Answer(row["name"], told, _holds(holds), "positions show" if spread > 0.01 else "positions do not show")


def smoothness(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("landmarks")
    for smooth in (0.0, 0.95, 0.99):
        mine = [r for r in rows if r["smooth"] == smooth and r["inverse"] == "per_matrix"]
        told = ", ".join(f"{r['error']:.2g} (m = {r['landmarks']})" for r in mine if r["landmarks"] >= 32)
        at_64 = next(r["error"] for r in mine if r["landmarks"] == 64)
        what = "independent tokens" if not smooth else f"each token {smooth} of the one before"
        yield Answer(what, told, _holds(at_64 < 0.1), "error at m = 64 below 0.1 of the output")


def exact_landmarks(e: Evidence) -> Iterator[Answer]:
    error = e.computed("repeated_tokens")
    yield Answer("kx.nystrom_attention, float64", f"error {error:.1e}", _holds(error < 1e-9), "the exact inverse")


def one_function(e: Evidence) -> Iterator[Answer]:
    for name, error in e.computed("one_function").items():
        yield Answer(name, f"error {error:.1e}", _holds(error < 1e-5), "against float64; 1e-5 is said")


def chunks(e: Evidence) -> Iterator[Answer]:
    for name, error in e.computed("chunks").items():
        yield Answer(name, f"difference {error:.1e}", _holds(error < 1e-12), "float64")


def _all(*parts: Callable[[Evidence], Iterator[Answer]]) -> Callable[[Evidence], Iterator[Answer]]:
    """Answers of several experiments, each of which may be missing."""

    def answers(e: Evidence) -> Iterator[Answer]:
        for part in parts:
            try:
                yield from part(e)
            except LookupError as missing:
                yield Answer("", "–", OPEN, str(missing).strip("'\""))

    return answers


def _no_count() -> str:
    return "–"


CLAIMS = [
    Claim(
        "D1",
        "RoPE's scores depend on the distance alone, and it keeps norms.",
        "K8265",
        "errors below 1e-4",
        ("rope_relativity",),
        _no_count,
        relativity,
    ),
    Claim(
        "D2",
        "RoPE's scores decay with distance.",
        "K8265",
        "the bound 32.5, 13.4 at 32, 5.3 at 512",
        ("decay",),
        _no_count,
        decay,
    ),
    Claim(
        "D3",
        "Rotating the numerator alone keeps linear attention sound.",
        "K8265",
        "weights that no longer sum to 1, some negative",
        ("rotated_features",),
        _no_count,
        rotated,
    ),
    Claim(
        "D4",
        "Linear attention has low rank and is close to mean pooling; a causal one is not.",
        "K8338",
        "16 of 256; entropy 5.50 of 5.55",
        ("ranks", "real_maps"),
        _no_count,
        _all(ranks, real_ranks),
    ),
    Claim(
        "D5",
        "Causal models lose little by linear attention, bidirectional ones much.",
        "K8338",
        "–",
        ("trained",),
        _no_count,
        kinds,
    ),
    Claim(
        "D6",
        "relu² with 1/n fails beyond the trained length; softmax does not.",
        "K9019",
        "an output that falls as 1/n",
        ("lengths", "beyond"),
        _no_count,
        _all(lengths, beyond),
    ),
    Claim(
        "D7",
        "A scale of log n keeps the entropy of attention.",
        "K8823",
        "3.94 to 8.00 for log n/log 512",
        ("entropies",),
        _no_count,
        entropies,
    ),
    Claim(
        "D8",
        "A gated attention unit starts small: of the order 1/n.",
        "K8990",
        "0.2066, 0.3557; 69; 1/n",
        ("initial_size",),
        _no_count,
        initial,
    ),
    Claim(
        "D9",
        "Attention whose rows do not sum to 1 knows positions of equal tokens.",
        "K9105",
        "a spread for relu², none for softmax",
        ("same_tokens",),
        _no_count,
        probe,
    ),
    Claim(
        "D10",
        "Nyström attention approximates softmax attention.",
        "Xiong et al. 2021",
        "only where sequences are smooth",
        ("landmarks",),
        _no_count,
        smoothness,
    ),
    Claim(
        "D11",
        "It is exact where segments hold one token each.",
        "Xiong et al. 2021, lemma 2",
        "rounding",
        ("repeated_tokens",),
        _no_count,
        exact_landmarks,
    ),
    Claim(
        "D13",
        "Chunked, recurrent and quadratic linear attention are one function.",
        "Katharopoulos et al. 2020",
        "1e-5 in float32",
        ("one_function",),
        _no_count,
        one_function,
    ),
    Claim(
        "D14",
        "FLASH with one chunk is the quadratic unit but for its scale.",
        "K8934",
        "rounding",
        ("chunks",),
        _no_count,
        chunks,
    ),
]
