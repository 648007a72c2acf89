"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

import functools

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


def _options(p: MixedProblem) -> tuple:
    """Those before `keep`."""
    return p.options[:-1]


def run_cpu(p: MixedProblem) -> Results:
    results = empty_results(p)
    extension = native.load()
    assert extension is not None
    inputs = _inputs(p)  # alive while the kernel runs
    extension.mixed_chunk_attention_cpu(_raw(*inputs), _raw(*results), _options(p), torch.get_num_threads())
    return results


def run_cpu_backward(p: MixedProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    bias = None if gradients.bias is None else torch.empty_like(gradients.bias, memory_format=torch.contiguous_format)
    extension = native.load()
    assert extension is not None
    inputs = [*_inputs(p), results.ungated, grad_o]
    outputs = _raw(*gradients[:6], bias)
    extension.mixed_chunk_attention_cpu_backward(_raw(*inputs), outputs, _options(p), torch.get_num_threads())
    return gradients._replace(bias=bias)


def cuda_unsupported(p: MixedProblem) -> str | None:
    if p.v.dtype == torch.float64:
        return "its products are those of tensor cores, in float32"
    reason = native.cuda_unsupported(p.device)
    if reason is None and not _fits(p.device, p.v.dtype):
        return f"its tiles in {p.v.dtype} need more shared memory than this GPU has"
    return reason


@functools.cache
def _fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a block, one of gated attention's, has shared memory enough."""
    return native.cuda(device).gau_attention_cuda_fits(native.DTYPE_CODES[dtype], device.index or 0)


def _longest(p: MixedProblem) -> int:
    """Tokens of the longest chunk, at most."""
    return min(p.chunk_size, p.v.shape[1])


def _chunks(p: MixedProblem) -> int:
    """Places for chunks."""
    packed = p.cu_seqlens is not None
    sequences = p.v.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
    return native.cuda(p.device).mixed_chunk_attention_cuda_chunks(*p.v.shape[:2], sequences, packed, p.chunk_size)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _tiles(p: MixedProblem, longest: int) -> int:
    """Of a chunk's tokens."""
    tile = native.cuda(p.device).gau_attention_cuda_tile
    return _up(max(longest, 1), tile) // tile


def _operands(p: MixedProblem) -> torch.dtype:
    """What products take: float16 in TF32, which has its precision and float32's range."""
    return p.v.dtype if p.v.dtype == torch.bfloat16 else torch.float32


def _rows(p: MixedProblem, width: int) -> Tensor:
    """A workspace [B, n, H, width] of what products take, whose rows begin at multiples of 16 bytes."""
    dtype = _operands(p)
    return p.v.new_empty((*p.quad_q.shape[:3], _up(width, 16 // dtype.itemsize)), dtype=dtype)


def _scores(p: MixedProblem, longest: int) -> Tensor:
    return _rows(p, _tiles(p, longest) * native.cuda(p.device).gau_attention_cuda_tile)


def _states(p: MixedProblem) -> tuple[Tensor, Tensor]:
    """Those of chunks, and what chunks take of them."""
    dtype = _operands(p)
    size = (_chunks(p), p.v.shape[2], p.quad_q.shape[3], _up(p.v.shape[3], 16 // dtype.itemsize))
    own = p.v.new_empty(size, dtype=torch.float32)
    return own, own if dtype == torch.float32 else torch.empty_like(own, dtype=dtype)


def run_cuda(p: MixedProblem) -> Results:
    results = empty_results(p)
    if p.cu_seqlens is not None:
        for x in results:  # rows of no sequence
            if x is not None:
                x.zero_()
    longest = _longest(p)
    workspaces = (_scores(p, longest), *_states(p))
    inputs = _inputs(p)  # alive until the launch
    arguments = (_raw(*inputs), _raw(*results), _options(p), _raw(*workspaces), longest)
    native.launch("mixed_chunk_attention_cuda", p.device, *arguments)
    return results


def run_cuda_backward(p: MixedProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    if p.cu_seqlens is not None:
        for x in gradients[:5]:
            x.zero_()
    bias = None if gradients.bias is None else torch.empty_like(gradients.bias, memory_format=torch.contiguous_format)
    longest = _longest(p)
    tiles, tile = _tiles(p, longest), native.cuda(p.device).gau_attention_cuda_tile
    diagonals = (_chunks(p), tiles, tiles, p.quad_q.shape[2], 2 * tile)
    workspaces = (
        _scores(p, longest),
        *_states(p),
        *_states(p),
        _scores(p, longest),
        _rows(p, p.v.shape[3]),
        _rows(p, p.quad_q.shape[3]),
        None if bias is None else p.v.new_empty(diagonals, dtype=torch.float32),
    )
    inputs = [*_inputs(p), results.ungated, grad_o]
    arguments = (_raw(*inputs), _raw(*gradients[:6], bias), _options(p), _raw(*workspaces), longest)
    native.launch("mixed_chunk_attention_cuda_backward", p.device, *arguments)
    return gradients._replace(bias=bias)
