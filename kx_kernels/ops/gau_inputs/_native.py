"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._core import native
from ._problem import GauInputsProblem, Gradients, empty_gradients, empty_results


def cpu_unsupported(p: GauInputsProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(tensors: Sequence[Tensor | None]) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _with_gate(p: GauInputsProblem, xs: Sequence[Tensor]) -> list[Tensor | None]:
    """Results, or their gradients, with None for a gate that there is not."""
    return [*xs] if p.u is not None else [None, *xs]


def run_cpu(p: GauInputsProblem) -> list[Tensor]:
    results = empty_results(p)
    extension = native.load()
    assert extension is not None
    extension.gau_inputs_cpu(_raw(p.tensors), _raw(_with_gate(p, results)), p.options, torch.get_num_threads())
    return results


def run_cpu_backward(p: GauInputsProblem, grads: Sequence[Tensor]) -> Gradients:
    gradients = empty_gradients(p)
    extension = native.load()
    assert extension is not None
    inputs = _raw([*p.tensors, *_with_gate(p, grads)])
    extension.gau_inputs_cpu_backward(inputs, _raw(gradients), p.options, torch.get_num_threads())
    return gradients


def cuda_unsupported(p: GauInputsProblem) -> str | None:
    reason = native.cuda_unsupported(p.device)
    if reason is None:
        heads, most = p.gamma.shape[0], native.cuda(p.device).gau_inputs_cuda_heads
        return f"gamma has {heads} heads; a launch takes {most} at most" if heads > most else None
    return reason


def run_cuda(p: GauInputsProblem) -> list[Tensor]:
    results = empty_results(p)
    native.launch("gau_inputs_cuda", p.device, _raw(p.tensors), _raw(_with_gate(p, results)), p.options)
    return results


def run_cuda_backward(p: GauInputsProblem, grads: Sequence[Tensor]) -> Gradients:
    gradients = empty_gradients(p)
    blocks = native.cuda(p.device).gau_inputs_cuda_sums(native.DTYPE_CODES[p.z.dtype], *p.z.shape)
    sums = p.z.new_empty((blocks, 2, *p.gamma.shape), dtype=torch.float64)
    inputs = _raw([*p.tensors, *_with_gate(p, grads)])
    native.launch("gau_inputs_cuda_backward", p.device, inputs, _raw(gradients), p.options, native.raw(sums))
    return gradients
