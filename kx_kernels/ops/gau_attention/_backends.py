"""The backends of gated attention in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..._core import dispatch
from ..._core.operator import Operator
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


@functools.cache
def backends() -> tuple[dispatch.Backend, ...]:
    from . import _native, _torch, _triton

    return (
        dispatch.Backend("cuda", _native.cuda_unsupported, _native.run_cuda, _native.run_cuda_backward),
        dispatch.Backend("triton", _triton.unsupported, _triton.run, _triton.run_backward),
        dispatch.Backend("torch", _torch.unsupported, _torch.run, _torch.run_backward, _torch.comes_last),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu, _native.run_cpu_backward),
        dispatch.Backend("reference", lambda problem: None, OPERATOR.run_reference, OPERATOR.run_reference_backward),
    )


OPERATOR = Operator(
    name="gau_attention",
    problem=Problem,
    num_tensors=NUM_TENSORS,
    results=Results,
    gradients=Gradients,
    arguments=(
        "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? bias, Tensor? a, Tensor? b, Tensor? c, "
        "Tensor? query_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? cu_seqlens_k, int activation, "
        "float scale, float bias_scale, float out_scale, bool by_sum, bool causal, SymInt workspace, bool keep"
    ),
    reference=differentiable_reference,
    check=check_values,
    empty_results=empty_results,
    empty_gradients=empty_gradients,
    backends=backends,
    alone=lambda p: p._replace(keep=False),
)
OPERATOR.register()
