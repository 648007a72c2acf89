"""Launches the Triton kernel of rope."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core import triton
from ._problem import RopeProblem

BLOCK_H = 4  # heads that share the angles in a program's registers
THREADS = 128


def unsupported(p: RopeProblem) -> str | None:
    return triton.unsupported(p.device, p.xs[0].dtype, _programs(p))


def _block_t(p: RopeProblem) -> int:
    """Tokens per program: a thread has one 16-byte vector of each half of a head."""
    half = triton.power_of_two(p.cos.shape[-1])
    return min(max(THREADS * 16 // p.xs[0].element_size() // half, 1), 64)


def _programs(p: RopeProblem) -> int:
    batch = 1 if p.cu_seqlens is not None else p.xs[0].shape[0]
    groups = sum(-(-x.shape[-2] // BLOCK_H) for x in p.xs)
    return batch * groups * -(-p.xs[0].shape[-3] // _block_t(p))


def arguments(p: RopeProblem, outs: list[Tensor]) -> dict[str, Any]:
    """What the kernel is launched with, by name; packed sequences are a batch of one."""
    import triton.language as tl

    q, k = p.xs[0], p.xs[-1]
    head_dim, rotary_dim = q.shape[-1], p.rotary_dim
    batched = q.dim() == 4
    sequences = p.cu_seqlens.shape[0] - 1 if p.cu_seqlens is not None else q.shape[0]
    block_t = _block_t(p)

    def strides(x: Tensor) -> tuple[int, ...]:
        return x.stride() if batched else (0, *x.stride())

    def table_strides(x: Tensor) -> tuple[int, ...]:
        return (0, *x.stride()[-2:]) if x.dim() == 2 or x.shape[0] == 1 else x.stride()

    return {
        "q_ptr": q,
        "q_strides": strides(q),
        "q_out_ptr": outs[0],
        "q_out_strides": strides(outs[0]),
        "q_heads": q.shape[-2],
        "k_ptr": k,
        "k_strides": strides(k),
        "k_out_ptr": outs[-1],
        "k_out_strides": strides(outs[-1]),
        "k_heads": k.shape[-2] if len(p.xs) == 2 else 0,
        "cos_ptr": p.cos,
        "cos_strides": table_strides(p.cos),
        "sin_ptr": p.sin,
        "sin_strides": table_strides(p.sin),
        "positions_ptr": p.positions,
        "position_strides": (0, 0) if p.positions is None else (0, *p.positions.stride())[-2:],
        "offsets_ptr": p.offsets,
        "offset_stride": 0 if p.offsets is None else p.offsets.stride(0),
        "cu_seqlens_ptr": p.cu_seqlens,
        "cu_stride": 0 if p.cu_seqlens is None else p.cu_seqlens.stride(0),
        "length": q.shape[-3],
        "tiles": -(-q.shape[-3] // block_t),
        "table_length": p.cos.shape[-2],
        "offset": p.offset,
        "sequences": sequences,
        "search_steps": (sequences + 1).bit_length(),
        "D": head_dim,
        "R": rotary_dim,
        "START": p.start,
        "INTERLEAVED": p.interleaved,
        "INVERSE": p.inverse,
        "COPY": outs[0] is not q and head_dim > rotary_dim,
        "HALF": triton.power_of_two(rotary_dim // 2),
        "PASS": triton.power_of_two(head_dim - rotary_dim),
        "BLOCK_T": block_t,
        "BLOCK_H": BLOCK_H,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }


def launch(p: RopeProblem, outs: list[Tensor]) -> None:
    """Rotates into `outs`: of any float dtype, rounded once."""
    from ._triton_kernel import rope_kernel

    programs = _programs(p)
    if programs > 0 and p.xs[0].shape[-1] > 0:
        rope_kernel[(programs,)](**arguments(p, outs), num_warps=THREADS // 32)


def run(p: RopeProblem, inplace: bool) -> list[Tensor]:
    outs = list(p.xs) if inplace else [torch.empty_like(x) for x in p.xs]
    with triton.on(p.device):
        launch(p, outs)
    return outs
