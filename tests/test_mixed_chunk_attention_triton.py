"""What is particular to mixed-chunk attention's Triton kernels: panels, the launches and bytes they take, and range."""

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
from kx_kernels.ops.mixed_chunk_attention import _triton, api
from kx_kernels.ops.mixed_chunk_attention.spec import SPEC, MixedCase, make
from kx_kernels.testing import comparison
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.metering import Meter, metered
from kx_kernels.testing.poison import poisoned_allocation, same_bits

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

TILE = 16
CASE = MixedCase(batch=1, length=64, chunk=32, key_dim=16, value_dim=64)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 16 × 16, and panels of one."""
    sizes = _triton.Sizes(
        segment=TILE,
        rows=TILE,
        keys=TILE,
        step=TILE,
        short=8,
        least=8,
        columns=32,
        dim=TILE,
        depth=TILE,
        shares=3,
        warps=4,
    )
    with (
        mock.patch.object(_triton, "_sizes", return_value=sizes),
        mock.patch.multiple(_triton, WORKSPACE=0, LEAST_WIDTH=TILE, CHAIN=64),
    ):
        yield


values_and_gradients = functools.partial(comparison.values_and_gradients, SPEC)


def by_triton(call: Call) -> list[Tensor]:
    return values_and_gradients(lambda **c: kx.mixed_chunk_attention(**c, backend="triton"), call)


PANELS = {
    "full": replace(CASE, length=40, chunk=37, bias="shared", padding="holes", batch=2),
    "causal": replace(CASE, length=40, causal=True, key_dim=40, by_row=True),
    "packed": replace(CASE, lengths=(17, 0, 40), chunk=33, surplus=3, bias="shared"),
    "packed_causal": replace(CASE, lengths=(35, 18), surplus=9, heads=2, causal=True, bias="heads", value_dim=20),
    "small_chunks": replace(CASE, length=40, chunk=3, causal=True, bias="shared", value_dim=20),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", PANELS.values(), ids=PANELS.keys())
def test_panels_within_budget(case: MixedCase) -> None:
    """Several of them to a segment, and several slices of s and e."""
    call = make(case, torch.float32, torch.device("cpu"), 0)
    with poisoned_allocation():
        found = by_triton(call)
    pairs = exact_and_eager(SPEC, call, torch.float32, "triton", values_and_gradients)
    for i, (x, (exact, eager)) in enumerate(zip(found, pairs, strict=True)):
        near = functools.partial(neighbours, SPEC, call, torch.float32, "triton", values_and_gradients, i)
        assert_within_budget(x, exact, eager, f"result {i}", near)


@pytest.mark.usefixtures("small_tiles")
def test_panels_change_only_the_order_of_sums_of_queries() -> None:
    call = make(replace(CASE, length=32, causal=True), torch.float32, torch.device("cpu"), 0)
    names = ["o", *(n for n in SPEC.differentiable if n in call)]
    narrow = by_triton(call)
    with mock.patch.object(_triton, "LEAST_WIDTH", 2 * TILE):
        wide = by_triton(call)
    for name, a, b in zip(names, narrow, wide, strict=True):
        assert name == "quad_q" or same_bits(a, b), name


def passes(case: MixedCase) -> tuple[Meter, Meter]:
    """What the forward and the backward pass of a call in float16 take."""
    p = api.problem(**make(case, torch.float16, torch.device("cpu"), 0))
    with metered() as forward:
        results = _triton.run(p)
    with metered() as backward:
        _triton.run_backward(p, results, results.o)
    return forward, backward


@pytest.mark.parametrize(
    ("change", "launches"),
    [
        ({}, (3, 6)),  # states and their sums; then scores, gradients of keys, of queries and of the gate
        ({"bias": "shared"}, (3, 7)),
        ({"gate": False}, (3, 5)),
        ({"causal": True, "chunk": 64}, (1, 4)),  # nobody takes a state
    ],
)
def test_launches(change: dict[str, Any], launches: tuple[int, int]) -> None:
    forward, backward = passes(replace(CASE, **change))
    assert (forward.launches, backward.launches) == launches


def test_bytes() -> None:
    """Of chunks that are a tile of tokens and of keys."""
    forward, backward = passes(CASE)
    chunks = CASE.length // CASE.chunk
    narrow, wide = CASE.length * CASE.key_dim * 2, CASE.length * CASE.value_dim * 2
    state, panel = CASE.key_dim * CASE.value_dim * 4, CASE.length * CASE.chunk * 4  # float32, for products in TF32
    # States read lin_k and v; outputs all but lin_k, and for each chunk a sum of states.
    assert forward.loaded == (narrow + wide) + chunks * state + (3 * narrow + 2 * wide) + chunks * state
    assert forward.stored == chunks * state + state + 2 * wide
    # States read lin_k, v, lin_q, g and the gate; scores q, k, g, the gate and v; values g, the gate, lin_k, and P;
    # linear keys v; the others q and X; linear queries g and the gate; the others k and X; that of the gate g and A.
    read = (2 * narrow + 3 * wide) + (2 * narrow + 3 * wide) + (2 * wide + narrow) + wide + narrow + 2 * wide + narrow
    assert backward.loaded == read + 3 * panel + 2 * wide + (2 + 3) * chunks * state
    assert backward.stored == 2 * chunks * state + 2 * state + 2 * panel + 4 * narrow + 2 * wide


@pytest.mark.parametrize("change", [{}, {"causal": True}, {"chunk": 4, "causal": True}])
def test_work_grows_with_the_length(change: dict[str, Any]) -> None:
    """Products, bytes and memory in proportion, launches not at all."""
    sizes: list[int] = []
    allocate = Tensor.new_empty

    def counted(x: Tensor, *shape: Any, **how: Any) -> Tensor:
        out = allocate(x, *shape, **how)
        sizes.append(out.nbytes)
        return out

    counts, bytes_ = [], []
    for length in (64, 128, 192):
        sizes.clear()
        with mock.patch.object(Tensor, "new_empty", counted):
            counts.append(passes(replace(CASE, length=length, **change)))
        bytes_.append(sum(sizes))
    assert bytes_[2] - bytes_[1] == bytes_[1] - bytes_[0]
    for a, b, c in zip(*counts, strict=True):
        assert a.launches == b.launches == c.launches
        assert c.dot_flops - b.dot_flops == b.dot_flops - a.dot_flops
        assert c.loaded - b.loaded == b.loaded - a.loaded


@pytest.mark.parametrize("size", [2.0**-9, 100.0])
def test_scores_may_leave_the_range_of_float16(size: float) -> None:
    """Squares of scores above 65504 and below 2^-14, held against a reference that keeps them in float32."""
    call = make(replace(CASE, causal=True, normalizer="none"), torch.float16, torch.device("cpu"), 0)
    call["quad_q"], call["lin_q"] = call["quad_q"] * size, torch.zeros_like(call["lin_q"])
    call["gate"] = call["gate"] * min(size**-2, 2.0**13)
    wide = {n: call[n].double() for n in ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate")}
    out = kx.mixed_chunk_attention(**call, backend="triton")
    assert out.abs().max() > 0.1
    assert_within_budget(out, SPEC.reference(**call | wide), SPEC.reference(**call), "o")


def test_a_launch_of_too_many_programs_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1).expand(1 << 28, 2048, 1, 16)
    with pytest.raises(kx.UnsupportedError, match="programs; a launch holds at most"):
        kx.mixed_chunk_attention(x, x, x, x, x, backend="triton")
