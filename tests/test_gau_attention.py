"""The mathematics of gated attention: what holds of every backend whatever the numbers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kx_kernels as kx
from kx_kernels.ops.gau_attention import api
from kx_kernels.ops.gau_attention.reference import eager
from kx_kernels.ops.gau_attention.reference import gau_attention as reference
from kx_kernels.ops.gau_attention.spec import SPEC, GauCase, make
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.emulation import emulated_cuda
from kx_kernels.testing.poison import same_bits

attend = kx.gau_attention


@pytest.fixture(autouse=True)
def serves(lane: Any) -> None:
    if lane.backend not in SPEC.backends:
        pytest.skip(f"no {lane.backend} kernel")


def inputs(lane: Any, length: int = 20, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k [B, n, 1, 16], v and the gate [B, n, 1, 24], of order one."""
    generator = torch.Generator().manual_seed(0)
    widths = (16, 16, 24, 24)
    return [torch.randn(batch, length, 1, w, generator=generator).to(lane.device, dtype) for w in widths]


def relu2(x: Tensor) -> Tensor:
    return F.relu(x) ** 2


Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""q, k [B, n, s], v [B, n, e], bias [n, n] by (query, key), mask bool [B, n, n], what sees what -> [B, n, e]. Written
after the sources named in kx_kernels/ops/gau_attention/README.md, each with its own order of scaling and masking."""


def su(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    scores = scores.masked_fill(~mask, -math.inf)
    return relu2(scores) / mask.sum(2, keepdim=True) @ v


def gau_alpha(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    length = mask.sum(2, keepdim=True).clamp(min=16).to(q.dtype)
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias) * length.log() / math.log(512)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    n = q.shape[1]
    weights = relu2((torch.einsum("bid,bjd->bij", q, k) + bias) / n)
    return weights.masked_fill(~mask, 0.0) @ v


def mega(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(2, keepdim=True)
    scores = q / lengths @ k.mT + bias
    return relu2(scores.masked_fill(~mask, 0.0)) @ v


def rtmpose(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return relu2((q @ k.mT + bias) / math.sqrt(q.shape[-1])).masked_fill(~mask, 0.0) @ v


def hstu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.silu(q @ k.mT + bias) / q.shape[1] * mask @ v


FORMULAS: dict[str, Formula] = {
    "su": su,
    "bert4keras": su,
    "gau_alpha": gau_alpha,
    "flash": flash,
    "mega": mega,
    "rtmpose": rtmpose,
    "hstu": hstu,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("preset", FORMULAS)
def test_presets_are_the_formulas_in_the_wild(lane: Any, preset: str, causal: bool) -> None:
    """Outputs and gradients where keys are no padding, against the formula in float64."""
    q, k, v, gate = inputs(lane)
    n = q.shape[1]
    vector = torch.randn(2 * n - 1, device=lane.device)
    mask = torch.arange(n, device=lane.device) < torch.tensor([[n], [n - 7]], device=lane.device)
    sees = mask[:, None] & torch.ones(n, n, dtype=torch.bool, device=lane.device).tril(0 if causal else n)
    grad = torch.randn_like(gate) * mask[..., None, None]

    def theirs(*leaves: Tensor) -> Tensor:
        q, k, v, gate, vector = leaves
        apart = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        o = FORMULAS[preset](q[:, :, 0], k[:, :, 0], v[:, :, 0], vector[(apart + n - 1).to(vector.device)], sees)
        return gate * o[:, :, None]

    def ours(*leaves: Tensor, **how: Any) -> Tensor:
        return attend(*leaves[:4], bias=leaves[4], key_padding_mask=mask, preset=preset, causal=causal, **how)

    def both(function: Any, dtype: torch.dtype, **how: Any) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, gate, vector)]
        out = function(*leaves, **how) * mask[..., None, None]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact, eager = both(theirs, torch.float64), both(theirs, torch.float32)
    where = {} if preset == "gau_alpha" else {"backend": lane.backend}
    for i, (x, e, g) in enumerate(zip(both(ours, torch.float32, **where), exact, eager, strict=True)):
        assert x.abs().max() > 0.01
        assert_within_budget(x, e, g, f"result {i}")


HOW: dict[str, dict[str, Any]] = {
    "su": {},
    "causal": {"causal": True},
    "sum": {"normalizer": "sum", "causal": True},
    "silu": {"activation": "silu", "normalizer": 3.0},
    "sigmoid": {"activation": "sigmoid"},
    "softmax_plus": {"preset": "gau_alpha"},
}


@pytest.fixture(params=HOW, name="how")
def how_fixture(request: pytest.FixtureRequest, lane: Any) -> dict[str, Any]:
    if "preset" in HOW[request.param]:  # softmax: torch's
        return HOW[request.param]
    return HOW[request.param] | {"backend": lane.backend}


def test_the_future_changes_nothing(lane: Any, how: dict[str, Any]) -> None:
    q, k, v, gate = inputs(lane)
    how = how | {"causal": True}
    before = attend(q, k, v, gate, **how)
    for x in (k, v):
        x[:, 12:] = 9.0
    torch.testing.assert_close(attend(q, k, v, gate, **how)[:, :12], before[:, :12], rtol=0, atol=0)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_never_leaks(lane: Any, how: dict[str, Any], garbage: float) -> None:
    """Whatever padding holds: outputs and gradients of the rest are the same bits, those of padding are 0."""
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


@pytest.mark.parametrize("name", ["scale", "bias_scale", "normalizer"])
def test_factors_of_rows_without_keys_never_leak(lane: Any, name: str) -> None:
    """Whatever they are, of padding and of queries before the first key: the same bits, gradients included."""
    keys, queries = torch.ones(2, 2, 20, dtype=torch.bool, device=lane.device)
    keys[0, 13:], queries[0, 13:], keys[1, :8] = False, False, False
    results = []
    for fill in (1.0, torch.inf, torch.nan):
        leaves = [x.requires_grad_() for x in (*inputs(lane), torch.linspace(-1, 1, 39, device=lane.device))]
        how: dict[str, Any] = {"causal": True, "key_padding_mask": keys, "query_padding_mask": queries}
        how[name] = torch.where(keys, 0.3, fill)
        out = attend(*leaves[:4], bias=leaves[4], backend=lane.backend, **how)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for clean, *others in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert all(same_bits(clean, x) for x in others)


def test_lengths_are_a_mask(lane: Any, how: dict[str, Any]) -> None:
    q, k, v, gate = inputs(lane)
    lengths = torch.tensor([13, 0], device=lane.device)
    mask = torch.arange(20, device=lane.device) < lengths[:, None]
    for queries in (20, 7):
        rows = (q[:, :queries], k, v, gate[:, :queries])
        o = attend(*rows, lengths=lengths, **how)
        assert o.any()
        assert same_bits(o, attend(*rows, key_padding_mask=mask, **how))
        assert same_bits(o, attend(*rows, lengths=lengths.clamp(max=13).int(), **how))


def test_padding_length_changes_nothing(lane: Any, how: dict[str, Any]) -> None:
    q, k, v, gate = inputs(lane)
    mask = torch.arange(29, device=lane.device).expand(2, 29) < 20
    padded = [F.pad(x, (0, 0, 0, 0, 0, 9)) for x in (q, k, v, gate)]
    short, long = attend(q, k, v, gate, **how), attend(*padded, key_padding_mask=mask, **how)[:, :20]
    assert_close_in_float32(long, short)


def assert_close_in_float32(a: Tensor, b: Tensor) -> None:
    """Up to the order of sums."""
    torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.float32).eps * b.abs().max().item())


def test_batch_mates_change_nothing(lane: Any, how: dict[str, Any]) -> None:
    together = attend(*inputs(lane), **how)
    alone = [attend(*(x[i : i + 1] for x in inputs(lane)), **how) for i in range(2)]
    assert_close_in_float32(together, torch.cat(alone))


def test_packed_sequences_are_sequences(lane: Any, how: dict[str, Any]) -> None:
    q, k, v, gate = (x[0] for x in inputs(lane, batch=1))
    ends = [0, 5, 5, 19, 20]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=lane.device)
    packed = attend(q, k, v, gate, cu_seqlens=cu_seqlens, **how)
    for first, last in itertools.pairwise(ends):
        alone = attend(*(x[None, first:last] for x in (q, k, v, gate)), **how)[0]
        if last > first:
            assert_close_in_float32(packed[first:last], alone)


def test_nan_stays_in_its_packed_sequence(lane: Any) -> None:
    """Outputs, gradients and second derivatives of the others are the same bits."""
    ends = torch.tensor([0, 6, 13, 20], dtype=torch.int32, device=lane.device)
    results = []
    for fill in (1.0, torch.nan):
        leaves = [x[0] for x in inputs(lane, batch=1)]
        for x in leaves:
            x[6:13] = fill
            x.requires_grad_()
        out = attend(*leaves, cu_seqlens=ends, backend=lane.backend)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
        second = torch.autograd.grad(grads[0], leaves, torch.ones_like(grads[0]), materialize_grads=True)
        results.append([torch.cat((x[:6], x[13:])) for x in (out, *grads, *second)])
    for clean, beside in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert same_bits(clean.detach(), beside.detach())


def test_no_gate_is_a_gate_of_ones(lane: Any, how: dict[str, Any]) -> None:
    q, k, v, gate = inputs(lane)
    assert same_bits(attend(q, k, v, **how), attend(q, k, v, torch.ones_like(gate), **how))


def test_a_decoded_query_is_the_last_row(lane: Any, how: dict[str, Any]) -> None:
    q, k, v, gate = inputs(lane)
    how = how | {"causal": True}
    bias = torch.randn(2 * 20 - 1, device=lane.device)
    whole = attend(q, k, v, gate, bias=bias, **how)
    for t in (0, 7, 19):
        one = attend(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], gate[:, t : t + 1], bias=bias, **how)
        assert_close_in_float32(one[:, 0], whole[:, t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value_dim", [1, 64, 200, 1100], ids=str)
@pytest.mark.parametrize("normalizer", ["visible", "sum"])
def test_threads_that_share_columns_change_no_bit(
    lane: Any, set_threads: Any, dtype: torch.dtype, value_dim: int, normalizer: str
) -> None:
    """Few queries, as in decoding: threads share the columns of their values, which are those of many queries."""
    if lane.backend != "cpu":
        pytest.skip("its threads are not ours")
    generator = torch.Generator().manual_seed(0)
    q, k, gate = (torch.randn(1, 150, 1, d, generator=generator).to(dtype) for d in (32, 32, value_dim))
    v = torch.randn(1, 150, 1, value_dim + 3, generator=generator).to(dtype)[..., :value_dim]  # a strided view
    how: dict[str, Any] = {"causal": True, "normalizer": normalizer, "backend": "cpu"}
    results = [attend(q, k, v, gate, **how)[:, -1:]]
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(attend(q[:, -1:], k, v, gate[:, -1:], **how))
    assert all(same_bits(results[0], result) for result in results[1:])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bias_heads", [(), (4,)], ids=["shared", "of_heads"])
def test_neither_threads_nor_batch_mates_change_a_bit(
    lane: Any, set_threads: Any, causal: bool, bias_heads: tuple[int, ...]
) -> None:
    """Blocks of keys that threads have at once add to the same gradients of queries and bias."""
    if lane.backend != "cpu":
        pytest.skip("its threads are not ours")
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 4, 32), (400, 2, 32), (400, 2, 40), (300, 4, 40)]
    q, k, v, gate = (torch.randn(3, *shape, generator=generator) for shape in shapes)
    bias = torch.randn(*bias_heads, 2 * 400 - 1, generator=generator)
    mask = torch.rand(3, 400, generator=generator) < 0.8

    def compute(samples: slice) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (*(x[samples] for x in (q, k, v, gate)), bias)]
        how: dict[str, Any] = {"causal": causal, "key_padding_mask": mask[samples], "backend": "cpu"}
        out = attend(*leaves[:4], bias=leaves[4], **how)
        return [out, *torch.autograd.grad(out, leaves, out.detach().cos())]

    set_threads(1)
    expected = compute(slice(None))
    for threads in (2, 3, 7):
        set_threads(threads)
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(compute(slice(None)), expected, strict=True))
        *alone, _ = compute(slice(1, 2))  # the bias has a gradient of the whole batch
        assert all(same_bits(a.detach(), b[1:2].detach()) for a, b in zip(alone, expected, strict=False))


def test_rows_that_see_nothing_are_zero(lane: Any, how: dict[str, Any]) -> None:
    """Queries before the first key, and a sequence of padding alone."""
    q, k, v, gate = inputs(lane)
    leaves = [x.requires_grad_() for x in (q, k[:, :8].clone(), v[:, :8].clone(), gate)]
    mask = torch.ones(2, 8, dtype=torch.bool, device=lane.device)
    mask[1] = False
    out = attend(*leaves, key_padding_mask=mask, **(how | {"causal": True}))
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not out[:, :12].any()
    assert not out[1].any()
    assert not any(g.isnan().any() for g in grads)
    assert not any(g[1].any() for g in grads)


@pytest.mark.parametrize("activation", ["relu2", "relu"])
def test_nan_of_a_token_is_seen(lane: Any, activation: str) -> None:
    """A query or a key that holds NaN gives NaN in every row that sees it, and nowhere else."""
    for name in (0, 1):
        leaves = inputs(lane)
        leaves[name][0, 13] = torch.nan
        out = attend(*leaves, activation=activation, causal=True, backend=lane.backend)
        rows = torch.zeros(2, 20, dtype=torch.bool, device=lane.device)
        rows[0, 13 : 14 if name == 0 else 20] = True
        assert torch.equal(out.isnan(), rows[..., None, None].expand_as(out))


@pytest.mark.parametrize("size", [2.0**-10, 2.0**-4, 2.0**8])
def test_half_holds_every_score(lane: Any, size: float) -> None:
    """Squared relu of x·2ⁿ is that of x times 4ⁿ: the same bits, though float16 holds neither 2⁻⁴⁰ nor 2⁴⁰."""
    q, k, v, gate = ((8 * x).round().half() / 8 for x in inputs(lane))  # which times 2⁻¹⁰ is exact
    grads = []
    for s in (1.0, size):
        leaves = [x.requires_grad_() for x in (q * s, k * s, v.clone(), gate.clone())]
        out = attend(*leaves, causal=True, normalizer=s**4, backend=lane.backend)
        grads.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))[2:]])
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        assert a.abs().max() > 0.5
        assert same_bits(a, b)


@pytest.mark.parametrize("size", [2.0**-10, 2.0**-4, 2.0**8])
def test_half_holds_gradients_of_every_score(lane: Any, size: float) -> None:
    """Those of q and k are as much larger as these are smaller, but for what float16 drops below 2⁻²⁵."""
    q, k, v, gate = ((8 * x).round().half() / 8 for x in inputs(lane))
    found = []
    for s in (1.0, size):
        leaves = [x.requires_grad_() for x in (q * s, k * s)]
        out = attend(*leaves, v, gate, causal=True, normalizer=s**4, backend=lane.backend)
        grads = torch.autograd.grad(out, leaves, torch.full_like(out, 2.0**-6))  # which float16 holds s times smaller
        found.append([grad.double() * s for grad in grads])
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0.05
        assert (a - b).abs().max() <= 2.0**-25 * (1 + size)


def test_second_derivatives_of_relu2(lane: Any) -> None:
    """Where scores are away from 0, at which they jump."""
    if lane.device != "cpu" or lane.slow:
        pytest.skip("they are those of the reference")
    made = torch.Generator().manual_seed(0)
    leaves = [1 + torch.rand(1, 4, 1, d, generator=made, dtype=torch.float64) for d in (3, 3, 2, 2)]
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None, None]
    q, k, v, gate = (x.requires_grad_() for x in (leaves[0] * signs, *leaves[1:]))
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, causal=True, backend=lane.backend), (q, k, v, gate))


@pytest.mark.parametrize("how_normal", ["visible", "sum"])
def test_saves_rows_beside_inputs(lane: Any, how_normal: str) -> None:
    """For the backward pass: what was before the gate, a factor or a sum by row, and nothing of pairs."""

    def beside_inputs(length: int) -> int:
        """Bytes."""
        leaves = [x.requires_grad_() for x in inputs(lane, length, batch=1)]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            attend(*leaves, causal=True, normalizer=how_normal, backend=lane.backend)
        addresses = {x.data_ptr() for x in leaves}
        return sum(x.untyped_storage().nbytes() for x in saved if x.data_ptr() not in addresses)

    row = 4 * (24 + 1)
    assert [beside_inputs(n) for n in (30, 60)] == [30 * row, 60 * row]


@pytest.mark.parametrize("how_normal", ["visible", "sum"])
def test_without_gradients_nothing_is_kept_for_them(lane: Any, how_normal: str) -> None:
    """The same bits, and on a CPU, whose allocations torch counts, one tensor as large as the output."""
    leaves = inputs(lane)
    how: dict[str, Any] = {"causal": True, "normalizer": how_normal, "backend": lane.backend}

    def as_large() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            attend(*leaves, **how)
        return sum(event.self_cpu_memory_usage >= leaves[3].nbytes for event in found.events())

    alone, made = attend(*leaves, **how), as_large()
    leaves = [x.requires_grad_() for x in leaves]
    assert same_bits(alone, attend(*leaves, **how).detach())
    assert lane.backend != "cpu" or (made, as_large()) == (1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "key_dim", "value_dim"), [(512, 128, 768), (513, 64, 1537), (640, 128, 64), (641, 32, 512), (1000, 128, 1536)]
)
def test_many_tiles(lane: Any, n: int, key_dim: int, value_dim: int, causal: bool) -> None:
    if lane.backend == "triton" and lane.slow:
        pytest.skip("takes minutes")
    if lane.slow:
        key_dim, value_dim = 32, 72  # or it takes minutes
    dtype = torch.bfloat16 if lane.slow else torch.float32
    made = torch.Generator().manual_seed(n)
    sizes = (key_dim, key_dim, value_dim, value_dim)
    leaves = [torch.randn(1, n, 1, d, generator=made).to(lane.device, dtype).requires_grad_() for d in sizes]
    weight = torch.randn(1, n, 1, value_dim, generator=made).to(lane.device)

    def results(function: Any, to: torch.dtype, **how: Any) -> list[Tensor]:
        own = [x.detach().to(to).requires_grad_() for x in leaves]
        out = function(*own, causal=causal, **how)
        return [out.detach(), *torch.autograd.grad(out, own, weight.to(to))]

    ours = results(attend, dtype, backend=lane.backend)
    plain = eager if lane.backend in ("cuda", "triton") else reference
    for i, found in enumerate(zip(ours, results(reference, torch.float64), results(plain, dtype), strict=True)):
        assert_within_budget(*found, f"result {i}")


@pytest.mark.parametrize("key_dim", [16, 130])  # 130 dimensions are too many on chip
def test_less_workspace_is_more_passes(lane: Any, key_dim: int) -> None:
    """The same forward; backward the same but for the order of sums."""
    made = torch.Generator().manual_seed(0)
    widths = (key_dim, key_dim, 24, 24)
    leaves = [torch.randn(2, 150, 2, d, generator=made).to(lane.device).requires_grad_() for d in widths]
    bias = torch.randn(299, generator=made).to(lane.device).requires_grad_()
    results = []
    for workspace in (0, 1 << 26):
        out = attend(*leaves, bias=bias, causal=True, workspace=workspace, backend=lane.backend)
        results.append([out, *torch.autograd.grad(out, (*leaves, bias), torch.ones_like(out))])
    assert same_bits(results[0][0].detach(), results[1][0].detach())
    for few, many in zip(*results, strict=True):
        assert_close_in_float32(few, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_packed_with_less_workspace(lane: Any, biased: bool, dtype: torch.dtype) -> None:
    """Gradients of packed sequences where a panel of scores has all keys, and where it has not."""
    if dtype not in lane.dtypes(SPEC) or (lane.backend == "triton" and lane.slow):
        pytest.skip("refused, or takes minutes")
    made = torch.Generator().manual_seed(0)
    ends = torch.tensor([2, 7, 7, 142, 150], dtype=torch.int32, device=lane.device)
    widths = (16, 16, 140, 140)
    leaves = [torch.randn(152, 2, d, generator=made).to(lane.device, dtype).requires_grad_() for d in widths]
    if biased:
        leaves.append(torch.randn(2 * 135 - 1, generator=made).to(lane.device).requires_grad_())
    weight = torch.randn(152, 2, 140, generator=made).to(lane.device)

    def results(function: Any, to: torch.dtype, **how: Any) -> list[Tensor]:
        own = [x.detach().to(torch.promote_types(to, x.dtype)).requires_grad_() for x in leaves]
        bias = {"bias": own[4]} if biased else {}
        out = function(*own[:4], **bias, cu_seqlens=ends, causal=True, **how)
        return [out.detach(), *torch.autograd.grad(out, own, weight.to(out.dtype))]

    exact = results(reference, torch.float64)
    plain = results(eager if lane.backend in ("cuda", "triton") else reference, dtype)
    emulated = lane.backend == "cuda" and lane.slow and dtype == torch.bfloat16
    machines = [lane.ready, *([functools.partial(emulated_cuda, wgmma=False)] if emulated else [])]
    for machine, workspace in itertools.product(machines, (0, 1 << 26)):
        with machine():
            ours = results(attend, dtype, workspace=workspace, backend=lane.backend)
        for i, found in enumerate(zip(ours, exact, plain, strict=True)):
            assert_within_budget(*found, f"result {i}")


@pytest.mark.parametrize("workspace", [0, 1 << 26])
def test_packed_calls_wait_for_nothing(lane: Any, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads no data, which a GPU would have to finish first."""
    if lane.backend not in ("cuda", "triton"):
        pytest.skip("on a CPU data is there")
    unchecked = dataclasses.replace(api.OPERATOR, check=lambda p: None)  # which is of calls on a CPU alone
    monkeypatch.setattr(api, "OPERATOR", unchecked)
    for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the host read data"))
    ends = torch.tensor([0, 6, 140], dtype=torch.int32, device=lane.device)
    leaves = [x[0].requires_grad_() for x in inputs(lane, length=140, batch=1)]
    out = attend(*leaves, cu_seqlens=ends, workspace=workspace, backend=lane.backend)
    torch.autograd.grad(out, leaves, out.detach())


