"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes, strides and the current stream."""

from __future__ import annotations

import functools
from typing import NamedTuple

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


# Launches of the CUDA kernel, in the order of csrc/linear_attention/cuda.cu.
OUT, QUERIES, KEYS_AND_VALUES, E = range(4)
MAX_DIM = 256


class Cut(NamedTuple):
    """Which of the kernel's forms a launch takes (csrc/linear_attention/kernel.cuh): a block has `slice` columns of the
    output, and of products whose inner dimension is at most `inner`."""

    inner: int
    slice: int


def _dims(p: LinearAttentionProblem, part: int) -> tuple[int, int]:
    """The inner dimension and the columns of a launch."""
    key_dim, value_dim = p.q.shape[3], p.v.shape[3]
    if part == OUT:
        return key_dim, value_dim
    if part == KEYS_AND_VALUES:
        return max(key_dim, value_dim), min(key_dim, value_dim)
    return value_dim, key_dim


def _cut(p: LinearAttentionProblem, part: int) -> Cut:
    inner, columns = _dims(p, part)
    wide = Cut(128, 128)  # one block has all columns of most heads: no operand is loaded twice
    if p.q.dtype == torch.bfloat16 and inner <= 128 and columns > 64 and _fits(p.device, p.q.dtype, wide):
        return wide
    return Cut(64 if inner <= 64 else 128 if inner <= 128 else 256, 64)


@functools.cache
def _fits(device: torch.device, dtype: torch.dtype, cut: Cut) -> bool:
    """Whether a block has shared memory enough."""
    extension = native.load("_emulation" if device.type == "cpu" else "_C")
    assert extension is not None
    return extension.linear_attention_cuda_fits(native.DTYPE_CODES[dtype], *cut, device.index or 0)


def cuda_unsupported(p: LinearAttentionProblem) -> str | None:
    if p.q.dtype == torch.float64:
        return "its products are those of tensor cores, in float32"
    widest = max(p.q.shape[3], p.v.shape[3])
    if widest > MAX_DIM:
        return f"a head has {widest} dimensions; its state would not fit on chip above {MAX_DIM}"
    reason = native.cuda_unsupported(p.device)
    if reason is None and not _fits(p.device, p.q.dtype, _cut(p, KEYS_AND_VALUES)):
        return f"a head of {widest} dimensions in {p.q.dtype} needs more shared memory than this GPU has"
    return reason


def _launch(
    p: LinearAttentionProblem, part: int, inputs: list[Tensor | None], outputs: list[Tensor | None], e: Tensor | None
) -> None:
    key_dim, value_dim = p.q.shape[3], p.v.shape[3]
    heads, kv_heads = p.q.shape[2], p.k.shape[2]
    cut = _cut(p, part)
    columns = (key_dim, value_dim) if part == KEYS_AND_VALUES else _dims(p, part)[1:]
    slices = sum(-(-n // cut.slice) for n in columns)
    segments = segments_for(p, p.sequences * slices * (kv_heads if part == KEYS_AND_VALUES else heads))
    segment = max(1, -(-p.q.shape[1] // (64 * segments))) * 64  # whole chunks
    sums = z_sums = None
    if segments > 1 or not p.causal:
        rows = p.sequences * segments * kv_heads * slices
        sums = p.q.new_empty(rows * cut.inner * cut.slice, dtype=p.wide)
        z_sums = p.q.new_empty(rows * max(cut), dtype=p.wide)
    extras = (native.raw_or_none(x) for x in (e, sums, z_sums))
    raw = (_raw(*inputs), _raw(*outputs), _options(p))
    native.launch("linear_attention_cuda", p.device, *raw, part, *cut, segments, segment, *extras)


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
    slices = -(-p.q.shape[3] // _cut(p, QUERIES).slice)
    split = p.normalize and slices > 1  # no block sees whole rows of the queries' gradients
    e = p.q.new_empty(slices, *p.q.shape[:3], dtype=p.wide) if p.normalize else None
    inputs = [*p.tensors, denominator, grad_o, *_dense(grad_kv, grad_z)]
    outputs = [*gradients, None]
    for part in (E, QUERIES, KEYS_AND_VALUES) if split else (QUERIES, KEYS_AND_VALUES):
        _launch(p, part, inputs, outputs, e)
    return gradients
