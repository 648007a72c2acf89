"""The mathematics of Nyström attention: what holds of every backend whatever the numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx
from kx_kernels.ops.nystrom_attention.presets import CONVENTIONS, lay_out
from kx_kernels.ops.nystrom_attention.reference import nystrom_attention as reference
from kx_kernels.ops.nystrom_attention.spec import SPEC
from kx_kernels.testing.budget import Pair, assert_within_budget
from kx_kernels.testing.poison import same_bits

attend = kx.nystrom_attention


@pytest.fixture(autouse=True)
def serves(lane: Any) -> None:
    if lane.backend not in SPEC.backends:
        pytest.skip(f"no {lane.backend} kernel")


def skip_refused(lane: Any, dtype: torch.dtype) -> None:
    """Of a dtype that the lane refuses, as the contract tests."""
    if dtype not in lane.dtypes(SPEC):
        pytest.skip(SPEC.cannot[lane.backend, lane.device, dtype])


def is_emulated(lane: Any) -> bool:
    """Whether time goes by products of tensor cores."""
    return lane.slow and lane.backend == "cuda"


def inputs(lane: Any, length: int = 50, batch: int = 3, dtype: torch.dtype = torch.float32, dim: int = 16) -> Any:
    """q, k and v [B, n, 2, D] of order one."""
    skip_refused(lane, dtype)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, 2, dim, generator=generator).to(lane.device, dtype) for _ in range(3)]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2)


def assert_close_in_float32(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of sums, which an inverse of condition 10³ amplifies."""
    assert (a - b).abs().max() < 2e-4 * b.abs().max()


