"""Claims about time and memory. H: width of the model, n: tokens, d: head dimension."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kx_kernels as kx
from kx_kernels.ops.rope import reference

from .. import fits, layers, units
from . import FAILS, HOLDS, OPEN, Answer, Claim, each, less, mean, within, worst
from .evidence import Evidence, H

D = layers.HEAD_DIM
NEAR = 1.5  # a number is as it is said to be within this factor
CLOSE = 1.25  # and a ratio that is said to be the products', within this one
CLEAR = 1.5  # times as fast: a clear advantage
SUFFICES = 0.1  # an error, of the output, that an approximation may have


def added(*times: fits.Times) -> fits.Times:
    """Of one after the other, round by round."""
    sizes = set.intersection(*(set(t) for t in times))
    return {n: [sum(x) for x in zip(*(t[n] for t in times), strict=False)] for n in sizes}


def scaled(times: fits.Times, factor: float) -> fits.Times:
    return {n: [factor * x for x in rounds] for n, rounds in times.items()}


def ratios(above: fits.Times, below: fits.Times) -> dict[int, fits.Interval]:
    """At every length that both were measured at."""
    found = {n: fits.ratio(above[n], below[n]) for n in sorted(set(above) & set(below))}
    if not found:
        raise LookupError("no length was measured for both")
    return found


def tokens(n: float) -> str:
    return "∞" if math.isinf(n) else f"{n:,.0f}"


def place(found: fits.Interval) -> str:
    if found.value == 0:
        return f"before n = {tokens(found.high)}"
    if math.isinf(found.value):
        return f"beyond n = {tokens(found.low)}"
    return f"n = {tokens(found.value)} ({tokens(found.low)}–{tokens(found.high)})"


def at_crossover(of: str, claimed: float, found: fits.Interval | None, least: float | None = None) -> Answer:
    """least: the shortest crossover that agrees with the claim, where that is not about `claimed` itself."""
    if found is None:
        return Answer(of, "–", OPEN, "too few lengths were measured")
    low, high = claimed / NEAR, claimed * NEAR
    verdict = within(found, low if least is None else least, high)
    if verdict == FAILS:
        why = f"{'later' if found.low > high else 'earlier'} than {tokens(claimed)} by more than a factor of {NEAR}"
    elif verdict == HOLDS:
        why = f"earlier than {tokens(claimed)}" if found.high < low else f"{tokens(claimed)} within a factor of {NEAR}"
    elif math.isinf(found.value):
        why = f"not crossed at the longest that was measured, which is too short for {tokens(claimed)}"
    elif found.value == 0:
        why = "crossed at the shortest that was measured already"
    else:
        why = f"the interval reaches beyond a factor of {NEAR} of {tokens(claimed)}"
    return Answer(of, place(found), verdict, why)


def listed(lengths: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in lengths)


def agreeing(verdicts: Mapping[int, str]) -> str:
    """At which lengths a claim does not hold."""
    off = [n for n, v in verdicts.items() if v == FAILS]
    wide = [n for n, v in verdicts.items() if v == OPEN]
    told = [f"beyond at n = {listed(off)}"] if off else []
    told += [f"the interval reaches beyond at n = {listed(wide)}"] if wide else []
    return ", ".join(told) or "kept at every length"


def as_said(
    of: str,
    found: Mapping[int, fits.Interval],
    said: Mapping[int, float],
    what: str,
    *,
    factor: float = CLOSE,
    or_more: bool = False,
    or_less: bool = False,
) -> Answer:
    """Whether a number is, at every length, what is said of it."""
    both = {n: x for n, x in found.items() if n in said}
    if not both:
        raise LookupError("none of the lengths was measured")
    ends = {n: (0 if or_less else x / factor, math.inf if or_more else x * factor) for n, x in said.items()}
    verdicts = {n: within(x, *ends[n]) for n, x in both.items()}
    told = ", ".join(f"{x} at {n:,} (said: {said[n]:.3g})" for n, x in both.items())
    rest = ", and more" if or_more else ", and less" if or_less else ""
    why = f"{what}; a factor of {factor} is allowed{rest}; {agreeing(verdicts)}"
    return unless_missing(Answer(of, told, worst(verdicts.values()), why), [n for n in said if n not in both])


def unless_missing(answer: Answer, lengths: Sequence[int]) -> Answer:
    """An answer about more lengths than were measured: of the others it is open what holds."""
    if not lengths:
        return answer
    verdict = worst([answer.verdict, OPEN])
    return replace(answer, verdict=verdict, why=f"{answer.why}; {listed(lengths)} tokens were not measured")


BY = ("eager", "ours")
BASELINES = (("materialised attention", ("eager",)), ("fused attention", ("fused",)))
PAIRS = (
    ("both in eager torch", ("eager", "eager")),
    ("ours against fused attention", ("ours", "fused")),
)
EVERY_PAIR = (PAIRS[0], ("ours against materialised attention", ("ours", "eager")), PAIRS[1])


@functools.cache
def flops(level: str, name: str, by: str, width: int, length: int) -> int:
    part = next(p for p in layers.parts() if (p.level, p.name, p.by) == (level, name, by))
    return layers.counted(part, width, length)


@functools.cache
def kept(level: str, name: str, by: str, length: int) -> tuple[int, ...]:
    """Numbers of each tensor that is kept for backward, the largest first."""
    part = next(p for p in layers.parts() if (p.level, p.name, p.by) == (level, name, by))
    return tuple(sorted(layers.kept(part, H, length), reverse=True))


def counted_crossover(above: Callable[[int], int], below: Callable[[int], int], unit: int = 1) -> int:
    """The least multiple of `unit` at which `above` counts more than `below`."""
    low, high = 0, 1 << 10
    while above(high * unit) <= below(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if above(middle * unit) > below(middle * unit) else (middle, high)
    return high * unit


# C1, C2
def at_each_width(
    found: Callable[[Evidence, str, int], fits.Interval | None], times_width: int
) -> Callable[[Evidence], Iterator[Answer]]:
    """Where attention crosses, for every width, by what it is computed by."""

    def answers(e: Evidence) -> Iterator[Answer]:
        def answer(of: str, by: str, width: int) -> Answer:
            return at_crossover(of, times_width * width, found(e, by, width))

        widths = [(f"{size}, H = {width}", width) for size, width in layers.WIDTHS.items()]
        return each([(f"{of}, {size}", (*by, width)) for of, by in BASELINES for size, width in widths], answer)

    return answers


def feed_forward_crossover(e: Evidence, by: str, width: int) -> fits.Interval | None:
    return fits.crossover(e.times("layer", "attention", by, width), e.times("layer", "feed-forward", "eager", width))


def mixing_crossover(e: Evidence, by: str, width: int) -> fits.Interval | None:
    return fits.crossover(e.times("mixing", "attention", by, width), unmixed(e, width))


def counted_feed_forward() -> str:
    found = [
        counted_crossover(
            lambda n, w=width: flops("layer", "attention", "eager", w, n),
            lambda n, w=width: flops("layer", "feed-forward", "eager", w, n),
        )
        for width in layers.WIDTHS.values()
    ]
    return "more products beyond n = " + ", ".join(f"{n - 1:,}" for n in found)


SHARES = {128: 2.7, 256: 5.3, 512: 10, 1024: 18, 2048: 31, 4096: 47, 8192: 64, 16384: 78}  # percent of a layer


def counted_mixing() -> str:
    found = [
        counted_crossover(
            lambda n, w=width: flops("mixing", "attention", "eager", w, n),
            lambda n, w=width: unmixed_flops(n, w),
        )
        for width in layers.WIDTHS.values()
    ]
    shares = ", ".join(f"{100 * (1 - unmixed_flops(n) / layer_flops(n)):.2g}% at {n:,}" for n in SHARES)
    return f"more products beyond n = {', '.join(f'{n - 1:,}' for n in found)}; of a layer's at base {shares}"


# C3, C4
SLOPES = (512, 1024, 2048, 4096)
CEILINGS = (128, 512, 1024, 2048, 4096, 8192)


def slope(n: int) -> float:
    return (12 * n * H * H + 4 * n * n * H) / (12 * n * H * H + 2 * n * n * H)


def layer(e: Evidence, by: str) -> fits.Times:
    return added(e.times("layer", "attention", by), e.times("layer", "feed-forward", "eager"))


def unmixed(e: Evidence, width: int = H) -> fits.Times:
    """A layer without what mixes tokens."""
    return added(e.times("layer", "projections", "eager", width), e.times("layer", "feed-forward", "eager", width))


def layer_flops(n: int) -> int:
    return flops("layer", "attention", "eager", H, n) + flops("layer", "feed-forward", "eager", H, n)


def unmixed_flops(n: int, width: int = H) -> int:
    return flops("layer", "projections", "eager", width, n) + flops("layer", "feed-forward", "eager", width, n)


def counted_slopes() -> str:
    found = [math.log(layer_flops(n + 64) / layer_flops(n - 64)) / math.log((n + 64) / (n - 64)) for n in SLOPES]
    return ", ".join(f"{x:.2f} at {n:,}" for n, x in zip(SLOPES, found, strict=True))


def counted_ceiling() -> str:
    return ", ".join(f"{layer_flops(n) / unmixed_flops(n):.2f}× at {n:,}" for n in (512, 4096))


def slopes(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, by: str) -> Answer:
        times = layer(e, by)
        found = {n: fits.local_slope(times, n) for n in SLOPES}
        known = {n: x for n, x in found.items() if x is not None}
        if not known:
            raise LookupError("too few lengths were measured")
        verdicts = {n: within(x, slope(n) - 0.1, slope(n) + 0.1) for n, x in known.items()}
        why = f"0.1 is allowed; {agreeing(verdicts)}"
        missing = [n for n in SLOPES if n not in known]
        if missing:
            why += f"; no lengths beside {listed(missing)} were measured"
        told = ", ".join(f"{x} at {n:,}" for n, x in known.items())
        return Answer(of, told, worst([*verdicts.values(), *(OPEN for _ in missing)]), why)

    return each(BASELINES, answer)


def ceiling(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, by: str) -> Answer:
        gains = {n: gain for n, gain in ratios(layer(e, by), unmixed(e)).items() if n in CEILINGS}
        if not gains:
            raise LookupError("too few lengths were measured")
        most = {n: 1 + n / (6 * H) for n in gains}
        verdicts = {n: within(gain, 0, 1.1 * most[n]) for n, gain in gains.items()}
        told = ", ".join(f"{gain}× at {n:,} (said: {most[n]:.2f}×)" for n, gain in gains.items())
        why = f"1.1 times the ceiling is allowed; {agreeing(verdicts)}"
        return unless_missing(Answer(of, told, worst(verdicts.values()), why), [n for n in CEILINGS if n not in gains])

    return each(BASELINES, answer)


# C5, C6, C8
def overtakes(name: str, claimed: float) -> Callable[[Evidence], Iterator[Answer]]:
    """Where mixing by `name` gets cheaper than attention, at the latest."""

    def answers(e: Evidence) -> Iterator[Answer]:
        def answer(of: str, mine: str, theirs: str) -> Answer:
            found = fits.crossover(e.times("mixing", "attention", theirs), e.times("mixing", name, mine))
            return at_crossover(of, claimed, found, least=0)

        return each(PAIRS, answer)

    return answers


WIDE = "linear attention, keys and values 4d"
GAINS = {512: 0.91, 1024: 1.00, 2048: 1.18, 4096: 1.55, 8192: 2.27}  # of a layer, the projections left as they are


def counted_overtaking(*names: str) -> str:
    found = [
        counted_crossover(
            lambda n: flops("mixing", "attention", "eager", H, n),
            lambda n, name=name: flops("mixing", name, "eager", H, n),
        )
        for name in names
    ]
    return "fewer products beyond n = " + " and ".join(f"{n - 1:,}" for n in found)


def both_readings(e: Evidence) -> Iterator[Answer]:
    for name, claimed in ((WIDE, 16 * D), ("linear attention, keys 4d", 4 * D)):
        for a in overtakes(name, claimed)(e):
            yield Answer(f"{name.split(', ')[1]}: {a.of}", a.measured, a.verdict, a.why)

    def answer(of: str, mine: str, theirs: str) -> Answer:
        gains = ratios(layer(e, theirs), added(unmixed(e), e.times("mixing", WIDE, mine)))
        return as_said(of, gains, GAINS, "times as fast, projections as they were")

    def whole(of: str, mine: str, theirs: str) -> Answer:
        wide = added(e.times("layer", WIDE, mine), e.times("layer", "feed-forward", "eager"))
        return as_said(of, ratios(layer(e, theirs), wide), GAINS, "times as fast, projections as wide")

    yield from each([(f"a layer, keys and values 4d: {of}", by) for of, by in PAIRS], answer)
    yield from each([(f"with its projections, keys and values 4d: {of}", by) for of, by in PAIRS], whole)


def slower_when_short(e: Evidence) -> Iterator[Answer]:
    shorter = {WIDE: (128, 256, 512), "linear attention, keys 4d": (128,)}  # than 1,026 and 258, where products tie
    for name, lengths in shorter.items():

        def answer(of: str, mine: str, theirs: str, name: str = name, lengths: Sequence[int] = lengths) -> Answer:
            slower = ratios(e.times("mixing", name, mine), e.times("mixing", "attention", theirs))
            found = {n: x for n, x in slower.items() if n in lengths}
            if not found:
                raise LookupError(f"{listed(lengths)} tokens were not measured")
            verdicts = {n: within(x, 1, math.inf) for n, x in found.items()}
            told = ", ".join(f"{x} of attention's time at {n}" for n, x in found.items())
            why = f"slower above 1; {agreeing(verdicts)}"
            missing = [n for n in lengths if n not in found]
            return unless_missing(Answer(of, told, worst(verdicts.values()), why), missing)

        short = name.split(", ")[1]
        yield from each([(f"{short}: {of}", by) for of, by in PAIRS], answer)


# C7, C20, C21
GPT3, NEEDLESS = 12288, 10_000  # a width, and up to how many tokens attention is said to be near linear there


def gpt3_ceiling() -> float:
    return 1 + NEEDLESS / (6 * GPT3)


def performer(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, mine: str, theirs: str) -> Answer:
        return at_crossover(of, 5000, fits.crossover(layer(e, theirs), scaled(whole(mine), CLEAR)))

    def whole(mine: str) -> fits.Times:
        return added(e.times("layer", "Performer", mine), e.times("layer", "feed-forward", "eager"))

    def small(of: str, mine: str, theirs: str) -> Answer:
        gains = ratios(layer(e, theirs), whole(mine))
        if 4096 not in gains:
            raise LookupError("4,096 tokens were not measured for both")
        told = f"{gains[4096]} times as fast at 4,096"
        return Answer(of, told, within(gains[4096], 1 / CLEAR, CLEAR), f"a factor of {CLEAR} would be significant")

    yield from each(EVERY_PAIR, answer)
    yield from each([(f"no significant gap at n = 4,096 (K8610): {of}", by) for of, by in EVERY_PAIR], small)
    why = f"no layer of width {GPT3:,} was timed; counted, without any mixing it is {gpt3_ceiling():.2f}× as fast"
    yield Answer(f"H = {GPT3:,} needs none below n = {NEEDLESS:,} (K9554)", "–", OPEN, why)


def counted_performer() -> str:
    """A layer's products, its feed-forward half in both."""

    def pair(name: str, n: int) -> int:
        return flops("layer", name, "eager", H, n) + flops("layer", "feed-forward", "eager", H, n)

    found = counted_crossover(lambda n: pair("attention", n), lambda n: math.ceil(CLEAR * pair("Performer", n)))
    gain = pair("attention", 4096) / pair("Performer", 4096)
    told = f"{CLEAR} times fewer products beyond n = {found - 1:,}, {gain:.2f} times at 4,096"
    return f"{told}; of H = {GPT3:,}, without any mixing {gpt3_ceiling():.2f} times at {NEEDLESS:,}"


