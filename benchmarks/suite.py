"""Measures one operator on one device and keeps the rows as JSON. Needs neither plots nor templates."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch._functorch.config as functorch_config
from tqdm import tqdm

from kx_kernels.testing import codegen

from . import accuracy, counts, gau_attention, linear_attention, measure, nystrom_attention, rope
from .environment import ROOT, cache_bytes, device_name, environment, slug

RESULTS = ROOT / "benchmarks" / "results"
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
    for name, (spread, fraction) in measure.take_turns(contenders, device, seconds, op.LIMIT).items():
        numbers = {"seconds": asdict(spread), "of_limit": asdict(fraction), "rate": case.work / spread.median}
        found.append({**common, "contender": name, **numbers})
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


def run(name: str, device: str, quick: bool) -> Path:
    """Measures everything about an operator; returns the file that holds it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    functorch_config.donated_buffer = False  # a compiled backward pass is timed more than once
    op = OPERATORS[name]
    cases, sweep = op.cases(device), op.sweep(device)
    if quick:
        cases, sweep = [cases[0], cases[-1]], sweep[::3]
    seconds = 3.0 if quick else 8.0
    results: dict[str, Any] = {"op": name, "quick": quick, "environment": environment(device)}
    results |= {"limit": op.LIMIT, "unit": op.UNIT}
    results["versions"] = op.versions()
    results["timings"], results["growth"] = [], []
    with tqdm(total=len(cases) + len(sweep) + 6, desc=name, unit="step", dynamic_ncols=True) as progress:

        def step(what: str) -> None:
            progress.set_postfix_str(what)
            progress.update()

        for case in cases:
            results["timings"] += timings(op, case, device, seconds)
            step(case.name)
        for case in sweep:
            results["growth"] += timings(op, case, device, seconds / 8)
            step(case.name)
        results["host"] = host_times(op, device)
        results["memory"] = memory(op, device)
        step("host time, memory")
        results["import"] = import_seconds(2 if quick else 5)
        step("import")
        results |= op.extras()
        step("extras")
        results["accuracy"] = accuracy.measure(name, device)
        step("accuracy")
        results["counts"] = counts.measure(name, device)
        step("counts")
        reason = codegen.available()
        code = [] if quick or reason else [row for row in codegen.table() if row["op"] == name]
        results["machine_code"] = {"rows": code, "reason": "left out by --quick" if quick else reason}
        step("machine code")
    file = RESULTS / slug(device_name(device)) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    return file
