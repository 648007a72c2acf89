"""Clocks: contenders take turns within one run, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kx_kernels._core import native

from . import units
from .calling import Missing, calling
from .environment import multiplies_bfloat16

PRECISION = 0.02  # relative error of a median that is enough
ROUNDS = 3  # at least, of whatever has times
CALLS = ROUNDS + 3  # and so many calls in all: one that checks the result, two before anything counts
Call = Callable[[int], object]  # given the number of a turn, so that it can take another set of buffers each time


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class _CpuClock:
    def time(self, call: Call, turn: int, calls: int) -> float:
        begin = time.perf_counter()
        for i in range(calls):
            call(turn + i)
        return (time.perf_counter() - begin) / calls


class _CudaClock:
    """CUDA events around each call, after the L2 cache has been overwritten."""

    def __init__(self) -> None:
        self.flush = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")

    def time(self, call: Call, turn: int, calls: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for i, (begin, end) in enumerate(pairs):
            self.flush.zero_()
            begin.record()
            call(turn + i)
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


READY = 0.5  # of an allowance: what making contenders ready may take
LATE = "no time was left to make it ready"


class Allowance:
    """The seconds that something may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()

    def refused(self, once: float = 0.0, calls: int = CALLS) -> str | None:
        """Why something that takes so long a call, or longer, is not measured in what is left."""
        if self.left <= 0:
            return "no time was left for it"
        if calls * once <= self.left:
            return None
        return f"a call takes {units.time(once)} or more, and {units.time(self.left)} were left for {calls} of them"

    def once_ready(self) -> Allowance:
        """What is left for rounds; their part of it even where making ready took longer, as an import may."""
        return Allowance(max(self.left, self.seconds * (1 - READY)))


class OutOfTime(BaseException):
    """What `ending` raises: no error of what it ends, which might catch those."""


@contextmanager
def ending(seconds: float) -> Iterator[None]:
    """Ends what is inside after so many seconds, or when the call of a kernel that is on its way has returned, or an
    import, which would leave half a module. What is inside may have an end of its own, before.
    """

    def stop(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                return
            frame = frame.f_back
        raise OutOfTime

    before, begin = signal.signal(signal.SIGALRM, stop), time.perf_counter()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would be never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.perf_counter() - begin), 1e-3))


def reason(error: BaseException) -> str:
    """Its kind and its first line; of one that says why something is missing, that alone."""
    if isinstance(error, Missing):
        return str(error)
    return " ".join([type(error).__name__ + ":", *str(error).splitlines()[:1]])


def precision(times: Sequence[float]) -> float:
    """How well the median is known: the distance of the quartiles over √n, relative to it."""
    spread = Spread.of(times)
    return (spread.high - spread.low) / spread.median / len(times) ** 0.5


def numbers(times: Sequence[float]) -> dict[str, Any]:
    """What a row says of its rounds."""
    return {"seconds": asdict(Spread.of(times)), "precision": precision(times), "times": times}