OTHER_UNIT = "the unit here has relu² and no RoPE, GAU-α softmax_plus and RoPE"


def units_against_pair(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, mine: str, theirs: str) -> Answer:
        found = at_crossover(of, 512, fits.crossover(layer(e, theirs), e.times("layer", "GAU × 2", mine)))
        return replace(found, why=f"{found.why}; {OTHER_UNIT}")

    def memory(of: str, mine: str, theirs: str) -> Answer:
        found = {n: pair_memory(e, mine, theirs, n) for n in (1024, 4096)}
        less = {n: pair / two for n, (pair, two) in found.items()}
        told = ", ".join(f"{x:.2f} times less at n = {n:,}" for n, x in less.items())
        grows = 1 < less[1024] < less[4096]
        why = f"kept for backward; less, and ever less, is said; {OTHER_UNIT}"
        return Answer(of, told, HOLDS if grows else FAILS, why)

    yield from each(PAIRS, answer)
    yield from each([(f"memory, {of}", by) for of, by in PAIRS], memory)
    yield Answer("against BERT, RoBERTa, RoFormer as they are", "–", OPEN, "faster is said; not measured")


def counted_units_against_pair() -> str:
    found = {n: flops("layer", "GAU × 2", "eager", H, n) / layer_flops(n) for n in CEILINGS}
    least = min(found, key=lambda n: found[n])
    return f"{found[least]:.2f} times as many products at least, at n = {least}; {counted_pair_memory()}"


