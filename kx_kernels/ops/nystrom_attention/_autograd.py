"""The calculus of Nyström attention: the gradient recomputes the factors, and has a gradient itself."""

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
from ._problem import NUM_TENSORS, Results
from ._problem import NystromProblem as Problem

Leaves = tuple[Tensor | None, ...]  # q, k, v and conv_weight


class NystromAttention(torch.autograd.Function):
    """Saves its inputs, and what has m rows to a head."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, *leaves: Tensor | None) -> Tensor:
        p = with_leaves(p, leaves)
        results = run(p, backend)
        ctx.save_for_backward(*p.tensors, *results[1:])
        ctx.options, ctx.backend = p.options, backend
        return results.o

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors[NUM_TENSORS:]
        p = Problem(*ctx.saved_tensors[:NUM_TENSORS], *ctx.options)
        if library.transforming((grad_o,)):
            with torch.enable_grad():
                leaves = [None if x is None else x.detach().requires_grad_() for x in leaves_of(p)]
                found = reference_gradients(with_leaves(p, leaves), grad_o, create_graph=False)
        elif torch.is_grad_enabled():
            found = Gradient.apply(p, ctx.backend, kept, *leaves_of(p), grad_o)
        else:
            found = run_backward(p, ctx.backend, Results(grad_o, *kept), grad_o)
        return None, None, *found


class Gradient(torch.autograd.Function):
    """The gradient as a function of its own, whose gradient comes of the reference: it takes n × m memory."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, kept: tuple[Tensor, ...], *values: Tensor | None) -> Leaves:
        *leaves, grad_o = values
        p = with_leaves(p, leaves)
        assert grad_o is not None
        ctx.save_for_backward(*p.tensors, grad_o)
        ctx.options = p.options
        return tuple(run_backward(p, backend, Results(grad_o, *kept), grad_o))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, grad_o = ctx.saved_tensors
        p = Problem(*tensors, *ctx.options)
        return None, None, None, *second_gradients(p, grad_o, grads)


def attend(p: Problem, backend: str) -> Tensor:
    """o, differentiable, by the shortest road that is correct for this call."""
    if library.needs_operator([x for x in p.tensors if x is not None]):
        return torch.ops.kx.nystrom_attention(*p, backend)[0]
    if library.transforming():
        dispatch.choose("nystrom_attention", backends(), backend, p)
        return differentiable_reference(p)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves_of(p)):
        return NystromAttention.apply(p, backend, *leaves_of(p))
    return run(p, backend).o
