"""The backends of a gated attention's inputs in the order that `auto` tries them, and the torch operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._problem import ACTIVATIONS, NUM_TENSORS, Gradients, check_values, empty_gradients, empty_results
from ._problem import GauInputsProblem as Problem


def differentiable_reference(p: Problem) -> list[Tensor]:
    """The results by the reference, as torch's own operators, which autograd and torch.func see through."""
    from .reference import gau_inputs

    packed = p.cu_seqlens is not None

    def rows(x: Tensor | None) -> Any:
        return x[0] if packed and x is not None else x

    results = gau_inputs(
        rows(p.u),
        rows(p.v),
        rows(p.z),
        p.gamma,
        p.beta,
        activation=ACTIVATIONS[p.activation],
        rope=None if p.cos is None or p.sin is None else (p.cos, p.sin),
        rope_offset=p.offset if p.offsets is None else p.offsets,
        rope_interleaved=p.interleaved,
        key_padding_mask=rows(p.mask),
        cu_seqlens=p.cu_seqlens,
    )
    return [x[None] if packed else x for x in results if x is not None]


def reference_gradients(p: Problem, grads: Sequence[Tensor], create_graph: bool) -> Gradients:
    """The gradients of p's leaves for those of the results."""
    present = [x for x in p.leaves if x is not None]
    found = iter(torch.autograd.grad(differentiable_reference(p), present, grads, create_graph=create_graph))
    return Gradients._make(None if x is None else next(found) for x in p.leaves)


def own_leaves(p: Problem) -> Problem:
    """The same call of leaves that require grad."""
    return p.with_leaves([None if x is None else x.detach().requires_grad_() for x in p.leaves])


def _run_reference(p: Problem) -> list[Tensor]:
    return [out.copy_(y) for out, y in zip(empty_results(p), differentiable_reference(p), strict=True)]


def _run_reference_backward(p: Problem, grads: Sequence[Tensor]) -> Gradients:
    with library.autograd_on():
        found = reference_gradients(own_leaves(p), grads, create_graph=False)
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


def run(p: Problem, backend: str) -> list[Tensor]:
    """The results with no autograd."""
    check_values(p)
    return dispatch.choose("gau_inputs", backends(), backend, p).run(library.plain(p))


def run_backward(p: Problem, backend: str, grads: Sequence[Tensor]) -> Gradients:
    """The gradients of p's leaves for those of the results."""
    chosen = dispatch.choose("gau_inputs", backends(), backend, p)
    assert chosen.run_backward is not None
    return chosen.run_backward(library.plain(p), [g.resolve_neg() for g in grads])


def second_gradients(p: Problem, grads: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """For gradients of the gradients, those of p's leaves and of the gradients of the results: by the reference."""
    with library.autograd_on():
        p, grads = own_leaves(p), [g.detach().requires_grad_() for g in grads]
        first = reference_gradients(p, grads, create_graph=True)
        pairs = [(y, c) for y, c in zip(first, cotangents, strict=True) if y is not None and c is not None]
        inputs = [x for x in (*p.leaves, *grads) if x is not None]
        ys, cs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, inputs, cs, materialize_grads=True))
    return [None if x is None else next(found) for x in (*p.leaves, *grads)]


_ARGUMENTS = (
    "Tensor? u, Tensor v, Tensor z, Tensor gamma, Tensor? beta, Tensor? cos, Tensor? sin, Tensor? offsets, "
    "Tensor? mask, Tensor? cu_seqlens, int activation, SymInt offset, bool interleaved, str backend"
)


def _given(p: Problem, gradients: Gradients) -> tuple[Tensor, ...]:
    """torch's operators return tensors, never None: what a call does not have is an empty one."""
    return tuple(p.z.new_empty(0) if x is None else x for x in gradients)


def _present(p: Problem, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x is None else g for x, g in zip(p.leaves, gradients, strict=True)]


def _op(*arguments):
    return run(Problem(*arguments[:-1]), arguments[-1])


def _fake(*arguments):
    return empty_results(Problem(*arguments[:-1]))


def _op_backward(*arguments):
    *given, backend, grads = arguments
    p = Problem(*given)
    return _given(p, run_backward(p, backend, grads))


def _fake_backward(*arguments):
    p = Problem(*arguments[:-2])
    return _given(p, empty_gradients(p))


def _op_setup(ctx, inputs, output):
    *ctx.options, ctx.backend = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS])
    ctx.shapes = [x.shape for x in output]


def _op_gradients(ctx, grads):
    p = Problem(*ctx.saved_tensors, *ctx.options)
    grads = [p.z.new_zeros(n) if g is None else g for n, g in zip(ctx.shapes, grads, strict=True)]
    found = torch.ops.kx.gau_inputs_backward(*p, ctx.backend, grads)
    return *_present(p, found), *(None,) * 9


def _backward_setup(ctx, inputs, output):
    *ctx.options, _, grads = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *grads)


def _backward_gradients(ctx, *cotangents):
    p = Problem(*ctx.saved_tensors[:NUM_TENSORS], *ctx.options)
    found = second_gradients(p, ctx.saved_tensors[NUM_TENSORS:], _present(p, cotangents))
    return *found[:5], *(None,) * 9, found[5:]


library.register(f"gau_inputs({_ARGUMENTS}) -> Tensor[]", _op, _fake)
library.register(
    f"gau_inputs_backward({_ARGUMENTS}, Tensor[] grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
torch.library.register_autograd("kx::gau_inputs", _op_gradients, setup_context=_op_setup)
torch.library.register_autograd("kx::gau_inputs_backward", _backward_gradients, setup_context=_backward_setup)