def mixed_against_quadratic(e: Evidence) -> Iterator[Answer]:
    for level, name in (("mixing", ""), ("layer", " × 2")):

        def answer(of: str, by: str, level: str = level, name: str = name) -> Answer:
            found = fits.crossover(e.times(level, f"GAU{name}", by), e.times(level, f"FLASH{name}", by))
            return at_crossover(of, 492, found, least=1)  # there has to be a length that is not long enough

        yield from each([(f"{level}, {by}", (by,)) for by in ("eager", "ours")], answer)

    def gain(of: str, by: str) -> Answer:
        found = ratios(e.times("layer", "GAU × 2", by), e.times("layer", "FLASH × 2", by))
        return as_said(of, found, mixed_gains(), "times as fast")

    yield from each([(f"layer, {by}: by how much", (by,)) for by in ("eager", "ours")], gain)


@functools.cache
def mixed_gains() -> dict[int, float]:
    """Products of two quadratic units over those of mixed chunks."""
    both = ("GAU × 2", "FLASH × 2")
    counted = {n: [flops("layer", name, "eager", H, n) for name in both] for n in (512, 1024, 2048, 4096, 8192)}
    return {n: quadratic / mixed for n, (quadratic, mixed) in counted.items()}


# C9, C10, C12, C13, C19
SCORES, LINEAR = ("mixing", "attention", "eager"), ("mixing", "linear attention", "eager")
STATES = ("mixing", "causal linear attention", "every state")


def counted_memory() -> str:
    n = 4096
    scores, mine = kept(*SCORES, n), kept(*LINEAR, n)
    states = max(set(mine) & set(kept(*LINEAR, 2 * n)))  # what does not grow
    products = flops(*SCORES, H, n) / flops(*LINEAR, H, n)
    return (
        f"at n = {n:,} {scores[0]:,} scores kept, {states:,} numbers of states: {scores[0] / states:,.0f} times fewer; "
        f"of all that is kept {sum(scores) / sum(mine):.0f} times, products {products:.1f} times"
    )


def counted_states() -> str:
    largest, whole = (
        counted_crossover(lambda n, f=f: f(kept(*SCORES, n)), lambda n, f=f: f(kept(*STATES, n))) for f in (max, sum)
    )
    return f"fewer states than scores beyond n = {largest - 1:,}, of all that is kept {whole - 1:,}"


def counted_gradient() -> str:
    n = 1024
    states, values = kept(*STATES, n)[0], n * H
    return f"at n = {n:,} {states:,} numbers of states for {values:,} of values: {states / values:g} times as many"


def counted_training() -> str:
    fewer = counted_crossover(lambda n: sum(kept(*SCORES, n)), lambda n: sum(kept(*LINEAR, n)))
    return f"{counted_overtaking('linear attention')}, fewer numbers kept beyond {fewer - 1:,}"


