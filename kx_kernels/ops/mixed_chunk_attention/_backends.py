"""The backends of mixed-chunk attention in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._problem import NUM_TENSORS, Gradients, Results, check_values, empty_gradients, empty_results
from ._problem import MixedProblem as Problem
from .presets import ACTIVATIONS


def differentiable_reference(p: Problem) -> Tensor:
    """o by the reference, as torch's own operators, which autograd and torch.func see through."""
    from .reference import mixed_chunk_attention

    packed = p.cu_seqlens is not None

    def rows(x: Tensor | None) -> Any:
        return x[0] if packed and x is not None else x

    def factor(number: float, by_row: Tensor | None) -> float | Tensor:
        return number if by_row is None else rows(number * by_row)

    o = mixed_chunk_attention(
        *(rows(x) for x in (p.quad_q, p.quad_k, p.lin_q, p.lin_k, p.v, p.gate)),
        chunk_size=p.chunk_size,
        causal=p.causal,
        activation=ACTIVATIONS[p.activation],
        scale=factor(p.scale, p.a),
        normalizer=factor(p.out_scale, p.c) if p.c is not None else 1 / p.out_scale,
        lin_normalizer=factor(p.lin_scale, p.d) if p.d is not None else 1 / p.lin_scale,
        bias=p.bias,
        bias_scale=factor(p.bias_scale, p.b),
        key_padding_mask=rows(p.key_mask),
        query_padding_mask=rows(p.query_mask),
        cu_seqlens=p.cu_seqlens,
    )
    return o[None] if packed else o


def leaves_of(p: Problem) -> tuple[Tensor | None, ...]:
    return p.quad_q, p.quad_k, p.lin_q, p.lin_k, p.v, p.gate, p.bias


def with_leaves(p: Problem, leaves: Any) -> Problem:
    """The same call of other leaves."""
    names = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate", "bias")
    return p._replace(**dict(zip(names, leaves, strict=True)))


def reference_gradients(p: Problem, grad_o: Tensor, create_graph: bool) -> Gradients:
    """The gradients of p's leaves for that of o."""
    present = [x for x in leaves_of(p) if x is not None]
    o = differentiable_reference(p)
    found = iter(torch.autograd.grad(o, present, grad_o, create_graph=create_graph, materialize_grads=True))
    return Gradients._make(None if x is None else next(found) for x in leaves_of(p))


def _run_reference(p: Problem) -> Results:
    results = empty_results(p)
    results.o.copy_(differentiable_reference(p))
    if results.ungated is not None:
        results.ungated.zero_()  # its gradient does not ask for it
    return results


def _run_reference_backward(p: Problem, results: Results, grad_o: Tensor) -> Gradients:
    with library.autograd_on():
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves_of(p)]
        found = reference_gradients(with_leaves(p, leaves), grad_o, create_graph=False)
    gradients = empty_gradients(p)  # laid out as every backend's
    for x, g in zip(gradients, found, strict=True):
        if x is not None and g is not None:
            x.copy_(g)
    return gradients


@functools.cache
def backends() -> tuple[dispatch.Backend, ...]:
    from . import _native, _triton

    def absent(p: Problem) -> str:
        return "it has no such kernel yet"

    return (
        dispatch.Backend("cuda", absent, absent),
        dispatch.Backend("triton", _triton.unsupported, _triton.run, _triton.run_backward),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu, _native.run_cpu_backward),
        dispatch.Backend("reference", lambda problem: None, _run_reference, _run_reference_backward),
    )


def run(p: Problem, backend: str) -> Results:
    """Attends with no autograd."""
    check_values(p)
    return dispatch.choose("mixed_chunk_attention", backends(), backend, p).run(library.plain(p))


def run_backward(p: Problem, backend: str, results: Results, grad_o: Tensor) -> Gradients:
    """The gradients of a call whose forward pass gave `results`."""
    chosen = dispatch.choose("mixed_chunk_attention", backends(), backend, p)
    assert chosen.run_backward is not None
    return chosen.run_backward(library.plain(p), results, grad_o.resolve_neg())


def second_gradients(p: Problem, grad_o: Tensor, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients of the gradients of p's leaves for that of o, in all of these: by the reference."""
    with library.autograd_on():
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves_of(p)]
        grad_o = grad_o.detach().requires_grad_()
        first = reference_gradients(with_leaves(p, leaves), grad_o, create_graph=True)
        pairs = [(y, g) for y, g in zip(first, grads, strict=True) if y is not None and g is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [x for x in (*leaves, grad_o) if x is not None],
                [g for _, g in pairs],
                materialize_grads=True,
            )
        )
    return [None if x is None else next(found) for x in (*leaves, grad_o)]


# torch's operators return tensors, never None: what a call does not have is an empty one.
_ARGUMENTS = (
    "Tensor quad_q, Tensor quad_k, Tensor lin_q, Tensor lin_k, Tensor v, Tensor? gate, Tensor? bias, Tensor? a, "
    "Tensor? b, Tensor? c, Tensor? d, Tensor? query_mask, Tensor? key_mask, Tensor? cu_seqlens, SymInt chunk_size, "
    "int activation, float scale, float bias_scale, float out_scale, float lin_scale, bool causal, str backend"
)


def _given(p: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(p.v.new_empty(0) if x is None else x for x in tensors)


def _op(*arguments):
    p = Problem(*arguments[:-1])
    return _given(p, run(p, arguments[-1]))


def _fake(*arguments):
    p = Problem(*arguments[:-1])
    return _given(p, empty_results(p))


def _split(arguments) -> tuple[Problem, str, Results, Tensor]:
    *given, backend, ungated, grad_o = arguments
    return Problem(*given), backend, Results(grad_o, ungated), grad_o


def _op_backward(*arguments):
    p, backend, results, grad_o = _split(arguments)
    return _given(p, run_backward(p, backend, results, grad_o))


def _fake_backward(*arguments):
    p = _split(arguments)[0]
    return _given(p, empty_gradients(p))


def _op_setup(ctx, inputs, output):
    *ctx.options, ctx.backend = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], output[1])


def _op_gradients(ctx, grad_o, grad_ungated):
    *tensors, ungated = ctx.saved_tensors
    p = Problem(*tensors, *ctx.options)
    kept = None if p.gate is None else ungated
    found = torch.ops.kx.mixed_chunk_attention_backward(*p, ctx.backend, kept, grad_o)
    given = (None if x is None else g for x, g in zip(leaves_of(p), found, strict=True))
    return *given, *(None,) * (len(p) + 1 - len(found))


library.register(f"mixed_chunk_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _op, _fake)
library.register(
    f"mixed_chunk_attention_backward({_ARGUMENTS}, Tensor? ungated, Tensor grad_o) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
torch.library.register_autograd("kx::mixed_chunk_attention", _op_gradients, setup_context=_op_setup)


def _backward_setup(ctx, inputs, output):
    ctx.options = inputs[NUM_TENSORS:-3]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], inputs[-1])


def _backward_gradients(ctx, *grads):
    *tensors, grad_o = ctx.saved_tensors
    p = Problem(*tensors, *ctx.options)
    present = (x is not None for x in leaves_of(p))
    *found, grad = second_gradients(
        p, grad_o, tuple(g if here else None for g, here in zip(grads, present, strict=True))
    )
    return *found, *(None,) * (len(p) + 2 - len(found)), grad


torch.library.register_autograd(
    "kx::mixed_chunk_attention_backward", _backward_gradients, setup_context=_backward_setup
)
