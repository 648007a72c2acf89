"""The mathematics of a gated attention's inputs: what holds of every backend whatever the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx
from kx_kernels.ops.gau_inputs.spec import SPEC
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.poison import same_bits

prepare = kx.gau_inputs


@pytest.fixture(autouse=True)
def serves(lane: Any) -> None:
    if lane.backend not in SPEC.backends:
        pytest.skip(f"no {lane.backend} kernel")


def projected(lane: Any, length: int = 20, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, v [B, T, 24] and z [B, T, 16], of one buffer."""
    generator = torch.Generator().manual_seed(0)
    return list(
        (2 * torch.randn(batch, length, 64, generator=generator)).to(lane.device, dtype).split((24, 24, 16), -1)
    )


def affine(lane: Any, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(heads, 16, generator=generator).to(lane.device) for _ in range(2)]


def tables(lane: Any, length: int = 32, dim: int = 16) -> tuple[Tensor, Tensor]:
    return kx.rope_tables(length, dim, base=100.0, device=lane.device)


def gradients(outs: Any, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outs, leaves, grads))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_it_is_what_layers_compute(lane: Any, heads: int) -> None:
    """silu of a projection, a scale and an offset by head, and pairs as complex numbers that turn: in float64."""
    values, (cos, sin) = [*projected(lane), *affine(lane, heads)], tables(lane)
    widths = (24, 24, *[16] * heads)
    grads = [torch.randn(2, 20, w, device=lane.device) for w in widths]

    def theirs(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in values]
        u, v, z, gamma, beta = leaves
        h = torch.einsum("bts,ms->mbts", F.silu(z), gamma) + beta[:, None, None]
        turn = torch.complex(cos[:20].to(dtype), sin[:20].to(dtype))
        h = torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (8, 2))) * turn).flatten(-2)
        outs = [F.silu(u), F.silu(v), *h]
        return [*outs, *gradients(outs, leaves, [g.to(dtype) for g in grads])]

    leaves = [x.detach().requires_grad_() for x in values]
    outs = prepare(*leaves, rope=(cos, sin), backend=lane.backend)
    ours = [*outs, *gradients(outs, leaves, grads)]
    for i, (x, e, g) in enumerate(zip(ours, theirs(torch.float64), theirs(torch.float32), strict=True)):
        assert_within_budget(x.detach(), e.detach(), g.detach(), f"result {i}")


