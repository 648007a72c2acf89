"""What is particular to linear attention's Triton kernel: the launches it takes, and the bytes it moves."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from kx_kernels.ops.linear_attention import _triton, api
from kx_kernels.ops.linear_attention.spec import LinearAttentionCase, make
from kx_kernels.testing.metering import Meter, metered

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

CASE = LinearAttentionCase(batch=1, length=64, heads=1, kv_heads=1, key_dim=64, value_dim=64)


def passes(case: LinearAttentionCase) -> tuple[Meter, Meter]:
    """What the forward and the backward pass of a call in float16 take."""
    p = api.problem(**make(case, torch.float16, torch.device("cpu"), 0))
    with metered() as forward:
        results = _triton.run(p)
    with metered() as backward:
        _triton.run_backward(p, results.denominator, results.o, None, None)
    return forward, backward


@pytest.mark.parametrize("normalize", [True, False])
def test_each_input_is_read_once_forward(normalize: bool) -> None:
    forward, _ = passes(replace(CASE, normalize=normalize))
    tensor = CASE.length * CASE.key_dim * 2  # bytes
    assert forward.launches == 1
    assert forward.loaded == 3 * tensor
    assert forward.stored == tensor + 4 * CASE.length * normalize  # and a denominator to each row


@pytest.mark.parametrize("normalize", [True, False])
def test_a_backward_pass_in_three_launches(normalize: bool) -> None:
    """For dq: g, v, k, and q twice, which would hold registers; for dk: g, v, q and k; for dv: g, q and k."""
    _, backward = passes(replace(CASE, normalize=normalize))
    tensor, row = CASE.length * CASE.key_dim * 2, 4 * CASE.length
    assert backward.launches == 3
    assert backward.loaded == 12 * tensor + 4 * row * normalize
    assert backward.stored == 3 * tensor + row * normalize


def test_bytes_and_products_grow_linearly() -> None:
    counts = [passes(replace(CASE, length=n)) for n in (64, 128, 256)]
    for once, twice in itertools.pairwise(counts):
        for a, b in zip(once, twice, strict=True):
            assert (b.loaded, b.stored, b.dot_flops) == (2 * a.loaded, 2 * a.stored, 2 * a.dot_flops)
            assert a.launches == b.launches


def test_wide_heads_take_slices_of_values() -> None:
    """Two programs share a head of 128: each reads q and k whole, and half of v."""
    forward, backward = passes(replace(CASE, key_dim=128, value_dim=128))
    tensor = CASE.length * 128 * 2
    assert (forward.launches, forward.loaded) == (1, 5 * tensor)
    assert backward.launches == 4  # one for e, as no program sees whole rows
