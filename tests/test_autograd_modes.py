"""Ways to call an operator that go round autograd's usual road, or round what an address tells."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import kx_kernels as kx
from kx_kernels.testing.poison import same_bits


def inputs(*widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 5, 2, w, generator=generator) for w in widths]


def negated(x: Tensor) -> Tensor:
    """x, whose memory holds -x."""
    lazily = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazily.is_neg()
    return lazily


COS, SIN = torch.linspace(0, 1, 10).reshape(5, 2), torch.linspace(-1, 1, 10).reshape(5, 2)
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "rope": (lambda x, **how: kx.rope(x, None, COS, SIN, **how), (4,)),
    "linear_attention": (kx.linear_attention, (4, 4, 4)),
    "gau_attention": (kx.gau_attention, (4, 4, 6, 6)),
    "gau_inputs": (lambda x, y, **how: kx.gau_inputs(None, x[0], x[0], y[0, 0], **how)[2][None], (4, 4)),
    "mixed_chunk_attention": (kx.mixed_chunk_attention, (4, 4, 4, 4, 6, 6)),
    "nystrom_attention": (lambda q, k, v, **how: kx.nystrom_attention(q, k, v, num_landmarks=2, **how), (6, 6, 4)),
}
functions = pytest.mark.parametrize(("function", "widths"), FUNCTIONS.values(), ids=FUNCTIONS)
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


@functions
@backends
def test_lazily_negated_tensors(backend: str, function: Callable[..., Any], widths: tuple[int, ...]) -> None:
    """Arguments and gradients whose memory has the other sign."""
    values, (grad,) = inputs(*widths), inputs(widths[-1])
    results = []
    for change in (lambda x: x, negated):
        leaves = [change(x.clone()).detach().requires_grad_() for x in values]
        out = function(*leaves, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, change(grad))])
    for a, b in zip(*results, strict=True):
        assert same_bits(a.detach(), b.detach().resolve_neg())


def test_lazily_negated_tables() -> None:
    turn = torch.polar(torch.ones(5, 2), COS).conj()
    x = inputs(4)[0]
    plain = (turn.real.clone(), turn.imag.resolve_neg().clone())
    assert same_bits(kx.rope(x, None, turn.real, turn.imag), kx.rope(x, None, *plain))


def test_nothing_is_written_into_negated_memory() -> None:
    q, k, v = (x[:, :1] for x in inputs(4, 4, 4))
    state = (torch._neg_view(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 4))
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="argument 'state' is a lazily negated view"):
            kx.linear_attention_step(q, k, v, state, backend=backend)
    with pytest.raises(ValueError, match="lazily negated view"):
        kx.rope(negated(inputs(4)[0]), None, COS, SIN, inplace=True)


@functions
@backends
def test_second_derivatives_under_a_dispatch_mode(
    backend: str, function: Callable[..., Any], widths: tuple[int, ...]
) -> None:
    found = []
    for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        leaves = [x.requires_grad_() for x in inputs(*widths)]
        with mode:
            out = function(*leaves, backend=backend)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        loss = out.sum() + sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@functions
def test_forward_mode_sees_the_reference(function: Callable[..., Any], widths: tuple[int, ...]) -> None:
    values = [x.double() for x in inputs(*widths)]
    tangent = torch.ones_like(values[0])
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(values[0], tangent), *values[1:])
        found = forward_ad.unpack_dual(out).tangent
    step = 1e-6
    there, back = (function(values[0] + sign * step * tangent, *values[1:]) for sign in (1, -1))
    torch.testing.assert_close(found, (there - back) / (2 * step), rtol=1e-6, atol=1e-8)


@functions
def test_traced_functions_compute(function: Callable[..., Any], widths: tuple[int, ...]) -> None:
    """In float64: while jit traces, numbers made of shapes are tensors, and would be float32."""
    values = [x.double() for x in inputs(*widths)]
    traced = torch.jit.trace(function, tuple(values))
    other = [x + 1 for x in values]
    assert same_bits(traced(*other), function(*other))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "rope"])
@backends
def test_a_batch_of_gradients(backend: str, name: str) -> None:
    function, widths = FUNCTIONS[name]
    leaves = [x.requires_grad_() for x in inputs(*widths)]
    out = function(*leaves, backend=backend)
    grads = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for a, b in zip(together, torch.autograd.grad(out, leaves, grads[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


@backends
def test_a_step_tells_autograd_of_the_state(backend: str) -> None:
    """A graph that has saved the state raises when it has been written over."""
    q, k, v = inputs(4, 4, 4)
    state = (torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4))
    out = kx.linear_attention(q.requires_grad_(), k, v, initial_state=state, backend=backend)
    with torch.no_grad():
        kx.linear_attention_step(q[:, :1], k[:, :1], v[:, :1], state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@backends
def test_ones_own_features_never_see_padding(backend: str) -> None:
    """The gradient of a function's own parameters is free of what padding holds."""
    q, k, v = inputs(4, 4, 4)
    mask = torch.tensor([[True, True, True, False, False]])
    for x in (q, k, v):
        x[:, 3:] = torch.nan
    layer = torch.nn.Linear(4, 5)
    out = kx.linear_attention(q, k, v, feature_map=lambda x: layer(x).exp(), key_padding_mask=mask, backend=backend)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@backends
def test_features_of_very_negative_elements(backend: str) -> None:
    """elu(x) + 1 is e^x there, not the 0 that the sum rounds to."""
    q, k, v = torch.full((1, 1, 1, 16), -18.0), torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 1, 1)
    assert kx.linear_attention(q, k, v, eps=0.0, backend=backend).item() == pytest.approx(1, rel=1e-6)


@backends
def test_tables_of_padding_do_not_matter(backend: str) -> None:
    q, k, v = inputs(4, 4, 4)
    mask = torch.tensor([[True, True, True, False, False]])
    tables = (COS.clone(), SIN.clone())
    outs = []
    for fill in (0.0, torch.nan):
        for table in tables:
            table[3:] = fill
        outs.append(kx.linear_attention(q, k, v, rope=tables, key_padding_mask=mask, backend=backend))
    assert same_bits(*outs)