def value_and_gradients(function: Any, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


def assert_as_float64(
    lane: Any, leaves: list[Tensor], grad: Tensor | None = None, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of q, k, v and perhaps conv_weight, within the budget; and theirs in float64."""
    weight = torch.randn(*leaves[0].shape[:-1], leaves[2].shape[-1], device=lane.device) if grad is None else grad

    def call(function: Any, leaves: list[Tensor], dtype: torch.dtype, **how: Any) -> list[Tensor]:
        def of(*x: Tensor) -> Tensor:
            return function(*x[:3], conv_weight=x[3] if len(x) > 3 else None, **options, **how)

        wide = torch.promote_types(dtype, torch.float32)
        cast = [x.to(dtype) for x in leaves[:3]] + [x.to(wide) for x in leaves[3:]]
        return value_and_gradients(of, cast, weight.to(dtype))

    def exact_and_eager(leaves: list[Tensor]) -> list[Pair]:
        exact, eager = (call(reference, leaves, dtype) for dtype in (torch.float64, leaves[0].dtype))
        return list(zip(exact, eager, strict=True))

    def neighbours(i: int) -> Iterator[Pair]:
        for _ in range(4):
            yield exact_and_eager([(x * (1 + 0.01 * torch.rand_like(x))) for x in leaves])[i]

    actual, pairs = call(attend, leaves, leaves[0].dtype, backend=lane.backend), exact_and_eager(leaves)
    for i, (x, (exact, eager)) in enumerate(zip(actual, pairs, strict=True)):
        assert x.isfinite().all()
        assert_within_budget(x, exact, eager, f"result {i}", functools.partial(neighbours, i))
    return actual, [exact for exact, _ in pairs]


def test_repeated_tokens_give_softmax_attention(lane: Any) -> None:
    """With every token l times, m = n / l landmarks and the exact inverse nothing is approximate: in float64."""
    for length in (4, 5):
        q, k, v = (4 * x if i == 0 else x for i, x in enumerate(inputs(lane, 12, dtype=torch.float64)))
        repeated = [x.repeat_interleave(length, 1) for x in (q, k, v)]
        o = attend(*repeated, num_landmarks=12, pinv_init="pinv", backend=lane.backend)
        torch.testing.assert_close(o, softmax_attention(*repeated), rtol=1e-8, atol=1e-9)
        o = attend(*repeated, num_landmarks=12, pinv_iterations=30, backend=lane.backend)
        torch.testing.assert_close(o, softmax_attention(*repeated), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("queries", [5, 16, 40])
@pytest.mark.parametrize("keys", [3, 16])
def test_no_more_tokens_than_landmarks_is_exact(lane: Any, queries: int, keys: int) -> None:
    """By keys, and by queries with the two exchanged."""
    q, (k, v) = inputs(lane, queries, dtype=torch.float64)[0], inputs(lane, keys, dtype=torch.float64)[1:]
    o = attend(q, k, v, num_landmarks=16, backend=lane.backend)
    torch.testing.assert_close(o, softmax_attention(q, k, v))
    o = attend(k, q, q, num_landmarks=16, backend=lane.backend)
    torch.testing.assert_close(o, softmax_attention(k, q, q))


@pytest.mark.parametrize("length", [15, 16, 17, 31, 33, 130])
def test_lengths_around_the_number_of_landmarks(lane: Any, length: int) -> None:
    actual, _ = assert_as_float64(lane, inputs(lane, length), num_landmarks=16)
    exact = softmax_attention(*inputs(lane, length))
    assert (length <= 16) == ((actual[0] - exact).abs().max() < 1e-5)


def test_segments_differ_by_at_most_one_token(lane: Any) -> None:
    """One step of no iteration shows the landmarks: against means of slices."""
    q, k, v = inputs(lane, 43, dtype=torch.float64)
    sizes = [5] * 5 + [6] * 3
    means = [torch.stack([x.mean(1) for x in y.split(sizes, 1)], 1) for y in (q, k)]
    f, a, b = (
        (x.transpose(1, 2) @ y.transpose(1, 2).mT / 4).softmax(-1) for x, y in ((q, means[1]), means, (means[0], k))
    )
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    expected = (f @ (z @ (b @ v.transpose(1, 2)))).transpose(1, 2)
    for name in ("valid", "xformers"):
        o = attend(q, k, v, num_landmarks=8, pinv_iterations=0, landmarks=name, backend=lane.backend)
        torch.testing.assert_close(o, expected)


@pytest.mark.parametrize("landmarks", CONVENTIONS)
@pytest.mark.parametrize("length", [0, 1, 6, 7, 20, 24])
def test_no_mask_is_a_mask_of_ones(landmarks: str, length: int) -> None:
    """The same table; but lucidrains' divisors are those of whole segments where there is no mask."""
    x, ones = torch.zeros(2, length, 1, 4), torch.ones(2, length, dtype=torch.bool)
    plain, masked = (lay_out(landmarks, x, mask, None, 7, torch.float32) for mask in (None, ones))
    for name in ("bounds", "valid", "total", *(("divisors",) if landmarks != "lucidrains" else ())):
        assert same_bits(getattr(plain, name), getattr(masked, name))


def test_three_names_of_one_table() -> None:
    """Which is why the contract has cases of one of them."""
    x, mask = torch.zeros(2, 43, 1, 1), torch.arange(43).expand(2, 43) % 3 > 0
    tables = [lay_out(name, x, mask, None, 8, torch.float32) for name in ("mlpen", "huggingface", "xformers")]
    assert all(same_bits(a, b) for other in tables[1:] for a, b in zip(tables[0], other, strict=True))


def assert_to_five_digits(actual: list[Tensor], exact: list[Tensor]) -> None:
    """Results of float32 tensors of order one: 1e-5 of the largest number, whatever eager torch is off by."""
    for a, b in zip(actual, exact, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("iterations", [1, 2, 6, 13, 20])
def test_iterations_are_part_of_the_function(lane: Any, iterations: int) -> None:
    leaves = inputs(lane)
    actual, _ = assert_as_float64(lane, leaves, num_landmarks=8, pinv_iterations=iterations)
    other = attend(*leaves, num_landmarks=8, pinv_iterations=iterations + 1, backend=lane.backend)
    assert iterations > 6 or (actual[0] - other).abs().max() > 1e-3


@pytest.mark.parametrize("m", [1, 16, 30, 32, 33, 48, 64, 100, 128, 256])
def test_numbers_of_landmarks(lane: Any, m: int) -> None:
    iterations = 6 if m <= 64 or not is_emulated(lane) else 1 if m <= 128 else 0
    values = inputs(lane, 2 * m + 3, batch=1)
    assert_to_five_digits(*assert_as_float64(lane, values, num_landmarks=m, pinv_iterations=iterations))


@pytest.mark.parametrize(("m", "dim"), [(64, 128), (128, 128), (256, 64), (256, 256)])
def test_many_landmarks_of_wide_heads(lane: Any, m: int, dim: int) -> None:
    if lane.slow:
        pytest.skip("takes minutes")
    values = inputs(lane, 4 * m + 3, batch=1, dim=dim)
    assert_to_five_digits(*assert_as_float64(lane, values, num_landmarks=m))


def test_saves_landmarks_beside_inputs(lane: Any) -> None:
    """And tables of segments: nothing that grows with the length."""

    def beside_inputs(length: int) -> int:
        """Bytes."""
        leaves = [x.requires_grad_() for x in inputs(lane, length, batch=1)]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            attend(*leaves, num_landmarks=6, backend=lane.backend)
        addresses = {x.data_ptr() for x in leaves}
        return sum(x.untyped_storage().nbytes() for x in saved if x.data_ptr() not in addresses)

    landmarks, tables = 2 * 6 * (4 * 16 + 2) * 4, 2 * 7 * 8 + 2 * 6 * 4 + 4
    assert beside_inputs(30) == beside_inputs(60) == landmarks + tables


def test_tokens_all_alike(lane: Any) -> None:
    """The matrix has rank one, and every column has the largest sum: the means of values."""
    q, k, v = inputs(lane)
    q, k = (x[:, :1].expand_as(x).clone() for x in (q, k))
    grad = torch.randn_like(v)
    for init in ("per_matrix", "original"):
        actual, exact = assert_as_float64(lane, [q, k, v], grad, num_landmarks=8, pinv_init=init)
        torch.testing.assert_close(exact[0], v.double().mean(1, keepdim=True).expand_as(v))
        assert actual[1].abs().max() < 1e-5


def test_kernels_near_the_identity(lane: Any) -> None:
    """Landmarks that see themselves alone: Z is near the identity as well."""
    directions = 8 * torch.eye(16, device=lane.device).repeat_interleave(4, 0)[None, :, None].expand(2, -1, 2, -1)
    leaves = [directions, directions, torch.randn_like(directions)]
    o = attend(*leaves, num_landmarks=16, backend=lane.backend)
    assert (o - softmax_attention(*leaves)).abs().max() < 1e-4
    noisy = [x + 0.1 * torch.randn_like(x) for x in leaves]
    assert_as_float64(lane, noisy, num_landmarks=16)


def test_several_columns_with_the_largest_sum(lane: Any) -> None:
    """Two of three, whose tokens mirror each other: the gradient of the norm is shared, as torch.amax shares it."""
    keys = torch.tensor([[1.0, 0.0, 10.0], [0.0, 1.0, 10.0], [0.0, 0.0, -1000.0]])
    queries = torch.tensor([[1.0, 0.0, 10.0], [0.0, 1.0, 10.0], [0.0, 0.0, 0.001]])
    dtype = max(lane.dtypes(SPEC), key=lambda dtype: dtype.itemsize)
    v = inputs(lane, 3, 1, dtype)[2][:, :, :1]
    leaves = [x.to(lane.device, dtype)[None, :, None] for x in (queries, keys)]
    leaves = [x.repeat_interleave(4, 1) for x in (*leaves, v)]
    for init in ("per_matrix", "original"):
        found, wanted = (
            value_and_gradients(
                lambda *x, f=f, h=how, i=init: f(*x, num_landmarks=3, pinv_iterations=1, pinv_init=i, **h),
                [x.to(at) for x in leaves],
                torch.ones_like(leaves[2], dtype=at) * torch.arange(12, device=lane.device)[:, None, None],
            )
            for f, how, at in ((attend, {"backend": lane.backend}, dtype), (reference, {}, torch.float64))
        )
        for a, b in zip(found, wanted, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(a, b)
            else:
                assert_close_in_float32(a.double(), b)


def test_the_norm_is_differentiated(lane: Any) -> None:
    """Against finite differences, where leaving it out is 1 % or more."""
    q, k, v = (x[:1, :20, :1] for x in inputs(lane, dtype=torch.float64))
    weight, direction = torch.randn_like(v), torch.randn_like(q)
    for init in ("per_matrix", "original"):

        def loss(x: Tensor, init: str = init) -> Tensor:
            how: dict[str, Any] = {"num_landmarks": 4, "pinv_iterations": 2, "pinv_init": init}
            return (attend(x, k, v, backend=lane.backend, **how) * weight).sum()

        x = q.clone().requires_grad_()
        slope = (torch.autograd.grad(loss(x), x)[0] * direction).sum()
        step = 1e-6 * direction
        torch.testing.assert_close(slope, (loss(q + step) - loss(q - step)) / 2e-6, rtol=1e-6, atol=1e-8)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "conv": {"conv_weight": torch.linspace(-1, 1, 10).reshape(2, 5)},
    "pinv": {"pinv_init": "pinv"},
    "ridge": {"ridge": 0.1, "pinv_iterations": 12},
}


@pytest.fixture(params=HOW, name="how")
def how_fixture(request: pytest.FixtureRequest, lane: Any) -> dict[str, Any]:
    how = {name: x.to(lane.device) if isinstance(x, Tensor) else x for name, x in HOW[request.param].items()}
    return how | {"num_landmarks": 6, "backend": lane.backend}


def test_batch_mates_change_nothing(lane: Any, how: dict[str, Any]) -> None:
    """Not one bit on the CPU, whose parts of a sequence are the sequence's alone."""
    leaves = inputs(lane)
    together = attend(*leaves, **how)
    for n in range(3):
        alone = attend(*(x[n : n + 1] for x in leaves), **how)
        assert_close_in_float32(alone, together[n : n + 1])
        assert lane.backend != "cpu" or how.get("pinv_init") == "pinv" or same_bits(alone, together[n : n + 1])


def test_the_original_norm_mixes_samples(lane: Any) -> None:
    """What `per_matrix` is for."""
    q, k, v = inputs(lane)
    q[0] *= 5
    how: dict[str, Any] = {"num_landmarks": 6, "pinv_init": "original", "backend": lane.backend}
    together, alone = attend(q, k, v, **how), attend(q[1:], k[1:], v[1:], **how)
    assert (together[1:] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_changes_nothing(lane: Any, how: dict[str, Any], side: str, garbage: float) -> None:
    """A padded sequence is the sequence: outputs and gradients; whatever its memory holds."""
    leaves = inputs(lane)
    own = slice(13, None) if side == "left" else slice(None, 37)
    mask = torch.zeros(3, 50, dtype=torch.bool, device=lane.device)
    mask[:, own] = True
    padded = [x.masked_fill(~mask[..., None, None], garbage) for x in leaves]
    grad = torch.randn_like(leaves[2])
    found = value_and_gradients(
        lambda *x: attend(*x, key_padding_mask=mask, **how), padded, grad.masked_fill(~mask[..., None, None], garbage)
    )
    wanted = value_and_gradients(lambda *x: attend(*x, **how), [x[:, own] for x in leaves], grad[:, own])
    for a, b in zip(found, wanted, strict=True):
        assert_close_in_float32(a[:, own], b)
        assert lane.backend != "cpu" or how.get("pinv_init") == "pinv" or same_bits(a[:, own].contiguous(), b)
        assert not a[~mask].any()


def test_lengths_are_a_mask(lane: Any, how: dict[str, Any]) -> None:
    leaves = inputs(lane)
    lengths = torch.tensor([50, 0, 21], device=lane.device)
    mask = torch.arange(50, device=lane.device) < lengths[:, None]
    assert same_bits(attend(*leaves, lengths=lengths, **how), attend(*leaves, key_padding_mask=mask, **how))


@pytest.mark.parametrize("how_original", [False, True])
def test_packed_sequences_are_sequences(lane: Any, how: dict[str, Any], how_original: bool) -> None:
    """Lengths of 0, of fewer tokens than landmarks, and more; the original norm is the whole call's. On the CPU in
    every bit."""
    lengths = [17, 0, 4, 6, 23]
    ends = torch.tensor([0, 17, 17, 21, 27, 50], dtype=torch.int32, device=lane.device)
    if how_original and "pinv_init" not in how:
        how = how | {"pinv_init": "original"}
    packed = [x[0] for x in inputs(lane)]
    grad = torch.randn_like(packed[2])
    found = value_and_gradients(lambda *x: attend(*x, cu_seqlens=ends, **how), packed, grad)
    padded = [torch.zeros(5, 23, 2, 16, device=lane.device) for _ in range(4)]
    for x, y in zip(padded, [*packed, grad], strict=True):
        for n, part in enumerate(y.split(lengths)):
            x[n, : lengths[n]] = part
    of_lengths = torch.tensor(lengths, device=lane.device)
    wanted = value_and_gradients(lambda *x: attend(*x, lengths=of_lengths, **how), padded[:3], padded[3])
    for a, b in zip(found, wanted, strict=True):
        joined = torch.cat([x[:n] for x, n in zip(b, lengths, strict=True)])
        assert_close_in_float32(a, joined)
        assert lane.backend != "cpu" or how.get("pinv_init") == "pinv" or same_bits(a, joined)


@pytest.mark.parametrize("landmarks", CONVENTIONS)
def test_sequences_of_padding_are_zero(lane: Any, landmarks: str) -> None:
    leaves = inputs(lane)
    mask = torch.ones(3, 50, dtype=torch.bool, device=lane.device)
    mask[1] = False
    found = value_and_gradients(
        lambda *x: attend(*x, key_padding_mask=mask, num_landmarks=6, landmarks=landmarks, backend=lane.backend),
        leaves,
        torch.ones_like(leaves[2]),
    )
    for x in found:
        assert x.isfinite().all()
        assert not x[1].any()
        assert x[0].any()


def test_masked_keys_of_other_queries(lane: Any) -> None:
    """n_q ≠ n_k: queries are no padding; keys cut out are keys that are not there."""
    q, (_, k, v) = inputs(lane, 30)[0], inputs(lane)
    mask = torch.arange(50, device=lane.device).expand(3, 50) % 3 > 0
    how: dict[str, Any] = {"num_landmarks": 6, "backend": lane.backend}
    o = attend(q, k, v, key_padding_mask=mask, **how)
    assert_close_in_float32(o, attend(q, k[:, mask[0]], v[:, mask[0]], **how))


@pytest.mark.parametrize("taps", [1, 3, 33, 65, 2, 4, 34])
def test_convolution_is_torchs(lane: Any, taps: int) -> None:
    q, k, v = inputs(lane, dtype=torch.float64)
    weight = torch.randn(2, 1, taps, 1, dtype=torch.float64, device=lane.device)
    conv = torch.nn.Conv2d(2, 2, (taps, 1), padding=(taps // 2, 0), bias=False, groups=2, dtype=torch.float64)
    conv.to(lane.device).weight.data.copy_(weight)
    expected = conv(v.transpose(1, 2))[:, :, :50].transpose(1, 2)
    how: dict[str, Any] = {"num_landmarks": 6, "backend": lane.backend}
    o = attend(q, k, v, conv_weight=weight, **how) - attend(q, k, v, **how)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-10)
    grad = torch.randn_like(v)
    leaves = [x.detach().requires_grad_() for x in (v, weight)]
    without = torch.autograd.grad(attend(q, k, leaves[0], **how), leaves[:1], grad)[0]
    found = torch.autograd.grad(attend(q, k, leaves[0], conv_weight=leaves[1], **how), leaves, grad)
    leaf = v.detach().requires_grad_()
    wanted = torch.autograd.grad(conv(leaf.transpose(1, 2))[:, :, :50].transpose(1, 2), [leaf, conv.weight], grad)
    torch.testing.assert_close(found[0] - without, wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_very_long_sequences(lane: Any, dtype: torch.dtype) -> None:
    """64k tokens, or 16k or 4k where that takes long: the landmarks average out, and the matrix is nearly of rank one.
    An odd number of segments straddles the parts that kernels cut a sequence into."""
    skip_refused(lane, dtype)
    length = 1 << (12 if is_emulated(lane) else 14 if lane.slow else 16)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, length, 1, 16, generator=generator).to(lane.device, dtype) for _ in range(3)]
    weight = torch.randn(1, 5, device=lane.device)
    assert_as_float64(lane, [*leaves, weight], num_landmarks=13)


@pytest.mark.parametrize("cut", ["keys", "queries"])
def test_long_sequences_beside_short_ones(lane: Any, cut: str) -> None:
    """n_q ≠ n_k with parts on one side alone, attention exact and not."""
    short, long = inputs(lane, 9, batch=1), inputs(lane, 1000 if is_emulated(lane) else 9000, batch=1)
    leaves = [short[0], *long[1:]] if cut == "keys" else [long[0], *short[1:]]
    for m in (4, 16):
        assert_as_float64(lane, leaves, num_landmarks=m)


def test_factors_are_the_attention(lane: Any) -> None:
    """Their product with values is the output; its rows sum to 1 where the inverse has converged."""
    q, k, v = inputs(lane, dtype=torch.float64)
    mask = torch.arange(50, device=lane.device) < torch.tensor([50, 5, 31], device=lane.device)[:, None]
    how: dict[str, Any] = {"num_landmarks": 8, "key_padding_mask": mask, "return_factors": True}
    o, front, back = attend(q, k, v, backend=lane.backend, **how)
    assert front.shape == (3, 2, 50, 8)
    assert back.shape == (3, 2, 8, 50)
    attention = front @ back
    torch.testing.assert_close((attention @ v.transpose(1, 2)).transpose(1, 2), o)
    torch.testing.assert_close(front[:, :, 3:4] @ back, attention[:, :, 3:4])
    torch.testing.assert_close(front.mean(2, keepdim=True) @ back, attention.mean(2, keepdim=True))
    assert not attention[1, :, :, 5:].any()
    short = softmax_attention(q[1:2, :5], k[1:2, :5], torch.eye(5, device=q.device).double()[None, :, None])
    torch.testing.assert_close(attention[1:2, :, :5, :5], short.transpose(1, 2))


def test_compiled_factors(lane: Any) -> None:
    """As they are without torch.compile; packed, refused by name where a graph may not break."""
    if lane.slow:
        pytest.skip("they are torch's operators")
    q, k, v = inputs(lane, 20)

    def call(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None) -> Any:
        return attend(q, k, v, num_landmarks=6, cu_seqlens=ends, return_factors=True, backend=lane.backend)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for a, b in zip(compiled(q, k, v, None), call(q, k, v, None), strict=True):
        assert same_bits(a, b)
    ends = torch.tensor([0, 3, 20], dtype=torch.int32, device=lane.device)
    with pytest.raises(RuntimeError, match=r"argument 'return_factors' is True; expected False .* cu_seqlens"):
        compiled(q[0], k[0], v[0], ends)


def test_causal_is_refused_with_the_reason(lane: Any) -> None:
    with pytest.raises(ValueError, match=r"causal.*future.*linear_attention"):
        attend(*inputs(lane), causal=True)


def test_ridge_is_added_to_the_diagonal(lane: Any) -> None:
    q, k, v = inputs(lane, 48, dtype=torch.float64)
    means = [x.unflatten(1, (8, 6)).mean(2).transpose(1, 2) for x in (q, k)]
    a = (means[0] @ means[1].mT / 4).softmax(-1) + 0.3 * torch.eye(8, dtype=torch.float64, device=q.device)
    f = (q.transpose(1, 2) @ means[1].mT / 4).softmax(-1)
    b = (means[0] @ k.transpose(1, 2).mT / 4).softmax(-1)
    expected = (f @ torch.linalg.solve(a, b @ v.transpose(1, 2))).transpose(1, 2)
    for init, iterations in (("per_matrix", 30), ("original", 30), ("pinv", 0)):
        how: dict[str, Any] = {"num_landmarks": 8, "ridge": 0.3, "pinv_init": init, "pinv_iterations": iterations}
        torch.testing.assert_close(attend(q, k, v, backend=lane.backend, **how), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inverse_is_wide_for_narrow_tensors(lane: Any, dtype: torch.dtype) -> None:
    """The error is that of rounding the output once: an inverse in 16 bits would be off by 1e-2."""
    skip_refused(lane, dtype)
    leaves = inputs(lane, 512, dtype=dtype)
    o = attend(*leaves, num_landmarks=32, backend=lane.backend)
    exact = reference(*(x.double() for x in leaves), num_landmarks=32)
    assert isinstance(o, Tensor)
    assert isinstance(exact, Tensor)
    assert (o.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()


def test_function_transforms_see_the_reference(lane: Any) -> None:
    q, k, v = (x.double() for x in inputs(lane))

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v, num_landmarks=6).square().sum()

    x = q.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q), torch.autograd.grad(loss(x), x)[0], rtol=1e-9, atol=1e-9)
    with pytest.raises(kx.UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda x: attend(x, k, v, backend="cpu").sum())(q)


def test_sdpa_is_the_limit_of_exact_sequences(lane: Any) -> None:
    """A batch of sequences short and long: each as it is alone."""
    q, k, v = inputs(lane)
    lengths = torch.tensor([3, 50, 8], device=lane.device)
    o = attend(q, k, v, num_landmarks=8, lengths=lengths, backend=lane.backend)
    for n, length in ((0, 3), (2, 8)):
        own = [x[n : n + 1, :length].transpose(1, 2) for x in (q, k, v)]
        exact, eager = (
            F.scaled_dot_product_attention(*(x.to(dtype) for x in own)).transpose(1, 2)
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_budget(o[n : n + 1, :length], exact, eager, f"sequence {n}")
