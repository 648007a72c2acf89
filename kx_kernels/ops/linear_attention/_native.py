"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes, strides and the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core import native
from ._problem import Gradients, LinearAttentionProblem, Results, empty_gradients, empty_results


def cpu_unsupported(p: LinearAttentionProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(*tensors: Tensor | None) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _options(p: LinearAttentionProblem) -> tuple:
    return p.options[:-1]


def run_cpu(p: LinearAttentionProblem) -> Results:
    results = empty_results(p)
    extension = native.load()
    assert extension is not None
    threads = torch.get_num_threads()
    extension.linear_attention_cpu(_raw(*p.tensors), _raw(*results), _options(p), threads)
    return results


def run_cpu_step(p: LinearAttentionProblem) -> Tensor:
    """Like run_cpu, with the states that sequences end with in the place of those they start from."""
    o = empty_results(p).o
    extension = native.load()
    assert extension is not None
    outputs = _raw(o, None, p.kv0, p.z0)
    extension.linear_attention_cpu(_raw(*p.tensors), outputs, _options(p), torch.get_num_threads())
    return o


def run_cpu_backward(
    p: LinearAttentionProblem,
    denominator: Tensor | None,
    grad_o: Tensor,
    grad_kv: Tensor | None,
    grad_z: Tensor | None,
) -> Gradients:
    gradients = empty_gradients(p)
    extension = native.load()
    assert extension is not None
    states = [None if x is None else x.contiguous() for x in (grad_kv, grad_z)]  # small beside the tokens
    inputs = _raw(*p.tensors, denominator, grad_o, *states)
    grad_denominator = None if denominator is None else torch.empty_like(denominator)
    outputs = _raw(*gradients, grad_denominator)
    extension.linear_attention_cpu_backward(inputs, outputs, _options(p), torch.get_num_threads())
    return gradients
