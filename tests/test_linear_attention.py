"""The mathematics of linear attention: what holds of every backend whatever the numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import kx_kernels as kx
from kx_kernels.ops.linear_attention.reference import linear_attention as reference
from kx_kernels.ops.linear_attention.spec import SPEC
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.poison import same_bits

attend = kx.linear_attention


@pytest.fixture(autouse=True)
def serves(lane: Any) -> None:
    if lane.backend not in SPEC.backends:
        pytest.skip(f"no {lane.backend} kernel")


def inputs(lane: Any, *sizes: int, value_dim: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v [B, T, H, D]."""
    batch, length, heads, dim = sizes
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, heads, d, generator=generator).to(lane.device, dtype)
        for d in (dim, dim, value_dim or dim)
    ]


def assert_agrees(actual: list[Tensor], compute: Callable[..., list[Tensor]], *values: Tensor) -> None:
    """`actual` is, within the budget, what `compute` makes of `values` by the reference."""

    def pairs(values: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        values = [x.detach() for x in values]
        return list(zip(compute(*(x.double() for x in values)), compute(*values), strict=True))

    def neighbours(i: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            yield pairs(x * (1 + 0.01 * torch.rand(x.shape, generator=generator).to(x)) for x in values)[i]

    for i, (x, (exact, eager)) in enumerate(zip(actual, pairs(values), strict=True)):
        assert_within_budget(x, exact, eager, f"result {i}", functools.partial(neighbours, i))


RELATIVES: dict[str, dict[str, Any]] = {
    "elu1": {},
    "sum": {"feature_map": "identity", "normalize": False},
    "decay": {"decay": torch.tensor([0.9, 0.99])},
    "exp": {"feature_map": "exp"},
    "rope": {"rope": kx.rope_tables(200, 16)},
}


@pytest.fixture(params=RELATIVES, name="how")
def how_fixture(request: pytest.FixtureRequest, lane: Any) -> dict[str, Any]:
    options = pytree.tree_map_only(Tensor, lambda x: x.to(lane.device), RELATIVES[request.param])
    return options | {"backend": lane.backend}


def recurrent(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """elu + 1, normalised, one token after the other: outputs, kv and z."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    a, b = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    kv = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    z, outs = kv[..., 0], []
    for t in range(q.shape[1]):
        kv = kv + b[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + b[:, t]
        outs.append((a[:, t, :, None] @ kv)[:, :, 0] / ((a[:, t] * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(outs, 1), kv, z


@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_the_reference_is_the_recurrence(lane: Any, length: int) -> None:
    q, k, v = inputs(lane, 1, length, 2, 16)
    exact = recurrent(q, k, v)[0]
    torch.testing.assert_close(reference(q.double(), k.double(), v.double()), exact, rtol=1e-12, atol=1e-12)
    assert_agrees([attend(q, k, v, backend=lane.backend)], lambda *x: [reference(*x)], q, k, v)


@pytest.mark.parametrize("length", [1000, 4097])
def test_many_chunks(lane: Any, length: int) -> None:
    """Outputs and gradients where sums are long, and the last chunk is not whole."""
    if lane.slow and length > 1000:
        pytest.skip("takes minutes")
    q, k, v = inputs(lane, 1, length, 1, 16)
    grad = torch.randn_like(v)

    def compute(q: Tensor, k: Tensor, v: Tensor, function: Any = reference, **how: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, **how)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    assert_agrees(compute(q, k, v, attend, backend=lane.backend), compute, q, k, v)


@pytest.mark.parametrize("cut", [1, 63, 64, 70])
def test_split_and_carried_state_equal_the_whole(lane: Any, how: dict[str, Any], cut: int) -> None:
    q, k, v = inputs(lane, 1, 130, 2, 16)
    whole, state = attend(q, k, v, **how, return_state=True)
    first, carried = attend(q[:, :cut], k[:, :cut], v[:, :cut], **how, return_state=True)
    later = {"rope_offset": cut} if "rope" in how else {}
    second, end = attend(q[:, cut:], k[:, cut:], v[:, cut:], **how, **later, initial_state=carried, return_state=True)

    def by_reference(*x: Tensor) -> list[Tensor]:
        out, state = attend(*x, **how | {"backend": "reference"}, return_state=True)
        return [out, state.kv]

    assert_agrees([whole, state.kv], by_reference, q, k, v)
    assert_agrees([torch.cat((first, second), 1), end.kv], by_reference, q, k, v)


def test_the_future_changes_nothing(lane: Any, how: dict[str, Any]) -> None:
    q, k, v = inputs(lane, 1, 130, 2, 16)
    before = attend(q, k, v, **how)
    for t in (0, 1, 63, 64, 100, 129):
        changed = [torch.cat((x[:, :t], torch.full_like(x[:, t:], 3.0)), 1) for x in (q, k, v)]
        assert same_bits(attend(*changed, **how)[:, :t], before[:, :t])


def test_no_gradient_to_the_past_from_before_it(lane: Any, how: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(lane, 1, 130, 2, 16))
    weight = torch.zeros(1, 130, 2, 16, device=lane.device)
    weight[:, :70] = 1
    for grad in torch.autograd.grad(attend(q, k, v, **how), (q, k, v), weight):
        assert not grad[:, 70:].any()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_padding_never_leaks(lane: Any, how: dict[str, Any], garbage: float) -> None:
    """Outputs and gradients are those of the tokens alone, wherever the padding lies and whatever its memory holds."""
    q, k, v = inputs(lane, 3, 75, 2, 16)
    keep = torch.ones(3, 75, dtype=torch.bool)
    keep[0, 70:] = keep[1, :5] = keep[2, 30:35] = False
    keep = keep.to(lane.device)
    spoiled = [torch.where(keep[..., None, None], x, garbage).requires_grad_() for x in (q, k, v)]
    clean = [torch.where(keep[..., None, None], x, 0).requires_grad_() for x in (q, k, v)]
    weight = torch.randn(3, 75, 2, 16, generator=torch.Generator().manual_seed(1)).to(lane.device)
    spoiled_weight = torch.where(keep[..., None, None], weight, garbage)
    outs = [attend(*x, **how, key_padding_mask=keep, return_state=True) for x in (spoiled, clean)]
    for a, b in zip(outs[0][1], outs[1][1], strict=True):
        assert (a is None and b is None) or same_bits(a, b)
    assert same_bits(outs[0][0], outs[1][0])
    assert not outs[0][0][~keep].any()
    grads = [
        torch.autograd.grad(out, x, w)
        for (out, _), x, w in zip(outs, (spoiled, clean), (spoiled_weight, weight), strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        assert same_bits(a, b)
        assert not a[~keep].any()


def assert_unchanged(lane: Any, actual: Tensor, expected: Tensor, how: dict[str, Any], *values: Tensor) -> None:
    """The same bits; of the reference within the budget, as torch's products sum in an order that goes by sizes."""
    if lane.backend == "reference":
        assert_agrees([actual], lambda *x: [attend(*x, **how)], *values)
    else:
        assert same_bits(actual, expected)


def test_padding_length_changes_nothing(lane: Any, how: dict[str, Any]) -> None:
    q, k, v = inputs(lane, 1, 70, 2, 16)
    alone = attend(q, k, v, **how)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 60), value=torch.nan) for x in (q, k, v)]
    keep = (torch.arange(130) < 70)[None].to(lane.device)
    assert_unchanged(lane, attend(*padded, **how, key_padding_mask=keep)[:, :70], alone, how, q, k, v)


