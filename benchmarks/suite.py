"""Measures one operator, or the layers, on one device and keeps the rows as JSON. Needs neither plots nor templates.

A run is a sequence of steps. What each found is kept in a file at once, from which an interrupted run goes on.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from tqdm import tqdm

from kx_kernels.testing import codegen

from . import (
    accuracy,
    contest,
    counts,
    gau_attention,
    layers,
    linear_attention,
    measure,
    nystrom_attention,
    quality,
    rope,
)
from .environment import ROOT, cache_bytes, device_name, environment, slug

RESULTS = ROOT / "benchmarks" / "results"
QUICK, PARTS, PARTIAL = (ROOT / "report" / name for name in ("quick", "parts", "partial"))
TRAINED = ("approximations", "real_maps", "trained", "beyond")  # whose models take their time: not in a quick run
OPERATORS = {
    "rope": rope,
    "linear_attention": linear_attention,
    "gau_attention": gau_attention,
    "nystrom_attention": nystrom_attention,
}


def entered(contenders: Sequence[contest.Contender], quick: bool) -> list[contest.Contender]:
    """quick: without those that compile."""
    return [c for c in contenders if not (quick and "torch.compile" in c.name)]


def timings(op: Any, case: Any, device: str, seconds: float, quick: bool) -> list[dict[str, Any]]:
    """Every contender of a case, or why there is no number."""
    working_set = 2 * case.bytes_moved
    sets = max(1, min(8, math.ceil(4 * cache_bytes(device) / working_set))) if device == "cpu" else 1
    buffers = [op.Inputs(case, device, seed) for seed in range(sets)]
    cold = device == "cuda" or sets * working_set >= 2 * cache_bytes(device)
    common = {"case": case.name, "work": case.work, "cache": "cold" if cold else "warm", "length": case.length}
    common |= {"bytes": case.bytes_moved, "flops": case.flops, "dtype": str(case.dtype).removeprefix("torch.")}
    contenders = {op.LIMIT: op.limit(buffers)}
    mine = op.contenders(case)
    chosen = entered(mine, quick)
    missing = {c.name: "compiling is left out by --quick" for c in mine if c not in chosen}
    for contender, call in contest.calls(op, buffers, chosen):
        if isinstance(call, str):
            missing[contender.name] = call
        else:
            contenders[contender.name] = call
    rounds, failed = measure.rounds(contenders, device, seconds, least=3 if quick else 7)
    if op.LIMIT in failed:
        raise RuntimeError(f"{op.LIMIT} fails: {failed[op.LIMIT]}")
    missing |= {name: f"fails: {why}" for name, why in failed.items()}
    of = {c.name: {"kind": c.kind, "version": c.version} for c in mine}
    of[op.LIMIT] = {"kind": "limit", "version": f"torch {torch.__version__}"}
    found = []
    for name, times in rounds.items():
        numbers = measure.numbers(times)
        fraction, rate = asdict(measure.against(rounds[op.LIMIT], times)), case.work / numbers["seconds"]["median"]
        found.append({**common, "contender": name, **of[name], **numbers, "of_limit": fraction, "rate": rate})
    none = [{"contender": name, **of[name], "seconds": None, "reason": why} for name, why in missing.items()]
    return found + [common | row for row in none]


def host_times(op: Any, device: str, quick: bool) -> list[dict[str, Any]]:
    """Time until a call on one token returns, without and with a gradient to come."""
    case = op.cases(device)[-1]
    inputs = op.Inputs(case, device)
    mine = [c for c in entered(op.contenders(case), quick) if c.kind in ("ours", "torch") and "in place" not in c.name]
    found = []
    for contender, call in contest.calls(op, [inputs], mine):
        if isinstance(call, str):
            continue
        for gradient in (False, True) if op.HOST_GRADIENTS else (False,):
            row = {"case": case.name, "contender": contender.name, "gradient": gradient}
            leaves = [x.detach().requires_grad_(gradient) for x in inputs.leaves]
            try:
                function = contender.prepare(inputs)
                spread = measure.host_seconds(lambda f=function, x=leaves: f(*x), device, 5 if quick else 30)
                found.append(row | asdict(spread))
            except Exception as error:
                found.append(row | {"reason": measure.reason(error)})
    return found


def memory(op: Any, device: str, quick: bool) -> list[dict[str, Any]]:
    """Bytes that a call takes beyond its inputs, and what autograd keeps."""
    case = op.cases(device)[0]
    inputs = op.Inputs(case, device)
    values = sum(x.numel() * x.itemsize for x in inputs.leaves)
    found = []
    for contender in entered(op.contenders(case), quick):
        row = {"case": case.name, "contender": contender.name, "values": values}
        try:
            found.append(row | _held(contender, inputs, device))
        except contest.Missing:
            continue
        except Exception as error:
            found.append(row | {"reason": measure.reason(error)})
    return found


def _held(contender: contest.Contender, inputs: Any, device: str) -> dict[str, int | None]:
    function = contender.prepare(inputs)
    peak, saved = measure.peak_bytes(lambda: function(*inputs.leaves), device), None
    if "in place" not in contender.name:
        leaves = [x.detach().requires_grad_() for x in inputs.leaves]
        saved = measure.saved_bytes(lambda: function(*leaves), leaves)
    return {"peak": peak, "saved": saved}


@functools.cache
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


class Step(NamedTuple):
    """One measurement. Lists that go to the same place are one after the other."""

    where: str
    what: str
    find: Callable[[], Any]
    seconds: float = 1.0  # about what it takes, for the progress bar

    @property
    def key(self) -> str:
        return f"{self.where}/{self.what}"


def operator_steps(op: Any, name: str, device: str, quick: bool) -> Iterator[Step]:
    cases, sweep, shared = op.cases(device), op.sweep(device), op.shared(device)
    seconds, short = (0.5, 0.1) if quick else (4.0, 1.0)
    if quick:
        cases, sweep, shared = [cases[0], cases[-1]], sweep[:5:2], []
    yield Step("roofline", "copy and products", lambda: measure.limits(device), 5)
    for where, chosen, budget in (("timings", cases, seconds), ("growth", sweep, short), ("shared", shared, short)):
        for case in chosen:
            find = functools.partial(timings, op, case, device, budget, quick)
            yield Step(where, case.name, find, budget if quick else 2 * budget + 15)
    yield Step("host", "host time", lambda: host_times(op, device, quick), 2 if quick else 15)
    yield Step("memory", "memory", lambda: memory(op, device, quick), 3 if quick else 15)
    yield Step("import", "import", lambda: import_seconds(1 if quick else 5), 10)
    yield Step("accuracy", "accuracy", lambda: accuracy.measure(name, device, quick), 2 if quick else 60)
    if not quick:
        yield Step("", "extras", op.extras, 10)
        yield Step("counts", "counts", lambda: counts.measure(name, device), 15)
    yield Step("machine_code", "machine code", lambda: machine_code(name, quick), 1 if quick else 30)


def machine_code(name: str, quick: bool) -> dict[str, Any]:
    reason = codegen.available()
    rows = [] if quick or reason else [row for row in codegen.table() if row["op"] == name]
    return {"rows": rows, "reason": "left out by --quick" if quick else reason}


def layer_steps(device: str, quick: bool) -> Iterator[Step]:
    base, lengths = layers.WIDTHS["base"], layers.QUICK if quick else layers.LENGTHS
    seconds, least = (0.3, 3) if quick else (2.0, 5)
    places = [(size, n, "forward") for size, mine in lengths.items() for n in mine]
    if not quick:
        places += [("base", n, "both") for n in (512, 1024, 2048, 4096)]
    yield Step("roofline", "copy and products", lambda: measure.limits(device), 5)

    def times(level: str, width: int, n: int, what: str) -> Step:
        name = f"H = {width}, n = {n}{', forward and backward' if what == 'both' else ''}, {level}"
        chosen = layers.timed(level, width, n, what, quick)
        find = functools.partial(layers.times, chosen, width, n, what, device, seconds, least)
        each = 1e-6 * n * width / base * (1000 if what == "both" else 300)
        return Step("times", name, find, seconds + each * len(chosen))

    for n in () if quick else layers.SHORT:
        yield times("mixing", base, n, "forward")
    for size, n, what in places:
        for level in ("mixing", "layer"):
            yield times(level, layers.WIDTHS[size], n, what)
    parts = [p for p in layers.parts() if not quick or p.usual]
    for n in (1024,) if quick else (1024, 4096):
        yield Step("memory", f"memory, n = {n}", lambda n=n: layers.memory(parts, base, n, device), n / 100)
    for n in (256, 2048, 16384) if quick else (256, 1024, 4096, 16384, 65536):
        yield Step("decoding", f"decoding after {n}", lambda n=n: layers.decoding(n, device, seconds), 2 * seconds)
    yield Step("rotary", "rotary embedding", lambda: layers.rotary(device, seconds), 15)


def quality_steps(quick: bool) -> Iterator[Step]:
    for name, experiment in quality.EXPERIMENTS.items():
        if not (quick and name in TRAINED):
            yield Step(name, name, experiment, 10 if name in TRAINED else 2)


NAMES = (*OPERATORS, "layers", "quality")


def steps(name: str, device: str, quick: bool) -> list[Step]:
    if name == "quality":
        return list(quality_steps(quick))
    if name == "layers":
        return list(layer_steps(device, quick))
    return list(operator_steps(OPERATORS[name], name, device, quick))


def holder(places: Sequence[str]) -> str:
    """Whether these places of results are those of quality, or of layers."""
    return "quality" if set(places) <= set(quality.EXPERIMENTS) else "layers"


def write(file: Path, text: str) -> None:
    """All of it or nothing. Where the disk is full a warning says so, and what was there stays."""
    whole = file.with_suffix(".new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text)
        whole.replace(file)
    except OSError as error:
        whole.unlink(missing_ok=True)
        warnings.warn(f"{file} cannot be written: {error}", stacklevel=2)


class Kept:
    """What the steps of one run have found so far, in a file that a later run goes on from.

    A file of another commit, another device or other versions is left aside. A step that the process did not survive is
    tried once more.
    """

    def __init__(self, file: Path, facts: dict[str, Any], fresh: bool) -> None:
        self.file, self.facts = file, facts
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.ended: list[str] = []  # in these the process ended
        if fresh or not file.exists():
            return
        old = json.loads(file.read_text())
        if old["facts"] != json.loads(json.dumps(facts)):
            return
        self.found, self.failed, self.seconds, self.ended = (old[k] for k in ("found", "failed", "seconds", "ended"))
        if (begun := old["begun"]) in self.ended:
            self.failed[begun] = "the process ended in it, twice"
        elif begun is not None:
            self.ended.append(begun)

    def done(self, step: Step) -> bool:
        return step.key in self.found or step.key in self.failed

    def measure(self, step: Step) -> None:
        self._write(begun=step.key)
        begin = time.perf_counter()
        try:
            self.found[step.key] = step.find()
        except KeyboardInterrupt:
            self._write(begun=None)
            raise
        except Exception as error:  # the report says so and goes on
            self.failed[step.key] = measure.reason(error)
        self.seconds[step.key] = time.perf_counter() - begin
        self._write(begun=None)

    def _write(self, begun: str | None) -> None:
        """begun: the step that comes next."""
        names = ("facts", "found", "failed", "seconds", "ended")
        write(self.file, json.dumps({"begun": begun} | {name: getattr(self, name) for name in names}))


def kept_file(name: str, device: str, quick: bool = False, places: Sequence[str] | None = None) -> Path:
    """Where results are kept: of whole runs in git, of quick ones and of parts elsewhere."""
    whole = RESULTS if not quick and places is None else QUICK if quick else PARTS
    return whole / slug(device_name(device)) / f"{'-'.join((name, *(places or ())))}.json"


def kept_files(quick: bool = False) -> list[Path]:
    """Of every device; quick: a quick run's where there is one."""
    files = {(f.parent.name, f.name): f for where in (RESULTS, QUICK)[: 1 + quick] for f in where.glob("*/*.json")}
    return sorted(f for (_, name), f in files.items() if name.removesuffix(".json") in NAMES)


