"""Measures one operator, or the layers, on one device and keeps the rows as JSON. Needs neither plots nor templates.

A run is a sequence of steps. What each found is kept in a file at once, from which an interrupted run goes on.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
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
    units,
)
from .calling import calling, last, told
from .environment import ROOT, cache_bytes, device_name, environment, slug

RESULTS = ROOT / "benchmarks" / "results"
# Of a run; what starts it and draws its page has the rest of 2, or of 30, minutes.
QUICK_SECONDS, WHOLE_SECONDS = 85.0, 1620.0
START, SLACK = 30.0, 1.5  # seconds, and times what steps are expected to take, that claims alone are given
PATIENCE = 5.0  # seconds that any step is given
COMPILED = (512, 2048, 4096, 8192)  # tokens, of these lengths, at which compilers take part
MEMORY = (512, 1024, 2048, 8192, 16384, 32768)  # tokens, of the lengths that times grow over
CODE_ANYWHERE = "of no use to a CPU; python -m kx_kernels.testing.codegen shows it on any machine"
QUICK, PARTS, PARTIAL = (ROOT / "report" / name for name in ("quick", "parts", "partial"))
# Experiments that are not in a quick run, and about what they take.
SLOW = {"landmarks": 60.0, "approximations": 6.0, "real_maps": 3.0, "trained": 4.0, "beyond": 20.0}
OPERATORS = {
    "rope": rope,
    "linear_attention": linear_attention,
    "gau_attention": gau_attention,
    "nystrom_attention": nystrom_attention,
}


def entered(contenders: Sequence[contest.Contender], compiled: bool) -> list[contest.Contender]:
    """Those that compile, or trace as FlexAttention does, last or not at all."""
    compiles = {c.name: bool(re.search("torch.compile|FlexAttention", c.name)) for c in contenders}
    return sorted((c for c in contenders if compiled or not compiles[c.name]), key=lambda c: compiles[c.name])


NATIVE = "kx (cpu|cuda|triton)"  # contenders whose products are not torch's


def least_seconds(contender: str, work: Mapping[str, Any], device: str) -> float:
    """Of a call, by its bytes and products."""
    own = re.fullmatch(NATIVE, contender) or work.get("kind") == "limit"
    return measure.bound(measure.limits(device), work, by_torch=not own)


def timings(
    op: Any, case: Any, device: str, seconds: float, quick: bool, allowed: float, compiled: bool = True
) -> list[dict[str, Any]]:
    """Every contender of a case, or why there is no number.

    Args:
        seconds: about how long rounds go on.
        allowed: seconds for everything.
        compiled: those that compile as well.
    """
    allowance, mine = measure.Allowance(allowed), op.contenders(case)
    common = {"case": case.name, "work": case.work, "length": case.length, "bytes": case.bytes_moved}
    common |= {"flops": case.flops, "dtype": str(case.dtype).removeprefix("torch.")}
    of = {c.name: {"kind": c.kind, "version": c.version} | (c.work(case) if c.work else {}) for c in mine}
    of[op.LIMIT] = {"kind": "limit", "version": f"torch {torch.__version__}"}
    of[op.LIMIT] |= {"flops": 0} if op.UNIT == "B" else {}  # a copy has no products

    def refused(name: str) -> str | None:
        """Why it is not even tried: the least that the device allows it takes too long."""
        return allowance.refused(least_seconds(name, common | of[name], device))

    def without(missing: Mapping[str, str]) -> list[dict[str, Any]]:
        return [
            common | of[name] | {"cache": "cold", "contender": name, "seconds": None, "reason": why}
            for name, why in missing.items()
        ]

    if why := refused(op.LIMIT):
        return without(dict.fromkeys(of, why))
    working_set = 2 * case.bytes_moved
    sets = max(1, min(8, math.ceil(4 * cache_bytes(device) / working_set))) if device == "cpu" else 1
    buffers = [op.Inputs(case, device, seed) for seed in range(sets)]
    cold = device == "cuda" or sets * working_set >= 2 * cache_bytes(device)
    common["cache"] = "cold" if cold else "warm"
    contenders = {op.LIMIT: op.limit(buffers)}
    chosen = entered(mine, compiled)
    missing = {c.name: f"compiling is left out {'by --quick' if quick else 'here'}" for c in mine if c not in chosen}
    ready = measure.Allowance(allowance.left * measure.READY)
    for contender in chosen:
        call: object = ready.refused() or refused(contender.name)
        if call is None:
            try:
                with measure.ending(ready.left):
                    ((_, call),) = contest.calls(op, buffers, [contender])
            except measure.OutOfTime:
                call = measure.LATE
        if isinstance(call, str):
            missing[contender.name] = call
        else:
            contenders[contender.name] = call
    needed = {op.LIMIT, *(c.name for c in mine if re.fullmatch(f"{NATIVE}|.*torch eager", c.name))}
    least = 3 if quick else 7
    rounds, failed = measure.rounds(contenders, device, seconds, allowance.once_ready(), least, needed=needed)
    missing |= failed
    if op.LIMIT not in rounds:  # of which all others are a fraction
        missing |= dict.fromkeys(rounds, f"{op.LIMIT}: {failed[op.LIMIT]}")
        rounds = {}
    found = []
    for name, times in rounds.items():
        numbers = measure.numbers(times)
        fraction, rate = asdict(measure.against(rounds[op.LIMIT], times)), case.work / numbers["seconds"]["median"]
        found.append({**common, "contender": name, **of[name], **numbers, "of_limit": fraction, "rate": rate})
    return found + without(missing)


def host_times(op: Any, device: str, quick: bool) -> list[dict[str, Any]]:
    """Time until a call on one token returns, without and with a gradient to come."""
    case = replace(op.cases(device)[-1], **op.HOST)
    inputs = op.Inputs(case, device)
    mine = [
        c for c in entered(op.contenders(case), not quick) if c.kind in ("ours", "torch") and "in place" not in c.name
    ]
    found = []
    for contender, call in contest.calls(op, [inputs], mine):
        for gradient in (False, True) if op.HOST_GRADIENTS else (False,):
            row = {"case": case.name, "contender": contender.name, "version": contender.version, "gradient": gradient}
            if isinstance(call, str):
                found.append(row | {"reason": call})
                continue
            leaves = [x.detach().requires_grad_(gradient) for x in inputs.leaves]
            try:
                with calling(contender.name):
                    function = contender.prepare(inputs)
                    spread = measure.host_seconds(lambda f=function, x=leaves: f(*x), device, 5 if quick else 30)
                found.append(row | asdict(spread))
            except Exception as error:
                found.append(row | {"reason": measure.reason(error)})
    return found


def memory(op: Any, case: Any, device: str, compiled: bool, allowed: float) -> list[dict[str, Any]]:
    """Bytes that a call takes beyond its inputs, and what autograd keeps."""
    allowance, found = measure.Allowance(allowed), []
    inputs = op.Inputs(case, device)
    values = sum(x.numel() * x.itemsize for x in inputs.leaves)
    for contender in entered(op.contenders(case), compiled):
        row = {"case": case.name, "length": case.length, "contender": contender.name, "version": contender.version}
        row |= {"values": values}
        work = {"bytes": case.bytes_moved, "flops": case.flops, "dtype": str(case.dtype).removeprefix("torch.")}
        work |= contender.work(case) if contender.work else {}
        if why := allowance.refused(least_seconds(contender.name, work, device)):
            found.append(row | {"reason": why})
            continue
        try:
            with calling(contender.name):
                found.append(row | _held(contender, inputs, device))
        except Exception as error:
            found.append(row | {"reason": measure.reason(error)})
    return found


def _held(contender: contest.Contender, inputs: Any, device: str) -> dict[str, int | None]:
    function = contender.prepare(inputs)
    leaves, saved = [x.detach().requires_grad_() for x in inputs.leaves], None
    if inputs.case.what == "both":
        peak = measure.peak_bytes(lambda: torch.autograd.grad(function(*leaves), leaves, inputs.grads), device)
    else:
        peak = measure.peak_bytes(lambda: function(*inputs.leaves), device)
    if "in place" not in contender.name:
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
    """One measurement, given the seconds that it may take. Lists that go to the same place are one after the other."""

    where: str
    what: str
    find: Callable[[float], Any]
    seconds: float = 1.0  # about what it takes: its share of a run

    @property
    def key(self) -> str:
        return f"{self.where}/{self.what}"


def call_seconds(case: Any, device: str, most: float) -> float:
    """About how many seconds the calls of four contenders take, beyond what rounds of fast ones do; none if they are so
    many that the case is refused.
    """
    seconds = 4 * measure.CALLS * case.flops / (1e11 if device == "cpu" else 2e14)
    return seconds if seconds < most else 0.0


def operator_steps(op: Any, name: str, device: str, quick: bool) -> Iterator[Step]:
    cases, sweep, shared = op.cases(device), op.sweep(device), op.shared(device)
    seconds, short = (0.4, 0.1) if quick else (3.0, 1.0)
    if quick:
        cases, sweep, shared = [cases[0], cases[-1]], sweep[:5:2], []
    most = max(cases, key=lambda case: case.work)
    measured = cases[:1] if quick else dict.fromkeys([cases[0], most, *(c for c in sweep if c.length in MEMORY)])
    for where, chosen, budget in (("timings", cases, seconds), ("growth", sweep, short), ("shared", shared, short)):
        for case in chosen:
            compiled = not quick and (where == "timings" or (where == "growth" and case.length in COMPILED))
            find = functools.partial(timings, op, case, device, budget, quick, compiled=compiled)
            imports = (4 if quick else 10) if case == cases[0] and where == "timings" else 0  # of peers, once
            goals = where == "timings"  # are about these
            calls = call_seconds(case, device, 100 if goals and not quick else 30)
            expected = (2 if goals else 1) * (2 * budget + imports + (1 if quick else 10 if compiled else 2) + calls)
            yield Step(where, case.name, find, expected)
    yield Step("host", "host time", lambda _: host_times(op, device, quick), 2 if quick else 30)
    for case in measured:
        find = functools.partial(memory, op, case, device, not quick and case == cases[0])
        yield Step("memory", f"memory, {case.name}", find, 2 if quick else 12 if case == cases[0] else 3)
    yield Step("import", "import", lambda _: import_seconds(1 if quick else 3), 6 if quick else 15)
    yield Step("accuracy", "accuracy", lambda s: accuracy.measure(name, device, quick, s), 1 if quick else 25)
    if not quick:
        yield Step("", "extras", lambda _: op.extras(), 10)
        yield Step("counts", "counts", lambda _: counts.measure(name, device), 60 if name in counts.WITH else 20)
    no_code = "left out by --quick" if quick else CODE_ANYWHERE if device == "cpu" else codegen.available()
    yield Step("machine_code", "machine code", lambda _: machine_code(name, no_code), 0.1 if no_code else 30)


def machine_code(name: str, reason: str | None) -> dict[str, Any]:
    return {"rows": [] if reason else codegen.table([name]), "reason": reason}


class Asked(NamedTuple):
    """What some claims are answered from; parts by level, name, by whom, and where times are asked for width and pass,
    where memory length.
    """

    claims: Sequence[str]
    places: Collection[str]
    parts: Collection[tuple[Any, ...]]


def layer_steps(device: str, quick: bool, asked: Asked | None = None) -> Iterator[Step]:
    base, lengths = layers.WIDTHS["base"], layers.QUICK if quick else layers.LENGTHS
    seconds, least = (0.3, 3) if quick else (2.0, 5)
    passes = {"forward": lengths} | ({} if quick else {"both": layers.BOTH})
    places = [(size, n, what) for what, mine in passes.items() for size in mine for n in mine[size]]

    def wanted(part: layers.Part, *where: object) -> bool:
        return asked is None or (part.level, part.name, part.by, *where) in asked.parts

    def times(level: str, width: int, n: int, what: str) -> Iterator[Step]:
        name = f"H = {width}, n = {n}{', forward and backward' if what == 'both' else ''}, {level}"
        chosen = [part for part in layers.timed(level, width, n, what, quick) if wanted(part, width, what)]
        find = functools.partial(layers.times, chosen, width, n, what, device, seconds, least=least)
        flops = sum(part.about(width, n) for part in chosen) * (3.3 if what == "both" else 1)
        compiled = sum(part.by == "torch.compile" for part in chosen)
        calls = measure.CALLS * flops / (1.5e11 if device == "cpu" else 1e13)
        if chosen:
            yield Step("times", name, find, 1.5 * seconds + 0.4 * len(chosen) + calls + 10 * compiled)

    for n in () if quick else layers.SHORT:
        yield from times("mixing", base, n, "forward")
    for size, n, what in places:
        for level in ("mixing", "layer"):
            yield from times(level, layers.WIDTHS[size], n, what)
    parts = [p for p in layers.parts() if not quick or p.usual]
    for n in (1024,) if quick else (1024, 4096):
        if chosen := [part for part in parts if wanted(part, n)]:
            find = functools.partial(layers.memory, chosen, base, n, device)
            yield Step("memory", f"memory, n = {n}", find, 3 + n / 80 * len(chosen) / len(parts))
    for n in (256, 512, 1024, 2048):
        find = functools.partial(layers.training, base, n, device)
        yield Step("training", f"memory of training, n = {n}", find, n / 500)
    for n in (256, 2048, 16384) if quick else (256, 1024, 4096, 16384, 65536):
        find = functools.partial(layers.decoding, n, device, seconds)
        yield Step("decoding", f"decoding after {n}", find, 2 * seconds + n / 30000)
    yield Step(
        "rotary", "rotary embedding", functools.partial(layers.rotary, device, seconds, quick), 2 if quick else 15
    )


def quality_steps(quick: bool) -> Iterator[Step]:
    for name, experiment in quality.EXPERIMENTS.items():
        if not (quick and name in SLOW):
            yield Step(name, name, lambda _, find=experiment: find(), SLOW.get(name, 1.0))


NAMES = (*OPERATORS, "layers", "quality")


def steps(name: str, device: str, quick: bool, asked: Asked | None = None) -> list[Step]:
    if name == "quality":
        found = list(quality_steps(quick))
    else:
        of_layers = name == "layers"
        mine = layer_steps(device, quick, asked) if of_layers else operator_steps(OPERATORS[name], name, device, quick)
        first = Step("roofline", "copy and products", lambda _: measure.limits(device, quick), 2 if quick else 6)
        last = Step("roofline", "copy and products, again", lambda _: measure.reach(device, quick), first.seconds)
        found = [first, *mine, last]
    return [step for step in found if asked is None or step.where in asked.places]


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
    tried again without the contender that was called, or, if there was none, once more.
    """

    def __init__(self, file: Path, facts: dict[str, Any], fresh: bool) -> None:
        self.file, self.facts, self.called = file, facts, file.with_suffix(".called")
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.ended: dict[str, list[str]] = {}  # in these the process ended, and in which of their contenders
        if fresh or not file.exists():
            return
        old = json.loads(file.read_text())
        if old["facts"] != json.loads(json.dumps(facts)):
            return
        self.found, self.failed, self.seconds, self.ended = (old[k] for k in ("found", "failed", "seconds", "ended"))
        if (begun := old["begun"]) is not None:
            contender, before = last(self.called), self.ended.setdefault(begun, [])
            if contender in before:
                self.failed[begun] = "the process ended in it, twice"
            before.append(contender)

    def done(self, step: Step) -> bool:
        return step.key in self.found or step.key in self.failed

    def measure(self, step: Step, allowed: float, most: float) -> None:
        """allowed: seconds that it is told to do with; most: those after which it is ended, if there are any."""
        if most <= 0:
            self.failed[step.key], self.seconds[step.key] = "no time was left for it", 0.0
            return
        self._write(begun=step.key)
        begin = time.perf_counter()
        try:
            with measure.ending(most), told(self.called, self.ended.get(step.key, ())):
                self.found[step.key] = step.find(allowed)
        except measure.OutOfTime:
            self.failed[step.key] = f"no time was left for it after {units.time(most)}"
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


