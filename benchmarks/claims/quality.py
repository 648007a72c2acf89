"""Claims about what is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .. import fits, models, quality
from . import FAILS, HOLDS, OPEN, Answer, Claim, best, each, less, mean, missed, within, worst
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
OPPOSITE = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}


def percent(found: fits.Interval) -> str:
    return f"{found.value:+.1%} ({found.low:+.1%} … {found.high:+.1%})"


def signed(found: fits.Interval) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} … {found.high:+.3f})"


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


def _beside(found: Mapping[int, fits.Interval], said: Mapping[int, float]) -> str:
    """Numbers, with what is said of them where something is."""
    return ", ".join(f"{x} at {n:,}" + (f" (said: {said[n]:.3g})" if n in said else "") for n, x in found.items())


def decay(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("decay")
    bounds = [r["bound"] for r in rows]
    told = ", ".join(f"{r['bound']:.1f} at {r['distance']:,}" for r in rows[::3])
    yield Answer("the bound", told, _holds(bounds[0] > 3 * max(bounds[6:])), "not monotone: it rises again at the end")

    def random(of: str) -> Answer:
        first, last = rows[0], rows[-1]
        told = f"{mean(first, 'scores')} at 0, {mean(last, 'scores')} at {last['distance']:,}"
        share = mean(last, "scores", lambda x, y: x / y, (first, "scores"))
        return Answer(
            of, told, within(share, 0, 0.8), "less than 0.8 times as large is asked for; the bound alone does"
        )

    def same(of: str) -> Answer:
        means = {r["distance"]: mean(r, "same") for r in rows}
        told = _beside({m: means[m] for m in (0, *SAME)}, SAME)
        limit = 0.5 * means[0].value
        verdict = worst(within(x, -limit, limit) for m, x in means.items() if m >= 256)
        return Answer(of, told, verdict, "means, over d; less than half from 256 on")

    yield from each([("scores of random q and k", ())], random)
    yield from each([("scores of q = k", ())], same)


SAME = {16: 0.62, 256: 0.32, 4096: -0.05}


def counted_decay() -> str:
    at = (0, 32, 512, 4096)
    phases = quality.phases(at, 128)
    bounds, same = 2 / 128 * phases.cumsum(1).abs().sum(1), phases.real.mean(1)
    told = [
        ", ".join(f"{x:.{digits}f} at {m:,}" for m, x in zip(at, found.tolist(), strict=True))
        for found, digits in ((bounds, 1), (same, 2))
    ]
    return f"the bound {told[0]}; scores of q = k, over d, {told[1]}; of independent ones none"


def real_decay(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("real_decay")
    told = ", ".join(f"{mean(r, 'score')} at {r['distance']:,}" for r in rows)
    share = mean(rows[-1], "less")
    why = f"means, over their root mean square; less at {rows[-1]['distance']} than at 1 in a share of {share} of heads"
    yield Answer("scores of a trained model, in every head", told, within(share, 1, 1), why)

    def below(of: str) -> Answer:
        most = max(_pick(r, "most") for r in rows)
        told = ", ".join(f"{mean(r, 'size')} below {mean(r, 'bound')} at {r['distance']:,}" for r in rows)
        last = rows[-1]
        heads = ", ".join(f"{x:.2f} below {b:.0f}" for x, b in zip(last["sizes"], last["bounds"], strict=True))
        why = f"sizes and bounds, means, over the same root mean square; by head at {last['distance']:,} {heads}; "
        why += f"no score is more than {most:.2f} of its own bound, in float64"
        return Answer(of, told, _holds(most <= 1), why)

    yield from each([("no score of a trained model exceeds its bound", ())], below)


def rotated(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("rotated_features")
    sums = {r["position"]: mean(r, "sum") for r in rows}
    last, negative = sums[rows[-1]["position"]], mean(rows[0], "negative")
    verdict = worst((within(last, -math.inf, 0.9), within(negative, 1e-9, 1)))
    told = f"weights sum to {_beside(sums, SUMS)}; {negative} of them are negative (said: 0.012)"
    yield Answer("elu + 1 of random q and k", told, verdict, "a sum below 0.9, and some that are negative")
    why = f"a sum of 1 within a factor of {NEAR}: outputs get smaller with the position"
    told = f"{last} at {rows[-1]['position']}"
    yield Answer("yet outputs keep their size", told, within(last, 1 / NEAR, math.inf), why)


SUMS = {31: 0.72, 127: 0.48, 511: 0.29}


def counted_sums() -> str:
    """Of features independent of each other their sines cancel; what is left are the mean cosines of all distances."""
    cosines = quality.phases(range(512), 64).real.mean(1)
    return "expected sums " + ", ".join(f"{cosines[: i + 1].mean().item():.2f} at {i}" for i in SUMS)


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


RANKS = {"softmax": (256, 137), "relu²": (256, 131), "linear": (16, 5.6), "causal linear": (256, 61)}
ENTROPIES = {"softmax": 3.60, "linear": 5.50}


def ranks(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "ranks")
    told = ", ".join(
        f"{name} {mean(r, 'rank')}, effective {mean(r, 'effective')} (said: {RANKS[name][0]}, {RANKS[name][1]:g})"
        for name, r in rows.items()
    )
    low = worst(within(mean(r, "rank"), RANKS[name][0], RANKS[name][0]) for name, r in rows.items())
    yield Answer("rank, n = 256, d = 16", told, low, "bidirectional linear attention has the rank of its features")
    found = {name: mean(r, "entropy") for name, r in rows.items() if name != "causal linear"}
    told = ", ".join(
        f"{name} {x}" + (f" (said: {ENTROPIES[name]:.2f})" if name in ENTROPIES else "") for name, x in found.items()
    )
    uniform = math.log(256)
    flat = worst((
        within(found["linear"], 0.98 * uniform, math.inf),
        *(within(x, 0, 0.98 * uniform) for name, x in found.items() if name != "linear"),
    ))  # fmt: skip
    yield Answer("entropy of rows", told, flat, f"{uniform:.2f} is uniform: linear attention alone is within 2% of it")


def counted_ranks() -> str:
    n, d = 256, 16
    return f"rank at most d = {d} of {n} if bidirectional; entropy of uniform rows log n = {math.log(n):.2f}"


def real_ranks(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "real_maps")
    both = ("softmax", "linear")
    told = ", ".join(f"{name} {mean(rows[name], 'rank')}, effective {mean(rows[name], 'effective')}" for name in both)
    low = worst((within(mean(rows["linear"], "rank"), 0, 32), within(mean(rows["softmax"], "rank"), 32.5, 256)))
    yield Answer("rank in trained models, n = 256, d = 32", told, low, "means over layers and heads")
    told = ", ".join(f"{name} {mean(rows[name], 'entropy')}" for name in both)
    flat = less((rows["softmax"], "entropy"), (rows["linear"], "entropy"))
    yield Answer("entropy in trained models", told, flat, f"more if linear; {math.log(256):.2f} is uniform")

    def gated(of: str) -> Answer:
        r = _pick(rows, "causal relu²")
        effective = mean(r, "effective")
        told = f"rank {mean(r, 'rank')}, effective {effective}, entropy {mean(r, 'entropy')}"
        return Answer(of, told, within(effective, 64, 256), "an effective rank above s is asked for")

    yield from each([("trained gated attention, causal, n = 256, s = 64", ())], gated)


def kinds(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "trained")

    def pair(suffix: str) -> tuple[tuple[Any, str], tuple[Any, str]]:
        return (_pick(rows, f"linear{suffix}"), "loss"), (_pick(rows, f"roformer{suffix}"), "loss")

    def loses(of: str, suffix: str, low: float, high: float, why: str) -> Answer:
        mine, theirs = pair(suffix)
        share = mean(*mine, lambda x, y: x / y - 1, theirs)
        told = f"{mean(*mine)} nats per byte, softmax attention {mean(*theirs)}: {percent(share)}"
        return Answer(of, told, within(share, low, high), why)

    def more(of: str) -> Answer:
        """Of the same places of the text."""
        masked, causal = pair("-masked"), pair("")
        lost = [mean(*mine, lambda x, y: x - y, theirs) for mine, theirs in (masked, causal)]
        twice = mean(*masked[0], lambda a, b, c, d: a - b - 2 * (c - d), masked[1], *causal)
        told = f"{lost[0]} nats per byte, {lost[1]} if causal"
        return Answer(of, told, within(twice, 0, math.inf), "more than twice as much is asked for")

    said = [
        ("causal: little", ("", -math.inf, LITTLE, f"{LITTLE:.0%} would be little")),
        ("bidirectional: clearly", ("-masked", LITTLE, math.inf, f"more than {LITTLE:.0%}")),
    ]
    yield from each(said, loses)
    yield from each([("bidirectional: more than causal", ())], more)


def copying(e: Evidence) -> Iterator[Answer]:
    rows = {r["mixing"]: r for r in e.computed("copied")}
    chance = math.log(models.SYMBOLS)
    told = ", ".join(f"{name} {mean(r, 'loss')}" for name, r in rows.items())
    told += f" nats per symbol; guessing {chance:.2f}"
    why = f"{models.COPIED} of {models.SYMBOLS} symbols, models trained alike, 1,000 steps; {LITTLE:.0%} of guessing"
    if within(mean(rows["softmax"], "loss"), -math.inf, LITTLE * chance) != HOLDS:
        yield Answer("copying: as well as softmax", told, OPEN, f"softmax attention did not learn it; {why}")
    else:
        more = mean(rows["linear"], "loss", lambda x, y: x - y, (rows["softmax"], "loss"))
        yield Answer("copying: as well as softmax", told, within(more, -math.inf, LITTLE * chance), why)


TOO_LARGE = "no model was trained so: with its weights, which are kept, all would take more than 4 MB"


def bands(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("bands")
    for kind, name in (("causal", "linear"), ("bidirectional", "linear-masked")):
        mine = {r["band"]: r for r in rows if r["name"] == name}
        whole = max(mine)
        told = ", ".join(
            f"{mean(r, 'loss')} with {f'keys less than {w} away' if w < whole else 'all'}" for w, r in mine.items()
        )
        verdict = best(less((r, "loss"), (mine[whole], "loss")) for w, r in mine.items() if w < whole)
        yield Answer(f"{kind}: a local band raises quality", told, verdict, "of a model trained with all keys")
    yield Answer("a local band raises quality, trained with it", "–", OPEN, TOO_LARGE)


def lengths(e: Evidence) -> Iterator[Answer]:
    rows = {r["length"]: r for r in e.computed("lengths")}
    short, long = rows[512], rows[8192]

    def told(name: str) -> str:
        return _beside({n: mean(r, name) for n, r in rows.items()}, dict(zip(quality.LENGTHS, SAID[name], strict=True)))

    def said(of: str, name: str, low: float, high: float, why: str) -> Answer:
        share = mean(long, name, lambda x, y: x / y, (short, name))
        return Answer(of, told(name), within(share, low, high), why)

    def closer(name: str) -> fits.Interval:
        return mean(long, name, lambda x, y: abs(1 - x) - abs(1 - y), (short, name))

    def improves(of: str) -> Answer:
        names = [name for name in SAID if name in short]
        nearer = {name: within(closer(name), -math.inf, math.nextafter(0, -1)) for name in names}
        verdict = worst(v if name == "softmax_plus" else OPPOSITE[v] for name, v in nearer.items())
        why = "nearer to 1 at 8,192 than at 512: " + (", ".join(n for n, v in nearer.items() if v == HOLDS) or "none")
        return Answer(of, told("softmax_plus"), verdict, why)

    share = 512 / 8192
    why = f"within a factor of {NEAR}; made-up keys, four of which matter: 1 is right"
    ends = [
        ("relu²/n falls as 1/n", ("relu²/n", share / NEAR, share * NEAR, why)),
        ("relu²/512 keeps its mean", ("relu²/512", 1 / NEAR, NEAR, f"within a factor of {NEAR} from 512 to 8,192")),
        ("relu²/sum falls as well", ("relu²/sum", 0.0, 0.5, "to less than half from 512 to 8,192")),
    ]
    yield from each(ends, said)
    yield from each([("softmax_plus alone improves with n", ())], improves)


SAID = {  # at quality.LENGTHS
    "relu²/n": (26.2, 6.79, 3.34, 0.869, 0.200, 0.053),
    "relu²/512": (0.835, 0.839, 0.823, 0.842, 0.845, 0.826),
    "relu²/sum": (0.986, 0.933, 0.867, 0.618, 0.286, 0.090),
    "softmax": (1.000, 0.998, 0.997, 0.985, 0.955, 0.855),
    "softmax_plus": (0.959, 0.971, 0.978, 0.984, 0.989, 0.991),
}


def counted_lengths() -> str:
    """Four scores of 0.9 √d, the rest normal: relu² of these is 1/2 in the mean, e to the t-th of them e^(t²/2)."""
    s, found = 0.9 * 128**0.5, {}
    for n in (512, 8192):
        a, t = 4 * s * s, math.log(n) / math.log(512)
        near, far = ([4 * math.exp(x * s), (n - 4) * math.exp(x * x / 2)] for x in (1.0, t)), (n - 4) / 2
        plain, plus = (x / (x + rest) for x, rest in near)
        found[n] = {"relu²/n": a / n, "relu²/512": a / 512, "relu²/sum": a / (a + far)}
        found[n] |= {"softmax": plain, "softmax_plus": plus}
    short, long = found.values()
    return "outputs at 512 and 8,192: " + ", ".join(f"{name} {x:.3g} and {long[name]:.3g}" for name, x in short.items())


def noise(e: Evidence) -> Iterator[Answer]:
    rows, means = ({r["length"]: r for r in e.computed(name)} for name in ("noise", "lengths"))
    fixed = "relu²/512"

    def grows(of: str) -> Answer:
        told = ", ".join(f"± {mean(r, fixed)} at {n:,}" for n, r in rows.items())
        more = mean(rows[8192], fixed, lambda x, y: x / y, (rows[512], fixed))
        return Answer(of, told, within(more, 2, math.inf), "more than twice from 512 to 8,192")

    def closer(of: str, mine: str, *others: str) -> Answer:
        def off(*given: float) -> float:
            return math.hypot(1 - given[0], given[1])

        at = {name: ((means[8192], name), (rows[8192], name)) for name in (mine, *others)}
        found = {name: mean(*middle, off, rest) for name, (middle, rest) in at.items()}
        told = ", ".join(f"{name} {x}" for name, x in found.items())

        def further(a: float, b: float, c: float, d: float) -> float:
            return off(a, b) - off(c, d)

        first, second = at[mine]
        verdict = worst(within(mean(*first, further, second, *at[name]), -math.inf, 0) for name in others)
        return Answer(of, told, verdict, "distance from 1 at n = 8,192, mean and noise")

    yield from each([(f"{fixed}: its noise grows", ())], grows)
    said = [
        (f"{fixed} does better than relu²/n", (fixed, "relu²/n")),
        ("softmax does better than relu², whatever divides it", ("softmax", *(n for n in SAID if "relu²" in n))),
    ]
    yield from each(said, closer)


def beyond(e: Evidence) -> Iterator[Answer]:
    rows = {r["length"]: r for r in e.computed("beyond")}
    short, long = rows[512], rows[2048]

    def loses_more(of: str) -> Answer:
        lost = {name: mean(long, name, lambda x, y: x - y, (short, name)) for name in ("gau", "roformer")}
        told = f"nats per byte from n = 512 to 2,048: relu² {signed(lost['gau'])}, softmax {signed(lost['roformer'])}"
        others = ((short, "gau"), (long, "roformer"), (short, "roformer"))
        more = mean(long, "gau", lambda a, b, c, d: a - b - (c - d), *others)
        return Answer(of, told, within(more, 0, math.inf), "than softmax, on the same bytes")

    def fails(of: str) -> Answer:
        share = mean(long, "roformer", lambda x, y: x / y - 1, (short, "roformer"))
        told = f"{mean(short, 'roformer')} at 512, {mean(long, 'roformer')} at 2,048: {percent(share)}"
        why = f"{LITTLE:.0%} is allowed; RoPE sees distances that it was not trained at"
        return Answer(of, told, within(share, -math.inf, LITTLE), why)

    def better(of: str, name: str, than: str) -> Answer:
        told = f"{mean(long, name)} at 2,048, {mean(long, than)} without"
        verdict = less((long, name), (long, than))
        return Answer(of, told, verdict, "nats per byte of the same bytes; of a model trained without")

    said = [
        ("trained at 512: relu² with an n that stays beyond does better", ("gau, n fixed", "gau")),
        ("trained at 512: softmax with log n beyond does better", ("roformer, log n", "roformer")),
        ("trained at 512: softmax_plus, log n at every length, does better", ("roformer, softmax_plus", "roformer")),
    ]
    yield from each([("trained at 512: relu²/n loses more", ())], loses_more)
    yield from each([("trained at 512: softmax does not fail", ())], fails)
    yield from each(said, better)
    yield Answer("trained with log n: softmax_plus does best", "–", OPEN, TOO_LARGE)


GROWTH = {  # of entropies, at the shortest and the longest
    "1/√d": {64: 3.68, 8192: 8.51},
    "log n/log 512": {64: 3.94, 8192: 8.00},
    "log n/(0.24 d)": {64: 3.15, 8192: 4.77},
}


def entropies(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("entropies")
    first, last = rows[0], rows[-1]

    def ends(name: str) -> str:
        return _beside({r["length"]: mean(r, name) for r in (first, last)}, GROWTH[name])

    def slower(of: str, name: str) -> Answer:
        others = ((first, name), (last, "1/√d"), (first, "1/√d"))
        more = mean(last, name, lambda a, b, c, d: a - b - (c - d), *others)
        why = f"1/√d: {ends('1/√d')}; unit vectors times √d, d = 128"
        return Answer(of, ends(name), within(more, -math.inf, 0), why)

    def level(of: str, name: str) -> Answer:
        grown = mean(last, name, lambda x, y: x - y, (first, name))
        return Answer(of, ends(name), within(grown, -math.inf, 0.5), "by less than 0.5; log n slows the growth")

    for name in ("log n/log 512", "log n/(0.24 d)"):
        yield from each([(f"{name}: grows less than by 1/√d", (name,))], slower)
        yield from each([(f"{name}: does not grow", (name,))], level)


def counted_entropies() -> str:
    """Scores are nearly normal, with a standard deviation σ: softmax of many such has an entropy of log n - σ²/2."""
    d, found = 128, {}
    for name in GROWTH:
        sigma = {n: quality.scales(n, d)[name] * d**0.5 for n in (64, 8192)}
        found[name] = [math.log(n) - x * x / 2 for n, x in sigma.items()]
    return "log n - σ²/2 of normal scores: " + ", ".join(f"{name} {a:.2f} to {b:.2f}" for name, (a, b) in found.items())


def initial(e: Evidence) -> Iterator[Answer]:
    found = e.computed("initial_size")
    told = f"E swish {found['mean']:.4f}, E swish² {found['square']:.4f}"
    close = abs(found["mean"] - 0.2066) < 1e-3 and abs(found["square"] - 0.3557) < 1e-3
    yield Answer("moments", told, _holds(close), "0.2066 and 0.3557 are said")
    yield from _initial_sizes(found["sizes"], "without RoPE")


def initial_turned(e: Evidence) -> Iterator[Answer]:
    yield from _initial_sizes(e.computed("initial_turned"), "with RoPE")


def _initial_sizes(sizes: Sequence[Mapping[str, Any]], how: str) -> Iterator[Answer]:
    def seen(of: str) -> Answer:
        found = {r["length"]: mean(r, "ratio") for r in sizes}
        verdict = worst(within(x, 69 / CLOSE, 69 * CLOSE) for x in found.values())
        why = f"69 is said, a factor of {CLOSE} is allowed; the variance of z_i·z_j is left out"
        return Answer(of, _beside(found, {}), verdict, why)

    def falls(of: str) -> Answer:
        found = {r["length"]: mean(r, "rms") for r in sizes}
        said = {n: initial_output(n) for n in found}
        share = mean(sizes[-1], "rms", lambda x, y: x / y, (sizes[0], "rms"))
        verdict = within(share, 0, 2 * sizes[0]["length"] / sizes[-1]["length"])
        why = "a factor of 2 is allowed; values have a mean, which other tokens add up to"
        return Answer(of, _beside(found, said), verdict, why)

    yield from each([(f"{how}: a token sees itself 69 times as much", ())], seen)
    yield from each([(f"{how}: the output falls as 1/n", ())], falls)


def initial_output(n: int) -> float:
    """s ν⁶/n, with ν² the mean of swish²."""
    return 128 * quality.swish_moments()[1] ** 3 / n


def counted_initial() -> str:
    first, square = quality.swish_moments()
    told = f"E swish {first:.4f}, E swish² {square:.4f}; s ν⁴ over s μ⁴ = {square**2 / first**4:.0f}; s ν⁶/n = "
    told += ", ".join(f"{initial_output(n):.3g} at {n:,}" for n in (64, 512, 2048))
    return told + "; λ⁷ = " + ", ".join(f"{x**7:.3g} for λ = {x:g}" for x in (0.5, 2.0))


def initial_factors(e: Evidence) -> Iterator[Answer]:
    rows = {r["factor"]: r for r in e.computed("initial_factors")}

    def answer(of: str, factor: float) -> Answer:
        found, said = mean(rows[factor], "output"), factor**7
        why = f"{said:.3g} is said, within a factor of {NEAR}; swish is not homogeneous"
        return Answer(of, str(found), within(found, said / NEAR, said * NEAR), why)

    return each([(f"weights times {x:g}: the output times {x:g}⁷", (x,)) for x in rows], answer)


def probe(e: Evidence) -> Iterator[Answer]:
    rows = _named(e, "same_tokens")

    def answer(name: str, shows: bool) -> Answer:
        row = _pick(rows, name)
        spread = row["high"] / row["low"] - 1
        told = f"outputs of {row['low']:.3g} … {row['high']:.3g}"
        why = "positions show: 1% apart is asked for" if shows else "positions do not show: equal to rounding"
        return Answer(name, told, _holds(spread > 0.01 if shows else spread < 1e-9), why)

    return each([("relu²", (True,)), ("softmax over l2 norms", (True,)), ("softmax", (False,))], answer)


COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
SMOOTH = {  # errors that are said, by smoothness and inverse, at these counts of landmarks
    (0.0, "per_matrix"): dict(zip(COUNTS, (0.99, 0.99, 0.99, 0.99, 0.98, 0.97, 0.90, 0.026), strict=True)),
    (0.95, "per_matrix"): dict(zip(COUNTS, (0.93, 0.85, 0.73, 0.53, 0.33, 0.17, 0.10, 0.076), strict=True)),
    (0.99, "per_matrix"): dict(zip(COUNTS, (0.69, 0.47, 0.24, 0.11, 0.069, 0.059, 0.057, 0.056), strict=True)),
    (0.99, "pinv"): dict(zip(COUNTS, (0.69, 0.47, 0.24, 0.106, 0.041, 0.016, 0.007, 0.0), strict=True)),
}


def smoothness(e: Evidence) -> Iterator[Answer]:
    rows = e.computed("landmarks")

    def answer(of: str, smooth: float, inverse: str) -> Answer:
        mine = [r for r in rows if (r["smooth"], r["inverse"]) == (smooth, inverse)]
        found = {r["landmarks"]: mean(r, "error") for r in mine}
        why = f"by m; error at m = 64 below {SUFFICES} of the output"
        verdict = within(_pick(found, 64), 0, SUFFICES)
        return Answer(of, _beside(found, SMOOTH.get((smooth, inverse), {})), verdict, why)

    for smooth in (0.0, 0.95, 0.99):
        what = "independent tokens" if not smooth else f"each token {smooth} of the one before"
        how = (("per_matrix", "six iterations"), ("pinv", "exact inverse"))
        yield from each([(f"{what}, {told}", (smooth, inverse)) for inverse, told in how], answer)

    def whole(of: str, inverse: str, low: float, high: float, why: str) -> Answer:
        mine = {r["smooth"]: r for r in rows if (r["inverse"], r["landmarks"]) == (inverse, 1024)}
        found = {smooth: mean(_pick(mine, smooth), "error") for smooth in (0.0, 0.95, 0.99)}
        told = ", ".join(f"{x} where each token is {smooth:g} of the one before" for smooth, x in found.items())
        return Answer(
            of,
            told,
            worst(within(x, low, high) for x in found.values()),
            f"n = m = 1,024, the reference, float64; {why}",
        )

    said = [
        ("m = n: six iterations are not exact", ("per_matrix", 1e-6, math.inf, "0.026, 0.076 and 0.056 are said")),
        ("m = n: the exact inverse is exact", ("pinv", 0.0, 1e-6, "1e-6 is rounding, of an inverse of 1,024 numbers")),
    ]
    yield from each(said, whole)


def counted_iterations() -> str:
    """Of a number λ in place of the matrix, between 1 over its condition number and 1: steps until λ z is nearly 1."""

    def steps(condition: float) -> int:
        x, count = condition**-2, 0
        while abs(1 - x) > 1e-3:
            x, count = x * (13 - x * (15 - x * (7 - x))) / 4, count + 1
        return count

    found = ", ".join(f"{steps(c)} for a condition number of {c:,}" for c in (10, 100, 1000, 10000))
    return f"iterations of the inverse: {found}; six are usual"


def real_landmarks(e: Evidence) -> Iterator[Answer]:
    rows = {(r["length"], r["by"], r["size"]): r for r in e.computed("approximations")}

    def answer(of: str, n: int) -> Answer:
        found = {m: mean(_pick(rows, (n, "Nyström", m)), "error") for m in (16, 32, 64, 128)}
        why = f"by m; error at m = 64 below {SUFFICES} of the output, q and k turned by RoPE"
        return Answer(of, _beside(found, {}), within(found[64], 0, SUFFICES), why)

    return each([(f"a trained model, n = {n:,}", (n,)) for n in (256, 512, 1024)], answer)


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


def nothing(why: str) -> Callable[[], str]:
    """Where nothing can be counted."""
    return lambda: f"nothing to count: {why}"


def counted_forms() -> str:
    n, d, c = 333, 64, 64
    return (
        f"products per token and head, n = {n}, d = {d}: quadratic {2 * n * d:,}, "
        f"in chunks of {c} {2 * c * d + 2 * d * d:,}, recurrent {2 * d * d:,}"
    )


def counted_chunks() -> str:
    n, s, e = 96, 64, 128
    inside, all_of_them = n * n * (s + e), 2 * n * s * e
    return f"products, n = {n}, s = {s}, e = {e}: one chunk {inside:,}, as the unit; the sum over all {all_of_them:,}"


def counted_repeats() -> str:
    tokens, times = 32, 8
    return f"{tokens * times} tokens, {tokens} of them different: {times} in a segment, whose mean they are"


CLAIMS = [
    Claim(
        "D1",
        "RoPE's scores depend on the distance alone, and it keeps norms.",
        "K8265",
        "errors below 1e-4",
        ("rope_relativity",),
        nothing("an identity"),
        relativity,
    ),
    Claim(
        "D2",
        "The bound on RoPE's scores decays with distance (and, as it is often read, so do the scores).",
        "K8265",
        "the bound 32.5, 13.4 at 32, 5.3 at 512; no score exceeds its own",
        ("decay", "real_decay"),
        counted_decay,
        _all(decay, real_decay),
    ),
    Claim(
        "D3",
        "With RoPE in its numerator alone, linear attention has weights that may be negative and need not sum to 1.",
        "K8265",
        "sums of 0.72 at 31, 0.48 at 127, 0.29 at 511; 1.2% negative",
        ("rotated_features", "rotated_by_hand"),
        counted_sums,
        _all(rotated, rotated_by_hand),
    ),
    Claim(
        "D4",
        "Linear attention has low rank and is close to mean pooling; a causal one is not.",
        "K8338",
        "rank 16 of 256, 256 if causal; entropy 5.50 of 5.55, softmax 3.60",
        ("ranks", "real_maps"),
        counted_ranks,
        _all(ranks, real_ranks),
    ),
    Claim(
        "D5",
        "Causal models lose little by linear attention, bidirectional ones much; a local band raises its quality.",
        "K8338",
        "little if causal, clearly if bidirectional; copies as softmax does; no other numbers",
        ("trained", "copied", "bands"),
        nothing("a matter of training"),
        _all(kinds, copying, bands),
    ),
    Claim(
        "D6",
        "relu² with 1/n fails beyond the trained length; softmax does not.",
        "K9019",
        "an output that falls as 1/n; a fixed n does better, softmax better than both, with log n best",
        ("lengths", "noise", "beyond"),
        counted_lengths,
        _all(lengths, noise, beyond),
    ),
    Claim(
        "D7",
        "A scale of log n keeps the entropy of attention.",
        "K8823",
        "from n = 64 to 8,192: 3.68 to 8.51 by 1/√d, 3.94 to 8.00 by log n/log 512, 3.15 to 4.77 by log n/(0.24 d)",
        ("entropies",),
        counted_entropies,
        entropies,
    ),
    Claim(
        "D8",
        "A gated attention unit starts small: of the order 1/n.",
        "K8990",
        "0.2066, 0.3557; 69; 1/n; weights times λ: the output times λ⁷",
        ("initial_size", "initial_turned", "initial_factors"),
        counted_initial,
        _all(initial, initial_turned, initial_factors),
    ),
    Claim(
        "D9",
        "Attention whose rows do not sum to 1 knows positions of equal tokens.",
        "K9105",
        "a spread for relu², none for softmax",
        ("same_tokens",),
        nothing("rows that sum to 1 return equal values as they are"),
        probe,
    ),
    Claim(
        "D10",
        "Nyström attention approximates softmax attention.",
        "Xiong et al. 2021",
        "only where sequences are smooth: errors of 0.99, 0.53, 0.11 at m = 64; six iterations end at 0.06, not exact "
        "at m = n, where the exact inverse is",
        ("landmarks", "approximations"),
        counted_iterations,
        _all(smoothness, real_landmarks),
    ),
    Claim(
        "D11",
        "It is exact where segments hold one token each.",
        "Xiong et al. 2021, lemma 2",
        "rounding",
        ("repeated_tokens",),
        counted_repeats,
        exact_landmarks,
    ),
    Claim(
        "D13",
        "Chunked, recurrent and quadratic linear attention are one function.",
        "Katharopoulos et al. 2020",
        "1e-5 in float32",
        ("one_function",),
        counted_forms,
        one_function,
    ),
    Claim(
        "D14",
        "FLASH with one chunk is the quadratic unit but for its scale, with chunks of one token linear attention.",
        "K8934",
        "rounding",
        ("chunks",),
        counted_chunks,
        chunks,
    ),
]
