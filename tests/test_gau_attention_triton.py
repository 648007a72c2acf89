"""What is particular to gated attention's Triton kernels: panels, the launches and bytes they take, and their range."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kx_kernels as kx
from kx_kernels._core.spec import Call
from kx_kernels.ops.gau_attention import _triton, api
from kx_kernels.ops.gau_attention.spec import SPEC, GauCase, make
from kx_kernels.testing import comparison
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.metering import Meter, metered
from kx_kernels.testing.poison import poisoned_allocation, same_bits

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

TILE = 16
CASE = GauCase(batch=1, queries=64, key_dim=16, value_dim=64)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16 × 16, and panels wherever there may be some."""
    sizes = _triton.Sizes(rows=TILE, keys=TILE, step=TILE, short=8, columns=32, depth=TILE, warps=4)
    with (
        mock.patch.object(_triton, "_sizes", return_value=sizes),
        mock.patch.multiple(_triton, ON_CHIP_KEYS=0, LEAST_WIDTH=TILE),
    ):
        yield


values_and_gradients = functools.partial(comparison.values_and_gradients, SPEC)


def by_triton(call: Call, workspace: int = 1 << 20) -> list[Tensor]:
    return values_and_gradients(lambda **c: kx.gau_attention(**c, backend="triton", workspace=workspace), call)