def kept_file(name: str, device: str, quick: bool = False, claims: Sequence[str] = ()) -> Path:
    """Where results are kept: of whole runs in git, of quick ones and of some claims elsewhere."""
    whole = QUICK if quick else PARTS if claims else RESULTS
    return whole / slug(device_name(device)) / f"{'-'.join((name, *claims))}.json"


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
        elif step.where == "roofline":
            results["roofline"] = measure.better(value, results.get("roofline", value))
        elif isinstance(value, list):
            results[step.where] = results.get(step.where, []) + value
        else:
            results[step.where] = value
    for place in (
        {"timings", "growth", "shared", "times", "decoding", "rotary"} & set(results) if "roofline" in results else ()
    ):
        results[place] = [_bounded(row, results["roofline"]) for row in results[place]]
    results["failed"] = [{"step": key, "reason": why} for key, why in kept.failed.items()]
    results["steps"] = [{"step": key, "seconds": round(s, 2)} for key, s in kept.seconds.items()]
    results["wall_seconds"] = round(sum(kept.seconds.values()), 1)
    return json.loads(json.dumps(results))


def _bounded(row: dict[str, Any], roofline: dict[str, Any]) -> dict[str, Any]:
    """With the least time that the device allows its bytes and products, and the share of it in what it takes."""
    if not row.get("seconds") or "bytes" not in row:
        return row
    bound = measure.bound(roofline, row)
    return row | {"bound": bound, "of_bound": bound / row["seconds"]["median"]}