def test_batch_mates_change_nothing(lane: Any, how: dict[str, Any]) -> None:
    q, k, v = inputs(lane, 3, 70, 2, 16)
    together = attend(q, k, v, **how)
    for b in range(3):
        mine = [x[b : b + 1] for x in (q, k, v)]
        assert_unchanged(lane, together[b : b + 1], attend(*mine, **how), how, *mine)


def test_packed_sequences_are_sequences(lane: Any, how: dict[str, Any]) -> None:
    lengths = (3, 0, 70, 1, 64)
    q, k, v = inputs(lane, 1, sum(lengths), 2, 16)
    ends = torch.tensor((0, *lengths)).cumsum(0)
    out, state = attend(q[0], k[0], v[0], **how, cu_seqlens=ends.int().to(lane.device), return_state=True)
    for n, (begin, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        alone, its_state = attend(q[:, begin:end], k[:, begin:end], v[:, begin:end], **how, return_state=True)
        assert same_bits(out[begin:end], alone[0])
        assert same_bits(state.kv[n], its_state.kv[0])


def test_nan_stays_in_its_packed_sequence(lane: Any, how: dict[str, Any]) -> None:
    """Outputs, gradients and second derivatives of the others are the same bits."""
    ends = torch.tensor([0, 30, 75, 100], dtype=torch.int32, device=lane.device)
    results = []
    for fill in (1.0, torch.nan):
        q, k, v = (x[0] for x in inputs(lane, 1, 100, 2, 16))
        for x in (q, k, v):
            x[30:75] = fill
            x.requires_grad_()
        out = attend(q, k, v, **how, cu_seqlens=ends)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), create_graph=True)
        second = torch.autograd.grad(grads[0], (q, k, v), torch.ones_like(out), materialize_grads=True)
        results.append([torch.cat((x[:30], x[75:])) for x in (out, *grads, *second)])
    for clean, beside in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert same_bits(clean.detach(), beside.detach())


