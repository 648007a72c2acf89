"""Claims about what is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .. import models
from . import FAILS, HOLDS, OPEN, Answer, Claim, each, missed
from .cost import CLOSE, NEAR, SUFFICES
from .evidence import Evidence


def _holds(condition: bool) -> str:
    return HOLDS if condition else FAILS


def _pick(found: Mapping[Any, Any], key: Any) -> Any:
    if key not in found:
        raise LookupError(f"{key} was not computed")
    return found[key]


def _named(e: Evidence, experiment: str) -> dict[str, Any]:
    return {row["name"]: row for row in e.computed(experiment)}


LITTLE = 0.05  # of a loss


def relativity(e: Evidence) -> Iterator[Answer]:
    found = e.computed("rope_relativity")

    def answer(of: str, key: str) -> Answer:
        error = _pick(found, key)
        return Answer(
            of, f"error {error:.1e}", _holds(error <= 1e-4), "kx.rope, float32; 1e-4 of |q| |k|, or of a norm"
        )

    said = {
        "shift": "scores, all positions moved by 3,072",
        "norm": "norms stay",
        "inverse": "the transpose is the inverse",
        "composition": "R_m twice is R_2m",
        "identity": "R_0 is 1",
    }
    return each([(of, (key,)) for key, of in said.items()], answer)


def decay(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("decay")
    bounds = [r["bound"] for r in rows]
    told = ", ".join(f"{r['bound']:.1f} at {r['distance']:,}" for r in rows[::3])
    yield Answer("the bound", told, _holds(bounds[0] > 3 * max(bounds[6:])), "not monotone: it rises again at the end")
    scores = [r["scores"] for r in rows]
    told = f"{min(scores):.1f} … {max(scores):.1f} at every distance"
    yield Answer("scores of random q and k", told, _holds(scores[-1] < 0.8 * scores[0]), "only the bound decays")

    def same(of: str) -> Answer:
        means = {r["distance"]: _pick(r, "same") for r in rows}
        told = ", ".join(f"{means[m]:.2f} at {m:,}" for m in (0, 16, 256, 4096))
        far = max(abs(x) for m, x in means.items() if m >= 256)
        return Answer(of, told, _holds(far < 0.5 * means[0]), "means, over d; 1, 0.62, 0.32 and -0.05 are said")

    yield from each([("scores of q = k", ())], same)


def real_decay(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("real_decay")
    told = ", ".join(f"{r['score']:.2f} at {r['distance']:,}" for r in rows)
    less = rows[-1]["less"]
    why = f"means, over their root mean square; less at {rows[-1]['distance']} than at 1 in {less:.0%} of the heads"
    yield Answer("scores of a trained model, in every head", told, _holds(less == 1), why)


def rotated(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("rotated_features")
    told = ", ".join(f"{r['sum']:.2f} at {r['position']}" for r in rows)
    last, negative = rows[-1]["sum"], rows[0]["negative"]
    yield Answer(
        "elu + 1 of random q and k", f"weights sum to {told}; {negative:.1%} negative",
        _holds(abs(last - 1) > 0.1 and negative > 0), "a sum that is not 1, and some that are negative",
    )  # fmt: skip
    why = f"a sum of 1 within a factor of {NEAR}: outputs get smaller with the position"
    yield Answer("yet outputs keep their size", f"{last:.2f} at {rows[-1]['position']}", _holds(last > 1 / NEAR), why)


def rotated_by_hand(e: Evidence) -> Iterator[Answer]:
    found = e.computed("rotated_by_hand")
    said = (-0.313, 0.620)
    off = max(abs(x - y) for x, y in zip(found["weights"], said, strict=True))
    told = ", ".join(f"{x:.4f}" for x in found["weights"])
    yield Answer("two keys, by hand", told, _holds(off < 1e-3), "kx.linear_attention; -0.313 and 0.620 are said")

    def denominator(of: str) -> Answer:
        random, opposite = _pick(e.computed("rotated_features")[0], "least"), found["opposite"][0]
        told = f"at least {random:.2f} of the unrotated one for random q and k, {opposite:.2f} half a turn away"
        return Answer(of, told, _holds(opposite <= 0), "so it is left unrotated; 0.25 is said for random ones")

    yield from each([("a rotated denominator may vanish", ())], denominator)


def ranks(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "ranks")
    told = ", ".join(f"{name} {r['rank']} (effective {r['effective']:.0f})" for name, r in rows.items())
    low = rows["linear"]["rank"] == 16 and all(rows[n]["rank"] == 256 for n in ("softmax", "relu²", "causal linear"))
    yield Answer(
        "rank, n = 256, d = 16", told, _holds(low), "bidirectional linear attention has the rank of its features"
    )
    told = ", ".join(f"{name} {r['entropy']:.2f}" for name, r in rows.items() if name != "causal linear")
    flat = rows["linear"]["entropy"] > 0.98 * 5.545 > 1.02 * rows["relu²"]["entropy"]
    yield Answer("entropy of rows", told, _holds(flat), "5.55 is uniform: linear attention is close to mean pooling")


def real_ranks(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "real_maps")
    both = ("softmax", "linear")
    told = ", ".join(f"{name} {rows[name]['rank']:.0f} (effective {rows[name]['effective']:.0f})" for name in both)
    low = rows["linear"]["rank"] <= 32 < rows["softmax"]["rank"]
    yield Answer("rank in trained models, n = 256, d = 32", told, _holds(low), "means over layers and heads")
    told = ", ".join(f"{name} {rows[name]['entropy']:.2f}" for name in both)
    flat = rows["linear"]["entropy"] > rows["softmax"]["entropy"]
    yield Answer("entropy in trained models", told, _holds(flat), "5.55 is uniform")

    def gated(of: str) -> Answer:
        r = _pick(rows, "causal relu²")
        told = f"rank {r['rank']:.0f} (effective {r['effective']:.0f}), entropy {r['entropy']:.2f}"
        return Answer(of, told, _holds(r["effective"] > 64), "an effective rank above s is asked for")

    yield from each([("trained gated attention, causal, n = 256, s = 64", ())], gated)


def kinds(e: Evidence) -> Iterator[Answer]:
    losses = {r["name"]: r["loss"] for r in e.computed("trained")}
    lost = {}
    for kind, suffix in (("causal", ""), ("bidirectional", "-masked")):
        mine, theirs = losses[f"linear{suffix}"], losses[f"roformer{suffix}"]
        lost[kind] = mine - theirs
        share = lost[kind] / theirs
        told = f"{mine:.2f} nats per byte, softmax attention {theirs:.2f}: {share:+.0%}"
        if kind == "causal":
            yield Answer("causal: little", told, _holds(share <= LITTLE), f"{LITTLE:.0%} would be little")
        else:
            yield Answer("bidirectional: clearly", told, _holds(share > LITTLE), f"more than {LITTLE:.0%}")
    told = f"{lost['bidirectional']:.2f} nats per byte, {lost['causal']:.2f} if causal"
    more = lost["bidirectional"] > 2 * lost["causal"]
    yield Answer("bidirectional: more than causal", told, _holds(more), "more than twice as much is asked for")


def copying(e: Evidence) -> Iterator[Answer]:
    losses = {r["mixing"]: r["loss"] for r in e.computed("copied")}
    chance = math.log(models.SYMBOLS)
    told = ", ".join(f"{name} {x:.2g}" for name, x in losses.items()) + f" nats per symbol; guessing {chance:.2f}"
    why = f"{models.COPIED} of {models.SYMBOLS} symbols, models trained alike, 1,000 steps; {LITTLE:.0%} of guessing"
    if losses["softmax"] > LITTLE * chance:
        yield Answer("copying: as well as softmax", told, OPEN, f"softmax attention did not learn it; {why}")
    else:
        close = losses["linear"] - losses["softmax"] <= LITTLE * chance
        yield Answer("copying: as well as softmax", told, _holds(close), why)


TOO_LARGE = "no model was trained so: with its weights, which are kept, all would take more than 4 MB"


def bands(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("bands")
    for kind, name in (("causal", "linear"), ("bidirectional", "linear-masked")):
        losses = {r["band"]: r["loss"] for r in rows if r["name"] == name}
        whole = max(losses)
        told = ", ".join(
            f"{x:.2f} with {f'keys less than {w} away' if w < whole else 'all'}" for w, x in losses.items()
        )
        better = min(x for w, x in losses.items() if w < whole) < losses[whole]
        yield Answer(f"{kind}: a local band raises quality", told, _holds(better), "of a model trained with all keys")
    yield Answer("a local band raises quality, trained with it", "–", OPEN, TOO_LARGE)


def lengths(e: Evidence) -> Iterator[Answer]:
    rows = {r["length"]: r for r in e.computed("lengths")}
    short, long = rows[512], rows[8192]

    def told(name: str) -> str:
        return ", ".join(f"{r[name]:.3g} at {n:,}" for n, r in rows.items())

    def said(of: str, name: str, low: float, high: float, why: str) -> Answer:
        return Answer(f"{name} {of}", told(name), _holds(low <= long[name] / short[name] <= high), why)

    share = 512 / 8192
    yield said(
        "falls as 1/n",
        "relu²/n",
        share / NEAR,
        share * NEAR,
        f"within a factor of {NEAR}; made-up keys, four of which matter: 1 is right",
    )
    yield said("keeps its mean", "relu²/512", 1 / NEAR, NEAR, f"within a factor of {NEAR} from 512 to 8,192")
    yield said("falls as well", "relu²/sum", 0, 0.5, "to less than half from 512 to 8,192")
    off = {n: {name: abs(1 - x) for name, x in r.items() if name != "length"} for n, r in rows.items()}
    nearer = [name for name in off[512] if off[8192][name] < off[512][name]]
    why = "nearer to 1 at 8,192 than at 512: " + (", ".join(nearer) or "none")
    yield Answer("softmax_plus alone improves with n", told("softmax_plus"), _holds(nearer == ["softmax_plus"]), why)


def noise(e: Evidence) -> Iterator[Answer]:
    rows, means = ({r["length"]: r for r in e.computed(name)} for name in ("noise", "lengths"))
    fixed = "relu²/512"
    told = ", ".join(f"± {r[fixed]:.2g} at {n:,}" for n, r in rows.items())
    grows = rows[8192][fixed] > 2 * rows[512][fixed]
    yield Answer(f"{fixed}: its noise grows", told, _holds(grows), "more than twice from 512 to 8,192")
    off = {name: math.hypot(1 - means[8192][name], x) for name, x in rows[8192].items() if name != "length"}
    told = ", ".join(f"{name} {x:.2g}" for name, x in off.items())
    why = "distance from 1 at n = 8,192, mean and noise"
    yield Answer(f"{fixed} does better than relu²/n", told, _holds(off[fixed] < off["relu²/n"]), why)
    best = off["softmax"] < min(x for name, x in off.items() if "relu²" in name)
    yield Answer("softmax does better than relu², whatever divides it", told, _holds(best), why)


def beyond(e: Evidence) -> Iterator[Answer]:
    rows = {r["length"]: r for r in e.computed("beyond")}
    short, long = rows[512], rows[2048]
    lost = {name: long[name] - short[name] for name in ("gau", "roformer")}
    told = f"nats per byte from n = 512 to 2,048: relu² {lost['gau']:+.3f}, softmax {lost['roformer']:+.3f}"
    yield Answer("trained at 512: relu²/n loses more", told, _holds(lost["gau"] > lost["roformer"]), "than softmax")
    share = lost["roformer"] / short["roformer"]
    told = f"{short['roformer']:.2f} at 512, {long['roformer']:.2f} at 2,048: {share:+.0%}"
    why = f"{LITTLE:.0%} is allowed; RoPE sees distances that it was not trained at"
    yield Answer("trained at 512: softmax does not fail", told, _holds(share <= LITTLE), why)

    def better(of: str, name: str, than: str) -> Answer:
        mine, other = _pick(long, name), long[than]
        told = f"{mine:.2f} at 2,048, {other:.2f} without"
        return Answer(of, told, _holds(mine < other), "nats per byte; of a model trained without")

    said = [
        ("trained at 512: relu² with an n that stays beyond does better", ("gau, n fixed", "gau")),
        ("trained at 512: softmax with log n beyond does better", ("roformer, log n", "roformer")),
    ]
    yield from each(said, better)
    yield Answer("trained with log n: softmax_plus does best", "–", OPEN, TOO_LARGE)


def entropies(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("entropies")
    plain = rows[-1]["1/√d"] - rows[0]["1/√d"]
    for name in ("log n/log 512", "log n/(0.24 d)"):
        low, high = rows[0][name], rows[-1][name]
        told = f"{low:.2f} at {rows[0]['length']:,}, {high:.2f} at {rows[-1]['length']:,}"
        why = f"by 1/√d it grows by {plain:.2f}; unit vectors times √d, d = 128"
        yield Answer(f"{name}: grows less than by 1/√d", told, _holds(high - low < plain), why)
        yield Answer(
            f"{name}: does not grow", told, _holds(high - low < 0.5), "by less than 0.5; log n slows the growth"
        )


def initial(e: Evidence) -> Iterator[Answer]:
    found = e.computed("initial_size")
    told = f"E swish {found['mean']:.4f}, E swish² {found['square']:.4f}"
    close = abs(found["mean"] - 0.2066) < 1e-3 and abs(found["square"] - 0.3557) < 1e-3
    yield Answer("moments", told, _holds(close), "0.2066 and 0.3557 are said")
    yield from _initial_sizes(found["sizes"], "without RoPE")


def initial_turned(e: Evidence) -> Iterator[Answer]:
    yield from _initial_sizes(e.computed("initial_turned"), "with RoPE")


def _initial_sizes(sizes: Sequence[Mapping[str, float]], how: str) -> Iterator[Answer]:
    told = ", ".join(f"{r['ratio']:.0f} at {r['length']:,}" for r in sizes)
    near = all(69 / CLOSE < r["ratio"] < 69 * CLOSE for r in sizes)
    why = f"a factor of {CLOSE} is allowed; the variance of z_i·z_j is left out"
    yield Answer(f"{how}: a token sees itself 69 times as much", told, _holds(near), why)
    told = ", ".join(f"{r['rms']:.3f} at {r['length']:,}" for r in sizes)
    falls = sizes[-1]["rms"] / sizes[0]["rms"] < 2 * sizes[0]["length"] / sizes[-1]["length"]
    why = "a factor of 2 is allowed; values have a mean, which other tokens add up to"
    yield Answer(f"{how}: the output falls as 1/n", told, _holds(falls), why)


def initial_factors(e: Evidence) -> Iterator[Answer]:
    for row in e.computed("initial_factors"):
        factor, said = row["factor"], row["factor"] ** 7
        near = said / NEAR < row["output"] < said * NEAR
        why = f"{said:.3g} is said, within a factor of {NEAR}; swish is not homogeneous"
        yield Answer(
            f"weights times {factor:g}: the output times {factor:g}⁷", f"{row['output']:.3g}", _holds(near), why
        )


def probe(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "same_tokens")

    def answer(name: str, shows: bool) -> Answer:
        row = _pick(rows, name)
        spread = row["high"] / row["low"] - 1
        told = f"outputs of {row['low']:.3g} … {row['high']:.3g}"
        why = "positions show: 1% apart is asked for" if shows else "positions do not show: equal to rounding"
        return Answer(name, told, _holds(spread > 0.01 if shows else spread < 1e-9), why)

    return each([("relu²", (True,)), ("softmax over l2 norms", (True,)), ("softmax", (False,))], answer)


def smoothness(e: Evidence) -> Iterator[Answer]:
    rows = {(r["smooth"], r["inverse"], r["landmarks"]): r["error"] for r in e.computed("landmarks")}
    counts = (32, 64, 128, 256)
    for smooth in (0.0, 0.95, 0.99):
        what = "independent tokens" if not smooth else f"each token {smooth} of the one before"
        for inverse, how in (("per_matrix", "six iterations"), ("pinv", "exact inverse")):
            told = ", ".join(f"{rows[smooth, inverse, m]:.2g} (m = {m})" for m in counts)
            why = f"error at m = 64 below {SUFFICES} of the output"
            yield Answer(f"{what}, {how}", told, _holds(rows[smooth, inverse, 64] < SUFFICES), why)


def real_landmarks(e: Evidence) -> Iterator[Answer]:
    rows = {(r["length"], r["by"], r["size"]): r["error"] for r in e.computed("approximations")}
    for n in (256, 512, 1024):
        told = ", ".join(f"{rows[n, 'Nyström', m]:.2g} (m = {m})" for m in (16, 32, 64, 128))
        why = f"error at m = 64 below {SUFFICES} of the output, q and k turned by RoPE"
        yield Answer(f"a trained model, n = {n:,}", told, _holds(rows[n, "Nyström", 64] < SUFFICES), why)


def exact_landmarks(e: Evidence) -> Iterator[Answer]:
    error = e.computed("repeated_tokens")
    yield Answer("kx.nystrom_attention, float64", f"error {error:.1e}", _holds(error < 1e-9), "the exact inverse")


def one_function(e: Evidence) -> Iterator[Answer]:
    found = e.computed("one_function")

    def answer(name: str) -> Answer:
        error = _pick(found, name)
        return Answer(
            name, f"error {error:.1e}", _holds(error < 1e-5), "against the quadratic form in float64, n = 333"
        )

    return each([(name, ()) for name in ("whole", "handed on", "pieces of 7", "recurrent")], answer)


def chunks(e: Evidence) -> Iterator[Answer]:
    found = e.computed("chunks")

    def answer(of: str, name: str) -> Answer:
        error = _pick(found, name)
        return Answer(of, f"difference {error:.1e}", _holds(error < 1e-12), "float64")

    said = [
        ("one chunk, causal: the unit, but 1/c for visible keys", ("causal",)),
        ("one chunk: the unit, and the sum over all", ("full",)),
        ("chunks of one token: linear attention and a diagonal", ("one token each",)),
    ]
    return each(said, answer)


def _all(*parts: Callable[[Evidence], Iterator[Answer]]) -> Callable[[Evidence], Iterator[Answer]]:
    """Answers of several experiments, each of which may be missing."""

    def answers(e: Evidence) -> Iterator[Answer]:
        for part in parts:
            try:
                yield from part(e)
            except LookupError as missing:
                yield missed(part.__name__.replace("_", " "), missing)

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
        "The bound on RoPE's scores decays with distance (and, as it is often read, so do the scores).",
        "K8265",
        "the bound 32.5, 13.4 at 32, 5.3 at 512",
        ("decay", "real_decay"),
        _no_count,
        _all(decay, real_decay),
    ),
    Claim(
        "D3",
        "With RoPE in its numerator alone, linear attention has weights that may be negative and need not sum to 1.",
        "K8265",
        "sums of 0.72 at 31, 0.48 at 127, 0.29 at 511; 1.2% negative",
        ("rotated_features", "rotated_by_hand"),
        _no_count,
        _all(rotated, rotated_by_hand),
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
        "Causal models lose little by linear attention, bidirectional ones much; a local band raises its quality.",
        "K8338",
        "–",
        ("trained", "copied", "bands"),
        _no_count,
        _all(kinds, copying, bands),
    ),
    Claim(
        "D6",
        "relu² with 1/n fails beyond the trained length; softmax does not.",
        "K9019",
        "an output that falls as 1/n; a fixed n does better, softmax better than both, with log n best",
        ("lengths", "noise", "beyond"),
        _no_count,
        _all(lengths, noise, beyond),
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
        "0.2066, 0.3557; 69; 1/n; weights times λ: the output times λ⁷",
        ("initial_size", "initial_turned", "initial_factors"),
        _no_count,
        _all(initial, initial_turned, initial_factors),
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
        ("landmarks", "approximations"),
        _no_count,
        _all(smoothness, real_landmarks),
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
        "FLASH with one chunk is the quadratic unit but for its scale, with chunks of one token linear attention.",
        "K8934",
        "rounding",
        ("chunks",),
        _no_count,
        chunks,
    ),
]
