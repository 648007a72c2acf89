"""The backends of linear attention in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch, library
from ._problem import (
    FEATURE_MAPS,
    NUM_TENSORS,
    Gradients,
    LinearAttentionProblem,
    Results,
    check_values,
    empty_gradients,
    empty_results,
)

Problem = LinearAttentionProblem


def differentiable_reference(p: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, kv, z) by the reference, as torch's own operators, which autograd and torch.func see through."""
    from .reference import linear_attention
    from .state import LinearAttentionState

    packed = p.cu_seqlens is not None

    def rows(x: Tensor | None) -> Any:
        return x[0] if packed and x is not None else x

    result: Any = linear_attention(
        rows(p.q),
        rows(p.k),
        rows(p.v),
        causal=p.causal,
        feature_map=FEATURE_MAPS[p.feature],
        stabilizer=p.stabilizer,
        normalize=p.normalize,
        eps=p.eps,
        scale=p.scale,
        decay=p.decay,
        rope=None if p.cos is None or p.sin is None else (p.cos, p.sin),
        rope_offset=p.offset if p.offsets is None else p.offsets,
        rope_interleaved=p.interleaved,
        key_padding_mask=rows(p.mask),
        cu_seqlens=p.cu_seqlens,
        initial_state=None if p.kv0 is None else LinearAttentionState(p.kv0, p.z0),
        return_state=p.with_state,
    )
    o, (kv, z) = result if p.with_state else (result, (None, None))
    return o[None] if packed else o, kv, z


def reference_gradients(p: Problem, grads: tuple[Tensor | None, ...], create_graph: bool) -> Gradients:
    """The gradients of p.q, p.k, p.v, p.kv0 and p.z0, for those of o, kv and z."""
    leaves = [x for x in (p.q, p.k, p.v, p.kv0, p.z0) if x is not None]
    outs = [(y, g) for y, g in zip(differentiable_reference(p), grads, strict=True) if y is not None and g is not None]
    found = torch.autograd.grad(
        [y for y, _ in outs],
        leaves,
        [g for _, g in outs],
        create_graph=create_graph,
        materialize_grads=True,
    )
    return Gradients(*found, *(None,) * (5 - len(found)))


def _run_reference(p: Problem) -> Results:
    results = empty_results(p)
    o, kv, z = differentiable_reference(p)
    for out, y in zip(results, (o, None, kv, z), strict=True):
        if out is not None and y is not None:
            out.copy_(y)
    if results.denominator is not None:
        results.denominator.zero_()  # its gradient does not ask for them
    return results


def _run_reference_backward(
    p: Problem, denominator: Tensor | None, grad_o: Tensor, grad_kv: Tensor | None, grad_z: Tensor | None
) -> Gradients:
    with library.autograd_on():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (p.q, p.k, p.v, p.kv0, p.z0)]
        found = reference_gradients(with_leaves(p, leaves), (grad_o, grad_kv, grad_z), create_graph=False)
    gradients = empty_gradients(p)  # laid out as every backend's
    for x, g in zip(gradients, found, strict=True):
        if x is not None and g is not None:
            x.copy_(g)
    return gradients


def leaves_of(p: Problem) -> tuple[Tensor | None, ...]:
    return p.q, p.k, p.v, p.kv0, p.z0


def with_leaves(p: Problem, leaves: Any) -> Problem:
    """The same call of other q, k, v, kv0 and z0."""
    q, k, v, kv0, z0 = leaves
    return p._replace(q=q, k=k, v=v, kv0=kv0, z0=z0)


@functools.cache
def backends() -> tuple[dispatch.Backend, ...]:
    from . import _native, _triton

    return (
        # By counts, not yet by time: CUDA takes fewer launches, reads wide heads once and leaves room for more blocks.
        dispatch.Backend("cuda", _native.cuda_unsupported, _native.run_cuda, _native.run_cuda_backward),
        dispatch.Backend("triton", _triton.unsupported, _triton.run, _triton.run_backward),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu, _native.run_cpu_backward),
        dispatch.Backend("reference", lambda problem: None, _run_reference, _run_reference_backward),
    )


def run(p: Problem, backend: str) -> Results:
    """Attends with no autograd."""
    check_values(p)
    return dispatch.choose("linear_attention", backends(), backend, p).run(library.plain(p))


def _run_reference_step(p: Problem) -> Tensor:
    assert p.kv0 is not None
    slots = torch.arange(p.sequences, device=p.device) if p.slots is None else p.slots
    z0 = None if p.z0 is None else p.z0[slots]
    o, kv, z = differentiable_reference(p._replace(kv0=p.kv0[slots], z0=z0, slots=None, with_state=True))
    assert kv is not None
    p.kv0.index_copy_(0, slots, kv)
    if p.z0 is not None and z is not None:
        p.z0.index_copy_(0, slots, z)
    return o


@functools.cache
def step_backends() -> tuple[dispatch.Backend, ...]:
    """Of the form that writes the new states over the old ones."""
    from . import _native, _triton

    return (
        dispatch.Backend("cuda", _native.cuda_unsupported, _native.run_cuda_step),
        dispatch.Backend("triton", _triton.unsupported, _triton.run_step),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu_step),
        dispatch.Backend("reference", lambda problem: None, _run_reference_step),
    )