def test_no_decay_is_a_decay_of_one(lane: Any) -> None:
    q, k, v = inputs(lane, 1, 130, 2, 16)
    ones = torch.ones(2, device=lane.device)
    out = attend(q, k, v, decay=ones, backend=lane.backend)
    assert same_bits(out, attend(q, k, v, backend=lane.backend))


def test_grouped_heads_are_repeated_heads(lane: Any, how: dict[str, Any]) -> None:
    q = inputs(lane, 1, 70, 6, 16)[0]
    _, k, v = inputs(lane, 1, 70, 2, 16)
    repeated = how | ({"decay": how["decay"].repeat_interleave(3)} if "decay" in how else {})
    expected = attend(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), **repeated)
    assert same_bits(attend(q, k, v, **how), expected)


def test_a_loss_on_the_state_alone(lane: Any, how: dict[str, Any]) -> None:
    """Its gradients, and that q has none."""

    def compute(backend: str, *values: Tensor) -> list[Tensor]:
        x = [y.detach().requires_grad_() for y in values]
        _, state = attend(*x, **how | {"backend": backend}, return_state=True)
        weighted = [y * torch.arange(y.numel(), device=y.device).view_as(y).cos() for y in state if y is not None]
        return list(torch.autograd.grad(sum(y.sum() for y in weighted), x, materialize_grads=True))

    values = inputs(lane, 1, 70, 2, 16)
    grads = compute(lane.backend, *values)
    assert not grads[0].any()
    assert_agrees(grads, functools.partial(compute, "reference"), *values)


def test_half_stays_finite(lane: Any) -> None:
    """Sums of features pass 65504 after some 750 tokens."""
    if (lane.backend, lane.device) == ("triton", "cpu") or (lane.backend == "cuda" and lane.device == "cpu"):
        pytest.skip("takes minutes")
    q, k, v = inputs(lane, 1, 4097, 1, 64, dtype=torch.float16)
    q, k = q.abs() + 1, k.abs() + 1
    exact = attend(q.double(), k.double(), v.double(), backend="reference")
    out = attend(q, k, v, backend=lane.backend)
    assert out.isfinite().all()
    assert_within_budget(out, exact, exact.half(), "output")


def test_gradients_of_expanded_outputs(lane: Any) -> None:
    """A gradient whose elements share memory, as that of a sum does."""
    q, k, v = (x.requires_grad_() for x in inputs(lane, 1, 70, 2, 16))
    out = attend(q, k, v, backend=lane.backend)
    shared = torch.ones((), device=lane.device).expand_as(out)
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), shared), expected, strict=True):
        assert same_bits(a, b)


def test_saves_inputs_and_denominators_only(lane: Any) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(lane, 2, 70, 2, 16))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attend(q, k, v, backend=lane.backend)
    own = [x for x in saved if x.data_ptr() not in {y.data_ptr() for y in (q, k, v)}]
    assert [(x.shape, x.dtype) for x in own] == [((2, 70, 2), torch.float32)]
    assert len(saved) == 4


def test_function_transforms_see_the_reference(lane: Any) -> None:
    q, k, v = inputs(lane, 2, 5, 2, 8)
    expected = attend(q, k, v, backend="reference")
    mapped = torch.func.vmap(lambda *x: attend(*(y[None] for y in x))[0])(q, k, v)
    torch.testing.assert_close(mapped, expected)


