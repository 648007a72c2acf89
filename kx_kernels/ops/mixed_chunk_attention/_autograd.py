"""The calculus of mixed-chunk attention: the gradient recomputes the scores, and has a gradient itself."""

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
    second_gradients,
    with_leaves,
)
from ._problem import MixedProblem as Problem
from ._problem import Results

Leaves = tuple[Tensor | None, ...]  # quad_q, quad_k, lin_q, lin_k, v, gate and bias


class MixedChunkAttention(torch.autograd.Function):
    """Saves its inputs, and what the gate was multiplied with."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, *leaves: Tensor | None) -> Tensor:
        p = with_leaves(p, leaves)
        results = run(p, backend)
        ctx.save_for_backward(*p.tensors, results.ungated)
        ctx.options, ctx.backend = p.options, backend
        return results.o

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, ungated = ctx.saved_tensors
        p = Problem(*tensors, *ctx.options)
        if library.transforming((grad_o,)):
            with torch.enable_grad():
                leaves = [None if x is None else x.detach().requires_grad_() for x in leaves_of(p)]
                found = reference_gradients(with_leaves(p, leaves), grad_o, create_graph=False)
        elif torch.is_grad_enabled():
            found = Gradient.apply(p, ctx.backend, ungated, *leaves_of(p), grad_o)
        else:
            found = run_backward(p, ctx.backend, Results(grad_o, ungated), grad_o)
        return None, None, *found


class Gradient(torch.autograd.Function):
    """The gradient as a function of its own, whose gradient comes of the reference."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, ungated: Tensor | None, *values: Tensor | None) -> Leaves:
        *leaves, grad_o = values
        p = with_leaves(p, leaves)
        assert grad_o is not None
        ctx.save_for_backward(*p.tensors, grad_o)
        ctx.options = p.options
        return tuple(run_backward(p, backend, Results(grad_o, ungated), grad_o))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, grad_o = ctx.saved_tensors
        p = Problem(*tensors, *ctx.options)
        return None, None, None, *second_gradients(p, grad_o, grads)


def attend(p: Problem, backend: str) -> Tensor:
    """o, differentiable, by the shortest road that is correct for this call."""
    if library.needs_operator([x for x in p.tensors if x is not None]):
        return torch.ops.kx.mixed_chunk_attention(*p, backend)[0]
    if library.transforming():
        dispatch.choose("mixed_chunk_attention", backends(), backend, p)
        return differentiable_reference(p)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves_of(p)):
        return MixedChunkAttention.apply(p, backend, *leaves_of(p))
    return run(p, backend).o
