"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core import native
from ._problem import Gradients, NystromProblem, Results, empty_gradients, empty_results
from .presets import INITS


def cpu_unsupported(p: NystromProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(*tensors: Tensor | None) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _inputs(p: NystromProblem) -> list[Tensor | None]:
    """The tensors, with the weights of the convolution without gaps: they are few."""
    conv_weight = None if p.conv_weight is None else p.conv_weight.contiguous()
    return [*p.tensors[:3], conv_weight, *p.tensors[4:]]


def _inverse(p: NystromProblem) -> Tensor | None:
    """[N, H, m, m]: what no iteration gives, of the matrices that the kernel makes."""
    if INITS[p.init] != "pinv":
        return None
    landmarks_q, landmarks_k = empty_results(p)[1:3]
    lead = landmarks_q.shape[:3]
    matrices = landmarks_q.new_empty((*lead, lead[-1]))
    inputs = [*_inputs(p), None]  # alive while the kernel runs
    extension = native.load()
    assert extension is not None
    results = _raw(landmarks_q, landmarks_k, matrices)
    extension.nystrom_attention_cpu_matrices(_raw(*inputs), results, p.options, torch.get_num_threads())
    return torch.linalg.pinv(matrices).contiguous()


def run_cpu(p: NystromProblem) -> Results:
    results = empty_results(p)
    extension = native.load()
    assert extension is not None
    inputs = [*_inputs(p), _inverse(p)]
    extension.nystrom_attention_cpu(_raw(*inputs), _raw(*results), p.options, torch.get_num_threads())
    return results


def run_cpu_backward(p: NystromProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    conv = gradients.conv_weight
    if conv is not None:
        conv = torch.empty_like(conv, memory_format=torch.contiguous_format)
    extension = native.load()
    assert extension is not None
    inputs = [*_inputs(p), _inverse(p), *results[1:], grad_o]
    outputs = _raw(*gradients[:3], conv)
    extension.nystrom_attention_cpu_backward(_raw(*inputs), outputs, p.options, torch.get_num_threads())
    return gradients._replace(conv_weight=conv)