def memory_against_time(e: Evidence) -> Iterator[Answer]:
    n = 4096

    def answer(of: str, mine: str, theirs: str) -> Answer:
        keys = (("attention", theirs), ("linear attention", mine))
        above, below = (e.bytes("mixing", *key, n, "peak") for key in keys)
        times = [e.times("mixing", *key) for key in keys]
        if any(n not in t for t in times):
            raise LookupError(f"{n} tokens were not timed")
        memory, time = above / below, fits.ratio(times[0][n], times[1][n])
        verdict = HOLDS if memory > time.high else FAILS if memory < time.low else OPEN
        return Answer(of, f"at n = {n:,}: memory {memory:.1f}× less, time {time}× less", verdict, "which falls more")

    return each(EVERY_PAIR, answer)


def states_against_scores(e: Evidence) -> Iterator[Answer]:
    n_tie = D * D

    def answer(of: str, by: str, n: int) -> Answer:
        states = e.bytes("mixing", "causal linear attention", by, n, "peak")
        scores = e.bytes("mixing", "attention", "eager", n, "peak")
        said, found = n_tie / n, states / scores
        verdict = HOLDS if said / NEAR <= found <= said * NEAR else FAILS
        told = f"{units.size(states)}, materialised attention {units.size(scores)}"
        why = f"{found:.3g} times as much; d²/n = {said:g} is said, within a factor of {NEAR}"
        fused = "; of a kernel that keeps the states of chunks only it is said to fail" if by == "ours" else ""
        return Answer(of, told, verdict, why + fused)

    readings = (("every state kept", "every state"), ("our kernel", "ours"))
    return each([(f"{of}, n = {n:,}", (by, n)) for of, by in readings for n in (1024, n_tie)], answer)


def naive_autograd(e: Evidence) -> Iterator[Answer]:
    n = 1024
    values = 3 * n * H * 4  # q, k and v, which both keep

    def answer(of: str, which: str) -> Answer:
        by = ("every state", "ours")
        naive, mine = (e.bytes("mixing", "causal linear attention", b, n, which) for b in by)
        if which == "saved":
            naive, mine = naive + values, mine + values
        found = naive / mine
        told = f"at n = {n:,}: {units.size(naive)}, our kernel {units.size(mine)}"
        verdict = HOLDS if D / NEAR <= found <= D * NEAR else FAILS
        return Answer(of, told, verdict, f"{found:.0f} times as much; {D} are said, within a factor of {NEAR}")

    readings = (("kept for backward, with q, k and v", ("saved",)), ("most that a forward pass holds", ("peak",)))
    return each(readings, answer)


ROOM = 11e9  # bytes: what the source's GPU had
END = 65536  # tokens of the longest that the source timed


def training(e: Evidence, name: str, by: str) -> tuple[dict[int, int], Callable[[int], float], float]:
    """Bytes that a forward and backward pass holds at most, by length; at any length, and how far off at most. They
    are tensors of one size, or as long as the tokens are many, or as their pairs: how much of each, the lengths tell.
    """
    mine = [r for r in e.rows("training") if (r["name"], r["by"]) == (name, by)]
    held = {r["length"]: r["peak"] for r in mine if "peak" in r}
    if len(held) < 4:
        raise LookupError(f"the memory of training {name} ({by}) was not measured at four lengths")
    n, most = (np.array(x, dtype=float) for x in (list(held), list(held.values())))
    parts, _ = scipy.optimize.nnls(np.stack((1 / most, n / most, n * n / most), 1), np.ones(len(n)))
    off = float(np.abs(parts @ (n**0, n, n * n) / most - 1).max())
    return held, lambda n: float(parts @ (1, n, n * n)), off


def fitting(e: Evidence, of: str, name: str, by: str, low: float, high: float) -> Answer:
    """The longest power of two, to 1,048,576, whose forward and backward pass fits."""
    held, takes, off = training(e, name, by)

    def longest(factor: float) -> int:
        return max(n for n in (1 << i for i in range(21)) if factor * takes(n) <= ROOM)

    found = longest(1)
    beyond = "or more" if found == 1 << 20 else f"{2 * found:,} would take {units.size(takes(2 * found))}"
    why = (
        f"{low:,.0f} is said{', or more' if math.isinf(high) else ''}; one sequence, mixing alone of one layer "
        f"{H} wide, forward and backward; counted from {listed(sorted(held))} tokens, {off:.1%} off at most"
    )
    verdicts = {HOLDS if low <= longest(x) <= high else FAILS for x in (1 - off, 1 + off)}
    return Answer(of, f"n = {found:,}, {beyond}", verdicts.pop() if len(verdicts) == 1 else OPEN, why)


def longest(e: Evidence) -> Iterator[Answer]:
    """Neither is causal: like against like."""
    name = "linear attention"

    def faster(of: str, by: str) -> Answer:
        found = ratios(e.times("mixing", "attention", by, what="both"), e.times("mixing", name, "ours", what="both"))
        verdicts = {n: within(x, 1, math.inf) for n, x in found.items()}
        told = ", ".join(f"{x}× at {n:,}" for n, x in found.items())
        slow = [n for n, v in verdicts.items() if v != HOLDS]
        why = f"not faster at n = {listed(slow)}" if slow else "faster at every length that was measured"
        why = f"forward and backward; {why}; 512 … 65,536 are said"
        beyond = [n for n in (16384, END) if n > max(found, default=0)]
        return unless_missing(Answer(of, told, worst(verdicts.values()), why), beyond)

    def smaller(of: str, by: str) -> Answer:
        (theirs, their_law, their_off), (mine, my_law, my_off) = (
            training(e, *key) for key in (("attention", by), (name, "ours"))
        )
        gains = {n: fits.Interval(*3 * (theirs[n] / mine[n],)) for n in sorted(theirs) if n >= 512 and n in mine}
        far = their_law(END) / my_law(END)
        gains[END] = fits.Interval(far, far * (1 - their_off) / (1 + my_off), far * (1 + their_off) / (1 - my_off))
        told = ", ".join(f"{x}× at {n:,}" for n, x in gains.items())
        why = f"most that a forward and backward pass holds, above 1: less; at {END:,} counted from the others"
        return Answer(of, told, worst(within(x, math.nextafter(1, 2), math.inf) for x in gains.values()), why)

    for what, answer in (("time", faster), ("memory", smaller)):
        yield from each([(f"{what}, ours against {of}", by) for of, by in BASELINES], answer)
    said = [
        (f"the longest that fits into {units.size(ROOM)}, {of}", (name, by, *ends))
        for of, name, by, ends in (
            ("materialised attention", "attention", "eager", (4096, 4096)),
            ("fused attention", "attention", "fused", (4096, 4096)),
            ("linear attention, ours", "linear attention", "ours", (65536, math.inf)),
        )
    ]
    yield from each(said, functools.partial(fitting, e))