def run(
    names: Sequence[str],
    device: str,
    quick: bool,
    fresh: bool = False,
    asked: Asked | None = None,
    seconds: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures everything about operators, the layers or quality; returns what `kept_file` has of each.

    A run that is interrupted goes on where it was, and measures nothing again that is found, of whatever name.

    Every step is allowed its share of the time that is left, by what it is expected to take: where earlier ones were
    slow, later ones look at less, and what one leaves is the others'. One that takes twice its share, and PATIENCE, is
    ended.

    Args:
        fresh: forgets what an interrupted run found.
        asked: by claims; only this is measured, and kept apart from whole runs.
        seconds: that all of it may take, with what an interrupted run took.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    functorch_config.donated_buffer = False  # a compiled backward pass is timed more than once
    facts = environment(device)
    claims = () if asked is None else asked.claims
    same = {k: v for k, v in facts.items() if k not in ("date", "clocks_mhz")} | {"quick": quick, "claims": claims}
    kept, todo = {}, {}
    for name in names:
        file = kept_file(name, device, quick, claims)
        kept[name] = Kept(PARTIAL / file.parent.parent.name / file.parent.name / file.name, same, fresh)
        todo[name] = steps(name, device, quick, asked)
    left = {name: [step for step in mine if not kept[name].done(step)] for name, mine in todo.items()}
    total, rest = (sum(step.seconds for mine in of.values() for step in mine) for of in (todo, left))
    usual = QUICK_SECONDS if quick else WHOLE_SECONDS if asked is None else min(WHOLE_SECONDS, START + SLACK * total)
    allowed = seconds or usual
    allowance = measure.Allowance(allowed - sum(sum(kept[name].seconds.values()) for name in names))
    found = {}
    in_turn = sorted(names, key=lambda name: name != "quality")  # short, no matter of time: slow steps leave it some
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    with tqdm(total=total, initial=total - rest, bar_format=form, dynamic_ncols=True) as progress:
        for name in in_turn:
            progress.set_description(name)
            for step in left[name]:
                progress.set_postfix_str(step.what)
                share = allowance.left * step.seconds / rest
                kept[name].measure(step, share, min(max(2 * share, PATIENCE), allowance.left))
                progress.update(step.seconds)
                rest -= step.seconds
            head = {"quick": quick, "allowed_seconds": allowed, "environment": facts}
            found[name] = _results(name, head, todo[name], kept[name])
            write(kept_file(name, device, quick, claims), json.dumps(found[name], indent=1) + "\n")
    for name in names:
        kept[name].file.unlink(missing_ok=True)
    return found