def test_nothing_to_do_changes_no_bit(lane: Any) -> None:
    u, v, z = projected(lane)
    ones = torch.ones(3, 16, device=lane.device)
    outs = prepare(u, v, z, ones, activation="identity", backend=lane.backend)
    for x, y in zip(outs, (u, v, z, z, z), strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_turn_as_rope_turns_them(lane: Any, interleaved: bool) -> None:
    """The turned heads are the bits of kx.rope where nothing comes before, partly turned and from offsets on."""
    _, v, z = projected(lane)
    one, where = torch.ones(1, 16, device=lane.device), torch.tensor([5, -4], device=lane.device)
    cos, sin = tables(lane, dim=6)
    how: dict[str, Any] = {"rope_offset": where, "rope_interleaved": interleaved, "backend": lane.backend}
    head = prepare(None, v, z, one, activation="identity", rope=(cos, sin), **how)[2]
    expected = kx.rope(z[:, :, None], None, cos, sin, offset=where, interleaved=interleaved, backend="reference")
    torch.testing.assert_close(head, expected[:, :, 0])


@pytest.mark.parametrize("number", [-1e30, -200.0, -104.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 104.0, 1e30])
def test_silu_of_extreme_numbers(lane: Any, number: float) -> None:
    """Each within its own budget, also where its exponential is infinite or nothing; and its slope."""
    one = torch.ones(1, 1, device=lane.device)

    def ours(x: Tensor) -> list[Tensor]:
        v, head = prepare(None, x, x, one, backend=lane.backend)[1:]
        return [v.detach(), head.detach(), *torch.autograd.grad(v, x)]

    def theirs(x: Tensor) -> list[Tensor]:
        y = F.silu(x)
        return [y.detach(), y.detach(), *torch.autograd.grad(y, x)]

    def pairs(off: float) -> list[tuple[Tensor, Tensor]]:
        x = torch.full((1, 1, 1), number * (1 + off), device=lane.device)
        exact, eager = (theirs(x.to(dtype).requires_grad_()) for dtype in (torch.float64, torch.float32))
        return list(zip(exact, eager, strict=True))

    results = ours(torch.full((1, 1, 1), number, device=lane.device).requires_grad_())
    for i, (x, pair) in enumerate(zip(results, pairs(0.0), strict=True)):
        assert_within_budget(x, *pair, f"result {i}", lambda i=i: [pairs(0.001 * n)[i] for n in range(1, 17)])


def test_no_number_stays_none(lane: Any) -> None:
    x = torch.full((1, 1, 40), torch.nan, device=lane.device)
    _, v, head = prepare(None, x, x, torch.ones(1, 40, device=lane.device), backend=lane.backend)
    assert v.isnan().all()
    assert head.isnan().all()


def test_more_rows_and_columns_than_threads(lane: Any) -> None:
    """What no block holds at once: 300 rows of 1028 dimensions, half of which turn."""
    if lane.backend == "triton" and lane.slow:
        pytest.skip("takes long")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 300, 1028, generator=generator).to(lane.device)
    gamma, beta = torch.randn(2, 2, 1028, generator=generator).to(lane.device)
    cos, sin = tables(lane, length=300, dim=512)
    grads = [torch.randn(1, 300, 1028, generator=generator).to(lane.device) for _ in range(3)]

    def results(function: Any, dtype: torch.dtype, **how: Any) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (z, gamma, beta)]
        outs = function(None, leaves[0], *leaves, rope=(cos, sin), rope_interleaved=False, **how)[1:]
        return [x.detach() for x in (*outs, *gradients(outs, leaves, [g.to(dtype) for g in grads]))]

    ours = results(prepare, torch.float32, backend=lane.backend)
    pairs = zip(*(results(SPEC.reference, dtype) for dtype in (torch.float64, torch.float32)), strict=True)
    for i, (x, pair) in enumerate(zip(ours, pairs, strict=True)):
        assert_within_budget(x, *pair, f"result {i}")


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_never_leaks(lane: Any, garbage: float) -> None:
    """Whatever padding and rows of no sequence hold, in inputs and in gradients, they are 0 and change no bit."""
    mask = torch.ones(20, dtype=torch.bool, device=lane.device)
    mask[11:14] = False
    ends = torch.tensor([2, 9, 17], dtype=torch.int32, device=lane.device)
    row = torch.arange(20, device=lane.device)
    kept = mask & (row >= 2) & (row < 17)
    results = []
    for fill in (0.0, garbage):
        values = [torch.where(kept[:, None], x[0], fill) for x in projected(lane)]
        leaves = [x.requires_grad_() for x in [*values, *affine(lane)]]
        outs = prepare(*leaves, rope=tables(lane), key_padding_mask=mask, cu_seqlens=ends, backend=lane.backend)
        assert all(not x[~kept].any() for x in outs)
        grads = [torch.where(kept[:, None], x.detach(), fill) for x in outs]
        found = gradients(outs, leaves, grads)
        assert all(not x[~kept].any() for x in found[:3])
        results.append([*outs, *found])
    for x, y in zip(*results, strict=True):
        assert same_bits(x.detach(), y.detach())


def test_lengths_are_a_mask(lane: Any) -> None:
    values, lengths = [*projected(lane), *affine(lane)], torch.tensor([13, 0], device=lane.device)
    mask = torch.arange(20, device=lane.device) < lengths[:, None]
    found = prepare(*values, lengths=lengths, backend=lane.backend)
    for x, y in zip(found, prepare(*values, key_padding_mask=mask, backend=lane.backend), strict=True):
        assert x.any()
        assert same_bits(x, y)


