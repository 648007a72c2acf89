"""Launches, bytes and products of each pass, counted. `python -m benchmarks.counts OP cpu` prints JSON.

Triton's kernels are counted under its interpreter, which has to be on from the start; CUDA's launches on the emulation.
Both need no GPU, and where there is one they are left out: its report is about time.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from kx_kernels._core import native
from kx_kernels._core.spec import Call, OpSpec, all_specs
from kx_kernels.testing.emulation import emulated_cuda
from kx_kernels.testing.metering import metered

from . import interpreter

WITH = {"gau_attention": ("gau_inputs", "mixed_chunk_attention")}  # the rest of gated units, without timings of its own


def seen(spec: OpSpec, call: Call) -> dict[str, int]:
    """Floating-point operations that torch's counter sees of each pass of the reference, on meta tensors."""
    meta = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), call)
    leaves = {name: meta[name] for name in spec.differentiable if name in meta}
    pytree.tree_map_only_(torch.Tensor, torch.Tensor.requires_grad_, leaves)
    with FlopCounterMode(display=False) as forward:
        outs = pytree.tree_leaves(spec.reference(**meta))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def told(beside: Mapping[str, int]) -> dict[str, int]:
    return {why: flops for why, flops in beside.items() if flops}


def rows(spec: OpSpec) -> list[dict[str, Any]]:
    """One row per backend, call and pass.

    `least`: bytes of a forward pass, each input read once and each output written once. `flops`: as the specification
    has them, beside those that torch's counter sees, and why both that and the meter's differ from it, by how many
    each.
    """
    api = importlib.import_module(spec.function.__module__)
    backends = {b.name: b for b in api.backends()}
    found = []
    for case, call in spec.metered().items():
        problem, of_torch = api.problem(**call), seen(spec, call)
        with metered() as meter:
            before = (0, 0, 0, 0)
            for name in spec.passes(backends["triton"], problem):
                now = (meter.launches, meter.loaded, meter.stored, meter.dot_flops)
                launches, loaded, stored, flops = (b - a for a, b in zip(before, now, strict=True))
                row = {"op": spec.name, "backend": "triton", "case": case, "pass": name, "launches": launches}
                row |= {"loaded": loaded, "stored": stored, "dot_flops": flops, "least": None}
                if name == "forward":
                    row["least"] = spec.bytes(call)
                if name in spec.work:
                    work = spec.work[name]
                    row |= {"flops": work.flops(call), "torch": of_torch[name]}
                    row["beside_torch"] = told(work.beside_torch(call))
                    row["beside_triton"] = told(work.beside_triton(call, problem))
                found.append(row)
                before = now
        emulation = native.load("_emulation")
        if emulation is None:
            continue
        with emulated_cuda():
            before_cuda = emulation.launches()
            for name in spec.passes(backends["cuda"], problem):
                row = {"op": spec.name, "backend": "cuda", "case": case, "pass": name}
                row["launches"] = emulation.launches() - before_cuda
                found.append(row | dict.fromkeys(("loaded", "stored", "dot_flops", "least")))
                before_cuda = emulation.launches()
    return found


def measure(op: str, device: str) -> list[dict[str, Any]]:
    if device != "cpu":
        return []
    return [row for name in (op, *WITH.get(op, ())) for row in interpreter.rows("benchmarks.counts", name, device)]


def main() -> None:
    op, _ = sys.argv[1:]
    print(json.dumps(rows(next(spec for spec in all_specs() if spec.name == op))))


if __name__ == "__main__":
    main()
