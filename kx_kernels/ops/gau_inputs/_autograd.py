"""The calculus of a gated attention's inputs: the gradient recomputes from them, and has a gradient itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._core import dispatch, library
from ._backends import (
    backends,
    differentiable_reference,
    own_leaves,
    reference_gradients,
    run,
    run_backward,
    second_gradients,
)
from ._problem import NUM_TENSORS
from ._problem import GauInputsProblem as Problem


class GauInputs(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, *leaves: Tensor | None) -> tuple[Tensor, ...]:
        p = p.with_leaves(leaves)
        ctx.save_for_backward(*p.tensors)
        ctx.options, ctx.backend = p.options, backend
        return tuple(run(p, backend))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p = Problem(*ctx.saved_tensors, *ctx.options)
        if library.transforming(grads):
            with torch.enable_grad():
                found = reference_gradients(own_leaves(p), grads, create_graph=False)
        elif torch.is_grad_enabled():
            found = Gradient.apply(p, ctx.backend, *p.leaves, *grads)
        else:
            found = run_backward(p, ctx.backend, grads)
        return None, None, *found


class Gradient(torch.autograd.Function):
    """The gradient as a function of its own, whose gradient comes of the reference."""

    @staticmethod
    def forward(ctx: Any, p: Problem, backend: str, *values: Tensor | None) -> tuple[Tensor | None, ...]:
        p, grads = p.with_leaves(values[:5]), [g for g in values[5:] if g is not None]
        ctx.save_for_backward(*p.tensors, *grads)
        ctx.options = p.options
        return tuple(run_backward(p, backend, grads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        p = Problem(*ctx.saved_tensors[:NUM_TENSORS], *ctx.options)
        return None, None, *second_gradients(p, ctx.saved_tensors[NUM_TENSORS:], cotangents)


def prepare(p: Problem, backend: str) -> list[Tensor]:
    """The results, differentiable, by the shortest road that is correct for this call."""
    if library.needs_operator([x for x in p.tensors if x is not None]):
        return torch.ops.kx.gau_inputs(*p, backend)
    if library.transforming():
        dispatch.choose("gau_inputs", backends(), backend, p)
        return differentiable_reference(p)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in p.leaves):
        return list(GauInputs.apply(p, backend, *p.leaves))
    return run(p, backend)