def test_rows_are_their_own(lane: Any) -> None:
    """A row has the same bits alone, in a batch, and packed; sequences begin at position 0."""
    u, v, z = projected(lane)
    gamma, beta = affine(lane)
    how: dict[str, Any] = {"rope": tables(lane), "backend": lane.backend}
    whole = prepare(u, v, z, gamma, beta, **how)
    alone = prepare(u[1:, 4:9], v[1:, 4:9], z[1:, 4:9], gamma, beta, rope_offset=4, **how)
    ends = torch.tensor([0, 20, 20, 40], dtype=torch.int32, device=lane.device)
    packed = prepare(*(x.flatten(0, 1) for x in (u, v, z)), gamma, beta, cu_seqlens=ends, **how)
    for x, y, p in zip(whole, alone, packed, strict=True):
        if lane.backend == "reference":  # torch's silu has other bits where its vectors end
            torch.testing.assert_close(x[1:, 4:9], y)
            torch.testing.assert_close(x.flatten(0, 1), p)
        else:
            assert same_bits(x[1:, 4:9], y)
            assert same_bits(x.flatten(0, 1), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_affine_of_narrow_rows(lane: Any, dtype: torch.dtype) -> None:
    """As autocast has it: results of the rows' dtype, gradients of each its own, and the affine map not rounded."""
    if dtype not in lane.dtypes(SPEC):
        pytest.skip("no such dtype")
    u, v, z = projected(lane, dtype=dtype)
    gamma, beta = affine(lane)
    gamma = gamma + 2.0**-16  # no number of 16 bits
    leaves = [x.detach().requires_grad_() for x in (u, v, z, gamma, beta)]
    outs = prepare(*leaves, backend=lane.backend)
    exact = F.silu(z.double()) * gamma[0].double() + beta[0].double()
    assert_within_budget(outs[2].detach(), exact, exact.to(dtype), "queries")
    assert all(x.dtype == dtype for x in outs)
    found = gradients(outs, leaves, [torch.ones_like(x) for x in outs])
    assert [x.dtype for x in found] == [dtype] * 3 + [torch.float32] * 2


def test_nothing_is_saved_but_inputs(lane: Any) -> None:
    leaves = [x.detach().requires_grad_() for x in [*projected(lane), *affine(lane)]]
    rope = tables(lane)
    known = {x.untyped_storage().data_ptr() for x in (*leaves, *rope)}
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        prepare(*leaves, rope=rope, backend=lane.backend)
    assert saved
    assert {x.untyped_storage().data_ptr() for x in saved} <= known


def test_one_result_may_be_used_alone(lane: Any) -> None:
    leaves = [x.detach().requires_grad_() for x in [*projected(lane), *affine(lane)]]
    _, _, q, _ = prepare(*leaves, rope=tables(lane), backend=lane.backend)
    u, v, z, gamma, beta = torch.autograd.grad(q.square().sum(), leaves)
    assert not u.any()
    assert not v.any()
    assert not gamma[1].any()
    assert not beta[1].any()
    assert z.any()
    assert gamma[0].all()


def test_attention_of_its_results(lane: Any) -> None:
    """The same as letting gau_attention turn them."""
    u, v, z = projected(lane)
    gamma, beta = affine(lane)
    gate, values, q, k = (x[:, :, None] for x in prepare(u, v, z, gamma, beta, rope=tables(lane), backend=lane.backend))
    plain = [x[:, :, None] for x in prepare(u, v, z, gamma, beta, backend=lane.backend)]
    expected = kx.gau_attention(plain[2], plain[3], plain[1], plain[0], rope=tables(lane), causal=True)
    torch.testing.assert_close(kx.gau_attention(q, k, values, gate, causal=True), expected)
