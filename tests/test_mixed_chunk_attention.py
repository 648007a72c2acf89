"""The mathematics of mixed-chunk attention: what holds of every backend whatever the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx
from kx_kernels.ops.mixed_chunk_attention.reference import mixed_chunk_attention as reference
from kx_kernels.ops.mixed_chunk_attention.spec import SPEC
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.poison import same_bits

attend = kx.mixed_chunk_attention


@pytest.fixture(autouse=True)
def serves(lane: Any) -> None:
    if lane.backend not in SPEC.backends:
        pytest.skip(f"no {lane.backend} kernel")


def inputs(lane: Any, length: int = 20, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """quad_q, quad_k, lin_q, lin_k [B, n, 1, 16], v and the gate [B, n, 1, 24], of order one."""
    generator = torch.Generator().manual_seed(0)
    widths = (16, 16, 16, 16, 24, 24)
    return [torch.randn(batch, length, 1, w, generator=generator).to(lane.device, dtype) for w in widths]


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


Formula = Callable[..., Tensor]
"""quad_q, quad_k, lin_q, lin_k [B, n, s], v [B, n, e], bias by distance, mask bool [B, n], C, causal -> [B, n, e]."""


def su(
    qq: Tensor, qk: Tensor, lq: Tensor, lk: Tensor, v: Tensor, bias: Tensor, mask: Tensor, chunk: int, causal: bool
) -> Tensor:
    """By n × n matrices of what sees what."""
    n, row = v.shape[1], torch.arange(v.shape[1], device=v.device)
    apart = row[None, :] - row[:, None]
    same = row[None, :] // chunk == row[:, None] // chunk
    earlier = row[None, :] // chunk < row[:, None] // chunk
    near = same & mask[:, None] & ((apart <= 0) if causal else True)
    far = (earlier if causal else torch.ones_like(same)) & mask[:, None]
    at = apart.clamp(1 - chunk, chunk - 1) + bias.shape[0] // 2
    quad = relu2(qq @ qk.mT / qq.shape[-1] ** 0.5 + bias[at]) / chunk * near
    lin = lq @ lk.mT * far / far.sum(-1, keepdim=True).clamp(min=1)
    assert quad.shape[1:] == (n, n)
    return (quad + lin) @ v


def lucidrains(
    qq: Tensor, qk: Tensor, lq: Tensor, lk: Tensor, v: Tensor, bias: Tensor, mask: Tensor, chunk: int, causal: bool
) -> Tensor:
    """By groups, one after the other, of a sequence with zeros after it."""
    n = v.shape[1]
    short = -n % chunk
    lk = lk * mask[..., None]
    qq, qk, lq, lk, v = (F.pad(x, (0, 0, 0, short)) for x in (qq, qk, lq, lk, v))
    mask = F.pad(mask, (0, short))
    middle = bias.shape[0] // 2
    toeplitz = torch.stack([bias[middle - i : middle - i + chunk] for i in range(chunk)])  # [C, C]
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device)
    visible = visible.tril() if causal else visible
    groups = [slice(i, i + chunk) for i in range(0, n, chunk)]
    states = [lk[:, g].mT @ v[:, g] for g in groups]
    outs = []
    for i, g in enumerate(groups):
        weights = relu2(qq[:, g] @ qk[:, g].mT / chunk + toeplitz) * mask[:, None, g] * visible
        state = torch.zeros_like(states[0])
        for other in states[:i] if causal else states:
            state = state + other / (chunk if causal else n)
        outs.append(weights @ v[:, g] + lq[:, g] @ state)
    return torch.cat(outs, 1)[:, :n]


FORMULAS: dict[str, Formula] = {"su": su, "lucidrains": lucidrains}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("preset", FORMULAS)
def test_presets_are_the_formulas_in_the_wild(lane: Any, preset: str, causal: bool) -> None:
    """Outputs and gradients, where tokens are no padding, against the formula in float64."""
    tensors, chunk = inputs(lane), 8
    vector = torch.randn(2 * chunk - 1, device=lane.device)
    n = tensors[0].shape[1]
    mask = torch.arange(n, device=lane.device) < torch.tensor([[n], [n - 7]], device=lane.device)
    grad = torch.randn_like(tensors[-1]) * mask[..., None, None]

    def theirs(*leaves: Tensor) -> Tensor:
        *rows, gate, vector = leaves
        return gate * FORMULAS[preset](*(x[:, :, 0] for x in rows), vector, mask, chunk, causal)[:, :, None]

    def ours(*leaves: Tensor, **how: Any) -> Tensor:
        how |= {"chunk_size": chunk, "causal": causal, "preset": preset}
        return attend(*leaves[:6], bias=leaves[6], key_padding_mask=mask, **how)

    def results(function: Any, inputs: list[Tensor], dtype: torch.dtype, **how: Any) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = function(*leaves, **how) * mask[..., None, None]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def pair(i: int, off: float) -> tuple[Tensor, Tensor]:
        nearby = [x * (1 + off * torch.rand_like(x)) for x in (*tensors, vector)]
        return results(theirs, nearby, torch.float64)[i], results(theirs, nearby, torch.float32)[i]

    for i, x in enumerate(results(ours, [*tensors, vector], torch.float32, backend=lane.backend)):
        assert x.abs().max() > 0.01
        assert_within_budget(x, *pair(i, 0.0), f"result {i}", lambda i=i: [pair(i, 0.01) for _ in range(4)])


def assert_close_in_float32(a: Tensor, b: Tensor) -> None:
    """Up to the order of sums."""
    torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.float32).eps * b.abs().max().item())


@pytest.mark.parametrize("chunk", [20, 33, 2**31 - 1])
def test_one_causal_chunk_is_gated_attention(lane: Any, chunk: int) -> None:
    quad_q, quad_k, lin_q, lin_k, v, gate = inputs(lane)
    where = {"causal": True, "backend": lane.backend}
    o = attend(quad_q, quad_k, lin_q, lin_k, v, gate, chunk_size=chunk, **where)
    assert_close_in_float32(o, kx.gau_attention(quad_q, quad_k, v, gate, normalizer=chunk, **_native(where)))
    o = attend(quad_q, quad_k, lin_q, lin_k, v, gate, chunk_size=chunk, normalizer="visible", **where)
    assert_close_in_float32(o, kx.gau_attention(quad_q, quad_k, v, gate, **_native(where)))


def _native(where: dict[str, Any]) -> dict[str, Any]:
    """Another operator, by whatever backend it has here."""
    return where | {"backend": None}


def test_one_chunk_that_sees_all_adds_the_linear_sum(lane: Any) -> None:
    quad_q, quad_k, lin_q, lin_k, v, gate = inputs(lane)
    o = attend(quad_q, quad_k, lin_q, lin_k, v, gate, chunk_size=20, backend=lane.backend)
    linear = torch.einsum("bihs,bjhs,bjhe->bihe", lin_q, lin_k, v) / 20
    assert_close_in_float32(o, kx.gau_attention(quad_q, quad_k, v, gate, normalizer=20.0) + gate * linear)


def test_chunks_of_one_token_are_linear_attention(lane: Any) -> None:
    """And a term of each token with itself: by squared relu, not by the product that linear attention has there."""
    quad_q, quad_k, lin_q, lin_k, v, _ = inputs(lane)
    how = {"scale": 1.0, "lin_normalizer": "none", "causal": True, "backend": lane.backend}
    o = attend(quad_q, quad_k, lin_q, lin_k, v, chunk_size=1, **how)
    linear = kx.linear_attention(lin_q, lin_k, v, feature_map="identity", normalize=False)
    own = relu2((quad_q * quad_k).sum(-1, keepdim=True)) - (lin_q * lin_k).sum(-1, keepdim=True)
    assert_close_in_float32(o, linear + own * v)


def test_the_first_chunk_has_none_before_it(lane: Any) -> None:
    quad_q, quad_k, lin_q, lin_k, v, gate = inputs(lane)
    leaves = [x.requires_grad_() for x in (lin_q, lin_k, v)]
    how = {"chunk_size": 8, "causal": True, "backend": lane.backend}
    o = attend(torch.zeros_like(quad_q), quad_k, *leaves, gate, **how)
    assert not o[:, :8].any()
    assert o[:, 8:].abs().amin(-1).all()
    grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert not grads[0][:, :8].any()
    assert not grads[1][:, 16:].any()  # nor the last any after it
    assert not grads[2][:, 16:].any()


HOW: dict[str, dict[str, Any]] = {
    "su": {},
    "causal": {"causal": True},
    "lucidrains": {"causal": True, "preset": "lucidrains"},
    "silu": {"activation": "silu", "normalizer": "valid"},
    "visible": {"causal": True, "normalizer": "visible"},
}


@pytest.fixture(params=HOW, name="how")
def how_fixture(request: pytest.FixtureRequest, lane: Any) -> dict[str, Any]:
    return HOW[request.param] | {"backend": lane.backend, "chunk_size": 8}


def test_the_future_changes_nothing(lane: Any, how: dict[str, Any]) -> None:
    quad_q, quad_k, lin_q, lin_k, v, gate = inputs(lane)
    how = how | {"causal": True}
    before = attend(quad_q, quad_k, lin_q, lin_k, v, gate, **how)
    for x in (quad_k, lin_k, v):
        x[:, 13:] = 9.0
    after = attend(quad_q, quad_k, lin_q, lin_k, v, gate, **how)
    assert same_bits(after[:, :13], before[:, :13])
    assert not same_bits(after[:, 13:], before[:, 13:])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_garbage_in_padding_changes_nothing(lane: Any, how: dict[str, Any], garbage: float) -> None:
    """Nor does it reach a gradient; that of padding is 0."""
    mask = torch.ones(2, 20, dtype=torch.bool, device=lane.device)
    mask[0, 13:], mask[1, ::3] = False, False
    results = []
    for fill in (0.0, garbage):
        leaves = [torch.where(mask[..., None, None], x, fill).requires_grad_() for x in inputs(lane)]
        out = attend(*leaves, key_padding_mask=mask, **how)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)
        assert not a[~mask].any()


@pytest.mark.parametrize("name", ["scale", "bias_scale", "normalizer", "lin_normalizer"])
def test_factors_of_rows_without_keys_never_leak(lane: Any, name: str) -> None:
    """Whatever they are, of padding and of rows whose sum has no key: the same bits, gradients included."""
    keys, queries = torch.ones(2, 2, 20, dtype=torch.bool, device=lane.device)
    keys[0, 13:], queries[0, 13:], keys[1, :11] = False, False, False
    seen = keys.clone()
    if name == "lin_normalizer":  # of the chunks before
        seen[0, :8], seen[1, :16] = False, False
    results = []
    for fill in (1.0, torch.inf, torch.nan):
        leaves = [x.requires_grad_() for x in (*inputs(lane), torch.linspace(-1, 1, 15, device=lane.device))]
        how: dict[str, Any] = {"causal": True, "key_padding_mask": keys, "query_padding_mask": queries}
        how[name] = torch.where(seen, 0.3, fill)
        out = attend(*leaves[:6], bias=leaves[6], chunk_size=8, backend=lane.backend, **how)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for clean, *others in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert all(same_bits(clean, x) for x in others)


def test_lengths_are_a_mask(lane: Any, how: dict[str, Any]) -> None:
    tensors, lengths = inputs(lane), torch.tensor([13, 0], device=lane.device)
    mask = torch.arange(20, device=lane.device) < lengths[:, None]
    o = attend(*tensors, lengths=lengths, **how)
    assert o.any()
    assert same_bits(o, attend(*tensors, key_padding_mask=mask, **how))


@pytest.mark.parametrize("more", [3, 9, 20])
def test_padding_length_changes_nothing(lane: Any, how: dict[str, Any], more: int) -> None:
    tensors = inputs(lane)
    mask = torch.arange(20 + more, device=lane.device).expand(2, -1) < 20
    padded = [F.pad(x, (0, 0, 0, 0, 0, more)) for x in tensors]
    short, long = attend(*tensors, **how), attend(*padded, key_padding_mask=mask, **how)[:, :20]
    assert_close_in_float32(long, short)


def test_batch_mates_change_nothing(lane: Any, how: dict[str, Any]) -> None:
    together = attend(*inputs(lane), **how)
    alone = [attend(*(x[i : i + 1] for x in inputs(lane)), **how) for i in range(2)]
    assert_close_in_float32(together, torch.cat(alone))


def test_packed_sequences_are_sequences(lane: Any, how: dict[str, Any]) -> None:
    tensors = [x[0] for x in inputs(lane, batch=1)]
    ends = [0, 5, 5, 19, 20]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=lane.device)
    packed = attend(*tensors, cu_seqlens=cu_seqlens, **how)
    for first, last in itertools.pairwise(ends):
        alone = attend(*(x[None, first:last] for x in tensors), **how)[0]
        if last > first:
            assert_close_in_float32(packed[first:last], alone)


@pytest.mark.parametrize("activation", ["relu2", "relu"])
def test_nan_of_a_token_is_seen(lane: Any, activation: str) -> None:
    """A query or a key that holds NaN gives NaN in every row whose sum has it, and nowhere else."""
    rows_of = (slice(9, 10), slice(9, 16), slice(9, 10), slice(16, 20))  # of chunks of 8
    for name, rows in enumerate(rows_of):
        leaves = inputs(lane)
        leaves[name][0, 9] = torch.nan
        out = attend(*leaves, activation=activation, causal=True, chunk_size=8, backend=lane.backend)
        holds = torch.zeros(2, 20, dtype=torch.bool, device=lane.device)
        holds[0, rows] = True
        assert torch.equal(out.isnan(), holds[..., None, None].expand_as(out))


@pytest.mark.parametrize("size", [2.0**-5, 2.0**-2, 2.0**4])
def test_half_holds_every_score(lane: Any, size: float) -> None:
    """Of x·2ⁿ squared relu is 4ⁿ times, the linear product 2ⁿ times that of x: the same bits in both."""
    *features, v, gate = ((8 * x).round().half() / 8 for x in inputs(lane))  # which times 2⁻⁵ is exact
    results = []
    for s in (1.0, size):
        leaves = [v.clone().requires_grad_(), gate.clone().requires_grad_()]
        how: dict[str, Any] = {"scale": 1.0, "normalizer": s**4, "lin_normalizer": s**2, "causal": True}
        out = attend(*(x * s for x in features), *leaves, chunk_size=8, backend=lane.backend, **how)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert a.abs().max() > 0.5
        assert same_bits(a, b)


def test_nan_stays_in_its_packed_sequence(lane: Any) -> None:
    """Outputs, gradients and second derivatives of the others are the same bits."""
    ends = torch.tensor([0, 6, 13, 20], dtype=torch.int32, device=lane.device)
    results = []
    for fill in (1.0, torch.nan):
        leaves = [x[0] for x in inputs(lane, batch=1)]
        for x in leaves:
            x[6:13] = fill
            x.requires_grad_()
        out = attend(*leaves, cu_seqlens=ends, chunk_size=3, causal=True, backend=lane.backend)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
        second = torch.autograd.grad(grads[2], leaves, torch.ones_like(grads[2]), materialize_grads=True)
        results.append([torch.cat((x[:6], x[13:])) for x in (out, *grads, *second)])
    for clean, beside in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert same_bits(clean.detach(), beside.detach())


def test_no_gate_is_a_gate_of_ones(lane: Any, how: dict[str, Any]) -> None:
    *tensors, gate = inputs(lane)
    assert same_bits(attend(*tensors, **how), attend(*tensors, torch.ones_like(gate), **how))


def test_a_sequence_of_padding_is_zero(lane: Any, how: dict[str, Any]) -> None:
    leaves = [x.requires_grad_() for x in inputs(lane)]
    mask = torch.ones(2, 20, dtype=torch.bool, device=lane.device)
    mask[1] = False
    out = attend(*leaves, key_padding_mask=mask, **how)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not out[1].any()
    assert not any(g[1].any() or g.isnan().any() for g in grads)


def test_no_sequences_give_zeros(lane: Any) -> None:
    leaves = [x[0].requires_grad_() for x in inputs(lane, batch=1)]
    ends = torch.tensor([0], dtype=torch.int32, device=lane.device)
    out = attend(*leaves, cu_seqlens=ends, backend=lane.backend)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not any(x.any() for x in (out, *grads))


def test_long_sequences_take_little(lane: Any) -> None:
    """The last chunk of 60000 tokens, whose scores alone would be 14 GB."""
    if lane.slow:
        pytest.skip("takes long")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 60000, 1, 8, generator=generator).to(lane.device) for _ in range(3))
    o = attend(q, k, q, k, v, chunk_size=32, causal=True, backend=lane.backend)

    def last_rows(dtype: torch.dtype) -> Tensor:
        q_, k_, v_ = (x[0, :, 0].to(dtype) for x in (q, k, v))
        local = relu2(q_[-32:] @ k_[-32:].T / 8**0.5).tril() / 32 @ v_[-32:]
        return local + q_[-32:] @ (k_[:-32].T @ v_[:-32]) / 59968

    assert_within_budget(o[0, -32:, 0], last_rows(torch.float64), last_rows(torch.float32), "the last rows")


@pytest.mark.parametrize("causal", [False, True])
def test_threads_change_only_the_order_of_sums(lane: Any, set_threads: Any, causal: bool) -> None:
    """One, or several that cut sequences into segments."""
    if lane.backend != "cpu":
        pytest.skip("its threads are not ours")
    leaves = [x.requires_grad_() for x in inputs(lane, length=1000)]
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        out = attend(*leaves, chunk_size=32, causal=causal, backend="cpu")
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_close_in_float32(a, b)


def test_function_transforms_see_the_reference(lane: Any) -> None:
    q, *others = (x.double() for x in inputs(lane))
    grad = torch.func.grad(lambda q: attend(q, *others, causal=True, chunk_size=8).sum())(q)
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(reference(leaf, *others, causal=True, chunk_size=8).sum(), leaf)[0]
    torch.testing.assert_close(grad, expected)
