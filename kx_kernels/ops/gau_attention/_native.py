"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..._core import native
from ._problem import GauProblem, Gradients, Results, empty_gradients, empty_results


def cpu_unsupported(p: GauProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(*tensors: Tensor | None) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _inputs(p: GauProblem) -> list[Tensor | None]:
    """The tensors, with those by row and the bias without gaps: they are small beside the others."""
    dense = (None if x is None else x.contiguous() for x in (p.bias, p.a, p.b, p.c))
    return [p.q, p.k, p.v, p.gate, *dense, p.query_mask, p.key_mask, p.cu_seqlens, p.cu_seqlens_k]


def _options(p: GauProblem) -> tuple:
    return p.options[:-1]


def run_cpu(p: GauProblem) -> Results:
    results = empty_results(p)
    extension = native.load()
    assert extension is not None
    inputs = _inputs(p)  # alive while the kernel runs
    extension.gau_attention_cpu(_raw(*inputs), _raw(*results), _options(p), torch.get_num_threads())
    return results


def run_cpu_backward(p: GauProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    bias = None if gradients.bias is None else torch.empty_like(gradients.bias, memory_format=torch.contiguous_format)
    extension = native.load()
    assert extension is not None
    inputs = [*_inputs(p), results.ungated, results.sums, grad_o]
    outputs = _raw(*gradients[:4], bias)
    extension.gau_attention_cpu_backward(_raw(*inputs), outputs, _options(p), torch.get_num_threads())
    return gradients._replace(bias=bias)


def cuda_unsupported(p: GauProblem) -> str | None:
    if p.q.dtype == torch.float64:
        return "its products are those of tensor cores, in float32"
    reason = native.cuda_unsupported(p.device)
    if reason is None and not _fits(p.device, p.q.dtype):
        return f"its tiles in {p.q.dtype} need more shared memory than this GPU has"
    return reason


def _cuda(device: torch.device) -> ModuleType:
    extension = native.load("_emulation" if device.type == "cpu" else "_C")
    assert extension is not None
    return extension


@functools.cache
def _fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a block has shared memory enough."""
    return _cuda(device).gau_attention_cuda_fits(native.DTYPE_CODES[dtype], device.index or 0)


def _longest(p: GauProblem) -> int:
    """Keys of the longest sequence. For packed ones this waits for the GPU."""
    if p.cu_seqlens_k is None:
        return p.k.shape[1]
    return max([0, *p.cu_seqlens_k.diff().tolist()])


def _tiles(p: GauProblem) -> int:
    """Of queries, at most."""
    packed = p.cu_seqlens is not None
    sequences = p.q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
    return _cuda(p.device).gau_attention_cuda_tiles(p.q.shape[0], p.q.shape[1], sequences, packed)


def _operands(p: GauProblem) -> torch.dtype:
    """What products take: float16 in TF32, which has its precision and float32's range."""
    return p.q.dtype if p.q.dtype == torch.bfloat16 else torch.float32


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def run_cuda(p: GauProblem) -> Results:
    results = empty_results(p)
    if p.cu_seqlens is not None:
        for x in results:  # rows of no sequence
            if x is not None:
                x.zero_()
    tile, keys = _cuda(p.device).gau_attention_cuda_tile, _longest(p)
    size = tile * max(tile, _up(keys, tile))
    dtype = _operands(p)
    count = max(1, min(_tiles(p) * p.q.shape[2], p.workspace // (size * dtype.itemsize)))
    scores = p.q.new_empty(count * size, dtype=dtype)
    inputs = _inputs(p)  # alive until the launch
    arguments = (_raw(*inputs), _raw(*results), _options(p), native.raw(scores), keys)
    native.launch("gau_attention_cuda", p.device, *arguments)
    return results


def run_cuda_backward(p: GauProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    if p.cu_seqlens is not None:
        for x in gradients[:3]:
            x.zero_()
    bias = None if gradients.bias is None else torch.zeros_like(gradients.bias, memory_format=torch.contiguous_format)
    tile, keys, dtype = _cuda(p.device).gau_attention_cuda_tile, _longest(p), _operands(p)
    rows = p.q.shape[:3]
    column = 2 * p.q[..., 0].numel() * tile * dtype.itemsize  # a tile of keys, of both workspaces
    panel = tile * max(1, min(_up(keys, tile) // tile, p.workspace // max(1, column)))
    values = _up(p.v.shape[3], 16 // dtype.itemsize)
    tiles = _tiles(p) * p.q.shape[2] * (panel // tile)
    workspaces = (
        p.q.new_empty((*rows, panel), dtype=dtype),
        p.q.new_empty((*rows, panel), dtype=dtype),
        p.q.new_empty((*rows, values), dtype=dtype),
        p.q.new_empty(rows, dtype=torch.float32),
        None if keys <= panel else p.q.new_empty(p.q.shape, dtype=torch.float32),
        None if bias is None else p.q.new_empty((tiles, 2 * tile), dtype=torch.float32),
    )
    inputs = [*_inputs(p), results.ungated, results.sums, grad_o]
    outputs = _raw(*gradients[:4], bias)
    arguments = (_raw(*inputs), outputs, _options(p), _raw(*workspaces), keys, panel)
    native.launch("gau_attention_cuda_backward", p.device, *arguments)
    return gradients._replace(bias=bias)
