"""The calculus of rope: the gradient of a rotation is the opposite rotation, so one function serves every order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._backends import backends, differentiable_reference, run
from ._problem import RopeProblem


class Rope(torch.autograd.Function):
    """Saves the tables and positions only: the gradient does not depend on the rotated values."""

    @staticmethod
    def forward(ctx: Any, p: RopeProblem, backend: str, inplace: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(p.cos, p.sin, p.positions, p.offsets, p.cu_seqlens)
        ctx.options = (p.offset, p.start, p.interleaved, p.inverse)
        ctx.backend = backend
        if inplace:
            ctx.mark_dirty(*xs)
        return tuple(run(p._replace(xs=xs), backend, inplace))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        offset, start, interleaved, inverse = ctx.options
        wanted = [g is not None and needed for g, needed in zip(grads, ctx.needs_input_grad[3:], strict=True)]
        given = tuple(g for g, w in zip(grads, wanted, strict=True) if w and g is not None)
        if not given:
            return None, None, None, *(None for _ in grads)
        cos, sin, positions, offsets, cu_seqlens = ctx.saved_tensors
        p = RopeProblem(
            given, cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse=not inverse
        )
        rotated = iter(rotate(p, ctx.backend, inplace=False))
        return None, None, None, *(next(rotated) if w else None for w in wanted)


def rotate(p: RopeProblem, backend: str, inplace: bool) -> tuple[Tensor, ...]:
    """Differentiable rotation of p.xs, by the shortest road that is correct for this call."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in p.xs)
    if library.needs_operator(p.xs):
        if inplace and not differentiable:
            torch.ops.kx.rope_(list(p.xs), *p[1:], backend)
            return p.xs
        outs = torch.ops.kx.rope(list(p.xs), *p[1:], backend)
        return tuple(x.copy_(y) for x, y in zip(p.xs, outs, strict=True)) if inplace else tuple(outs)
    if library.transforming(p.xs):
        dispatch.choose("rope", backends(), backend, p)
        outs = differentiable_reference(p)
        return tuple(x.copy_(y) for x, y in zip(p.xs, outs, strict=True)) if inplace else tuple(outs)
    if not differentiable:
        return tuple(run(p, backend, inplace))
    if inplace and len(p.xs) > 1:  # autograd lets a Function change one view at a time
        return tuple(Rope.apply(p, backend, True, x)[0] for x in p.xs)
    return Rope.apply(p, backend, inplace, *p.xs)
