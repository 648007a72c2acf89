"""The calculus of linear attention: the gradient recomputes all but the denominators, and has a gradient itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._core import dispatch, library
from ._backends import (
    backends,
    differentiable_reference,
    leaves_of,
    reference_gradients,
    run,
    run_backward,
    run_step,
    second_gradients,
    with_leaves,
)
from ._problem import NUM_TENSORS
from ._problem import LinearAttentionProblem as Problem

Leaves = tuple[Tensor | None, ...]  # q, k, v, kv0 and z0


class LinearAttention(torch.autograd.Function):
    """Saves its inputs and the denominators."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, *leaves: Tensor | None) -> tuple[Tensor | None, ...]:
        p = with_leaves(p, leaves)
        o, denominator, kv, z = run(p, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*p.tensors, denominator)
        ctx.options, ctx.backend = p.options, backend
        return o, kv, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 7
        *tensors, denominator = ctx.saved_tensors
        p = Problem(*tensors, *ctx.options)
        grad_o, grad_kv, grad_z = grads
        if grad_o is None:  # a loss on the state alone
            grad_o = p.q.new_zeros(()).expand(*p.q.shape[:-1], p.v.shape[-1])
        leaves = leaves_of(p)
        if library.transforming(grads):
            with torch.enable_grad():
                leaves = tuple(None if x is None else x.detach().requires_grad_() for x in leaves)
                found = reference_gradients(with_leaves(p, leaves), (grad_o, grad_kv, grad_z), create_graph=False)
        elif torch.is_grad_enabled():
            found = Gradient.apply(p, ctx.backend, denominator, *leaves, grad_o, grad_kv, grad_z)
        else:
            found = run_backward(p, ctx.backend, denominator, grad_o, grad_kv, grad_z)
        return None, None, *found


class Gradient(torch.autograd.Function):
    """The gradient as a function of its own, whose gradient comes of the reference: quadratic in T."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, denominator: Tensor | None, *values: Tensor | None) -> Leaves:
        p = with_leaves(p, values[:5])
        ctx.save_for_backward(*p.tensors, *values[5:])
        ctx.options = p.options
        grad_o, grad_kv, grad_z = values[5:]
        assert grad_o is not None
        return tuple(run_backward(p, backend, denominator, grad_o, grad_kv, grad_z))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        p = Problem(*ctx.saved_tensors[:NUM_TENSORS], *ctx.options)
        return None, None, None, *second_gradients(p, ctx.saved_tensors[NUM_TENSORS:], grads)


def step(p: Problem, backend: str) -> Tensor:
    """o, with the states after the call in the place of those before it."""
    if library.needs_operator([x for x in p.tensors if x is not None]):
        return torch.ops.kx.linear_attention_step(*p, backend)
    with torch.no_grad():
        return run_step(p, backend)


def attend(p: Problem, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, kv, z), differentiable, by the shortest road that is correct for this call."""
    leaves = leaves_of(p)
    if library.needs_operator([x for x in p.tensors if x is not None]):
        o, _, kv, z = torch.ops.kx.linear_attention(*p, backend)
        return o, kv if p.with_state else None, z if p.with_state and p.normalize else None
    if library.transforming():
        dispatch.choose("linear_attention", backends(), backend, p)
        return differentiable_reference(p)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return LinearAttention.apply(p, backend, *leaves)
    results = run(p, backend)
    return results.o, results.kv, results.z
