"""Launches the Triton kernels of a gated attention's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import triton
from ._problem import ACTIVATIONS, GauInputsProblem, Gradients, empty_gradients, empty_results

WARPS = 8
MAX_DIM = 2048


def unsupported(p: GauInputsProblem) -> str | None:
    if p.z.shape[2] > MAX_DIM:
        return f"a head has {p.z.shape[2]} dimensions; a program has whole rows of them, of {MAX_DIM} at most"
    return triton.unsupported(p.device, p.z.dtype, _programs(p))


def _widths(p: GauInputsProblem) -> tuple[int, int, int]:
    """e, e' and s."""
    return 0 if p.u is None else p.u.shape[2], p.v.shape[2], p.z.shape[2]


def _blocks(p: GauInputsProblem) -> tuple[int, int]:
    """Rows and columns of a program: as many as leave registers for two blocks or more, and whole heads."""
    elements = 1024 if p.z.dtype == torch.float64 else 2048
    block_t = max(1, min(elements // triton.power_of_two(p.z.shape[2]), 64))
    return block_t, min(elements // block_t, triton.power_of_two(max(_widths(p)[:2])))


def _tiles(p: GauInputsProblem) -> int:
    """Blocks of rows of a batch entry."""
    return -(-p.z.shape[1] // _blocks(p)[0])


def _programs(p: GauInputsProblem) -> int:
    block_e = _blocks(p)[1]
    return p.z.shape[0] * _tiles(p) * (1 + sum(-(-width // block_e) for width in _widths(p)[:2]))


def _rows(x: Tensor | None) -> tuple:
    """A pointer and strides of b, t and d; of fewer dimensions, 0 for those that there are not."""
    return (None, 0, 0, 0) if x is None else (x, *(0,) * (3 - x.dim()), *x.stride())


def _arguments(p: GauInputsProblem, results: Sequence[Tensor]) -> dict[str, Any]:
    """What both kernels are launched with, by name; `results` are those of the call, or their gradients."""
    import triton.language as tl

    e, value_dim, s = _widths(p)
    gate, values, *heads = (None, *results) if p.u is None else results
    rotary_dim = 0 if p.cos is None else 2 * p.cos.shape[1]
    sequences = p.z.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
    block_t, block_e = _blocks(p)
    return {
        "u": _rows(p.u),
        "v": _rows(p.v),
        "z": _rows(p.z),
        "gamma": _rows(p.gamma),
        "gate": _rows(gate),
        "values": _rows(values),
        "heads": tuple(map(_rows, heads)),
        "cos": _rows(p.cos)[:1] + _rows(p.cos)[2:],
        "sin": _rows(p.sin)[:1] + _rows(p.sin)[2:],
        "mask": _rows(p.mask)[:1] + _rows(p.mask)[2:],
        "offsets_ptr": p.offsets,
        "cu_seqlens_ptr": p.cu_seqlens,
        "length": p.z.shape[1],
        "tiles": _tiles(p),
        "table_length": 0 if p.cos is None else p.cos.shape[0],
        "offset": p.offset,
        "sequences": sequences,
        "search_steps": sequences.bit_length(),
        "E": e,
        "V": value_dim,
        "S": s,
        "M": p.gamma.shape[0],
        "R": rotary_dim,
        "ACTIVATION": ACTIVATIONS[p.activation],
        "INTERLEAVED": p.interleaved,
        "HALF": triton.power_of_two(rotary_dim // 2),
        "PASS": triton.power_of_two(s - rotary_dim),
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        "ACC": tl.float64 if p.z.dtype == torch.float64 else tl.float32,
        "num_warps": WARPS,
    }


def run(p: GauInputsProblem) -> list[Tensor]:
    from ._triton_kernel import gau_inputs_kernel

    results = empty_results(p)
    with triton.on(p.device):
        if _programs(p) > 0:
            gau_inputs_kernel[(_programs(p),)](beta=_rows(p.beta), **_arguments(p, results))
    return results


def run_backward(p: GauInputsProblem, grads: Sequence[Tensor]) -> Gradients:
    from ._triton_kernel import gau_inputs_backward_kernel, gau_inputs_sum_kernel

    gradients = empty_gradients(p)
    tiles, (heads, s) = p.z.shape[0] * _tiles(p), p.gamma.shape
    sums = p.z.new_empty((tiles, 2, heads, s), dtype=torch.float64)
    block_c = 16
    with triton.on(p.device):
        arguments = _arguments(p, grads)
        if tiles > 0:
            gau_inputs_backward_kernel[(_programs(p),)](
                grad_u=_rows(gradients.u),
                grad_v=_rows(gradients.v),
                grad_z=_rows(gradients.z),
                sums_ptr=sums,
                **arguments,
            )
        gau_inputs_sum_kernel[(-(-2 * heads * s // block_c),)](
            sums,
            _rows(gradients.gamma),
            _rows(gradients.beta),
            tiles,
            S=s,
            M=heads,
            BLOCK_N=64,
            BLOCK_C=block_c,
            ACC=arguments["ACC"],
            num_warps=4,
        )
    return gradients
