"""Measures one operator, or the layers, on one device and keeps the rows as JSON. Needs neither plots nor templates.

A run is a sequence of steps. What each found is kept in a file at once, from which an interrupted run goes on.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch._functorch.config as functorch_config
from tqdm import tqdm

from kx_kernels.testing import codegen

from . import accuracy, counts, gau_attention, layers, linear_attention, measure, nystrom_attention, quality, rope
from .environment import ROOT, cache_bytes, device_name, environment, slug

RESULTS = ROOT / "benchmarks" / "results"
PARTIAL = ROOT / "report" / "partial"
OPERATORS = {
    "rope": rope,
    "linear_attention": linear_attention,
    "gau_attention": gau_attention,
    "nystrom_attention": nystrom_attention,
}


def timings(op: Any, case: Any, device: str, seconds: float) -> list[dict[str, Any]]:
    """Every contender of a case, or why there is no number."""
    working_set = 2 * case.bytes_moved
    sets = max(1, min(8, math.ceil(4 * cache_bytes(device) / working_set))) if device == "cpu" else 1
    buffers = [op.Inputs(case, device, seed) for seed in range(sets)]
    missing: dict[str, str] = {}
    contenders = {op.LIMIT: op.limit(buffers)}
    for contender, call in op.calls(case, buffers):
        if isinstance(call, str):
            missing[contender.name] = call
        else:
            contenders[contender.name] = call
    cold = device == "cuda" or sets * working_set >= 2 * cache_bytes(device)
    common = {"case": case.name, "work": case.work, "cache": "cold" if cold else "warm", "length": case.length}
    found = []
    rounds = measure.rounds(contenders, device, seconds)
    for name, times in rounds.items():
        spread, fraction = measure.Spread.of(times), measure.against(rounds[op.LIMIT], times)
        numbers = {"seconds": asdict(spread), "of_limit": asdict(fraction), "rate": case.work / spread.median}
        found.append({**common, "contender": name, **numbers, "times": times})
    return found + [{**common, "contender": name, "seconds": None, "reason": why} for name, why in missing.items()]


def host_times(op: Any, device: str) -> list[dict[str, Any]]:
    """Time until a call on one token returns, without and with a gradient to come."""
    case = op.cases(device)[-1]
    inputs = op.Inputs(case, device)
    found = []
    for contender, call in op.calls(case, [inputs]):
        if isinstance(call, str) or contender.kind in ("peer", "other") or "in place" in contender.name:
            continue
        function = contender.prepare(inputs)
        for gradient in (False, True) if op.HOST_GRADIENTS else (False,):
            leaves = [x.detach().requires_grad_(gradient) for x in inputs.leaves]
            spread = measure.host_seconds(lambda function=function, leaves=leaves: function(*leaves), device)
            found.append({"case": case.name, "contender": contender.name, "gradient": gradient, **asdict(spread)})
    return found


def memory(op: Any, device: str) -> list[dict[str, Any]]:
    """Bytes that a call takes beyond its inputs, and what autograd keeps."""
    case = op.cases(device)[0]
    inputs = op.Inputs(case, device)
    found = []
    for contender, call in op.calls(case, [inputs]):
        if isinstance(call, str):
            continue
        function = contender.prepare(inputs)
        peak = measure.peak_bytes(lambda function=function: function(*inputs.leaves), device)
        saved = None
        if "in place" not in contender.name:
            leaves = [x.detach().requires_grad_() for x in inputs.leaves]
            saved = measure.saved_bytes(lambda function=function, leaves=leaves: function(*leaves), leaves)
        values = sum(x.numel() * x.itemsize for x in inputs.leaves)
        found.append({"case": case.name, "contender": contender.name, "values": values, "peak": peak, "saved": saved})
    return found


def import_seconds(rounds: int) -> dict[str, Any]:
    """What importing the package costs after torch, in fresh processes."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import kx_kernels; "
        "print(b - a, time.perf_counter() - b)"
    )
    command = [sys.executable, "-c", code]
    times = [
        [float(t) for t in subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split()]
        for _ in range(rounds + 1)
    ]
    torch_seconds, extra = zip(*times[1:], strict=True)  # the first may have read files from the disk
    return {"torch": statistics.median(torch_seconds), "extra": asdict(measure.Spread.of(extra))}


Step = tuple[str, str, Callable[[], Any]]
"""Where its result goes, what it is called, and how it is found. Lists of the same place are one after the other."""


def operator_steps(op: Any, name: str, device: str, quick: bool) -> Iterator[Step]:
    cases, sweep = op.cases(device), op.sweep(device)
    if quick:
        cases, sweep = [cases[0], cases[-1]], sweep[::3]
    seconds = 3.0 if quick else 8.0
    for case in cases:
        yield "timings", case.name, lambda case=case: timings(op, case, device, seconds)
    for case in sweep:
        yield "growth", case.name, lambda case=case: timings(op, case, device, seconds / 8)
    for case in () if quick or not hasattr(op, "shared") else op.shared(device):
        yield "shared", case.name, lambda case=case: timings(op, case, device, seconds / 8)
    yield "host", "host time", lambda: host_times(op, device)
    yield "memory", "memory", lambda: memory(op, device)
    yield "import", "import", lambda: import_seconds(2 if quick else 5)
    yield "", "extras", op.extras
    yield "accuracy", "accuracy", lambda: accuracy.measure(name, device)
    yield "counts", "counts", lambda: counts.measure(name, device)
    yield "machine_code", "machine code", lambda: machine_code(name, quick)


def machine_code(name: str, quick: bool) -> dict[str, Any]:
    reason = codegen.available()
    rows = [] if quick or reason else [row for row in codegen.table() if row["op"] == name]
    return {"rows": rows, "reason": "left out by --quick" if quick else reason}