def pair_memory(e: Evidence, mine: str, theirs: str, n: int) -> tuple[int, int]:
    """What attention and a feed-forward layer keep for backward, and what two units do."""
    pair = e.bytes("layer", "attention", theirs, n, "saved") + e.bytes("layer", "feed-forward", "eager", n, "saved")
    return pair, e.bytes("layer", "GAU × 2", mine, n, "saved")


def gated_memory(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, mine: str, theirs: str, n: int) -> Answer:
        pair, two = pair_memory(e, mine, theirs, n)
        found = pair / two
        told = f"{units.size(pair)} kept for backward, GAU × 2 {units.size(two)}"
        why = f"{found:.2f} times as much; nearly 2 are said, {CLEAR} are asked for; of the batch that fits, which is "
        why += "inferred: none was tried"
        return Answer(of, told, HOLDS if found >= CLEAR else FAILS, why)

    def scores(of: str, n: int) -> Answer:
        attention, unit = (e.bytes("mixing", name, "eager", n, "saved") for name in ("attention", "GAU"))
        found = attention / (2 * unit)
        told = f"{units.size(attention)} kept for backward, two of GAU {units.size(2 * unit)}"
        why = f"{found:.2g} times as much; 6 is said, within a factor of {NEAR}; relu² keeps relu as well, and values"
        return Answer(of, told, HOLDS if 6 / NEAR <= found <= 6 * NEAR else FAILS, why)

    yield from each([(f"{of}, n = {n:,}", (*by, n)) for of, by in PAIRS for n in (1024, 4096)], answer)
    yield from each([("mixing alone, in eager torch, n = 4,096", (4096,))], scores)


def counted_units() -> str:
    n = 4096
    scores, unit = (kept("mixing", name, "eager", n)[0] for name in ("attention", "GAU"))
    told = f"scores {scores / n**2:g} n², of two units {2 * unit / n**2:g} n²: {scores / (2 * unit):g} times fewer"
    return f"{told}; {counted_pair_memory()}"


def counted_pair_memory() -> str:
    """Of all that layers keep for backward."""

    def numbers(name: str, n: int) -> int:
        return sum(kept("layer", name, "eager", n))

    found = {n: (numbers("attention", n) + numbers("feed-forward", n)) / numbers("GAU × 2", n) for n in (1024, 4096)}
    told = ", ".join(f"{x:.2f} times at n = {n:,}" for n, x in found.items())
    return f"numbers that the pair keeps for those of the units: {told}"


# C11
def chunk_states(e: Evidence) -> Iterator[Answer]:
    n, s = 1024, layers.KEY_DIM
    said = 2 * H / (layers.CHUNK * s)
    every = n * s * s * 4
    held = e.bytes("mixing", "FLASH, causal", "ours", n, "peak") - n * 2 * H * 4
    share = held / every
    told = f"at n = {n:,}: {units.size(held)} beyond the output, {share:.3f} of the states of every token"
    why = "the sum before its gate, n·e numbers, counts as well"
    yield Answer("our kernel: no state of every token", told, HOLDS if share < 0.5 else FAILS, f"below half; {why}")
    verdict = HOLDS if said / NEAR <= share <= said * NEAR else FAILS
    yield Answer(f"our kernel: {said:.3f} of them", told, verdict, f"within a factor of {NEAR}; {why}")


# C14
STATE, CACHE = "linear attention, state", "attention, cache of keys and values"


def contexts(e: Evidence, name: str) -> dict[int, Sequence[float]]:
    found = {r["length"]: r["times"] for r in e.named("decoding", name)}
    if len(found) < 2:
        raise LookupError(f"{name}: too few contexts were measured")
    return found


def generation(times: fits.Times, count: int) -> list[float]:
    """Seconds of `count` tokens one after the other, interpolated between the contexts that were measured."""
    sizes = sorted(times)
    if sizes[-1] < count:
        raise LookupError(f"no context of {count:,} was measured")
    rounds = zip(*(times[n] for n in sizes), strict=False)
    return [float(np.interp(np.arange(count), sizes, found).sum()) for found in rounds]


def decoding(e: Evidence) -> Iterator[Answer]:
    def growth(of: str, claimed: float) -> Answer:
        times = contexts(e, of)
        sizes = sorted(times)
        low, high = sizes[-3:][0], sizes[-1]
        more = fits.ratio(times[high], times[low])
        found = fits.Interval(*(math.log(x) / math.log(high / low) for x in (more.value, more.low, more.high)))
        told = ", ".join(f"{units.time(float(np.median(times[n])))} at {n:,}" for n in (sizes[0], sizes[-1]))
        why = f"grows as n to the power of {found} from {low:,} to {high:,}; {claimed:g} is said, within 0.2"
        return Answer(of, told, within(found, claimed - 0.2, claimed + 0.2), why)

    def faster(of: str, batch: str, count: int, said: float, cached: bool = True) -> Answer:
        theirs = contexts(e, CACHE + batch) if cached else e.times("mixing", "attention", "eager")
        found = fits.ratio(generation(theirs, count), generation(contexts(e, STATE + batch), count))
        verdict = within(found, max(1, said / NEAR), math.inf)
        why = f"{said:,g} times is said, of a whole model; between contexts, interpolated"
        return Answer(of, f"{found} times as fast as {'a cache' if cached else 'all again'}", verdict, why)

    def smaller(of: str) -> Answer:
        state, cache = ([r for r in e.rows("decoding") if r["name"] == name] for name in (STATE, CACHE))
        if not (state and cache):
            raise LookupError("a state or a cache was not measured")
        found, said = state[0]["bytes"] / (cache[0]["bytes"] / cache[0]["length"]), (D + 1) / 2
        sizes = sorted({r["bytes"] for r in state})
        level = len(sizes) == 1
        told = f"{' … '.join(map(units.size, sizes))}, at first as much as a cache of {found:.1f} tokens"
        why = f"{said:g} is said, within a factor of {NEAR}, after any context; the state is in float32"
        return Answer(of, told, HOLDS if level and said / NEAR <= found <= said * NEAR else FAILS, why)

    yield from each([(STATE, (0.0,)), (CACHE, (1.0,))], growth)
    yield from each([(f"memory: less than a cache from n = {(D + 1) / 2:g}", ())], smaller)
    said = [
        ("784 tokens (MNIST) against a cache, batch 8", ("", 784, 19.0)),
        ("3,072 tokens (CIFAR-10) against a cache, batch 8", ("", 3072, 56.0)),
        ("3,072 tokens (CIFAR-10) against a cache, batch 1", (", batch 1", 3072, 1.15)),
        ("784 tokens (MNIST) without a cache, batch 1", (", batch 1", 784, 317.0, False)),
        ("3,072 tokens (CIFAR-10) without a cache, batch 1", (", batch 1", 3072, 4462.0, False)),
    ]
    yield from each(said, faster)
    yield Answer("an epoch of WSJ 3.3 times as fast as softmax", "–", OPEN, "no model of speech was trained")


