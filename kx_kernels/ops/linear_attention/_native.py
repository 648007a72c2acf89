"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes, strides and the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core import native
from ._problem import Gradients, LinearAttentionProblem, Results, empty_gradients, empty_results, segments_for


def cpu_unsupported(p: LinearAttentionProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(*tensors: Tensor | None) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _dense(*states: Tensor | None) -> list[Tensor | None]:
    """Without gaps, as the kernels take states: they are small beside the tokens."""
    return [None if x is None else x.contiguous() for x in states]


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
    states = _dense(grad_kv, grad_z)
    inputs = _raw(*p.tensors, denominator, grad_o, *states)
    grad_denominator = None if denominator is None else torch.empty_like(denominator)
    outputs = _raw(*gradients, grad_denominator)
    extension.linear_attention_cpu_backward(inputs, outputs, _options(p), torch.get_num_threads())
    return gradients


# Passes of the CUDA kernel, in the order of csrc/linear_attention/kernel.cuh.
OUT, QUERIES, KEYS, VALUES, E = range(5)
SLICE = 64  # columns of the output that a block works on
MAX_DIM = 256


def cuda_unsupported(p: LinearAttentionProblem) -> str | None:
    if p.q.dtype == torch.float64:
        return "its products are those of tensor cores, in float32"
    widest = max(p.q.shape[3], p.v.shape[3])
    if widest > MAX_DIM:
        return f"a head has {widest} dimensions; its state would not fit on chip above {MAX_DIM}"
    return native.cuda_unsupported(p.device)


def _slices(p: LinearAttentionProblem, role: int) -> int:
    return -(-(p.q if role in (QUERIES, KEYS, E) else p.v).shape[3] // SLICE)


def _launch(
    p: LinearAttentionProblem, role: int, inputs: list[Tensor | None], outputs: list[Tensor | None], e: Tensor | None
) -> None:
    length, heads = p.q.shape[1:3]
    kv_heads = p.k.shape[2]
    slices = _slices(p, role)
    segments = segments_for(p, p.sequences * slices * (kv_heads if role in (KEYS, VALUES) else heads))
    segment = max(1, -(-length // (64 * segments))) * 64  # whole chunks
    sums = z_sums = None
    if segments > 1 or not p.causal:
        inner = (p.v if role in (QUERIES, KEYS, E) else p.q).shape[3]
        inner = 64 if inner <= 64 else 128 if inner <= 128 else 256
        rows = p.sequences * segments * kv_heads * slices
        sums = p.q.new_empty(rows * inner * SLICE, dtype=p.wide)
        z_sums = p.q.new_empty(rows * inner, dtype=p.wide)
    extras = (native.raw_or_none(x) for x in (e, sums, z_sums))
    raw = (_raw(*inputs), _raw(*outputs), _options(p))
    native.launch("linear_attention_cuda", p.device, *raw, role, segments, segment, *extras)


def run_cuda(p: LinearAttentionProblem) -> Results:
    results = empty_results(p)
    if p.cu_seqlens is not None:
        results.o.zero_()  # rows of no sequence
    _launch(p, OUT, list(p.tensors), list(results), None)
    return results


def run_cuda_step(p: LinearAttentionProblem) -> Tensor:
    o = empty_results(p).o
    native.launch("linear_attention_cuda_step", p.device, _raw(*p.tensors), _raw(o, None, p.kv0, p.z0), _options(p))
    return o


def run_cuda_backward(
    p: LinearAttentionProblem,
    denominator: Tensor | None,
    grad_o: Tensor,
    grad_kv: Tensor | None,
    grad_z: Tensor | None,
) -> Gradients:
    gradients = empty_gradients(p)
    if p.cu_seqlens is not None:
        for x in gradients[:3]:
            x.zero_()
    split = p.normalize and _slices(p, QUERIES) > 1  # no block sees whole rows of the queries' gradients
    e = p.q.new_empty(_slices(p, E), *p.q.shape[:3], dtype=p.wide) if p.normalize else None
    inputs = [*p.tensors, denominator, grad_o, *_dense(grad_kv, grad_z)]
    outputs = [*gradients, None]
    for role in (E, QUERIES, KEYS, VALUES) if split else (QUERIES, KEYS, VALUES):
        _launch(p, role, inputs, outputs, e)
    return gradients