def layer_steps(device: str, quick: bool) -> Iterator[Step]:
    parts = list(layers.parts())
    mixing = [p for p in parts if p.level == "mixing"]
    whole = [p for p in parts if p.level == "layer"]
    needed = {"attention", "feed-forward", "projections"}  # of the other widths
    few = [p for p in parts if p.name in needed]
    seconds = 0.5 if quick else 2.0

    def times(chosen: list[layers.Part], width: int, length: int, what: str = "forward") -> Step:
        name = f"H = {width}, n = {length}{', forward and backward' if what == 'both' else ''}, {chosen[0].level}"
        return "times", name, lambda: layers.times(chosen, width, length, what, device, seconds)

    for n in () if quick else layers.SHORT:
        yield times(mixing, layers.WIDTHS["base"], n)
    for size, lengths in layers.LENGTHS.items():
        if quick and size != "base":
            continue
        for n in lengths[::3] if quick else lengths:
            for chosen in (mixing, whole) if size == "base" else (few,):
                yield times(chosen, layers.WIDTHS[size], n)
    for n in () if quick else (512, 1024, 2048, 4096):
        for chosen in (mixing, whole):
            yield times(chosen, layers.WIDTHS["base"], n, "both")
    for n in (1024,) if quick else (1024, 4096):
        yield "memory", f"memory, n = {n}", lambda n=n: layers.memory(parts, layers.WIDTHS["base"], n, device)
    for n in (256, 2048) if quick else (256, 1024, 4096, 16384, 65536):
        yield "decoding", f"decoding after {n}", lambda n=n: layers.decoding(n, device, seconds)
    yield "rotary", "rotary embedding", lambda: layers.rotary(device, seconds)


def quality_steps() -> Iterator[Step]:
    for name, experiment in quality.EXPERIMENTS.items():
        yield name, name, experiment


NAMES = (*OPERATORS, "layers", "quality")


def steps(name: str, device: str, quick: bool) -> list[Step]:
    if name == "quality":
        return list(quality_steps())
    return list(
        layer_steps(device, quick) if name == "layers" else operator_steps(OPERATORS[name], name, device, quick)
    )


def holder(places: Sequence[str]) -> str:
    """Whether these places of results are those of quality, or of layers."""
    return "quality" if set(places) <= set(quality.EXPERIMENTS) else "layers"


class Kept:
    """What the steps of one run have found so far, in a file that a later run goes on from.

    A file of another commit, another device or other versions is left aside. A step that the process did not survive is
    not tried again.
    """

    def __init__(self, file: Path, facts: dict[str, Any], fresh: bool) -> None:
        self.file, self.facts = file, facts
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        if fresh or not file.exists():
            return
        old = json.loads(file.read_text())
        if old["facts"] == json.loads(json.dumps(facts)):
            self.found, self.failed = old["found"], old["failed"]
            if old["begun"] is not None:
                self.failed[old["begun"]] = "the process ended in it"

    def write(self, begun: str | None) -> None:
        """begun: the step that comes next."""
        text = json.dumps({"facts": self.facts, "begun": begun, "found": self.found, "failed": self.failed})
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            whole = self.file.with_suffix(".new")
            whole.write_text(text)
            whole.replace(self.file)
        except OSError as error:
            warnings.warn(f"{self.file} cannot be written, so this run cannot be resumed: {error}", stacklevel=2)


def kept_file(name: str, device: str) -> Path:
    return RESULTS / slug(device_name(device)) / f"{name}.json"


def _merge(results: dict[str, Any], where: str, value: Any) -> None:
    if where == "":
        results |= value
    elif isinstance(value, list):
        results[where] = results.get(where, []) + value
    else:
        results[where] = value


def run(name: str, device: str, quick: bool, fresh: bool = False, places: Sequence[str] | None = None) -> Path:
    """Measures everything about an operator, the layers or quality; returns the file that holds it.

    Args:
        fresh: forgets what an interrupted run found.
        places: of results; only these are measured, and kept apart from whole runs.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    functorch_config.donated_buffer = False  # a compiled backward pass is timed more than once
    results: dict[str, Any] = {"op": name, "quick": quick, "environment": environment(device)}
    if name in OPERATORS:
        op = OPERATORS[name]
        results |= {"limit": op.LIMIT, "unit": op.UNIT, "versions": op.versions()}
    facts = {k: v for k, v in results["environment"].items() if k != "date"} | {"quick": quick, "places": places}
    file = kept_file(name, device)
    if places is not None:
        file = PARTIAL / file.parent.name / f"{'-'.join((name, *places))}-measured.json"
    kept = Kept(PARTIAL / file.parent.name / file.name.replace("-measured", ""), facts, fresh)
    todo = [step for step in steps(name, device, quick) if places is None or step[0] in places]
    with tqdm(total=len(todo), desc=name, unit="step", dynamic_ncols=True) as progress:
        for where, what, find in todo:
            key = f"{where}/{what}"
            progress.set_postfix_str(what)
            if key not in kept.found and key not in kept.failed:
                kept.write(begun=key)
                try:
                    kept.found[key] = find()
                except KeyboardInterrupt:
                    kept.write(begun=None)
                    raise
                except Exception as error:  # no room, a full disk: the report says so and goes on
                    kept.failed[key] = " ".join([type(error).__name__ + ":", *str(error).splitlines()[:1]])
                kept.write(begun=None)
            if key in kept.found:
                _merge(results, where, kept.found[key])
            progress.update()
    results["failed"] = [{"step": key, "reason": why} for key, why in kept.failed.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    kept.file.unlink(missing_ok=True)
    return file