def counted_decoding() -> str:
    """What linear attention hands on after one token, and what a cache keeps of it."""
    q, k, v = torch.ones(3, 1, 1, 1, D)
    out = kx.linear_attention(q, k, v, return_state=True, backend="reference")
    state, token = sum(x.numel() for x in out[1]), k.numel() + v.numel()
    return f"{state:,} numbers of a state, {token} of each token in a cache: fewer from n = {state / token:g}"


# C15
PAPER: dict[str, dict[int, tuple[float, float]]] = {  # MB and ms of table 1 of the paper, on a 1080 Ti
    "attention": {512: (54, 0.8), 1024: (186, 2.4), 2048: (685, 10.0), 4096: (2620, 32.9), 8192: (10233, 155.4)},
    "Nyström, m = 64": {512: (35, 0.7), 1024: (63, 1.3), 2048: (118, 2.7), 4096: (229, 5.9), 8192: (450, 12.3)},
    "Nyström, m = 32": {512: (26, 0.6), 1024: (49, 1.2), 2048: (96, 2.6), 4096: (193, 5.6), 8192: (383, 11.5)},
    "Linformer-256": {512: (41, 0.7), 1024: (81, 1.3), 2048: (165, 2.7), 4096: (366, 5.3), 8192: (635, 11.3)},
    "Longformer-257": {512: (32.2, 2.4), 1024: (65, 4.6), 2048: (130, 9.2), 4096: (263, 18.5), 8192: (455, 36.2)},
}


def paper_table(e: Evidence) -> Iterator[Answer]:
    """Ratios to attention: the paper's own numbers are of another machine, and of a module with its projections."""

    def time(of: str, name: str, mine: str, theirs: str) -> Answer:
        found = ratios(e.times("mixing", "attention", theirs), e.times("mixing", name, mine))
        said = {n: PAPER["attention"][n][1] / ms for n, (_, ms) in PAPER[name].items()}
        return as_said(of, found, said, "times as fast", factor=NEAR, or_more=True)

    def memory(of: str, name: str, mine: str, theirs: str) -> Answer:
        found = {}
        for n in (1024, 4096):
            x = e.bytes("mixing", "attention", theirs, n, "peak") / e.bytes("mixing", name, mine, n, "peak")
            found[n] = fits.Interval(x, x, x)
        said = {n: PAPER["attention"][n][0] / PAPER[name][n][0] for n in found}
        return as_said(of, found, said, "times less at its peak", factor=NEAR, or_more=True)

    def doubling(of: str, name: str, by: str) -> Answer:
        times = e.times("mixing", name, by)
        found = {n: fits.ratio(times[2 * n], times[n]) for n in sorted(times) if 2 * n in times}
        said = {n: PAPER[name][2 * n][1] / PAPER[name][n][1] for n in (512, 1024, 2048, 4096)}
        return as_said(of, found, said, "times as long for twice the tokens", or_less=name != "attention")

    def fewer(of: str, by: str) -> Answer:
        found = ratios(*(e.times("mixing", f"Nyström, m = {m}", by) for m in (64, 32)))
        said = {n: PAPER["Nyström, m = 64"][n][1] / ms for n, (_, ms) in PAPER["Nyström, m = 32"].items()}
        return as_said(of, found, said, "times as fast as 64")

    for what, answer in (("time", time), ("memory", memory)):
        named = [(f"{what}, m = {m}, {of}", (f"Nyström, m = {m}", *by)) for m in (64, 32) for of, by in PAIRS]
        yield from each(named, answer)
    doubled = [(f"twice the tokens, {of}", ("attention", *by)) for of, by in BASELINES]
    doubled += [(f"twice the tokens, m = {m}, {by}", (f"Nyström, m = {m}", by)) for m in (64, 32) for by in BY]
    yield from each(doubled, doubling)
    yield from each([(f"m = 32 is hardly faster than 64, {by}", (by,)) for by in BY], fewer)


def counted_paper_table() -> str:
    found = ", ".join(f"{fewer_products()[n]:.1f} times fewer products at {n:,}" for n in (512, 8192))
    twice = [
        flops("mixing", name, "eager", H, 8192) / flops("mixing", name, "eager", H, 4096)
        for name in ("Nyström, m = 64", "attention")
    ]
    told = f"from 4,096 to 8,192 {twice[0]:.2f} times as many, of attention {twice[1]:.2f} times"
    return f"m = 64: {found} ({FIRST}); {told}"


# C16, C17
NYSTROM = {32: 125, 64: 320, 128: 854, 256: 2367}
FEWER = {512: 2.0, 1024: 4.9, 2048: 11, 4096: 24, 8192: 49}  # products, of 64 landmarks
FIRST = "m²·d in place of the n·m² that is said: values are multiplied first"  # what is counted beside what is said


def landmarks(e: Evidence) -> Iterator[Answer]:
    def crossing(of: str, m: int, mine: str, theirs: str) -> Answer:
        found = fits.crossover(e.times("mixing", "attention", theirs), e.times("mixing", f"Nyström, m = {m}", mine))
        return at_crossover(of, NYSTROM[m], found, least=0)

    def growth(of: str, m: int, by: str) -> Answer:
        times = e.times("mixing", f"Nyström, m = {m}", by)
        times = {n: t for n, t in times.items() if n >= 4 * m}  # shorter ones are about m, not about n
        if len(times) < 4:
            raise LookupError("too few lengths were measured")
        n = sorted(times)[-2]
        found, law = fits.local_slope(times, n), fits.power_law(times)
        assert found is not None
        assert law is not None
        told = f"slope {found} at {n:,}; t = a + b·nᵖ from {law.sizes[0]:,} on, p = {law.exponent}"
        why = f"a slope of 1 is said, and 0.1 allowed; the law is {law.residual:.0%} off at most"
        return Answer(of, told, within(found, 0, 1.1), why)

    def gain(of: str, mine: str, theirs: str) -> Answer:
        found = ratios(e.times("mixing", "attention", theirs), e.times("mixing", "Nyström, m = 64", mine))
        return as_said(of, found, FEWER, "times as fast, as products are fewer", or_more=True)

    yield from each([(f"overtakes, m = {m}: {of}", (m, *by)) for of, by in PAIRS for m in NYSTROM], crossing)
    yield from each([(f"by how much, m = 64: {of}", by) for of, by in PAIRS], gain)
    yield from each([(f"is linear, m = {m}: {by}", (m, by)) for by in ("eager", "ours") for m in NYSTROM], growth)