def test_a_feature_map_of_ones_own(lane: Any) -> None:
    wide = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(lane.device)

    class Projection:
        kernel_map = "exp"

        def __call__(self, x: Tensor) -> Tensor:
            return 0.1 * x @ wide.to(x.dtype)

    def compute(backend: str, *values: Tensor) -> list[Tensor]:
        x = [y.detach().requires_grad_() for y in values]
        out = attend(*x, feature_map=Projection(), backend=backend)
        return [out, *torch.autograd.grad(out.sin().sum(), x)]

    values = inputs(lane, 1, 40, 2, 16)
    assert_agrees(compute(lane.backend, *values), functools.partial(compute, "reference"), *values)


STEPS: dict[str, dict[str, Any]] = {
    **RELATIVES,
    "rope_half": {"rope": kx.rope_tables(200, 8), "rope_interleaved": False},
    "relu2_decay": {"feature_map": "relu2", "decay": torch.tensor([0.5, 0.75])},
    "exp_sum": {"feature_map": "exp", "stabilizer": 0.5, "normalize": False, "scale": 0.3},
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_steps_equal_the_whole(lane: Any, name: str, tokens: int) -> None:
    """Outputs and states of 9 tokens, some at a time, for grouped heads and states in slots."""
    how = {n: pytree.tree_map_only(Tensor, lambda x: x.to(lane.device), x) for n, x in STEPS[name].items()}
    q = inputs(lane, 3, 9, 4, 16)[0]
    _, k, v = inputs(lane, 3, 9, 2, 16, value_dim=20)
    slots = torch.tensor([4, 0, 2], device=lane.device, dtype=torch.int32)
    normalize = how.get("normalize", True)
    kv, z = torch.zeros(5, 2, 16, 20, device=lane.device), torch.zeros(5, 2, 16, device=lane.device)
    kv[[1, 3]], z[[1, 3]] = torch.nan, torch.nan  # of sequences that do not take part
    outs = []
    for t in range(0, 9, tokens):
        now = slice(t, t + tokens)
        where = {"rope_offset": t} if "rope" in how else {}
        state = (kv, z if normalize else None)
        step = kx.linear_attention_step
        outs.append(step(q[:, now], k[:, now], v[:, now], state, slots=slots, backend=lane.backend, **how, **where))

    def whole(*x: Tensor) -> list[Tensor]:
        out, state = attend(*x, **how, return_state=True, backend="reference")
        return [out, *(y for y in state if y is not None)]

    used = slots.long()
    assert_agrees([torch.cat(outs, 1), kv[used], *([z[used]] if normalize else [])], whole, q, k, v)
    assert kv[[1, 3]].isnan().all()


def test_steps_in_order_and_with_padding(lane: Any) -> None:
    """Without slots the b-th state is the b-th sequence's; padding leaves it as it was."""
    q, k, v = inputs(lane, 2, 1, 2, 16)
    keep = torch.tensor([[True], [False]], device=lane.device)
    state = kx.LinearAttentionState(*(torch.rand(2, 2, 16, *n, device=lane.device) for n in ((16,), ())))
    before = [x.clone() for x in state]
    out = kx.linear_attention_step(q, k, v, state, key_padding_mask=keep, backend=lane.backend)
    assert not out[1].any()
    for x, y in zip(state, before, strict=True):
        assert same_bits(x[1], y[1])
        assert not torch.equal(x[0], y[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_decode_keeps_its_sums(lane: Any, dtype: torch.dtype) -> None:
    """8192 tokens one at a time equal the prefill: sums held in bfloat16 would have stopped growing at 256."""
    if lane.backend != "cpu" and lane.device == "cpu":
        pytest.skip("takes minutes")
    q, k, v = inputs(lane, 1, 8192, 1, 64, dtype=dtype)
    state = kx.LinearAttentionState(
        torch.zeros(1, 1, 64, 64, device=lane.device), torch.zeros(1, 1, 64, device=lane.device)
    )
    outs = [
        kx.linear_attention_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state, backend=lane.backend)
        for t in range(8192)
    ]

    cpu = "cpu" if lane.device == "cpu" else lane.backend
    exact = attend(q.double(), k.double(), v.double(), return_state=True, backend=cpu)
    eager = recurrent(q, k, v, torch.float32)
    results = zip((torch.cat(outs, 1), *state), (exact[0], *exact[1]), eager, strict=True)
    for i, (actual, right, one_by_one) in enumerate(results):
        assert_within_budget(actual, right, one_by_one.to(actual.dtype), f"result {i}")


def test_a_step_is_explained(lane: Any) -> None:
    q, k, v = inputs(lane, 1, 1, 2, 16)
    _, state = attend(q, k, v, return_state=True)
    assert "serves this call" in kx.explain(kx.linear_attention_step, q, k, v, state)


def test_a_step_compiles(lane: Any) -> None:
    q, k, v = inputs(lane, 2, 1, 2, 16)
    state = [torch.rand(2, 2, 16, *n, device=lane.device) for n in ((16,), ())]
    states = [state, [x.clone() for x in state]]

    def step(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, z: Tensor) -> Tensor:
        return kx.linear_attention_step(q, k, v, (kv, z), backend=lane.backend)

    torch.compiler.reset()
    outs = [step(q, k, v, *states[0]), torch.compile(step, fullgraph=True)(q, k, v, *states[1])]
    assert same_bits(*outs)
    for a, b in zip(*states, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"state": torch.zeros(2)}, TypeError, "argument 'state' is a Tensor; expected a pair"),
        ({"state": (torch.zeros(2, 2, 16, 16).mT, torch.zeros(2, 2, 16))}, ValueError, "'state' .*without gaps"),
        ({"state": (torch.zeros(2, 2, 16, 16, requires_grad=True), None)}, ValueError, "use linear_attention to train"),
        ({"slots": torch.zeros(2)}, TypeError, "'slots' .*dtype int32 or int64"),
        ({"slots": torch.zeros(3, dtype=torch.long)}, ValueError, r"'slots' .*shape \[B\] = \[2\]"),
        ({"slots": torch.tensor([1, 1])}, ValueError, r"'slots' is \[1, 1\]; expected different numbers of the 2"),
        ({"slots": torch.tensor([0, 2])}, ValueError, "'slots' is"),
    ],
)
def test_wrong_steps_are_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    call = {"q": torch.ones(2, 1, 2, 16), "k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16)}
    call |= {"state": (torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16))} | change
    with pytest.raises(error, match=says):
        kx.linear_attention_step(**call)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("how_long", [4097], ids=str)
