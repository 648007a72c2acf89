"""What is particular to rope's Triton kernel: the bytes it moves, and bfloat16 without a GPU."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from kx_kernels.ops.rope import _triton, api
from kx_kernels.ops.rope.reference import rope as reference
from kx_kernels.ops.rope.spec import CASES, SPEC, RopeCase, make
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.metering import metered
from kx_kernels.testing.poison import bits

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

METERED = {
    "interleaved": RopeCase(length=16, head_dim=16, rotary_dim=16),
    "half": RopeCase(length=16, head_dim=16, rotary_dim=16, interleaved=False),
    "partial": RopeCase(length=16, head_dim=24, rotary_dim=12, start=3),
    "positions": RopeCase(length=16, head_dim=16, rotary_dim=16, positions="sequence"),
    "q alone": RopeCase(length=16, heads=9, kv_heads=None),
}


def moved(case: RopeCase) -> tuple[int, int, dict[str, Any]]:
    call = make(case, torch.float32, torch.device("cpu"), 0)
    with metered() as meter:
        SPEC.function(**call, backend="triton")
    return meter.loaded, meter.stored, call


@interpreted
@pytest.mark.parametrize("case", METERED.values(), ids=METERED.keys())
def test_bytes_moved(case: RopeCase) -> None:
    """Values are read once and written once; a table row and an offset, once per token and group of heads."""
    loaded, stored, call = moved(case)
    values = sum(x.numel() * 4 for x in (call["q"], call["k"]) if x is not None)
    groups = sum(-(-x.shape[2] // _triton.BLOCK_H) for x in (call["q"], call["k"]) if x is not None)
    angles = case.batch * case.length * case.rotary_dim * 4
    offsets = case.batch * case.length * 8 if case.positions == "sequence" else 0
    assert stored == values
    assert loaded == values + groups * (angles + offsets)


@interpreted
@pytest.mark.parametrize("dimension", ["length", "batch"])
def test_bytes_grow_linearly(dimension: str) -> None:
    case = METERED["interleaved"]
    counts = [moved(replace(case, **{dimension: n})) for n in (16, 32, 64)]
    for (loaded, stored, _), (twice_loaded, twice_stored, _) in itertools.pairwise(counts):
        assert (twice_loaded, twice_stored) == (2 * loaded, 2 * stored)


@interpreted
@pytest.mark.parametrize("case", [n for n, c in CASES.items() if c.table_dtype == torch.float32])
def test_bfloat16_up_to_its_last_rounding(case: str) -> None:
    """The interpreter cannot round to bfloat16, so the kernel reads bfloat16 and writes float32: the rest is seen."""
    call = SPEC.call(case, torch.bfloat16)
    p = api.problem(**call)
    outs = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in p.xs]
    _triton.launch(p, outs)
    wide = call | {n: call[n].float() for n in ("q", "k") if call[n] is not None}
    exact = call | {n: call[n].double() for n in ("q", "k") if call[n] is not None}
    for out, x, e, w in zip(outs, p.xs, results(exact), results(wide), strict=True):
        assert_within_budget(out, e, w, case)
        passed = torch.ones(x.shape[-1], dtype=torch.bool)
        passed[p.start : p.start + p.rotary_dim] = False
        assert torch.equal(bits(out[..., passed]), bits(x.float()[..., passed]))


def results(call: dict[str, Any]) -> list[torch.Tensor]:
    result = reference(**call)
    return [result] if isinstance(result, torch.Tensor) else list(result)