@functools.cache
def fewer_products() -> dict[int, float]:
    """Of 64 landmarks."""
    both = ("attention", "Nyström, m = 64")
    counted = {n: [flops("mixing", name, "eager", H, n) for name in both] for n in FEWER}
    return {n: theirs / mine for n, (theirs, mine) in counted.items()}


def counted_landmarks() -> str:
    found = [
        counted_crossover(
            lambda n: flops("mixing", "attention", "eager", H, n),
            lambda n, m=m: flops("mixing", f"Nyström, m = {m}", "eager", H, n),
            m,
        )
        for m in NYSTROM
    ]
    told = ", ".join(f"{n:,} (m = {m})" for n, m in zip(found, NYSTROM, strict=True))
    fewer = ", ".join(f"{x:.1f} times fewer at {n:,}" for n, x in fewer_products().items())
    return f"fewer products from n = {told}, of multiples of m; m = 64: {fewer}; {FIRST}"


def features(e: Evidence) -> Iterator[Answer]:
    d = 32  # of the small models' heads
    rows = {(r["length"], r["by"], r["size"]): r for r in e.computed("approximations")}
    lengths = (256, 512, 1024)

    def error(by: str, size: int) -> dict[int, fits.Interval]:
        return {n: mean(rows[n, by, size], "error") for n in lengths}

    def suffice(of: str) -> Answer:
        found = error("Nyström", d)
        told = ", ".join(f"{x} at n = {n:,}" for n, x in found.items())
        why = f"errors on real activations, of softmax attention's output; {SUFFICES} would suffice"
        return Answer(of, told, worst(within(x, 0, SUFFICES) for x in found.values()), why)

    def better(of: str, size: int) -> Answer:
        mine, other = error("Nyström", d), error("Performer", size)
        told = ", ".join(f"{mine[n]} against {other[n]} at n = {n:,}" for n in lengths)
        verdict = worst(less((rows[n, "Nyström", d], "error"), (rows[n, "Performer", size], "error")) for n in lengths)
        why = "which error is less" + ("; neither suffices" if min(x.low for x in other.values()) > SUFFICES else "")
        return Answer(of, told, verdict, why)

    yield from each([(f"{d} landmarks suffice", ())], suffice)
    yield from each([(f"better than {size} features of Performer", (size,)) for size in (d, 4 * d)], better)


def counted_features() -> str:
    found = {name: flops("mixing", name, "eager", H, 1024) for name in ("Nyström, m = 64", "Performer")}
    told = ", ".join(f"{name} {x / 1e9:.2f} G" for name, x in found.items())
    return f"operations of products at n = 1,024, d = {D}, {layers.FEATURES} features of Performer: {told}"


# C18
def pair_cost(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, mine: str, theirs: str) -> Answer:
        found = ratios(e.times("layer", "GAU × 2", mine), layer(e, theirs))
        verdicts = {n: within(x, 1 / CLOSE, CLOSE) for n, x in found.items()}
        told = ", ".join(f"{x} at {n:,}" for n, x in found.items())
        why = f"time of the units over the pair's; a factor of {CLOSE} is allowed; {agreeing(verdicts)}"
        return Answer(of, told, worst(verdicts.values()), why)

    return each(PAIRS, answer)


def counted_pair() -> str:
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {(p.level, p.name, p.by): p for p in layers.parts()}
    modules = [parts["layer", name, "eager"].build(H) for name in ("GAU × 2", "attention", "feed-forward")]
    units, attention, forward = (size(m) for m in modules if isinstance(m, nn.Module))
    found = [flops("layer", "GAU × 2", "eager", H, n) / layer_flops(n) for n in CEILINGS]
    told = ", ".join(f"{x:.2f}" for x in found)
    return f"{units / (attention + forward):.3f} of the parameters; products {told} at n = 128, 512, …, 8192"


# C24, C25
def rotary(e: Evidence) -> Iterator[Answer]:
    def answer(of: str, above: str, below: str, low: float, high: float, why: str) -> Answer:
        row, other = (e.named("rotary", name)[0] for name in (above, below))
        found = fits.ratio(row["times"], other["times"])
        told = f"{found} times {below}"
        if "bytes" in row:
            told += f"; {row['bytes'] / float(np.median(row['times'])) / 1e9:.1f} GB/s"
        return Answer(of, told, within(found, low, high), why)

    added, ours = "an embedding added", "RoPE, ours"
    said = [
        ("eager", ("RoPE, eager", added, 4.0, 5.0, "4–5 are said")),
        ("fused by torch.compile", ("RoPE, torch.compile", added, 2.0, 2.5, "2–2.5 are said")),
        ("fused, ours", (ours, added, 0.0, 2.5, "2–2.5 are said of fused ones; less is no failure")),
        ("eager against ours", ("RoPE, eager", ours, 0.0, 5.0, "5 at most, by bytes: 10 units against 2")),
        ("ours against a copy", (ours, "a copy", 0.0, NEAR, f"the same bytes; a factor of {NEAR} is allowed")),
    ]
    yield from each(said, answer)

    def overhead(of: str, name: str) -> Answer:
        """A quarter of the times: a layer takes one sequence."""
        n, times = 2048, layer(e, "fused")
        if n not in times:
            raise LookupError(f"a layer was not timed at {n:,} tokens")
        found = fits.ratio([x / 4 for x in e.named("rotary", name)[0]["times"]], times[n])
        why = "1–3% are said of fused ones, less is no failure; q and k of 2,048 tokens, in float32, forward"
        return Answer(of, f"{found} of a layer's time", within(found, 0, 0.03), why)

    named = (("fused by torch.compile", "RoPE, torch.compile"), ("ours", ours))
    yield from each([(f"what it adds to a layer, {of}", (name,)) for of, name in named], overhead)


def counted_rotary() -> str:
    """Multiplications: of q and k two for each number; of a layer half of its operations."""
    n = 2048
    share = 4 * n * H / (layer_flops(n) / 2)
    return f"about 10 units of bytes against 2; {share:.3%} of the multiplications of a layer at n = {n:,}"