def test_segments_equal_the_whole(lane: Any, set_threads: Any, packed: bool, how_long: int) -> None:
    """A sequence that many threads share."""
    if lane.backend != "cpu":
        pytest.skip("only the CPU's kernel chooses segments by threads")
    q, k, v = (x.double() for x in inputs(lane, 1, how_long, 1, 8))
    ends = torch.tensor([0, 5, 5, 3000, 4090], dtype=torch.int32)
    where: dict[str, Any] = {"cu_seqlens": ends} if packed else {}
    if packed:
        q, k, v = q[0], k[0], v[0]
    sequences = 4 if packed else 1
    state = (torch.randn(sequences, 1, 8, 8).double(), torch.rand(sequences, 1, 8).double())
    for how in ({}, {"causal": False}, {"decay": torch.tensor([0.999])}):
        results = []
        for count in (1, 2, 7):
            x = [y.detach().requires_grad_() for y in (q, k, v, *state)]
            set_threads(count)
            out = attend(*x[:3], initial_state=tuple(x[3:]), return_state=True, backend="cpu", **how, **where)
            outs = [out[0], *out[1]]
            results.append([*outs, *torch.autograd.grad(outs, x, [y.detach().cos() for y in outs])])
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy_of_long_sequences(lane: Any, dtype: torch.dtype) -> None:
    """Root mean square of the error at 65536 tokens: 1.15 times that of one rounding, and 1e-5 for float32."""
    if lane.backend != "cpu" and lane.device == "cpu":
        pytest.skip("takes minutes")
    q, k, v = inputs(lane, 1, 65536, 1, 64, dtype=dtype)
    out = attend(q, k, v, backend=lane.backend).double()
    exact = attend(q.double(), k.double(), v.double(), backend="cpu" if lane.device == "cpu" else lane.backend)
    error, norm = (out - exact).norm() / exact.norm(), exact.norm()
    floor = (exact.to(dtype).double() - exact).norm() / norm
    assert error <= (1e-5 if dtype == torch.float32 else 1.15 * floor)