def _results(name: str, head: dict[str, Any], todo: list[Step], kept: Kept) -> dict[str, Any]:
    results = {"op": name} | head
    if name in OPERATORS:
        op = OPERATORS[name]
        results |= {"limit": op.LIMIT, "unit": op.UNIT, "versions": op.versions()}
    for step in todo:
        value = kept.found.get(step.key)
        if step.key not in kept.found:
            continue
        if step.where == "":
            results |= value
        elif isinstance(value, list):
            results[step.where] = results.get(step.where, []) + value
        else:
            results[step.where] = value
    for place in {"timings", "growth", "shared", "times"} & set(results) if "roofline" in results else ():
        results[place] = [_bounded(row, results["roofline"]) for row in results[place]]
    results["failed"] = [{"step": key, "reason": why} for key, why in kept.failed.items()]
    results["steps"] = [{"step": key, "seconds": round(s, 2)} for key, s in kept.seconds.items()]
    results["wall_seconds"] = round(sum(kept.seconds.values()), 1)
    return json.loads(json.dumps(results))


def _bounded(row: dict[str, Any], roofline: dict[str, Any]) -> dict[str, Any]:
    """With the least time that the device allows its bytes and products, and the share of it in what it takes."""
    if not row.get("seconds") or "bytes" not in row or row.get("kind") == "other":
        return row
    bound = measure.bound(roofline, row)
    return row | {"bound": bound, "of_bound": bound / row["seconds"]["median"]}