class Multiplied(TorchDispatchMode):
    """Counts numbers that are multiplied one by one."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += out.numel() if func is torch.ops.aten.mul.Tensor else 0
        return out


def counted_matrices() -> str:
    """Of one vector: the reference's multiplications, and a product's, which are half of its operations."""
    found = []
    for d in (2 * D, D):
        x, tables = torch.ones(1, 1, 1, d), kx.rope_tables(1, d)
        with Multiplied() as turned:
            reference.rope(x, None, *tables)
        with FlopCounterMode(display=False) as matrix:
            x @ torch.eye(d)
        found.append((d, turned.count, matrix.get_total_flops() // 2))
    return "; ".join(f"d = {d}: {few:,} for {many:,}, {many / few:g} times fewer" for d, few, many in found)


def matrices(e: Evidence) -> Iterator[Answer]:
    found = fits.ratio(*(e.named("rotary", name)[0]["times"] for name in ("RoPE, as matrices", "RoPE, ours")))
    told = f"matrices take {found} times as long as ours"
    yield Answer("faster", told, within(found, 1, math.inf), "above 1")
    said = D / 2
    why = f"as many as multiplications, within a factor of {NEAR}: time may follow bytes instead"
    yield Answer(f"{said:g} times as fast", told, within(found, said / NEAR, math.inf), why)


CLAIMS = [
    Claim(
        "C1",
        "The feed-forward layer costs more than attention until n > 2H.",
        "K8610",
        "n = 768, 1,536, 2,048 for H = 384, 768, 1,024",
        ("times",),
        counted_feed_forward,
        at_each_width(feed_forward_crossover, 2),
    ),
    Claim(
        "C2",
        "Mixing tokens dominates a layer only for n > 6H, near 5000 at base.",
        "K8610",
        "n = 2,304, 4,608, 6,144 for H = 384, 768, 1,024; of multiplications at base "
        + ", ".join(f"{x:g}% at {n:,}" for n, x in SHARES.items()),
        ("times",),
        counted_mixing,
        at_each_width(mixing_crossover, 6),
    ),
    Claim(
        "C3",
        "A layer's time grows almost linearly with n at usual lengths.",
        "K8610",
        "slopes " + ", ".join(f"{slope(n):.2f} at {n:,}" for n in (512, 1024, 2048, 4096)),
        ("times",),
        counted_slopes,
        slopes,
    ),
    Claim(
        "C4",
        "Even to leave mixing out altogether gains little.",
        "K8610",
        "1 + n/(6H): 1.11× at 512, 1.89× at 4,096",
        ("times",),
        counted_ceiling,
        ceiling,
    ),
    Claim(
        "C5",
        "Linear attention mixes for less than softmax attention when n > d.",
        "K8610",
        "n = 64",
        ("times",),
        lambda: counted_overtaking("linear attention"),
        overtakes("linear attention", D),
    ),
    Claim(
        "C6",
        "At equal quality linear attention needs keys of 4d, and pays from n > 16d on.",
        "K8610",
        "n = 1,024 if values widen too, 256 if only keys do; a layer 0.91× as fast at 512, 2.27× at 8,192",
        ("times",),
        lambda: counted_overtaking(WIDE, "linear attention, keys 4d"),
        both_readings,
    ),
    Claim(
        "C7",
        "Performer has a clear advantage only from n of about 5000.",
        "K7921, K8610, K9554",
        f"a layer {CLEAR} times as fast from n = 5,000, not at 4,096; none needed below 10,000 for H = {GPT3:,}",
        ("times",),
        counted_performer,
        performer,
    ),
    Claim(
        "C8",
        "With wider keys linear attention is slower than standard attention on short sequences.",
        "K8338",
        "slower below n = 256 … 1,024",
        ("times",),
        lambda: counted_overtaking("linear attention, keys 4d", WIDE),
        slower_when_short,
    ),
    Claim(
        "C9",
        "Efficient attention saves more memory than time.",
        "K8610",
        "n²/d² fewer numbers than scores, n/d less time at best; not beside fused attention, which keeps none",
        (
            "times",
            "memory",
        ),
        counted_memory,
        memory_against_time,
    ),
    Claim(
        "C10",
        "Causal linear attention in parallel needs more memory than scores unless n > d².",
        "K8934",
        "n = 4,096 for d = 64",
        ("memory",),
        counted_states,
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
        counted_gradient,
        naive_autograd,
    ),
    Claim(
        "C13",
        "Linear attention is faster and smaller at every length, forward and backward.",
        "Katharopoulos et al. 2020",
        "faster and smaller from n = 512 to 65,536; softmax ends at 4,096 in 11 GB",
        ("times", "training"),
        counted_training,
        longest,
    ),
    Claim(
        "C14",
        "Decoding takes constant time and memory per token.",
        "Katharopoulos et al. 2020",
        "n⁰ against n¹; 784 tokens 19 times as fast as with a cache, 317 times as without; 3,072 tokens 56 and 4,462; "
        "an epoch of WSJ 3.3 times",
        ("decoding", "times"),
        counted_decoding,
        decoding,
    ),
    Claim(
        "C15",
        "Nyström attention takes a fraction of attention's time and memory (table 1).",
        "Xiong et al. 2021",
        "m = 64: 1.1× as fast at 512, 12.7× at 8,192; 1.5× and 22.8× less memory; twice the tokens take 1.9–2.2 times "
        "as long, of attention 3.0–4.7 times; m = 32 is 7% faster",
        ("times", "memory"),
        counted_paper_table,
        paper_table,
    ),
    Claim(
        "C16",
        "Nyström attention is linear and overtakes early.",
        "Xiong et al. 2021",
        ", ".join(f"n = {n:,} (m = {m})" for m, n in NYSTROM.items())
        + "; m = 64, fewer products: "
        + ", ".join(f"{x} times at {n:,}" for n, x in FEWER.items()),
        ("times",),
        counted_landmarks,
        landmarks,
    ),
    Claim(
        "C17",
        "m = d landmarks suffice where Performer needs several times d features.",
        "K8180",
        f"m = d, features 4d; an error of {SUFFICES} would suffice",
        ("approximations",),
        counted_features,
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
        counted_units,
        gated_memory,
    ),
    Claim(
        "C20",
        "A model of gated attention units is faster than a simplified Transformer only for n > 512.",
        "K9052",
        "n = 512, eager against eager; against fused attention it may fail (C18); less memory, ever less as n grows",
        ("times", "memory"),
        counted_units_against_pair,
        units_against_pair,
    ),
    Claim(
        "C21",
        "Mixed chunks are faster than the quadratic unit only when sequences are long enough.",
        "K8934",
        "n = 492 in mixing; a layer 1.01× as fast at 512, 3.88× at 8,192",
        ("times",),
        lambda: "a layer " + ", ".join(f"{x:.2f}× at {n:,}" for n, x in mixed_gains().items()),
        mixed_against_quadratic,
    ),
    Claim(
        "C24",
        "RoPE takes 4 to 5 times an added embedding, fused 2 to 2.5 times.",
        "EleutherAI 2021",
        "4–5×, 2–2.5×; eager at most 5 times fused; 1–3% of a model's time",
        ("rotary", "times"),
        counted_rotary,
        rotary,
    ),
    Claim(
        "C25",
        "RoPE multiplies 2d times per vector where matrices would d² times.",
        "K8265, Su et al. 2021",
        "64 times fewer for d = 128, 32 for d = 64",
        ("rotary",),
        counted_matrices,
        matrices,
    ),
]