def rounds(
    contenders: Mapping[str, Call],
    device: str,
    seconds: float,
    allowance: Allowance,
    least: int = 7,
    most: int = 60,
    seed: int = 0,
    needed: Collection[str] = (),
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Each contender's seconds per call, one number per round, and why others have none.

    In a round all take turns, in shuffled order. Rounds go on until every median is known to PRECISION. The slowest
    have none where the others would be left without.

    Args:
        contenders: by name; each is called two or three times before anything counts. One that fails, for want of
            memory say, leaves the others to go on.
        seconds: about how long the rounds may take.
        allowance: what everything may take, calls before anything counts included.
        least, most: rounds, however well medians are known; but ROUNDS, where they take four times those seconds.
        seed: of the order in a round.
        needed: those that are left out after all others.
    """
    clock: Any = _CudaClock() if device == "cuda" else _CpuClock()
    calls: dict[str, int] = {}
    lasts: dict[str, float] = {}  # a turn
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}

    def timed(name: str, turn: int, repeats: int) -> float:
        try:
            with calling(name):
                return clock.time(contenders[name], turn, repeats)
        except Exception as error:
            failed[name] = reason(error)
        if device == "cuda":
            torch.cuda.empty_cache()
        return math.nan

    for name in contenders:
        if why := allowance.refused():
            failed[name] = why
            continue
        for turn in range(3):
            once = timed(name, turn, 1)
            if name in failed or (turn and once > 0.1):
                break
        if name not in failed:
            calls[name] = max(1, min(1000, int(2e-3 / max(once, 1e-7)))) if device == "cpu" else 1
            lasts[name], times[name] = calls[name] * once, []
    while times and ROUNDS * sum(lasts[name] for name in times) > allowance.left:
        others = [name for name in times if name not in needed]
        slowest = max(others or times, key=lambda name: lasts[name])
        failed[slowest] = f"a call takes {units.time(lasts[slowest])}, for which no time was left"
        del times[slowest]
    generator, begin, turn = random.Random(seed), time.perf_counter(), 0
    while times and turn < most:
        taken = time.perf_counter() - begin
        if turn >= least and (taken > seconds or max(map(precision, times.values())) <= PRECISION):
            break
        if turn >= ROUNDS and (taken > 4 * seconds or allowance.left <= 0):
            break
        for name in generator.sample(list(times), len(times)):
            times[name].append(timed(name, turn, calls[name]))
            if name in failed:
                del times[name]
        turn += 1
    return times, failed


_REACHED: dict[str, dict[str, Any]] = {}  # by device, the best since the process began


def limits(device: str, quick: bool = False) -> dict[str, Any]:
    """What this device was seen to reach: bytes per second of a copy, read and written, and operations per second of
    products.
    """
    return _REACHED.get(device) or reach(device, quick)


def reach(device: str, quick: bool = False) -> dict[str, Any]:
    """Measures the limits, again where they were. They are the best of all rounds: a device may slow down for seconds.

    quick: fewer rounds, and small products alone.
    """
    large, sides = (1 << 28, (8192,)) if device == "cuda" else (1 << 25, (1024,) if quick else (1024, 2048))
    source = torch.randn(large, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda _: target.copy_(source)}
    narrow = sides if multiplies_bfloat16(device) else (256,)  # at a hundredth of the rate
    products = {dtype: {f"{dtype}, {n}": n for n in of} for dtype, of in (("float32", sides), ("bfloat16", narrow))}
    for dtype, names in products.items():
        for name, n in names.items():
            a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
            calls[name] = lambda _, a=a, b=b: a @ b
    times, failed = rounds(calls, device, 0.3 if quick else 1.0, Allowance(20), least=3 if quick else 7)
    if failed:
        raise RuntimeError("; ".join(failed.values()))
    rates = {dtype: max(2 * n**3 / min(times[name]) for name, n in names.items()) for dtype, names in products.items()}
    found = {"bytes_per_second": 2 * source.nbytes / min(times["copy"]), "flops_per_second": rates}
    _REACHED[device] = better(found, _REACHED.get(device, found))
    return _REACHED[device]


def better(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of which each is the higher one."""
    rates = {dtype: max(rate, other["flops_per_second"][dtype]) for dtype, rate in one["flops_per_second"].items()}
    bytes_per_second = max(one["bytes_per_second"], other["bytes_per_second"])
    return {"bytes_per_second": bytes_per_second, "flops_per_second": rates}


def bound(roofline: Mapping[str, Any], row: Mapping[str, Any], by_torch: bool = False) -> float:
    """The least seconds of a row's bytes, that it moves, and products on a device of these limits.

    by_torch: products are torch's own, in the row's dtype; others may convert to float32 where that is faster, as it is
        on a CPU without instructions for less.
    """
    rates = roofline["flops_per_second"]
    rate = rates.get("bfloat16" if row["dtype"] == "float16" else row["dtype"], rates["float32"])
    rate = rate if by_torch else max(rate, rates["float32"])
    return max(row.get("moved", row["bytes"]) / roofline["bytes_per_second"], row["flops"] / rate)


def against(limit: Sequence[float], times: Sequence[float]) -> Spread:
    """The limit's seconds over a contender's in the same round."""
    return Spread.of([of / t for of, t in zip(limit, times, strict=True)])


def host_seconds(call: Callable[[], object], device: str, rounds: int = 30) -> Spread:
    """Time until the call returns, not until a GPU has done the work."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - begin) / 20)
    return Spread.of(times)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that the call holds beyond what was there before, its result included.

    On a CPU our kernels' own memory is added as if its peak were at the same time.
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    extension = native.load()
    if extension is not None:
        extension.cpu_peak_bytes()  # since now
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    own = 0 if extension is None else extension.cpu_peak_bytes()
    return own + max(itertools.accumulate((size for _, size in sorted(changes)), initial=0))


def saved(call: Callable[[], object], inputs: Sequence[Tensor]) -> list[int]:
    """Bytes of each storage that autograd keeps for the backward pass, beyond the inputs themselves."""
    kept: dict[int, int] = {}  # by what meta tensors have as well, which have no address

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = call()
    del result
    own = {x.untyped_storage()._cdata for x in inputs}
    return [size for storage, size in kept.items() if storage not in own]


def saved_bytes(call: Callable[[], object], inputs: Sequence[Tensor]) -> int:
    return sum(saved(call, inputs))
