"""The backends of Nyström attention in the order that `auto` tries them, and the torch operators that run them."""

from __future__ import annotations

import functools

from torch import Tensor

from ..._core import dispatch
from ..._core.operator import Operator
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


@functools.cache
def backends() -> tuple[dispatch.Backend, ...]:
    from . import _native, _triton

    return (
        dispatch.Backend("cuda", _native.cuda_unsupported, _native.run_cuda, _native.run_cuda_backward),
        dispatch.Backend("triton", _triton.unsupported, _triton.run, _triton.run_backward),
        dispatch.Backend("cpu", _native.cpu_unsupported, _native.run_cpu, _native.run_cpu_backward),
        dispatch.Backend("reference", lambda problem: None, OPERATOR.run_reference, OPERATOR.run_reference_backward),
    )


OPERATOR = Operator(
    name="nystrom_attention",
    problem=Problem,
    num_tensors=NUM_TENSORS,
    results=Results,
    gradients=Gradients,
    arguments=(
        "Tensor q, Tensor k, Tensor v, Tensor? conv_weight, Tensor? query_mask, Tensor? key_mask, Tensor? cu_seqlens, "
        "Tensor bounds_q, Tensor divisors_q, Tensor bounds_k, Tensor divisors_k, Tensor road, int init, "
        "int iterations, float scale, float ridge"
    ),
    reference=differentiable_reference,
    check=check_values,
    empty_results=empty_results,
    empty_gradients=empty_gradients,
    backends=backends,
)
OPERATOR.register()