def run_step(p: Problem, backend: str) -> Tensor:
    check_values(p)
    chosen = dispatch.choose("linear_attention_step", step_backends(), backend, p)
    states = [x for x in (p.kv0, p.z0) if x is not None]
    if any(x.is_neg() for x in states):
        raise ValueError(
            "linear_attention_step: argument 'state' is a lazily negated view; expected plain memory to write in place"
        )
    torch.autograd.graph.increment_version(states)
    return chosen.run(library.plain(p))


def run_backward(
    p: Problem,
    backend: str,
    denominator: Tensor | None,
    grad_o: Tensor,
    grad_kv: Tensor | None,
    grad_z: Tensor | None,
) -> Gradients:
    """The gradients of a call whose forward pass gave `denominator`."""
    chosen = dispatch.choose("linear_attention", backends(), backend, p)
    assert chosen.run_backward is not None
    given = (None if x is None else x.resolve_neg() for x in (denominator, grad_o, grad_kv, grad_z))
    return chosen.run_backward(library.plain(p), *given)


def second_gradients(
    p: Problem, given: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients of the gradients of p's leaves for those of o, kv and z, in all of these: by the reference."""
    with library.autograd_on():
        leaves, outer = (
            [None if x is None else x.detach().requires_grad_() for x in values] for values in (leaves_of(p), given)
        )
        first = reference_gradients(with_leaves(p, leaves), tuple(outer), create_graph=True)
        pairs = [(y, g) for y, g in zip(first, grads, strict=True) if y is not None and g is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [x for x in (*leaves, *outer) if x is not None],
                [g for _, g in pairs],
                materialize_grads=True,
            )
        )
    return [None if x is None else next(found) for x in (*leaves, *outer)]


# torch's operators return tensors, never None: what a call does not have is an empty one.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? cos, Tensor? sin, Tensor? offsets, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor? kv0, Tensor? z0, Tensor? slots, int feature, float stabilizer, bool normalize, "
    "float eps, float scale, bool causal, bool interleaved, SymInt offset, bool with_state, str backend"
)
_GRADIENTS = "Tensor? denominator, Tensor grad_o, Tensor? grad_kv, Tensor? grad_z"


def _given(p: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(p.q.new_empty(0, dtype=p.wide) if x is None else x for x in tensors)


def _op(*arguments):
    p = Problem(*arguments[:-1])
    return _given(p, run(p, arguments[-1]))


def _fake(*arguments):
    p = Problem(*arguments[:-1])
    return _given(p, empty_results(p))


def _op_backward(*arguments):
    p = Problem(*arguments[:-5])
    return _given(p, run_backward(p, *arguments[-5:]))


def _fake_backward(*arguments):
    p = Problem(*arguments[:-5])
    return _given(p, empty_gradients(p))


def _op_setup(ctx, inputs, output):
    *ctx.options, ctx.backend = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], output[1])


def _op_gradients(ctx, grad_o, grad_denominator, grad_kv, grad_z):
    *tensors, denominator = ctx.saved_tensors
    p = Problem(*tensors, *ctx.options)
    given = (denominator if p.normalize else None, grad_o, grad_kv if p.with_state else None)
    grad_z = grad_z if p.with_state and p.normalize else None
    found = torch.ops.kx.linear_attention_backward(*p, ctx.backend, *given, grad_z)
    q, k, v, kv0, z0 = found
    return q, k, v, *(None,) * 6, *(None if p.kv0 is None else kv0, None if p.z0 is None else z0), *(None,) * 11


_IN_PLACE = _ARGUMENTS.replace("Tensor? kv0", "Tensor(a!)? kv0").replace("Tensor? z0", "Tensor(b!)? z0")
library.register(
    f"linear_attention_step({_IN_PLACE}) -> Tensor",
    lambda *arguments: run_step(Problem(*arguments[:-1]), arguments[-1]),
    lambda *arguments: empty_results(Problem(*arguments[:-1])).o,
)
library.register(f"linear_attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _op, _fake)
library.register(
    f"linear_attention_backward({_ARGUMENTS}, {_GRADIENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
torch.library.register_autograd("kx::linear_attention", _op_gradients, setup_context=_op_setup)


def _backward_setup(ctx, inputs, output):
    ctx.options = inputs[NUM_TENSORS : -len(_GIVEN)]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], *inputs[-len(_GIVEN) :])


def _backward_gradients(ctx, *grads):
    tensors, given = ctx.saved_tensors[:NUM_TENSORS], ctx.saved_tensors[NUM_TENSORS + 1 :]
    p = Problem(*tensors, *ctx.options[:-1])
    present = (True, True, True, p.kv0 is not None, p.z0 is not None)
    found = second_gradients(
        p, tuple(given), tuple(g if here else None for g, here in zip(grads, present, strict=True))
    )
    q, k, v, kv0, z0 = found[:5]
    return q, k, v, *(None,) * 6, kv0, z0, *(None,) * 11, None, *found[5:]


_GIVEN = ("denominator", "grad_o", "grad_kv", "grad_z")
torch.library.register_autograd("kx::linear_attention_backward", _backward_gradients, setup_context=_backward_setup)
