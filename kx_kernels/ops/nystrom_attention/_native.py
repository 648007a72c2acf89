"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes and strides."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..._core import native
from ._problem import Gradients, NystromProblem, Results, empty_gradients, empty_results
from .presets import INITS

MOST = 1 << 14  # landmarks, and dimensions of a head, as csrc/nystrom_attention/cuda.cu checks
FEW_KEYS = 64 << 20  # bytes that take less time to be read once more than a matrix to be inverted


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


def cuda_unsupported(p: NystromProblem) -> str | None:
    if p.q.dtype == torch.float64:
        return "its products are those of tensor cores, in float32"
    if max(p.divisors_q.shape[1], p.q.shape[3], p.v.shape[3]) >= MOST:
        return f"it counts fewer than {MOST} landmarks and dimensions"
    reason = native.cuda_unsupported(p.device)
    if reason is None and not _fits(p.device, p.q.dtype):
        return f"its tiles in {p.q.dtype} need more shared memory than this GPU has"
    return reason


@functools.cache
def _fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a block has shared memory enough."""
    return native.cuda(device).nystrom_attention_cuda_fits(native.DTYPE_CODES[dtype], device.index or 0)


def _cut(p: NystromProblem, length: int) -> tuple[int, int]:
    """Rows of a part of as many queries or keys, whole tiles; and parts of a head, for packed sequences at most."""
    tile = native.cuda(p.device).nystrom_attention_cuda_tile
    wanted = 4 * native.processors(p.device) // max(1, p.q.shape[0] * p.q.shape[2])  # for all processors to have some
    wanted = max(1, wanted)
    span = tile * max(1, -(-length // (wanted * tile)))
    return span, -(-length // span) if p.cu_seqlens is None else length // span + p.road.shape[0]


def _cuts(p: NystromProblem) -> tuple[int, int, int, int]:
    return *_cut(p, p.q.shape[1]), *_cut(p, p.k.shape[1])


def _wide(p: NystromProblem, *shape: int) -> Tensor:
    return p.q.new_empty(shape, dtype=p.wide)


def _units(p: NystromProblem) -> int:
    """Heads of sequences."""
    return p.road.shape[0] * p.q.shape[2]


def _places(p: NystromProblem, parts: int) -> int:
    return p.q.shape[0] * p.q.shape[2] * parts


def _memory(p: NystromProblem, *, backward: bool) -> tuple[Tensor, Tensor]:
    """For sums of columns, and for matrices that have no room on chip."""
    m, device = p.divisors_q.shape[1], p.device
    numbers = native.cuda(device).nystrom_attention_cuda_scratch(m, p.options, backward, device.index or 0)
    return _wide(p, _units(p), m), _wide(p, _units(p), numbers)


def _cuda_inverse(p: NystromProblem, results: Results) -> Tensor | None:
    """[N, H, m, m]: what no iteration gives, of the matrices that the kernel makes."""
    if INITS[p.init] != "pinv":
        return None
    m = p.divisors_q.shape[1]
    matrices = _wide(p, p.road.shape[0], p.q.shape[2], m, m)
    inputs = [*_inputs(p), None]
    outputs = _raw(results.landmarks_q, results.landmarks_k, matrices)
    workspaces = _memory(p, backward=False)
    native.launch("nystrom_attention_cuda_matrices", p.device, _raw(*inputs), outputs, p.options, _raw(*workspaces))
    return torch.linalg.pinv(matrices).contiguous()


def run_cuda(p: NystromProblem) -> Results:
    results = empty_results(p)
    if p.cu_seqlens is not None:
        results.o.zero_()  # rows of no sequence
    if _units(p) == 0:
        return results
    cuts, m, dims = _cuts(p), p.divisors_q.shape[1], p.q.shape[3] + p.v.shape[3]
    inputs, outputs, options = [*_inputs(p), None], _raw(*results), p.options
    sums, memory = _wide(p, _places(p, cuts[3]), m, dims + 2), _memory(p, backward=False)
    beside = INITS[p.init] != "pinv" and p.k.numel() * p.k.itemsize <= FEW_KEYS
    inverse = _wide(p, p.road.shape[0], p.q.shape[2], m, m) if beside else None
    workspaces = [sums, *memory, inverse] if beside else [sums, None, None, None]
    native.launch(
        "nystrom_attention_cuda_landmarks", p.device, _raw(*inputs), outputs, options, cuts, _raw(*workspaces)
    )
    if inverse is None:
        inverse = _cuda_inverse(p, results)
    if inverse is not None:
        inputs[-1], options = inverse, (INITS.index("pinv"), *options[1:])
    native.launch("nystrom_attention_cuda", p.device, _raw(*inputs), outputs, options, cuts, _raw(*memory))
    return results


def run_cuda_backward(p: NystromProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    if p.cu_seqlens is not None:
        for x in gradients[:3]:
            x.zero_()
    conv = gradients.conv_weight
    if _units(p) == 0:
        return gradients._replace(conv_weight=None if conv is None else torch.zeros_like(conv))
    if conv is not None:
        conv = torch.empty_like(conv, memory_format=torch.contiguous_format)
    cuts, units, (m, dim), value_dim = _cuts(p), _units(p), results.landmarks_q.shape[2:], p.v.shape[3]
    numbers = max(_places(p, cuts[1]) * m * (dim + value_dim), _places(p, cuts[3]) * m * dim)
    conv_sums = None if conv is None else p.q.new_zeros((*p.q.shape[::2], cuts[3], conv.shape[1]), dtype=torch.float64)
    columns, scratch = _memory(p, backward=True)
    workspaces = (
        _wide(p, numbers),
        _wide(p, units, m, dim + value_dim),
        torch.empty_like(results.summary),
        torch.empty_like(results.landmarks_q),
        torch.empty_like(results.landmarks_k),
        columns,
        _wide(p, units),
        scratch,
        conv_sums,
    )
    inputs = [*_inputs(p), _cuda_inverse(p, results), *results[1:], grad_o]
    outputs = _raw(*gradients[:3], conv)
    arguments = (_raw(*inputs), outputs, p.options, cuts, _raw(*workspaces))
    native.launch("nystrom_attention_cuda_backward", p.device, *arguments)
    return gradients._replace(conv_weight=None if conv_sums is None else conv_sums.sum((0, 2)).to(p.wide))
