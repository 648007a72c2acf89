"""The backends of Nyström attention in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._problem import NUM_TENSORS, Gradients, Results, check_values, empty_gradients, empty_results
from ._problem import NystromProblem as Problem


def factors(p: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
    """F [B, H, n_q, m], Z [B, H, m, m] and B [B, H, m, n_k] by torch's own operators; packed, of each sequence."""
    from .reference import factors

    tables = (p.query_mask, p.key_mask, p.bounds_q, p.divisors_q, p.bounds_k, p.divisors_k, p.road, p.cu_seqlens)
    return list(factors(p.q, p.k, *tables, *p.options))


def read_out_factors(p: Problem) -> tuple[Tensor, Tensor]:
    """F·Z [B, H, n_q, m] and B [B, H, m, n_k], of q's dtype."""
    from .reference import Factors, whole

    if p.device.type == "meta":  # sequences are cut where data says
        m = p.divisors_q.shape[1]
        (batch, n_q, heads, _), n_k = p.q.shape, p.k.shape[1]
        return p.q.new_empty(batch, heads, n_q, m), p.q.new_empty(batch, heads, m, n_k)
    return whole([Factors(*x) for x in factors(p)], p.q, p.k, p.cu_seqlens)


def differentiable_reference(p: Problem) -> Tensor:
    """o by the reference, as torch's own operators, which autograd and torch.func see through."""
    from .reference import Factors, read_out

    found = [Factors(*x) for x in factors(p)]
    return read_out(found, p.v, p.conv_weight, p.query_mask, p.key_mask, p.cu_seqlens)


def leaves_of(p: Problem) -> tuple[Tensor | None, ...]:
    return p.q, p.k, p.v, p.conv_weight


def with_leaves(p: Problem, leaves: Any) -> Problem:
    """The same call of other q, k, v and conv_weight."""
    q, k, v, conv_weight = leaves
    return p._replace(q=q, k=k, v=v, conv_weight=conv_weight)


def reference_gradients(p: Problem, grad_o: Tensor, create_graph: bool) -> Gradients:
    """The gradients of p's leaves for that of o."""
    present = [x for x in leaves_of(p) if x is not None]
    o = differentiable_reference(p)
    found = iter(torch.autograd.grad(o, present, grad_o, create_graph=create_graph, materialize_grads=True))
    q, k, v = (next(found) for _ in range(3))
    return Gradients(q, k, v, next(found, None))


def _run_reference(p: Problem) -> Results:
    results = empty_results(p)
    if p.device.type != "meta":  # as above
        results.o.copy_(differentiable_reference(p))
        for unused in results[1:]:  # its gradient does not ask for them
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
    return dispatch.choose("nystrom_attention", backends(), backend, p).run(library.plain(p))


def run_backward(p: Problem, backend: str, results: Results, grad_o: Tensor) -> Gradients:
    """The gradients of a call whose forward pass gave `results`."""
    chosen = dispatch.choose("nystrom_attention", backends(), backend, p)
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
    "Tensor q, Tensor k, Tensor v, Tensor? conv_weight, Tensor? query_mask, Tensor? key_mask, Tensor? cu_seqlens, "
    "Tensor bounds_q, Tensor divisors_q, Tensor bounds_k, Tensor divisors_k, Tensor road, int init, int iterations, "
    "float scale, float ridge, str backend"
)
_NUM_ARGUMENTS, _NUM_KEPT = NUM_TENSORS + 5, 5


def _op(*arguments):
    return tuple(run(Problem(*arguments[:-1]), arguments[-1]))


def _fake(*arguments):
    return tuple(empty_results(Problem(*arguments[:-1])))


def _given(p: Problem, gradients: Gradients) -> tuple[Tensor, ...]:
    return tuple(p.q.new_empty(0) if x is None else x for x in gradients)


def _op_backward(*arguments):
    *given, backend = arguments[:_NUM_ARGUMENTS]
    *kept, grad_o = arguments[_NUM_ARGUMENTS:]
    p = Problem(*given)
    return _given(p, run_backward(p, backend, Results(grad_o, *kept), grad_o))


def _fake_backward(*arguments):
    p = Problem(*arguments[: _NUM_ARGUMENTS - 1])
    return _given(p, empty_gradients(p))


def _op_setup(ctx, inputs, output):
    *ctx.options, ctx.backend = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *output[1:])


def _op_gradients(ctx, grad_o, *unused):
    tensors, kept = ctx.saved_tensors[:NUM_TENSORS], ctx.saved_tensors[NUM_TENSORS:]
    p = Problem(*tensors, *ctx.options)
    q, k, v, conv_weight = torch.ops.kx.nystrom_attention_backward(*p, ctx.backend, *kept, grad_o)
    return q, k, v, None if p.conv_weight is None else conv_weight, *(None,) * (_NUM_ARGUMENTS - 4)


library.register(f"nystrom_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _op, _fake)
library.register(
    f"nystrom_attention_backward({_ARGUMENTS}, Tensor landmarks_q, Tensor landmarks_k, Tensor summary, "
    "Tensor weighted, Tensor norms, Tensor grad_o) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
torch.library.register_autograd("kx::nystrom_attention", _op_gradients, setup_context=_op_setup)


def _backward_setup(ctx, inputs, output):
    ctx.options = inputs[NUM_TENSORS : _NUM_ARGUMENTS - 1]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], inputs[-1])


def _backward_gradients(ctx, *grads):
    *tensors, grad_o = ctx.saved_tensors
    p = Problem(*tensors, *ctx.options)
    present = (x is not None for x in leaves_of(p))
    found = second_gradients(p, grad_o, tuple(g if here else None for g, here in zip(grads, present, strict=True)))
    return *found[:4], *(None,) * (_NUM_ARGUMENTS - 4 + _NUM_KEPT), found[4]


torch.library.register_autograd("kx::nystrom_attention_backward", _backward_gradients, setup_context=_backward_setup)
