"""The backends of gated attention in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._problem import NUM_TENSORS, Gradients, Results, check_values, empty_gradients, empty_results
from ._problem import GauProblem as Problem
from .presets import ACTIVATIONS


def differentiable_reference(p: Problem) -> Tensor:
    """o by the reference, as torch's own operators, which autograd and torch.func see through."""
    from .reference import gau_attention

    packed = p.cu_seqlens is not None

    def rows(x: Tensor | None) -> Any:
        return x[0] if packed and x is not None else x

    def factor(number: float, by_row: Tensor | None) -> float | Tensor:
        return number if by_row is None else rows(number * by_row)

    o = gau_attention(
        rows(p.q),
        rows(p.k),
        rows(p.v),
        rows(p.gate),
        causal=p.causal,
        activation=ACTIVATIONS[p.activation],
        scale=factor(p.scale, p.a),
        normalizer="sum" if p.by_sum else factor(p.out_scale, p.c) if p.c is not None else 1 / p.out_scale,
        bias=p.bias,
        bias_scale=factor(p.bias_scale, p.b),
        key_padding_mask=rows(p.key_mask),
        query_padding_mask=rows(p.query_mask),
        cu_seqlens=p.cu_seqlens,
        cu_seqlens_k=p.cu_seqlens_k,
    )
    return o[None] if packed else o


def leaves_of(p: Problem) -> tuple[Tensor | None, ...]:
    return p.q, p.k, p.v, p.gate, p.bias


def with_leaves(p: Problem, leaves: Any) -> Problem:
    """The same call of other q, k, v, gate and bias."""
    q, k, v, gate, bias = leaves
    return p._replace(q=q, k=k, v=v, gate=gate, bias=bias)


def reference_gradients(p: Problem, grad_o: Tensor, create_graph: bool) -> Gradients:
    """The gradients of p's leaves for that of o."""
    present = [x for x in leaves_of(p) if x is not None]
    found = iter(torch.autograd.grad(differentiable_reference(p), present, grad_o, create_graph=create_graph))
    q, k, v = (next(found) for _ in range(3))
    return Gradients(q, k, v, *(None if x is None else next(found) for x in (p.gate, p.bias)))


def _run_reference(p: Problem) -> Results:
    results = empty_results(p)
    results.o.copy_(differentiable_reference(p))
    for unused in results[1:]:  # its gradient does not ask for them
        if unused is not None:
            unused.zero_()
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

    return (
        dispatch.Backend("cuda", _native.cuda_unsupported, _native.run_cuda, _native.run_cuda_backward),
        dispatch.Backend("triton", _triton.unsupported, _triton.run, _triton.run_backward),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu, _native.run_cpu_backward),
        dispatch.Backend("reference", lambda problem: None, _run_reference, _run_reference_backward),
    )


def run(p: Problem, backend: str) -> Results:
    """Attends with no autograd."""
    check_values(p)
    return dispatch.choose("gau_attention", backends(), backend, p).run(library.plain(p))


def run_backward(p: Problem, backend: str, results: Results, grad_o: Tensor) -> Gradients:
    """The gradients of a call whose forward pass gave `results`."""
    chosen = dispatch.choose("gau_attention", backends(), backend, p)
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
    "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? bias, Tensor? a, Tensor? b, Tensor? c, Tensor? query_mask, "
    "Tensor? key_mask, Tensor? cu_seqlens, Tensor? cu_seqlens_k, int activation, float scale, float bias_scale, "
    "float out_scale, bool by_sum, bool causal, SymInt workspace, str backend"
)


def _given(p: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(p.q.new_empty(0) if x is None else x for x in tensors)


def _op(*arguments):
    p = Problem(*arguments[:-1])
    return _given(p, run(p, arguments[-1]))


def _fake(*arguments):
    p = Problem(*arguments[:-1])
    return _given(p, empty_results(p))


def _split(arguments) -> tuple[Problem, str, Results, Tensor]:
    *given, backend, ungated, sums, grad_o = arguments
    return Problem(*given), backend, Results(grad_o, ungated, sums), grad_o


def _op_backward(*arguments):
    p, backend, results, grad_o = _split(arguments)
    return _given(p, run_backward(p, backend, results, grad_o))


def _fake_backward(*arguments):
    p = _split(arguments)[0]
    return _given(p, empty_gradients(p))


def _op_setup(ctx, inputs, output):
    *ctx.options, ctx.backend = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *output[1:])


def _op_gradients(ctx, grad_o, grad_ungated, grad_sums):
    *tensors, ungated, sums = ctx.saved_tensors
    p = Problem(*tensors, *ctx.options)
    kept = (ungated if p.by_sum or p.gate is not None else None, sums if p.by_sum else None)
    q, k, v, gate, bias = torch.ops.kx.gau_attention_backward(*p, ctx.backend, *kept, grad_o)
    optional = (None if x is None else g for x, g in ((p.gate, gate), (p.bias, bias)))
    return q, k, v, *optional, *(None,) * 15


library.register(f"gau_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _op, _fake)
library.register(
    f"gau_attention_backward({_ARGUMENTS}, Tensor? ungated, Tensor? sums, Tensor grad_o) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
torch.library.register_autograd("kx::gau_attention", _op_gradients, setup_context=_op_setup)


def _backward_setup(ctx, inputs, output):
    ctx.options = inputs[NUM_TENSORS:-4]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], inputs[-1])


def _backward_gradients(ctx, *grads):
    *tensors, grad_o = ctx.saved_tensors
    p = Problem(*tensors, *ctx.options)
    present = (x is not None for x in leaves_of(p))
    found = second_gradients(p, grad_o, tuple(g if here else None for g, here in zip(grads, present, strict=True)))
    return *found[:5], *(None,) * 17, found[5]


torch.library.register_autograd("kx::gau_attention_backward", _backward_gradients, setup_context=_backward_setup)
