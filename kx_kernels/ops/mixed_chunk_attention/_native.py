"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core import native
from ._problem import Gradients, MixedProblem, Results, empty_gradients, empty_results


def cpu_unsupported(p: MixedProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(*tensors: Tensor | None) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _inputs(p: MixedProblem) -> list[Tensor | None]:
    """The tensors, with those by row and the bias without gaps: they are small beside the others."""
    dense = (None if x is None else x.contiguous() for x in (p.bias, p.a, p.b, p.c, p.d))
    return [p.quad_q, p.quad_k, p.lin_q, p.lin_k, p.v, p.gate, *dense, p.query_mask, p.key_mask, p.cu_seqlens]


def run_cpu(p: MixedProblem) -> Results:
    results = empty_results(p)
    extension = native.load()
    assert extension is not None
    inputs = _inputs(p)  # alive while the kernel runs
    extension.mixed_chunk_attention_cpu(_raw(*inputs), _raw(*results), p.options, torch.get_num_threads())
    return results


def run_cpu_backward(p: MixedProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    bias = None if gradients.bias is None else torch.empty_like(gradients.bias, memory_format=torch.contiguous_format)
    extension = native.load()
    assert extension is not None
    inputs = [*_inputs(p), results.ungated, grad_o]
    outputs = _raw(*gradients[:6], bias)
    extension.mixed_chunk_attention_cpu_backward(_raw(*inputs), outputs, p.options, torch.get_num_threads())
    return gradients._replace(bias=bias)