def run(
    names: Sequence[str], device: str, quick: bool, fresh: bool = False, places: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Measures everything about operators, the layers or quality; returns what `kept_file` has of each.

    A run that is interrupted goes on where it was, and measures nothing again that is found, of whatever name.

    Args:
        fresh: forgets what an interrupted run found.
        places: of results; only these are measured, and kept apart from whole runs.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    functorch_config.donated_buffer = False  # a compiled backward pass is timed more than once
    facts = environment(device)
    same = {k: v for k, v in facts.items() if k not in ("date", "clocks_mhz")} | {"quick": quick, "places": places}
    kept, todo = {}, {}
    for name in names:
        file = kept_file(name, device, quick, places)
        kept[name] = Kept(PARTIAL / file.parent.parent.name / file.parent.name / file.name, same, fresh)
        todo[name] = [step for step in steps(name, device, quick) if places is None or step.where in places]
    left = {name: [step for step in mine if not kept[name].done(step)] for name, mine in todo.items()}
    total, rest = (sum(step.seconds for mine in of.values() for step in mine) for of in (todo, left))
    found = {}
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    with tqdm(total=total, initial=total - rest, bar_format=form, dynamic_ncols=True) as progress:
        for name in names:
            progress.set_description(name)
            for step in left[name]:
                progress.set_postfix_str(step.what)
                kept[name].measure(step)
                progress.update(step.seconds)
            found[name] = _results(name, {"quick": quick, "environment": facts}, todo[name], kept[name])
            write(kept_file(name, device, quick, places), json.dumps(found[name], indent=1) + "\n")
    for name in names:
        kept[name].file.unlink(missing_ok=True)
    return found
