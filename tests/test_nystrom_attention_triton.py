"""What is particular to Nyström attention's Triton kernels: parts, slices and tiles, launches and bytes, products in
halves."""

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
from kx_kernels.ops.nystrom_attention import _triton, api
from kx_kernels.ops.nystrom_attention.spec import SPEC, NystromCase, make
from kx_kernels.testing import comparison
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.metering import Meter, metered
from kx_kernels.testing.poison import poisoned_allocation, same_bits

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

CASE = NystromCase(batch=1, heads=1, queries=70, dim=24, value_dim=40, landmarks=20, iterations=2)
SMALL = _triton.Sizes(part=16, rows=16, out_rows=16, numbers=512, shallow=512, pooled=256, summed=64, tile=16, warps=4)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Several parts to a sequence, slices to a head, and tiles to a matrix."""
    with mock.patch.object(_triton, "_sizes", return_value=SMALL):
        yield


values_and_gradients = functools.partial(comparison.values_and_gradients, SPEC)


def by_triton(call: Call) -> list[Tensor]:
    return values_and_gradients(lambda **c: kx.nystrom_attention(**c, backend="triton"), call)


TILES = {
    "plain": CASE,
    "original": replace(CASE, init="original", heads=2, ridge=0.1),
    "pinv": replace(CASE, init="pinv", size=8.0),
    "packed": replace(CASE, lengths=(45, 0, 21, 7), surplus=3, conv=5),
    "padding": replace(CASE, padding="holes", batch=2, conv=19),
    "cross": replace(CASE, queries=37, keys=90, query_padding=True),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", TILES.values(), ids=TILES.keys())
def test_small_tiles_within_budget(case: NystromCase) -> None:
    call = make(case, torch.float32, torch.device("cpu"), 0)
    with poisoned_allocation():
        found = by_triton(call)
    pairs = exact_and_eager(SPEC, call, torch.float32, "triton", values_and_gradients)
    for i, (x, (exact, eager)) in enumerate(zip(found, pairs, strict=True)):
        near = functools.partial(neighbours, SPEC, call, torch.float32, "triton", values_and_gradients, i)
        assert_within_budget(x, exact, eager, f"result {i}", near)


def test_products_in_halves() -> None:
    """What float32 numbers beside bfloat16 are multiplied in, by two of float16: the interpreter cannot multiply
    bfloat16. Two have 22 bits, and one, which is all that remains where a half is left out, 11."""
    import triton.language as tl

    make_launch = _triton.Launch.__init__

    def in_halves(launch: _triton.Launch, p: Any) -> None:
        make_launch(launch, p)
        launch.how["DOT"] = tl.float16

    call = make(replace(CASE, conv=5), torch.float32, torch.device("cpu"), 0)
    whole = by_triton(call)
    with mock.patch.object(_triton.Launch, "__init__", in_halves):
        halves = by_triton(call)
    for a, b in zip(halves, whole, strict=True):
        assert 0 < (a - b).abs().max() < 2**-16 * b.abs().max()


def passes(case: NystromCase) -> tuple[Meter, Meter]:
    """What the forward and the backward pass of a call in float16 take."""
    p = api.problem(**make(case, torch.float16, torch.device("cpu"), 0))
    with metered() as forward:
        results = _triton.run(p)
    with metered() as backward:
        _triton.run_backward(p, results, results.o)
    return forward, backward


EVEN = NystromCase(batch=1, heads=1, queries=256, dim=16, value_dim=16, landmarks=16, iterations=1)


def test_launches() -> None:
    """However long the sequence, and however many heads there are."""
    for case in (EVEN, replace(EVEN, heads=2, queries=100)):
        assert [meter.launches for meter in passes(case)] == [5, 6]
    assert [meter.launches for meter in passes(replace(EVEN, conv=3))] == [5, 7]
    assert [meter.launches for meter in passes(replace(EVEN, init="original"))] == [6, 8]


def test_bytes_grow_with_the_length_by_what_is_read_and_written() -> None:
    """Forward 5 units and backward 9: q twice, k, v, o; q and the gradient twice, k, v; all gradients. Rows of ∂q and
    ∂k also take the gradient of a landmark, and what divides it: from a cache."""
    unit, of_landmarks = 256 * EVEN.dim * 2, 256 * (EVEN.dim + 1) * 4
    forward, backward = zip(passes(EVEN), passes(replace(EVEN, queries=512)), strict=True)
    assert (forward[1].loaded - forward[0].loaded, forward[1].stored - forward[0].stored) == (4 * unit, unit)
    assert backward[1].loaded - backward[0].loaded == 6 * unit + 2 * of_landmarks
    assert backward[1].stored - backward[0].stored == 3 * unit


def test_products_grow_as_the_length() -> None:
    """By as much from 256 rows to 512 as from 512 to 1024."""
    for a, b, c in zip(*(passes(replace(EVEN, queries=n)) for n in (256, 512, 1024)), strict=True):
        assert 2 * (b.dot_flops - a.dot_flops) == c.dot_flops - b.dot_flops


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("processors", "programs"), [(1, 3), (2, 5), (132, 5)])
def test_few_heads_are_shared_out_among_processors(processors: int, programs: int) -> None:
    """In parts of the least size or more; sums change in their order only."""
    call = make(CASE, torch.float32, torch.device("cpu"), 0)
    one = by_triton(call)
    with mock.patch.object(_triton.triton, "processors", return_value=processors):
        p = api.problem(**call)
        assert _triton.Parts.of(p, 70, SMALL).places == programs
        for a, b in zip(by_triton(call), one, strict=True):
            assert (a - b).abs().max() < 2e-4 * b.abs().max()


@pytest.mark.usefixtures("small_tiles")
def test_parts_do_not_depend_on_how_often_they_are_made() -> None:
    call = make(replace(CASE, conv=3), torch.float32, torch.device("cpu"), 0)
    for a, b in zip(by_triton(call), by_triton(call), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"landmarks": 257}, "there are 257 landmarks; a row of scores would not fit on chip above 256"),
        ({"dim": 257}, "a head has 257 dimensions; landmarks would not fit on chip above 256"),
        ({"value_dim": 300}, "a head has 300 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], says: str) -> None:
    call = make(replace(CASE, **change), torch.float32, torch.device("cpu"), 0)
    with pytest.raises(kx.UnsupportedError, match=says):
        kx.nystrom_attention(**call, backend="triton")


def test_a_launch_of_too_many_programs_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 1).expand(1 << 16, 8, 2048, 1)
    with pytest.raises(kx.UnsupportedError, match="programs; a launch holds at most"):
        kx.nystrom_attention(x, x, x, num_landmarks=16, backend="triton")
