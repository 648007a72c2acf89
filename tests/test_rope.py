"""Rotary position embedding: its mathematics, its corners, and what torch does with it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kx_kernels as kx
from kx_kernels.ops.rope.reference import rope as reference
from kx_kernels.ops.rope.spec import SPEC
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.poison import LAYOUTS, poisoned_allocation, same_bits

PAIRINGS = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half"])


def tables(length: int, rotary_dim: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return kx.rope_tables(length, rotary_dim, device=device, dtype=dtype)


# The mathematics, on every backend.


def test_hand_worked_example(lane) -> None:
    """A quarter turn takes (1, 2) to (−2, 1); the pairs of the two conventions lie where they say."""
    cos, sin = torch.zeros(1, 2, device=lane.device), torch.ones(1, 2, device=lane.device)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=lane.device).view(1, 1, 1, 4)
    interleaved = kx.rope(x, None, cos, sin, backend=lane.backend)
    half = kx.rope(x, None, cos, sin, interleaved=False, backend=lane.backend)
    back = kx.rope(x, None, cos, sin, inverse=True, backend=lane.backend)
    assert interleaved.flatten().tolist() == [-2, 1, -4, 3]
    assert half.flatten().tolist() == [-3, -4, 1, 2]
    assert back.flatten().tolist() == [2, -1, 4, -3]


@PAIRINGS
def test_norm_is_kept(lane, interleaved: bool) -> None:
    x = torch.randn(1, 50, 2, 32, dtype=torch.float64, device=lane.device)
    cos, sin = tables(50, 32, lane.device, torch.float64)
    y = kx.rope(x, None, cos, sin, interleaved=interleaved, backend=lane.backend)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    assert not torch.equal(y[:, 1:], x[:, 1:])


@PAIRINGS
def test_scores_depend_on_the_distance_only(lane, interleaved: bool) -> None:
    """⟨R_m q, R_n k⟩ = ⟨R_{m+s} q, R_{n+s} k⟩."""
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64, device=lane.device).expand(2, 1, 40, 1, 64)
    cos, sin = tables(90, 64, lane.device, torch.float64)

    def scores(offset: int) -> Tensor:
        a, b = kx.rope(q, k, cos, sin, offset=offset, interleaved=interleaved, backend=lane.backend)
        return a[0, :, 0] @ b[0, :, 0].T  # [T, T]

    torch.testing.assert_close(scores(0), scores(50), rtol=0, atol=1e-12)
    s = scores(7)
    for d in (-3, 0, 5):  # Toeplitz: constant along each diagonal
        assert s.diagonal(d).std() < 1e-12
    assert s[0].std() > 0.1


@PAIRINGS
def test_rotations_compose(lane, interleaved: bool) -> None:
    """R_a R_b = R_{a+b}, R_0 = I, and the inverse undoes."""
    x = torch.randn(1, 1, 3, 16, dtype=torch.float64, device=lane.device)
    cos, sin = tables(100, 16, lane.device, torch.float64)

    def turn(x: Tensor, position: int, inverse: bool = False) -> Tensor:
        how = {"offset": position, "interleaved": interleaved, "inverse": inverse, "backend": lane.backend}
        return kx.rope(x, None, cos, sin, **how)

    torch.testing.assert_close(turn(turn(x, 31), 11), turn(x, 42), rtol=0, atol=1e-13)
    torch.testing.assert_close(turn(turn(x, 42), 42, inverse=True), x, rtol=0, atol=1e-14)
    assert torch.equal(turn(x, 0), x)


def test_interleaved_is_half_permuted(lane) -> None:
    x = torch.randn(2, 9, 3, 32, device=lane.device)
    cos, sin = tables(9, 32, lane.device)
    to_half = torch.arange(32, device=lane.device).view(16, 2).T.flatten()  # even dimensions, then odd ones
    y = kx.rope(x, None, cos, sin, interleaved=True, backend=lane.backend)
    z = kx.rope(x[..., to_half].contiguous(), None, cos, sin, interleaved=False, backend=lane.backend)
    assert same_bits(y[..., to_half].contiguous(), z)


# Positions and padding.


@PAIRINGS
def test_padding_passes_through(lane, interleaved: bool) -> None:
    """Rows with negative positions keep their bits, NaN included, forward and backward; no other row sees them."""
    x = torch.randn(2, 6, 2, 16, device=lane.device)
    clean = x.clone()
    x[0, :3] = torch.nan
    x[1, :1, :, ::2] = torch.inf
    offset = torch.tensor([-3, -1], device=lane.device)
    cos, sin = tables(6, 16, lane.device)
    how = {"offset": offset, "interleaved": interleaved, "backend": lane.backend}
    leaf = x.clone().requires_grad_()
    y = kx.rope(leaf, None, cos, sin, **how)
    (gradient,) = torch.autograd.grad(y, leaf, x)
    expected = kx.rope(clean, None, cos, sin, **how)
    expected_gradient = kx.rope(clean, None, cos, sin, inverse=True, **how)
    for b, padding in ((0, 3), (1, 1)):
        assert same_bits(y[b, :padding], x[b, :padding])
        assert same_bits(gradient[b, :padding], x[b, :padding])
        assert same_bits(y[b, padding:], expected[b, padding:])
        assert same_bits(gradient[b, padding:], expected_gradient[b, padding:])


def test_a_sequence_does_not_see_its_batch_or_padding(lane) -> None:
    """One sequence alone, in a batch, left-padded and packed: the same bits."""
    x = torch.randn(3, 5, 2, 16, device=lane.device)
    cos, sin = tables(16, 16, lane.device)
    alone = kx.rope(x[1:2], None, cos, sin, backend=lane.backend)
    batch = kx.rope(x, None, cos, sin, backend=lane.backend)
    padded = torch.cat((torch.full_like(x[:, :4], torch.nan), x), 1)
    left = kx.rope(padded, None, cos, sin, offset=torch.full((3,), -4, device=lane.device), backend=lane.backend)
    cu_seqlens = torch.tensor([0, 5, 10, 15], dtype=torch.int32, device=lane.device)
    packed = kx.rope(x.flatten(0, 1), None, cos, sin, cu_seqlens=cu_seqlens, backend=lane.backend)
    for other in (batch[1:2], left[1:2, 4:], packed[None, 5:10]):
        assert same_bits(alone, other)


def test_position_forms_agree(lane) -> None:
    x = torch.randn(2, 5, 2, 8, device=lane.device)
    cos, sin = tables(20, 8, lane.device)
    token = torch.arange(4, 9, device=lane.device).expand(2, 5)
    forms = [{"offset": 4}, {"offset": torch.tensor([4, 4], device=lane.device)}, {"positions": token}]
    forms += [
        {"positions": token[:1].int()},
        {"offset": torch.tensor([4, 0, 4], device=lane.device, dtype=torch.int32)[::2]},
    ]
    outs = [kx.rope(x, None, cos, sin, **form, backend=lane.backend) for form in forms]
    assert all(same_bits(outs[0], y) for y in outs[1:])


def test_positions_past_the_table() -> None:
    """On the CPU an error, whatever form the position comes in."""
    cos, sin = tables(4, 8, "cpu")
    x, packed = torch.randn(1, 4, 1, 8), torch.randn(5, 1, 8)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    for call, name in (
        ({"q": x, "offset": torch.tensor([1])}, "offset"),
        ({"q": x, "positions": torch.tensor([[0, 1, 4, 2]])}, "positions"),
        ({"q": packed, "cu_seqlens": cu_seqlens}, "cu_seqlens"),
        ({"q": packed, "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), "offset": 2}, "offset"),
    ):
        with pytest.raises(ValueError, match=rf"'{name}' reaches position 4; .* 0 to 3"):
            kx.rope(k=None, cos=cos, sin=sin, **call)
    kx.rope(packed, None, cos, sin, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))  # the fifth row has no sequence


def test_a_position_past_the_table_that_nobody_checked_is_nan(lane) -> None:
    """As on a GPU, where checking would wait for it: NaN in the rotated dimensions, never memory past the table."""
    from kx_kernels.ops.rope._backends import backends
    from kx_kernels.ops.rope._problem import RopeProblem

    x = torch.randn(1, 4, 1, 12, device=lane.device)
    cos, sin = (LAYOUTS["sliced"](t[:3]) for t in tables(3, 8, lane.device))
    positions = torch.tensor([[2, 3, 2**31 - 1, -1]], device=lane.device, dtype=torch.int32)
    run = next(b.run for b in backends() if b.name == lane.backend)
    for interleaved in (True, False):
        p = RopeProblem((x,), cos, sin, positions, None, None, 0, 2, interleaved, False)
        (y,) = run(p, False)
        expected = reference(x, None, cos, sin, positions=positions, start=2, interleaved=interleaved)
        assert y[0, 1:3, :, 2:10].isnan().all()
        torch.testing.assert_close(y, expected, equal_nan=True)


# Memory.


@PAIRINGS
def test_inplace_equals_fresh(lane, interleaved: bool) -> None:
    """Slices of a packed qkv, rotated where they lie: nothing else changes; gradients are those of the fresh form."""
    cos, sin = tables(12, 8, lane.device)
    qkv = torch.randn(2, 6, 8, 12, device=lane.device)
    before = qkv.clone()
    how = {"interleaved": interleaved, "start": 2, "offset": 3, "backend": lane.backend}
    q, k = qkv[:, :, :4], qkv[:, :, 4:6]
    fresh_q, fresh_k = kx.rope(q, k, cos, sin, **how)
    out_q, out_k = kx.rope(q, k, cos, sin, inplace=True, **how)
    assert out_q.data_ptr() == q.data_ptr()
    assert out_k.data_ptr() == k.data_ptr()
    assert same_bits(q, fresh_q)
    assert same_bits(k, fresh_k)
    assert same_bits(qkv[:, :, 6:], before[:, :, 6:])

    leaf = before.clone().requires_grad_()
    weight = torch.randn_like(fresh_q)
    projected = leaf * 2
    y, z = kx.rope(projected[:, :, :4], projected[:, :, 4:6], cos, sin, inplace=True, **how)
    (inplace_gradient,) = torch.autograd.grad((y * weight).sum() + z.square().sum() + projected.sum(), leaf)
    other = leaf * 2
    y, z = kx.rope(other[:, :, :4], other[:, :, 4:6], cos, sin, **how)
    total = (y * weight).sum() + z.square().sum() + y.sum() + z.sum() + other[:, :, 6:].sum()
    torch.testing.assert_close(inplace_gradient, torch.autograd.grad(total, leaf)[0])


def test_inplace_on_a_saved_value_is_caught(lane) -> None:
    """mark_dirty: autograd refuses a backward pass that needs the overwritten value."""
    cos, sin = tables(6, 8, lane.device)
    x = torch.randn(1, 6, 2, 8, device=lane.device, requires_grad=True)
    y = x.exp()  # saves its result
    z = kx.rope(y, None, cos, sin, inplace=True, backend=lane.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inplace_overlap_is_exact() -> None:
    """Slices of one packed tensor are accepted when they interleave and refused when they share an element."""
    cos, sin = tables(5, 8, "cpu")
    packed = torch.randn(2, 5, 3, 4, 8)
    kx.rope(packed[:, :, 0], packed[:, :, 1], cos, sin, inplace=True)
    kx.rope(packed[:, :, :, :1].squeeze(3), packed[:, :, :, 3:].squeeze(3), cos, sin, inplace=True)
    flat = torch.randn(2, 5, 6, 8)
    kx.rope(flat[:, :, ::2], flat[:, :, 1::2], cos, sin, inplace=True)
    for a, b in ((flat[:, :, :4], flat[:, :, 3:]), (flat[:, :, ::2], flat[:, :, 2:4]), (flat, flat.transpose(0, 0))):
        with pytest.raises(ValueError, match="overlaps q"):
            kx.rope(a, b, cos, sin, inplace=True)


def test_saved_for_backward_is_tables_and_positions_only() -> None:
    saved: list[Tensor] = []
    x = torch.randn(1, 64, 8, 64, requires_grad=True)
    cos, sin = tables(64, 64, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kx.rope(x, None, cos, sin)
    assert {t.data_ptr() for t in saved if t is not None} == {cos.data_ptr(), sin.data_ptr()}


def test_layout_of_the_result(lane) -> None:
    """A transposed view comes back transposed, so that a following transpose is contiguous again."""
    cos, sin = tables(5, 8, lane.device)
    x = torch.randn(2, 3, 5, 8, device=lane.device).transpose(1, 2)
    assert kx.rope(x, None, cos, sin, backend=lane.backend).stride() == x.stride()


def test_expanded_gradient(lane) -> None:
    """sum().backward() hands over a gradient of stride 0."""
    cos, sin = tables(5, 8, lane.device)
    x = torch.randn(2, 5, 3, 8, device=lane.device, requires_grad=True)
    kx.rope(x, None, cos, sin, backend=lane.backend).sum().backward()
    expected = kx.rope(torch.ones_like(x), None, cos, sin, inverse=True, backend=lane.backend)
    assert same_bits(x.grad, expected.detach())


def test_offsets_past_32_bits(lane) -> None:
    """Few elements, but a stride that takes the second token past 2^31 elements."""
    far = 2**31 + 8
    memory = torch.empty(far + 64, dtype=torch.float16, device=lane.device)  # pages are touched at both ends only
    x = memory.as_strided((1, 2, 1, 16), (0, far, 16, 1))
    x.copy_(torch.randn(x.shape))
    cos, sin = tables(2, 16, lane.device)
    expected = kx.rope(x.contiguous(), None, cos, sin, backend=lane.backend)
    assert same_bits(kx.rope(x, None, cos, sin, backend=lane.backend), expected)
    kx.rope(x, None, cos, sin, inplace=True, backend=lane.backend)
    assert same_bits(x.contiguous(), expected)


@pytest.mark.slow
def test_more_elements_than_32_bits_count(lane) -> None:
    """2^31 + elements, most of them from one expanded head."""
    if lane.backend == "reference" or (lane.device == "cpu" and lane.backend != "cpu"):
        pytest.skip("an interpreted, emulated or eager pass over 2^31 elements takes many minutes")
    heads, length = 2**18 + 3, 128
    x = torch.randn(1, length, 1, 64, device=lane.device).bfloat16().expand(1, length, heads, 64)
    cos, sin = tables(length, 64, lane.device)
    y = kx.rope(x, None, cos, sin, backend=lane.backend)
    assert y.numel() > 2**31
    expected = kx.rope(x[:, :, :1], None, cos, sin, backend=lane.backend)
    for head in (0, heads // 2, heads - 1):
        assert same_bits(y[:, :, head : head + 1], expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_stride_and_offset(lane, data: st.DataObject) -> None:
    """hypothesis draws sizes, layouts, starts and positions; the result meets the budget and fills its memory."""
    draw = data.draw
    head_dim = draw(st.integers(1, 40), "head_dim")
    rotary_dim = 2 * draw(st.integers(0, head_dim // 2), "rotary_dim / 2")
    start = draw(st.integers(0, head_dim - rotary_dim), "start")
    batch, length = draw(st.integers(0, 3), "batch"), draw(st.integers(0, 9), "length")
    heads = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)), "heads")
    dtype = draw(st.sampled_from(lane.dtypes(SPEC)), "dtype")
    table_dtype = draw(st.sampled_from(SPEC.dtypes), "table dtype")
    how = {"interleaved": draw(st.booleans(), "interleaved"), "inverse": draw(st.booleans(), "inverse"), "start": start}
    layout = st.sampled_from([*LAYOUTS.values(), lambda x: x, lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), "seed"))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(lane.device, dtype)

    q, k = (draw(layout)(random(batch, length, h, head_dim)) for h in heads)
    cos, sin = (
        draw(st.sampled_from([*LAYOUTS.values()]))(t) for t in tables(length + 9, rotary_dim, lane.device, table_dtype)
    )
    form = draw(st.sampled_from(["none", "int", "sequence", "token"]), "positions")
    if form == "int":
        how["offset"] = draw(st.integers(-5, 9), "offset")
    elif form == "sequence":
        how["offset"] = torch.randint(-5, 10, (batch,), generator=generator).to(lane.device)
    elif form == "token":
        how["positions"] = torch.randint(-5, length + 9, (batch, length), generator=generator).to(lane.device)

    with poisoned_allocation():
        outs = kx.rope(q, k, cos, sin, **how, backend=lane.backend)
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    exact = reference(q.double(), k.double(), cos, sin, **how)
    eager = reference(q.to(eager_dtype), k.to(eager_dtype), cos, sin, **how)
    for name, *values in zip("qk", outs, exact, eager, strict=True):
        assert_within_budget(*values, name)


# Tables.


def test_tables_are_exact_to_one_ulp_far_out() -> None:
    """Against 60-digit arithmetic, at positions up to 2^20."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    rotary_dim = 128
    for position in (1, 4097, 131071, 2**20 - 1, 2**20):
        cos, sin = kx.rope_tables(1, rotary_dim, start=position)
        for i in range(0, rotary_dim // 2, 7):
            phase = position * mpmath.power(10000, -mpmath.mpf(2 * i) / rotary_dim)
            for value, exact in ((cos[0, i], mpmath.cos(phase)), (sin[0, i], mpmath.sin(phase))):
                spacing = torch.finfo(torch.float32).eps * 2.0 ** float(mpmath.floor(mpmath.log(abs(exact), 2)))
                assert abs(float(mpmath.mpf(value.item()) - exact)) <= spacing


def test_tables_options() -> None:
    cos, sin = kx.rope_tables(6, 8, start=-2)
    assert torch.equal(cos[2:], kx.rope_tables(4, 8)[0])
    assert torch.equal(sin[0], -sin[4])
    frequencies = torch.tensor([1.0, 0.5], dtype=torch.float64)
    cos, _ = kx.rope_tables(3, 4, inv_freq=frequencies)
    torch.testing.assert_close(cos[2], torch.tensor([2.0, 1.0]).cos())
    for call, name in (
        ({"num_positions": -1, "rotary_dim": 4}, "num_positions"),
        ({"num_positions": 1, "rotary_dim": 3}, "rotary_dim"),
        ({"num_positions": 1, "rotary_dim": 8, "inv_freq": frequencies}, "inv_freq"),
    ):
        with pytest.raises(ValueError, match=f"argument '{name}'"):
            kx.rope_tables(**call)


# The module.


@PAIRINGS
def test_module_keeps_float32_phases(interleaved: bool) -> None:
    module = kx.nn.RotaryEmbedding(16, interleaved=interleaved, max_positions=8)
    x = torch.randn(1, 5, 2, 16)
    expected = kx.rope(x, None, *kx.rope_tables(5, 16), interleaved=interleaved)
    for cast in (lambda m: m, lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), copy.deepcopy):
        module = cast(module)
        assert same_bits(module(x), expected)
    assert module.state_dict() == {}
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    assert same_bits(torch.load(stored, weights_only=False)(x), expected)


