"""The backends of rope in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._problem import RopeProblem, check_positions


def differentiable_reference(p: RopeProblem) -> list[Tensor]:
    """The reference as torch's own operators, which autograd and torch.func see through."""
    from .reference import rope

    offset = p.offset if p.offsets is None else p.offsets
    where: Any = {"positions": p.positions, "offset": offset, "cu_seqlens": p.cu_seqlens}
    how: Any = {"start": p.start, "interleaved": p.interleaved, "inverse": p.inverse}
    return [rope(x, None, p.cos, p.sin, **where, **how) for x in p.xs]  # type: ignore[misc]


def _run_reference(p: RopeProblem, inplace: bool) -> list[Tensor]:
    outs = p.xs if inplace else [torch.empty_like(x) for x in p.xs]
    return [out.copy_(y) for out, y in zip(outs, differentiable_reference(p), strict=True)]


@functools.cache
def backends() -> tuple[dispatch.Backend, ...]:
    from . import _native, _triton

    return (
        dispatch.Backend("cuda", _native.cuda_unsupported, _native.run_cuda),
        dispatch.Backend("triton", _triton.unsupported, _triton.run),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu),
        dispatch.Backend("reference", lambda problem: None, _run_reference),
    )


def run(p: RopeProblem, backend: str, inplace: bool) -> list[Tensor]:
    """Rotates with no autograd: fresh tensors laid out as their inputs, or the inputs themselves if `inplace`."""
    check_positions(p)
    chosen = dispatch.choose("rope", backends(), backend, p)
    if not inplace:
        return chosen.run(library.plain(p), inplace)
    if any(x.is_neg() for x in p.xs):
        raise ValueError("rope: argument 'q' or 'k' is a lazily negated view; expected plain memory to write in place")
    torch.autograd.graph.increment_version(p.xs)
    return chosen.run(library.plain(p), inplace)


_ARGUMENTS = (
    "Tensor cos, Tensor sin, Tensor? positions, Tensor? offsets, Tensor? cu_seqlens, "
    "SymInt offset, int start, bool interleaved, bool inverse, str backend"
)


def _op(xs, cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse, backend):
    problem = RopeProblem(tuple(xs), cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse)
    return run(problem, backend, inplace=False)


def _op_(xs, cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse, backend):
    problem = RopeProblem(tuple(xs), cos, sin, positions, offsets, cu_seqlens, offset, start, interleaved, inverse)
    run(problem, backend, inplace=True)


def _op_setup(ctx, inputs, output):
    _, cos, sin, positions, offsets, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions, offsets, cu_seqlens)


def _op_backward(ctx, grads):
    offset, start, interleaved, inverse, backend = ctx.options
    tables = ctx.saved_tensors
    return torch.ops.kx.rope(grads, *tables, offset, start, interleaved, not inverse, backend), *(None,) * 10


library.register(f"rope(Tensor[] xs, {_ARGUMENTS}) -> Tensor[]", _op, lambda xs, *_: [torch.empty_like(x) for x in xs])
library.register(f"rope_(Tensor(a!)[] xs, {_ARGUMENTS}) -> ()", _op_, lambda xs, *_: None)
torch.library.register_autograd("kx::rope", _op_backward, setup_context=_op_setup)
