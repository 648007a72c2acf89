"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..._core import native
from ._problem import GauProblem, Gradients, Results, empty_gradients, empty_results, whole_rounds

# Scores are made again for each slice of the values, rather than kept in a panel (README.md, CUDA):
ON_CHIP_SLICES = 2  # for so many at most,
ON_CHIP_KEYS = 512  # and where products cost no more than bytes.
LEAST_SEGMENT = 256  # keys that a block sums over, where they are cut at all


def cpu_unsupported(p: GauProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def _raw(*tensors: Tensor | None) -> list[native.RawTensor | None]:
    return [native.raw_or_none(x) for x in tensors]


def _inputs(p: GauProblem) -> list[Tensor | None]:
    """The tensors, with those by row and the bias without gaps: they are small beside the others."""
    dense = (None if x is None else x.contiguous() for x in (p.bias, p.a, p.b, p.c))
    return [p.q, p.k, p.v, p.gate, *dense, p.query_mask, p.key_mask, p.cu_seqlens, p.cu_seqlens_k]


def _options(p: GauProblem) -> tuple:
    """Those before `workspace`."""
    return p.options[:-2]


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


@functools.cache
def _fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a block has shared memory enough."""
    return native.cuda(device).gau_attention_cuda_fits(native.DTYPE_CODES[dtype], device.index or 0)


def _longest(p: GauProblem) -> int:
    """Keys of the longest sequence, at most: of packed ones only the GPU knows more than how far their bias reaches."""
    n_k = p.k.shape[1]
    return n_k if p.cu_seqlens is None or p.bias is None else min(n_k, p.bias.shape[1] // 2 + 1)


def _tiles(p: GauProblem) -> int:
    """Of queries, at most."""
    packed = p.cu_seqlens is not None
    sequences = p.q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
    return native.cuda(p.device).gau_attention_cuda_tiles(p.q.shape[0], p.q.shape[1], sequences, packed)


def _operands(p: GauProblem) -> torch.dtype:
    """What products take: float16 in TF32, which has its precision and float32's range."""
    return p.q.dtype if p.q.dtype == torch.bfloat16 else torch.float32


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@functools.cache
def _fused_columns(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> int:
    """Columns of the values that a block on chip has, or 0 where it has no room."""
    code = native.DTYPE_CODES[dtype]
    return native.cuda(device).gau_attention_cuda_fused_columns(code, key_dim, value_dim, device.index or 0)


class ResidentForm(NamedTuple):
    """How scores stay on chip."""

    most_keys: int
    tile: int  # keys
    columns: int  # of the values, a slice
    at_once: tuple[int, ...]  # clusters that the device runs, of 1, 2, … blocks

    def products(self, rows: int, n_k: int, s: int, e: int, blocks: int) -> int:
        """Of one row of a tile of rows, one multiprocessor's after the other, where clusters of `blocks` share the
        scores of `rows` such tiles."""
        rounds = -(-rows // self.at_once[blocks - 1])
        scores = -(-n_k // (self.tile * blocks)) * self.tile * s
        return rounds * (scores + -(-e // (self.columns * blocks)) * self.columns * n_k)

    def blocks(self, rows: int, n_k: int, s: int, e: int, processors: int) -> int:
        """How many blocks share scores, or 0 where there is no room or they are made sooner again for each slice."""
        slices = -(-e // self.columns)
        if slices < 2 or n_k > self.most_keys:
            return 0
        again = -(-rows * slices // processors) * n_k * (s + self.columns)
        sizes = [n for n in range(1, 1 + min(slices, len(self.at_once))) if self.at_once[n - 1] > 0]
        best = min(sizes, key=lambda n: self.products(rows, n_k, s, e, n), default=0)
        return best if best > 0 and self.products(rows, n_k, s, e, best) < again else 0


@functools.cache
def _resident_form(device: torch.device, dtype: torch.dtype, key_dim: int) -> ResidentForm | None:
    """None where the GPU has no clusters or a block no room."""
    code = native.DTYPE_CODES[dtype]
    form = native.cuda(device).gau_attention_cuda_resident_form(code, key_dim, device.index or 0)
    if not form:
        return None
    most_keys, tile, columns, *at_once = form
    return ResidentForm(most_keys, tile, columns, tuple(at_once))


def _resident_blocks(p: GauProblem) -> int:
    """How many blocks share scores that stay on chip, or 0 where other forms have them."""
    read = _resident_form if p.device.type == "cuda" else _resident_form.__wrapped__  # emulated machines change
    form = read(p.device, p.q.dtype, p.q.shape[3])
    if form is None or p.cu_seqlens is not None:
        return 0
    rows = _tiles(p) * p.q.shape[2]
    return form.blocks(rows, p.k.shape[1], p.q.shape[3], p.v.shape[3], native.processors(p.device))


def _slices_on_chip(p: GauProblem, room: int) -> int:
    """Into how many slices values are cut where each makes its scores again, or 0 where panels of `room` tiles have
    them."""
    n_q, n_k, s, e = p.q.shape[1], p.k.shape[1], p.q.shape[3], p.v.shape[3]
    columns = _fused_columns(p.device, p.q.dtype, s, e)
    if columns == 0:
        return 0
    slices = -(-e // columns)
    few = slices <= ON_CHIP_SLICES or n_k <= ON_CHIP_KEYS or n_q <= native.cuda(p.device).gau_attention_cuda_tile
    idle = room * slices * (slices * s + e) < native.processors(p.device) * (s + e)  # more than is made again
    return slices if few or idle or p.cu_seqlens is not None else 0


def _segment(p: GauProblem, slices: int) -> int:
    """How many keys a block sums over: fewer than all where there are too few blocks for the processors."""
    n_k = max(1, p.k.shape[1])
    blocks = max(1, _tiles(p) * p.q.shape[2] * slices)
    segments = 1 if blocks >= native.processors(p.device) else 2 * native.processors(p.device) // blocks
    part = 4 * p.q[..., 0].numel() * (_up(p.v.shape[3], 4) + 1)
    segments = max(1, min(segments, n_k // LEAST_SEGMENT, p.workspace // max(1, part)))
    return _up(-(-n_k // segments), native.cuda(p.device).gau_attention_cuda_tile)


def _run_fused(p: GauProblem, slices: int, results: Results) -> None:
    segment = _segment(p, slices)
    rows = (-(-p.k.shape[1] // segment), *p.q.shape[:3])
    parts = sums = None
    if rows[0] > 1:
        parts = p.q.new_empty((*rows, _up(p.v.shape[3], 4)), dtype=torch.float32)
        sums = p.q.new_empty(rows, dtype=torch.float32)
    inputs = _inputs(p)  # alive until the launch
    arguments = (_raw(*inputs), _raw(*results), _options(p), *_raw(parts, sums), segment)
    native.launch("gau_attention_cuda_fused", p.device, *arguments)


def run_cuda(p: GauProblem) -> Results:
    results = empty_results(p)
    if p.cu_seqlens is not None:
        for x in results:  # rows of no sequence
            if x is not None:
                x.zero_()
    blocks = _resident_blocks(p)
    if blocks > 0:
        inputs = _inputs(p)  # alive until the launch
        native.launch("gau_attention_cuda_resident", p.device, _raw(*inputs), _raw(*results), _options(p), blocks)
        return results
    tile, keys, dtype = native.cuda(p.device).gau_attention_cuda_tile, _longest(p), _operands(p)
    size = tile * max(tile, _up(keys, tile))
    wide = dtype == torch.bfloat16 and p.v.shape[3] > tile  # two tiles of columns to a block
    of_values = max(1, -(-p.v.shape[3] // (2 * tile if wide else tile)))
    room = whole_rounds(p.workspace // (size * dtype.itemsize), of_values, native.processors(p.device))
    slices = _slices_on_chip(p, room)
    if slices > 0:
        _run_fused(p, slices, results)
        return results
    scores = p.q.new_empty(max(1, min(_tiles(p) * p.q.shape[2], room)) * size, dtype=dtype)
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
    tile, keys, dtype = native.cuda(p.device).gau_attention_cuda_tile, _longest(p), _operands(p)
    rows = p.q.shape[:3]
    column = 2 * p.q[..., 0].numel() * tile * dtype.itemsize  # a tile of keys, of both workspaces
    most = max(1, _up(keys, tile) // tile)
    panel = tile * max(1, min(most, p.workspace // max(1, column)))
    on_chip = p.cu_seqlens is not None and bias is None and panel < keys  # where most panels might find no key
    panel = tile * most if on_chip else panel
    values = _up(p.v.shape[3], 16 // dtype.itemsize)
    tiles = _tiles(p) * p.q.shape[2] * (panel // tile)
    workspaces = (
        *(None if on_chip else p.q.new_empty((*rows, panel), dtype=dtype) for _ in range(2)),
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