def test_module_grows() -> None:
    module = kx.nn.RotaryEmbedding(16, max_positions=4)
    for length in (3, 9, 100):
        q, k = torch.randn(1, length, 2, 16), torch.randn(1, length, 1, 16)
        for a, b in zip(module(q, k), kx.rope(q, k, *kx.rope_tables(length, 16)), strict=True):
            assert same_bits(a, b)
    assert module.tables(1, torch.device("cpu"))[0].shape[0] >= 100
    module(torch.randn(1, 1, 2, 16), offset=500)
    module(torch.randn(2, 1, 2, 16), offset=torch.tensor([3, 1500]))
    module(torch.randn(1, 2, 2, 16), positions=torch.tensor([[9999, 3]]))
    module(torch.randn(7, 2, 16), cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    assert module.tables(1, torch.device("cpu"))[0].shape[0] >= 10000


def test_module_under_compile_grows_too() -> None:
    torch.compiler.reset()
    module = kx.nn.RotaryEmbedding(16, max_positions=4)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (3, 9, 100):
        q = torch.randn(1, length, 2, 16)
        assert same_bits(compiled(q), kx.rope(q, None, *kx.rope_tables(length, 16)))


# What torch does with it.


def test_one_compilation_for_every_length(lane) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(kx.rope, fullgraph=True, dynamic=True, backend=counter)
    cos, sin = tables(64, 8, lane.device)
    for length in (5, 7, 33, 64):
        q = torch.randn(2, length, 3, 8, device=lane.device, requires_grad=True)
        k = torch.randn(2, length, 2, 8, device=lane.device)
        for a, b in zip(compiled(q, k, cos, sin, backend=lane.backend), kx.rope(q, k, cos, sin), strict=True):
            torch.testing.assert_close(a, b)
    (graph,) = counter.graphs
    assert [n.target for n in graph.graph.nodes if "kx" in str(n.target)] == [torch.ops.kx.rope]


def test_compiled_inplace(lane) -> None:
    torch.compiler.reset()
    cos, sin = tables(6, 8, lane.device)

    def layer(x: Tensor) -> Tensor:
        y = x * 2
        kx.rope(y, None, cos, sin, inplace=True, backend=lane.backend)
        return y

    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 6, 2, 8, device=lane.device)
    assert same_bits(compiled(x), layer(x))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).square().sum().backward()
    layer(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("case", ["interleaved", "half", "positions", "cu_seqlens", "q_alone", "T0"])
def test_opcheck(lane, case: str) -> None:
    call = SPEC.call(case, torch.float32, lane.device)
    xs = [x.requires_grad_() for x in (call["q"], call["k"]) if x is not None]
    rest = (
        call["cos"],
        call["sin"],
        call.get("positions"),
        None,
        call.get("cu_seqlens"),
        0,
        0,
        call["interleaved"],
        False,
    )
    torch.library.opcheck(torch.ops.kx.rope.default, (xs, *rest, lane.backend))
    torch.library.opcheck(torch.ops.kx.rope_.default, ([x.detach() for x in xs], *rest, lane.backend))


def test_autocast_changes_nothing(lane) -> None:
    """rope takes the dtypes it is given: no cast of q and k, none of the tables."""
    cos, sin = tables(6, 8, lane.device)
    for dtype in lane.dtypes(SPEC):
        x = torch.randn(1, 6, 2, 8, device=lane.device, dtype=dtype)
        with torch.autocast(lane.device, dtype=torch.bfloat16):
            y = kx.rope(x, None, cos, sin, backend=lane.backend)
        assert same_bits(y, kx.rope(x, None, cos, sin, backend=lane.backend))


def test_export(lane) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return kx.rope(q, None, cos, sin, backend=lane.backend)

    q = torch.randn(2, 6, 3, 8, device=lane.device)
    cos, sin = tables(32, 8, lane.device)
    length = torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(Layer(), (q, cos, sin), dynamic_shapes={"q": {1: length}, "cos": None, "sin": None})
    longer = torch.randn(2, 9, 3, 8, device=lane.device)
    assert same_bits(program.module()(longer, cos, sin), kx.rope(longer, None, cos, sin, backend=lane.backend))


def test_torch_func_transforms() -> None:
    """grad, jvp and vmap see through the reference; a kernel asked for by name says that it cannot."""
    cos, sin = tables(6, 8, "cpu")
    x = torch.randn(3, 1, 6, 2, 8)

    def loss(x: Tensor) -> Tensor:
        return kx.rope(x, None, cos, sin).pow(3).sum()

    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), torch.autograd.grad(loss(leaf), leaf)[0])
    _, tangent = torch.func.jvp(lambda x: kx.rope(x, None, cos, sin), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, kx.rope(x[1], None, cos, sin))
    mapped = torch.func.vmap(lambda x: kx.rope(x, None, cos, sin))(x)
    torch.testing.assert_close(mapped, torch.stack([kx.rope(y, None, cos, sin) for y in x]))
    with pytest.raises(kx.UnsupportedError, match=r"cpu: torch\.func transforms"):
        torch.func.grad(lambda x: kx.rope(x, None, cos, sin, backend="cpu").sum())(x[0])


def test_under_checkpointing(lane) -> None:
    cos, sin = tables(6, 8, lane.device)
    x = torch.randn(1, 6, 2, 8, device=lane.device, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return kx.rope(x * 2, None, cos, sin, inplace=True, backend=lane.backend).pow(3)

    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, expected)