def test_relu2_is_flat_at_zero(lane: Any) -> None:
    q, k, v, gate = inputs(lane)
    leaves = [x.requires_grad_() for x in (torch.zeros_like(q), k, v, gate)]
    out = attend(*leaves, backend=lane.backend)
    assert not out.any()
    assert not torch.autograd.grad(out, leaves[:2], torch.ones_like(out))[0].any()


class LargestResult(TorchDispatchMode):
    """The most elements that any of torch's operators gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        self.elements = max([self.elements, *(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_softmax_of_packed_sequences() -> None:
    """As the definition has it, with tokens of none and other keys than queries; and no memory by their number."""
    q, k, v, gate = (torch.randn(40, 2, d, dtype=torch.float64) for d in (4, 4, 6, 6))
    ends, of_keys = (torch.tensor(x, dtype=torch.int32) for x in ([2, 2, 9, 30, 38], [0, 5, 5, 31, 40]))
    for causal in (False, True):
        how: dict[str, Any] = {"preset": "gau_alpha", "cu_seqlens": ends, "cu_seqlens_k": of_keys, "causal": causal}
        torch.testing.assert_close(attend(q, k, v, gate, **how), reference(q, k, v, gate, **how))
    with LargestResult() as largest:
        attend(q, k, v, gate, preset="gau_alpha", cu_seqlens=torch.arange(41, dtype=torch.int32))
    assert largest.elements <= 2 * 40 * 40  # scores of two heads


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_needs_no_mask_without_padding(causal: bool) -> None:
    q, k, v, gate = (torch.randn(2, 40, 1, 8) for _ in range(4))
    with LargestResult() as largest:
        out = attend(q, k, v, gate, preset="gau_alpha", causal=causal)
    assert largest.elements <= v.numel()
    mask = torch.ones(2, 40, dtype=torch.bool)
    torch.testing.assert_close(out, attend(q, k, v, gate, preset="gau_alpha", causal=causal, key_padding_mask=mask))


def test_softmax_is_torchs(lane: Any) -> None:
    with pytest.raises(kx.UnsupportedError, match="served by torch's scaled_dot_product_attention"):
        attend(*inputs(lane), activation="softmax", backend=lane.backend)
    with pytest.raises(ValueError, match="argument 'normalizer' is 'length'; expected None, as softmax"):
        attend(*inputs(lane), activation="softmax", normalizer="length")
    assert "torch      serves this call" in kx.explain(attend, *inputs(lane), preset="gau_alpha")


def test_function_transforms_see_the_reference(lane: Any) -> None:
    q, k, v, gate = (x.double() for x in inputs(lane))
    grad = torch.func.grad(lambda q: kx.gau_attention(q, k, v, gate, causal=True).sum())(q)
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(reference(leaf, k, v, gate, causal=True).sum(), leaf)[0]
    torch.testing.assert_close(grad, expected)


def test_gradients_of_rows_of_no_sequence_are_left_out(lane: Any) -> None:
    """Whatever comes in for them."""
    case = GauCase(batch=1, lengths=(5, 9), surplus=3, gate=True)
    call = make(case, torch.float32, torch.device(lane.device), 0)
    ends = call["cu_seqlens"]
    inside = torch.arange(call["q"].shape[0], device=lane.device)
    inside = (inside >= ends[0]) & (inside < ends[-1])
    inputs = {name: call[name].detach().requires_grad_() for name in ("q", "k", "v", "gate")}
    o = kx.gau_attention(**{**call, **inputs}, backend=lane.backend)
    grad = torch.where(inside[:, None, None], torch.ones_like(o), torch.nan)
    assert not inside.all()
    for name, x in zip(inputs, torch.autograd.grad(o, list(inputs.values()), grad), strict=True):
        assert x.isfinite().all(), name
        assert not x[~inside].any(), name
        assert x[inside].any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_of_rows_divide_numbers_however_small(lane: Any, dtype: torch.dtype) -> None:
    """Of sigmoid at −88 they are below the least normal number of float32."""
    if lane.backend not in ("cpu", "reference"):
        pytest.skip("GPUs may take such numbers for 0")
    sizes = ((8, -11.0), (8, 1.0), (8, 2.0))
    q, k, v = (torch.full((1, 4, 1, dim), x, dtype=dtype, device=lane.device) for dim, x in sizes)
    how = {"activation": "sigmoid", "scale": 1.0, "normalizer": "sum"}
    out = kx.gau_attention(q, k, v, **how, backend=lane.backend)
    assert torch.equal(out.bfloat16(), v.bfloat16())
