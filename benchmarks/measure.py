"""Clocks: contenders take turns within one run, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def rounds(
    contenders: Mapping[str, Call], device: str, seconds: float, least: int = 7, seed: int = 0
) -> dict[str, list[float]]:
    """Each contender's seconds per call, one number per round; in a round all take turns, in shuffled order.

    Args:
        contenders: by name; each is called three times before anything counts.
        seconds: about how long this may take.
        least: rounds, however long they take.
        seed: of the order in a round.
    """
    clock: Any = _CudaClock() if device == "cuda" else _CpuClock()
    calls, cost = {}, 0.0
    for name, call in contenders.items():
        for turn in range(3):
            once = clock.time(call, turn, 1)
        calls[name] = max(1, min(1000, int(2e-3 / max(once, 1e-7)))) if device == "cpu" else 1
        cost += once * calls[name]
    count = max(least, min(60, int(seconds / max(cost, 1e-6))))
    order, generator = list(contenders), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(count):
        generator.shuffle(order)
        for name in order:
            times[name].append(clock.time(contenders[name], turn, calls[name]))
    return times


def against(limit: Sequence[float], times: Sequence[float]) -> Spread:
    """The limit's seconds over a contender's in the same round."""
    return Spread.of([of / t for of, t in zip(limit, times, strict=True)])


def host_seconds(call: Callable[[], object], device: str) -> Spread:
    """Time until the call returns, not until a GPU has done the work."""
    for _ in range(20):
        call()
    times = []
    for _ in range(30):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - begin) / 20)
    return Spread.of(times)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that the call holds beyond what was there before, its result included."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(changes)), initial=0))


def saved_bytes(call: Callable[[], object], inputs: Sequence[Tensor]) -> int:
    """What autograd keeps for the backward pass, beyond the inputs themselves."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = call()
    del result
    own = {x.untyped_storage().data_ptr() for x in inputs}
    return sum(size for address, size in kept.items() if address not in own)