NAMES = ("causal", "sum_causal", "flash", "mega", "bias_heads", "grouped", "padding_holes", "cross", "cross_longer")
NAMES += ("cross_padding", "one_query", "packed_surplus", "packed_cross", "packed_padding", "n17", "s32")
PANELS = {name: SPEC.cases[name] for name in NAMES} | {
    "causal_long": replace(CASE, queries=40, causal=True, bias="shared", batch=2),
    "packed_causal_long": replace(CASE, lengths=(17, 0, 35), causal=True, bias="shared"),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace", [0, 6 << 10, 1 << 20])
@pytest.mark.parametrize("case", PANELS.values(), ids=PANELS.keys())
def test_panels_within_budget(case: GauCase, workspace: int) -> None:
    """However few of them the workspace holds."""
    call = make(case, torch.float32, torch.device("cpu"), 0)
    with poisoned_allocation():
        found = by_triton(call, workspace)
    pairs = exact_and_eager(SPEC, call, torch.float32, "triton", values_and_gradients)
    for i, (x, (exact, eager)) in enumerate(zip(found, pairs, strict=True)):
        near = functools.partial(neighbours, SPEC, call, torch.float32, "triton", values_and_gradients, i)
        assert_within_budget(x, exact, eager, f"result {i}", near)


@pytest.mark.usefixtures("small_tiles")
def test_the_workspace_holds_all_panels() -> None:
    sizes: list[int] = []
    allocate = Tensor.new_empty

    def counted(x: Tensor, *shape: Any, **how: Any) -> Tensor:
        out = allocate(x, *shape, **how)
        sizes.extend([out.nbytes] if out.dim() == 1 else [])  # panels are
        return out

    call = make(replace(CASE, heads=2, kv_heads=2), torch.float32, torch.device("cpu"), 0)
    p = api.problem(**call, workspace=20 << 10)
    with mock.patch.object(Tensor, "new_empty", counted):
        results = _triton.run(p)
        forward = sum(sizes)
        _triton.run_backward(p, results, results.o)
    assert 10 << 10 < forward <= 20 << 10
    assert 10 << 10 < sum(sizes) - forward <= 20 << 10


@pytest.mark.usefixtures("small_tiles")
def test_the_workspace_changes_only_the_order_of_sums_of_queries() -> None:
    call = make(replace(CASE, causal=True, queries=70), torch.float32, torch.device("cpu"), 0)
    names = ["o", *(n for n in SPEC.differentiable if n in call)]
    large, small = (by_triton(call, workspace) for workspace in (1 << 20, 20 << 10))
    for name, a, b in zip(names, large, small, strict=True):
        assert same_bits(a, b) == (name != "q"), name


def passes(case: GauCase, **how: Any) -> tuple[Meter, Meter]:
    """What the forward and the backward pass of a call in float16 take."""
    p = api.problem(**make(case, torch.float16, torch.device("cpu"), 0), **how)
    with metered() as forward:
        results = _triton.run(p)
    with metered() as backward:
        _triton.run_backward(p, results, results.o)
    return forward, backward


def test_one_launch_where_scores_stay_on_chip() -> None:
    """q, k, v and the gate are read once, o is written, and what its gate was multiplied with."""
    forward, backward = passes(CASE)
    narrow, wide = CASE.queries * CASE.key_dim * 2, CASE.queries * CASE.value_dim * 2
    assert forward.launches == 1
    assert forward.loaded == 2 * narrow + 2 * wide
    assert forward.stored == 2 * wide
    assert forward.dot_flops == 2 * 128 * 128 * (CASE.key_dim + CASE.value_dim)  # of a tile, full or not
    assert backward.launches == 4  # scores, keys and values, queries, the gate


@pytest.mark.usefixtures("small_tiles")
def test_bytes_of_a_panel() -> None:
    """Forward: each tile of P is written once, and read by each slice of e."""
    forward, backward = passes(CASE)
    blocks, slices = CASE.queries // TILE, CASE.value_dim // 32
    narrow, wide = CASE.queries * CASE.key_dim * 2, CASE.queries * CASE.value_dim * 2
    panel = CASE.queries**2 * 4  # float16 numbers keep their products in float32
    assert forward.launches == 2
    assert forward.loaded == 2 * blocks * narrow + slices * panel + blocks * wide + wide
    assert forward.stored == panel + 2 * wide
    # Scores read q, k, v, the gate and the gradient for each tile; values read P by slices, the gate and the gradient,
    # keys read X and q; queries read X and k.
    assert backward.launches == 4
    products = blocks * (2 * narrow + 3 * wide) + (slices + 2) * panel + blocks * (2 * wide + 2 * narrow)
    assert backward.loaded == products + 2 * wide  # and the gradient of the gate
    assert backward.stored == 2 * panel + 2 * narrow + 2 * wide


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("processors", "launches"), [(1, 4), (4, 4), (6, 4), (7, 4), (8, 1)])
def test_panels_that_would_leave_processors_idle_are_not_made(processors: int, launches: int) -> None:
    """Three of four blocks of queries fit, 6 programs; on chip a fifth more is multiplied."""
    with mock.patch.object(_triton.triton, "processors", return_value=processors):
        forward, _ = passes(CASE, workspace=3 * TILE * CASE.queries * 4)
    assert forward.launches == launches


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace", [0, 1 << 20])
def test_causal_rows_multiply_what_they_see(workspace: int) -> None:
    """Half the tiles and the diagonal, whether scores are in panels or not."""
    blocks = CASE.queries // TILE
    for full, causal in zip(
        *(passes(replace(CASE, causal=c), workspace=workspace) for c in (False, True)), strict=True
    ):
        assert causal.dot_flops * 2 * blocks == full.dot_flops * (blocks + 1)


@pytest.mark.usefixtures("small_tiles")
def test_products_grow_as_the_square_of_the_length() -> None:
    counts = [passes(replace(CASE, queries=n)) for n in (32, 64)]
    for a, b in zip(*counts, strict=True):
        assert (b.dot_flops, b.launches) == (4 * a.dot_flops, a.launches)


@pytest.mark.parametrize("size", [2.0**-9, 1.0, 40.0])
def test_scores_may_leave_the_range_of_float16(size: float) -> None:
    """Squares of scores above 65504 and below 2^-24, held against a reference that keeps them in float32."""
    call = make(replace(CASE, size=size), torch.float16, torch.device("cpu"), 0)
    call["gate"] = call["gate"] / size**2
    wide = {n: call[n].double() for n in ("q", "k", "v", "gate")}
    out = kx.gau_attention(**call, backend="triton")
    assert out.abs().max() > 0.1
    assert_within_budget(out, SPEC.reference(**call | wide), SPEC.reference(**call), "o")


def test_a_launch_of_too_many_programs_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1).expand(1 << 24, 2048, 1, 16)
    with pytest.raises(kx.UnsupportedError, match="programs; a launch holds at most"):
        kx.gau_attention(x, x, x, backend="triton")
