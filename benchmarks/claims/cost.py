"""Claims about time and memory. H: width of the model, n: tokens, d: head dimension."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from .. import fits, layers
from . import FAILS, HOLDS, OPEN, Answer, Claim
from .evidence import Evidence, H

D = layers.HEAD_DIM
NEAR = 1.5  # a crossover is where it is said to be within this factor
CLEAR = 1.5  # times as fast: a clear advantage


def added(*times: fits.Times) -> fits.Times:
    """Of one after the other, round by round."""
    sizes = set.intersection(*(set(t) for t in times))
    return {n: [sum(x) for x in zip(*(t[n] for t in times), strict=False)] for n in sizes}


def scaled(times: fits.Times, factor: float) -> fits.Times:
    return {n: [factor * x for x in rounds] for n, rounds in times.items()}


def tokens(n: float) -> str:
    return "none up to the longest" if math.isinf(n) else "below the shortest" if n == 0 else f"{n:,.0f}"


def at_crossover(of: str, found: Sequence[tuple[str, float, fits.Interval | None]]) -> Answer:
    """found: what, the length that is claimed, and the one that was measured."""
    told, verdicts, why = [], [], []
    for what, claimed, interval in found:
        if interval is None:
            continue
        told.append(f"{what}: {tokens(interval.value)} ({tokens(interval.low)}–{tokens(interval.high)})")
        inside = interval.low <= claimed * NEAR and interval.high >= claimed / NEAR
        clear = interval.low >= claimed / NEAR and interval.high <= claimed * NEAR
        verdicts.append(HOLDS if clear else OPEN if inside else FAILS)
        if not clear:
            side = (
                "the interval reaches beyond" if inside else "later than" if interval.low > claimed else "earlier than"
            )
            why.append(f"{what}: {side} {claimed:,.0f} within a factor of {NEAR}")
    if not told:
        return Answer(of, "–", OPEN, "too few lengths were measured")
    verdict = FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS
    return Answer(of, "; ".join(told), verdict, "; ".join(why) or f"within a factor of {NEAR} of what is said")


def each(by: Sequence[tuple[str, Any]], answer: Callable[[Any], Answer]) -> Iterator[Answer]:
    """An answer for each reading; a reading whose rows are missing says so."""
    for name, key in by:
        try:
            yield answer(key)
        except LookupError as missing:
            yield Answer(name, "–", OPEN, str(missing).strip("'\""))


BASELINES = (("materialised attention", "eager"), ("fused attention", "fused"))


@functools.cache
def flops(level: str, name: str, by: str, width: int, length: int) -> int:
    part = next(p for p in layers.parts() if (p.level, p.name, p.by) == (level, name, by))
    return layers.counted(part, width, length)


def counted_crossover(above: Callable[[int], int], below: Callable[[int], int], unit: int = 64) -> int:
    """The least multiple of `unit` from which `above` counts more than `below`."""
    low, high = 0, 1 << 10
    while above(high * unit) <= below(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle * unit) > below(middle * unit) else (middle, high)
    return high * unit


# C1, C2
def feed_forward_crossover(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, str]) -> Answer:
        of, by = item
        found = []
        for size, width in layers.WIDTHS.items():
            attention, forward = (
                e.times("layer", "attention", by, width),
                e.times("layer", "feed-forward", "eager", width),
            )
            found.append((f"{size}, H = {width}", 2 * width, fits.crossover(attention, forward)))
        return at_crossover(of, found)

    return each([(b[0], b) for b in BASELINES], answer)


def mixing_crossover(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, str]) -> Answer:
        of, by = item
        found = []
        for size, width in layers.WIDTHS.items():
            rest = added(
                e.times("layer", "projections", "eager", width), e.times("layer", "feed-forward", "eager", width)
            )
            interval = fits.crossover(e.times("mixing", "attention", by, width), rest)
            found.append((f"{size}, H = {width}", 6 * width, interval))
        return at_crossover(of, found)

    return each([(b[0], b) for b in BASELINES], answer)


def counted_feed_forward() -> str:
    found = [
        counted_crossover(
            lambda n, w=width: flops("layer", "attention", "eager", w, n),
            lambda n, w=width: flops("layer", "feed-forward", "eager", w, n),
        )
        for width in layers.WIDTHS.values()
    ]
    return "more products beyond n = " + ", ".join(f"{n:,}" for n in found)


def counted_mixing() -> str:
    found = [
        counted_crossover(
            lambda n, w=width: flops("mixing", "attention", "eager", w, n),
            lambda n, w=width: (
                flops("layer", "projections", "eager", w, n) + flops("layer", "feed-forward", "eager", w, n)
            ),
        )
        for width in layers.WIDTHS.values()
    ]
    return "more products beyond n = " + ", ".join(f"{n:,}" for n in found)


# C3, C4
def slope(n: int) -> float:
    return (12 * n * H * H + 4 * n * n * H) / (12 * n * H * H + 2 * n * n * H)


def layer(e: Evidence, by: str) -> fits.Times:
    return added(e.times("layer", "attention", by), e.times("layer", "feed-forward", "eager"))


def slopes(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, str]) -> Answer:
        of, by = item
        times = layer(e, by)
        told, off = [], []
        for n in (512, 1024, 2048, 4096):
            found = fits.local_slope(times, n)
            if found is not None:
                told.append(f"{found.value:.2f} at {n:,}")
                off.append((max(found.low - slope(n), slope(n) - found.high, 0), n))
        if not off:
            raise LookupError("too few lengths were measured")
        worst, n = max(off)
        return Answer(
            of, ", ".join(told), HOLDS if worst <= 0.1 else FAILS,
            f"the interval at n = {n:,} is {worst:.2f} off; 0.1 is allowed" if worst else "inside every interval",
        )  # fmt: skip

    return each([(b[0], b) for b in BASELINES], answer)


def ceiling(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, str]) -> Answer:
        of, by = item
        rest = added(e.times("layer", "projections", "eager"), e.times("layer", "feed-forward", "eager"))
        whole = layer(e, by)
        told, over = [], []
        for n in (128, 512, 1024, 2048, 4096, 8192):
            if n in whole and n in rest:
                gain, most = fits.ratio(whole[n], rest[n]), 1 + n / (6 * H)
                told.append(f"{gain.value:.2f}× at {n:,} (said: {most:.2f}×)")
                over.append((gain.low / most, n))
        if not over:
            raise LookupError("too few lengths were measured")
        worst, n = max(over)
        why = f"at most {worst:.2f} times the ceiling" if worst > 1 else "never above the ceiling"
        return Answer(of, ", ".join(told), HOLDS if worst <= 1.1 else FAILS, f"{why} (n = {n:,}); 1.1 times is allowed")

    return each([(b[0], b) for b in BASELINES], answer)


# C5, C6, C8
PAIRS = (
    ("both in eager torch", ("eager", "eager")),
    ("ours against fused attention", ("ours", "fused")),
)


def overtakes(name: str, claimed: float) -> Callable[[Evidence], Iterator[Answer]]:
    """Where mixing by `name` gets cheaper than attention."""

    def answers(e: Evidence) -> Iterator[Answer]:
        def answer(item: tuple[str, tuple[str, str]]) -> Answer:
            of, (mine, theirs) = item
            interval = fits.crossover(e.times("mixing", "attention", theirs), e.times("mixing", name, mine))
            return at_crossover(of, [("from n", claimed, interval)])

        return each([(p[0], p) for p in PAIRS], answer)

    return answers


def both_readings(e: Evidence) -> Iterator[Answer]:
    for name, claimed in (("linear attention, keys and values 4d", 16 * D), ("linear attention, keys 4d", 4 * D)):
        for a in overtakes(name, claimed)(e):
            yield Answer(f"{name.split(', ')[1]}: {a.of}", a.measured, a.verdict, a.why)


def slower_when_short(e: Evidence) -> Iterator[Answer]:
    for name in ("linear attention, keys and values 4d", "linear attention, keys 4d"):

        def answer(item: tuple[str, tuple[str, str]], name: str = name) -> Answer:
            of, (mine, theirs) = item
            ours, other = e.times("mixing", name, mine), e.times("mixing", "attention", theirs)
            n = 128
            if n not in ours or n not in other:
                raise LookupError(f"{n} tokens were not measured")
            found = fits.ratio(ours[n], other[n])
            verdict = HOLDS if found.low > 1 else FAILS if found.high < 1 else OPEN
            why = "above 1: slower" if verdict == HOLDS else "below 1: faster" if verdict == FAILS else "around 1"
            return Answer(f"{name.split(', ')[1]}: {of}", f"{found} of attention's time at n = {n}", verdict, why)

        yield from each([(p[0], p) for p in PAIRS], answer)


# C7, C17, C20, C21
def performer(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, str]) -> Answer:
        of, by = item
        whole = layer(e, by)
        mine = added(e.times("layer", "Performer", "ours"), e.times("layer", "feed-forward", "eager"))
        interval = fits.crossover(whole, scaled(mine, CLEAR))
        return at_crossover(of, [(f"{CLEAR} times as fast from n", 5000, interval)])

    return each([(b[0], b) for b in BASELINES], answer)


def units_against_pair(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, tuple[str, str]]) -> Answer:
        of, (mine, theirs) = item
        interval = fits.crossover(layer(e, theirs), e.times("layer", "GAU × 2", mine))
        return at_crossover(of, [("faster from n", 512, interval)])

    return each([(p[0], p) for p in PAIRS], answer)


def mixed_against_quadratic(e: Evidence) -> Iterator[Answer]:
    for level, name in (("mixing", ""), ("layer", " × 2")):

        def answer(by: str, level: str = level, name: str = name) -> Answer:
            interval = fits.crossover(e.times(level, f"GAU{name}", by), e.times(level, f"FLASH{name}", by))
            return at_crossover(f"{level}, {by}", [("faster from n", 492, interval)])

        yield from each([(f"{level}, {by}", by) for by in ("eager", "ours")], answer)


def features(e: Evidence) -> Iterator[Answer]:
    d = 32  # of the small models' heads
    rows = {(r["length"], r["by"], r["size"]): r["error"] for r in e.computed("approximations")}
    for n in (256, 512, 1024):
        landmarks, few, many = rows[n, "Nyström", d], rows[n, "Performer", d], rows[n, "Performer", 4 * d]
        told = f"error {landmarks:.2f} by {d} landmarks, {few:.2f} by {d} features, {many:.2f} by {4 * d}"
        verdict = HOLDS if landmarks <= many else FAILS
        yield Answer(f"n = {n}", told, verdict, "real activations, against softmax attention")


# C9, C10, C12, C13, C19
def memory_against_time(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, str]) -> Answer:
        of, by = item
        n = 4096
        peaks = [e.bytes("mixing", *key, n, "peak") for key in (("attention", by), ("linear attention", "ours"))]
        times = [e.times("mixing", *key)[n] for key in (("attention", by), ("linear attention", "ours"))]
        memory, time = peaks[0] / peaks[1], fits.ratio(*times)
        verdict = HOLDS if memory > time.high else FAILS if memory < time.low else OPEN
        return Answer(of, f"at n = {n}: memory {memory:.1f}× less, time {time}× less", verdict, "which falls more")

    return each([(b[0], b) for b in BASELINES], answer)


def states_against_scores(e: Evidence) -> Iterator[Answer]:
    def answer(by: str) -> Answer:
        n = 1024
        states = e.bytes("mixing", "causal linear attention", by, n, "peak")
        scores = e.bytes("mixing", "attention", "eager", n, "peak")
        less = states < scores
        told = f"at n = {n}: {states / 1e6:,.0f} MB, materialised attention {scores / 1e6:,.0f} MB"
        if by == "every state":
            return Answer("every state kept", told, FAILS if less else HOLDS, "more than the scores, below n = d²")
        why = "less, far below n = d²: the bound is that of keeping every state"
        return Answer("our kernel", told, FAILS if less else HOLDS, why if less else "more")

    return each([("every state kept", "every state"), ("our kernel", "ours")], answer)


def naive_autograd(e: Evidence) -> Iterator[Answer]:
    n = 1024
    naive = e.bytes("mixing", "causal linear attention", "every state", n, "saved")
    mine = e.bytes("mixing", "causal linear attention", "ours", n, "saved")
    values = n * H * 4
    found = naive / (mine + 3 * values)  # with the inputs, which both keep
    told = f"at n = {n}: {naive / 1e6:.0f} MB kept for backward, by our kernel {mine / 1e6:.1f} MB and the inputs"
    verdict = HOLDS if D / 4 <= found <= 4 * D else FAILS
    yield Answer("", told, verdict, f"{found:.0f} times as much, where {D} are said; a factor of 4 is allowed")


def longest(e: Evidence) -> Iterator[Answer]:
    what = "both"
    mine = e.times("mixing", "causal linear attention", "ours", what=what)
    for of, by in BASELINES:

        def answer(by: str, of: str = of) -> Answer:
            theirs = e.times("mixing", "attention", by, what=what)
            shared = sorted(set(mine) & set(theirs))
            found = {n: fits.ratio(theirs[n], mine[n]) for n in shared}
            slow = [n for n in shared if found[n].low < 1]
            told = ", ".join(f"{found[n].value:.1f}× at {n:,}" for n in shared)
            why = f"slower at n = {', '.join(map(str, slow))}" if slow else "faster at every length"
            return Answer(of, told, FAILS if slow else HOLDS, f"forward and backward, {why}")

        yield from each([(of, by)], answer)


def gated_memory(e: Evidence) -> Iterator[Answer]:
    for of, mine, theirs in (
        ("both in eager torch", "eager", "eager"),
        ("ours against fused attention", "ours", "fused"),
    ):

        def answer(item: tuple[str, str, str]) -> Answer:
            of, mine, theirs = item
            n = 1024
            attention = e.bytes("layer", "attention", theirs, n, "saved")
            forward = e.bytes("layer", "feed-forward", "eager", n, "saved")
            gated = e.bytes("layer", "GAU × 2", mine, n, "saved")
            found = (attention + forward) / gated
            told = f"at n = {n}: {(attention + forward) / 1e6:.0f} MB kept for backward, GAU × 2 {gated / 1e6:.0f} MB"
            return Answer(of, told, HOLDS if found >= CLEAR else FAILS, f"{found:.2f} times as much; nearly 2 are said")

        yield from each([(of, (of, mine, theirs))], answer)


# C11
def chunk_states(e: Evidence) -> Iterator[Answer]:
    n, s = 1024, layers.KEY_DIM
    out = n * 2 * H * 4
    held = e.bytes("mixing", "FLASH, causal", "ours", n, "peak") - out
    told = f"at n = {n}: {held / 1e6:.1f} MB beyond the output, states of every token {n * s * s * 4 / 1e6:.0f} MB"
    share = held / (n * s * s * 4)
    yield Answer("our kernel", told, HOLDS if share < 0.1 else FAILS, f"{share:.3f} of them; below 0.1 is asked for")


# C14
def decoding(e: Evidence) -> Iterator[Answer]:
    rows = e.rows("decoding")
    for name, claimed in (("linear attention, state", 0.0), ("attention, cache of keys and values", 1.0)):
        times = {r["length"]: r["times"] for r in rows if r["name"] == name}
        sizes = sorted(times)
        if len(sizes) < 2:
            raise LookupError("too few lengths were measured")
        low, high = sizes[-3:][0], sizes[-1]
        found = float(np.log(np.median(times[high]) / np.median(times[low])) / np.log(high / low))
        told = ", ".join(f"{np.median(times[n]) * 1e6:.0f} µs at {n:,}" for n in (sizes[0], sizes[-1]))
        verdict = HOLDS if abs(found - claimed) <= 0.2 else FAILS
        yield Answer(name, told, verdict, f"grows as n^{found:.2f} from {low:,} to {high:,}; n^{claimed:g} is said")
    held = {(r["name"], r["length"]): r["bytes"] for r in rows}
    n = min(r["length"] for r in rows)
    state, cache = (held[name, n] for name in ("linear attention, state", "attention, cache of keys and values"))
    equal = n * state / cache
    yield Answer(
        "memory", f"state {state / 1e6:.1f} MB; a cache is as large at n = {equal:.1f}",
        HOLDS if abs(equal - 32.5) < 0.5 else FAILS, "n = 32.5 is said, for d = 64",
    )  # fmt: skip


# C16
NYSTROM = {32: 125, 64: 320, 128: 854, 256: 2367}


def landmarks(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, tuple[str, str]]) -> Answer:
        of, (mine, theirs) = item
        found = []
        for m, claimed in NYSTROM.items():
            interval = fits.crossover(
                e.times("mixing", "attention", theirs), e.times("mixing", f"Nyström, m = {m}", mine)
            )
            found.append((f"m = {m}", claimed, interval))
        return at_crossover(of, found)

    return each([(p[0], p) for p in PAIRS], answer)


def counted_landmarks() -> str:
    found = [
        counted_crossover(
            lambda n: flops("mixing", "attention", "eager", H, n),
            lambda n, m=m: flops("mixing", f"Nyström, m = {m}", "eager", H, n),
            m,
        )
        for m in NYSTROM
    ]
    return "fewer products beyond n = " + ", ".join(f"{n:,} (m = {m})" for n, m in zip(found, NYSTROM, strict=True))


# C18
def pair_cost(e: Evidence) -> Iterator[Answer]:
    def answer(item: tuple[str, tuple[str, str]]) -> Answer:
        of, (mine, theirs) = item
        whole, units = layer(e, theirs), e.times("layer", "GAU × 2", mine)
        shared = sorted(set(whole) & set(units))
        found = {n: fits.ratio(units[n], whole[n]) for n in shared}
        told = ", ".join(f"{found[n].value:.2f} at {n:,}" for n in shared)
        off = [n for n in shared if found[n].low > 1.25 or found[n].high < 0.8]
        why = f"beyond a factor of 1.25 at n = {', '.join(map(str, off))}" if off else "within a factor of 1.25"
        return Answer(of, told, FAILS if off else HOLDS, f"time of the units over the pair's, {why}")

    return each([(p[0], p) for p in PAIRS], answer)


def counted_pair() -> str:
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {(p.level, p.name, p.by): p for p in layers.parts()}
    modules = [parts["layer", name, "eager"].build(H) for name in ("GAU × 2", "attention", "feed-forward")]
    units, attention, forward = (size(m) for m in modules if isinstance(m, nn.Module))
    found = [
        flops("layer", "GAU × 2", "eager", H, n)
        / (flops("layer", "attention", "eager", H, n) + flops("layer", "feed-forward", "eager", H, n))
        for n in (128, 512, 1024, 2048, 4096, 8192)
    ]
    told = ", ".join(f"{x:.2f}" for x in found)
    return f"{units / (attention + forward):.3f} of the parameters; products {told} at n = 128, 512, …, 8192"


# C24, C25
def rotary(e: Evidence) -> Iterator[Answer]:
    times = {r["name"]: r["times"] for r in e.rows("rotary")}
    base = times["an embedding added"]
    for name, low, high in (("RoPE, eager", 4.0, 5.0), ("RoPE, torch.compile", 2.0, 2.5), ("RoPE, ours", 1.0, 2.5)):
        found = fits.ratio(times[name], base)
        verdict = HOLDS if found.low <= high and found.high >= low else FAILS
        yield Answer(name, f"{found} times an added embedding", verdict, f"{low:g}–{high:g} are said")


def matrices(e: Evidence) -> Iterator[Answer]:
    times = {r["name"]: r["times"] for r in e.rows("rotary")}
    found = fits.ratio(times["RoPE, as matrices"], times["RoPE, ours"])
    verdict = HOLDS if found.low > 1 else FAILS
    yield Answer("", f"{found} times as long as matrices", verdict, "time follows bytes more than multiplications")


CLAIMS = [
    Claim(
        "C1",
        "The feed-forward layer costs more than attention until n > 2H.",
        "K8610",
        "n = 768, 1,536, 2,048 for H = 384, 768, 1,024",
        ("times",),
        counted_feed_forward,
        feed_forward_crossover,
    ),
    Claim(
        "C2",
        "Mixing tokens dominates a layer only for n > 6H, near 5000 at base.",
        "K8610",
        "n = 2,304, 4,608, 6,144 for H = 384, 768, 1,024",
        ("times",),
        counted_mixing,
        mixing_crossover,
    ),
    Claim(
        "C3",
        "A layer's time grows almost linearly with n at usual lengths.",
        "K8610",
        "slopes " + ", ".join(f"{slope(n):.2f} at {n:,}" for n in (512, 1024, 2048, 4096)),
        ("times",),
        lambda: "the same, from the products",
        slopes,
    ),
    Claim(
        "C4",
        "Even to leave mixing out altogether gains little.",
        "K8610",
        "1 + n/(6H): 1.11× at 512, 1.89× at 4,096",
        ("times",),
        lambda: "the same, from the products",
        ceiling,
    ),
    Claim(
        "C5",
        "Linear attention mixes for less than softmax attention when n > d.",
        "K8610",
        "n = 64",
        ("times",),
        lambda: f"fewer products beyond n = {D}",
        overtakes("linear attention", D),
    ),
    Claim(
        "C6",
        "At equal quality linear attention needs keys of 4d, and pays from n > 16d on.",
        "K8610",
        "n = 1,024 if values widen too; 256 if only keys do",
        ("times",),
        lambda: f"n = {16 * D:,} and {4 * D}",
        both_readings,
    ),
    Claim(
        "C7",
        "Performer has a clear advantage only from n of about 5000.",
        "K7921",
        f"a layer {CLEAR} times as fast from n = 5,000",
        ("times",),
        lambda: "–",
        performer,
    ),
    Claim(
        "C8",
        "With wider keys linear attention is slower than standard attention on short sequences.",
        "K8338",
        "slower below n = 256 … 1,024",
        ("times",),
        lambda: "more products below n = 256 or 1,024",
        slower_when_short,
    ),
    Claim(
        "C9",
        "Efficient attention saves more memory than time.",
        "K8610",
        "n/d for scores, against n/d in time at best",
        (
            "times",
            "memory",
        ),
        lambda: f"scores h·n², states h·d²: n²/d² = {4096**2 // D**2:,} at n = 4,096",
        memory_against_time,
    ),
    Claim(
        "C10",
        "Causal linear attention in parallel needs more memory than scores unless n > d².",
        "K8934",
        "n = 4,096 for d = 64",
        ("memory",),
        lambda: "n·d² numbers for n²",
        states_against_scores,
    ),
    Claim(
        "C11",
        "Causal FLASH keeps a state for each chunk only, not one for each token: n·s² numbers.",
        "K8934",
        "e/(c·s) = 0.047",
        ("memory",),
        lambda: f"{2 * H / (layers.CHUNK * layers.KEY_DIM):.3f}",
        chunk_states,
    ),
    Claim(
        "C12",
        "Naive autograd of causal linear attention keeps d times as much as a fused gradient.",
        "Katharopoulos et al. 2020",
        "about 64 for d = 64",
        ("memory",),
        lambda: "n·d² numbers for n·d",
        naive_autograd,
    ),
    Claim(
        "C13",
        "Linear attention is faster at every length, forward and backward.",
        "Katharopoulos et al. 2020",
        "faster at every configuration",
        ("times",),
        lambda: "–",
        longest,
    ),
    Claim(
        "C14",
        "Decoding takes constant time and memory per token.",
        "Katharopoulos et al. 2020",
        "n⁰ against n¹; a smaller state from n > 32.5",
        ("decoding",),
        lambda: "d² + d numbers against 2·n·d",
        decoding,
    ),
    Claim(
        "C16",
        "Nyström attention is linear and overtakes early.",
        "Xiong et al. 2021",
        ", ".join(f"n = {n:,} (m = {m})" for m, n in NYSTROM.items()),
        ("times",),
        counted_landmarks,
        landmarks,
    ),
    Claim(
        "C17",
        "m = d landmarks suffice where Performer needs several times d features.",
        "K8180",
        "m = d, features 4d",
        ("approximations",),
        lambda: "–",
        features,
    ),
    Claim(
        "C18",
        "Two gated attention units cost as much as attention and a feed-forward layer.",
        "K8934",
        "1.03 of the parameters; 1.06 … 2.17 of the products",
        ("times",),
        counted_pair,
        pair_cost,
    ),
    Claim(
        "C19",
        "Two units keep n² numbers each where attention keeps n² per head: nearly twice the batch fits.",
        "K8934",
        "6 times fewer scores; nearly 2 in all at n = 1,024",
        ("memory",),
        lambda: "2 n² numbers for 12 n²",
        gated_memory,
    ),
    Claim(
        "C20",
        "A model of gated attention units is faster than a simplified Transformer for n > 512.",
        "K9052",
        "n = 512",
        ("times",),
        lambda: "never fewer products (C18)",
        units_against_pair,
    ),
    Claim(
        "C21",
        "Mixed chunks are faster than the quadratic unit only when sequences are long enough.",
        "K8934",
        "n = 492 in mixing",
        ("times",),
        lambda: "c + 2se/(s + e) = 492 for c = 256, s = 128, e = 1,536",
        mixed_against_quadratic,
    ),
    Claim(
        "C24",
        "RoPE takes 4 to 5 times an added embedding, fused 2 to 2.5 times.",
        "EleutherAI 2021",
        "4–5×, 2–2.5×",
        ("rotary",),
        lambda: "about 10 units of bytes against 2",
        rotary,
    ),
    Claim(
        "C25",
        "RoPE multiplies 2d times per vector where matrices would d² times.",
        "K8265, Su et al. 2021",
        "32 times fewer for d = 64",
        ("rotary",),
        lambda: f"{2 * D} against {D * D:,}",
        matrices,
    ),
]
