"""The bridge from torch tensors to the compiled kernels: raw pointers, sizes, strides and the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core import native
from ._problem import RopeProblem


def cpu_unsupported(p: RopeProblem) -> str | None:
    return native.cpu_unsupported(p.device)


def cuda_unsupported(p: RopeProblem) -> str | None:
    return native.cuda_unsupported(p.device)


def _arguments(p: RopeProblem, outs: list[Tensor]) -> tuple:
    return (
        [native.raw(x) for x in p.xs],
        [native.raw(y) for y in outs],
        native.raw(p.cos),
        native.raw(p.sin),
        native.raw_or_none(p.positions),
        native.raw_or_none(p.offsets),
        native.raw_or_none(p.cu_seqlens),
        p.offset,
        p.start,
        p.interleaved,
        p.inverse,
    )


def run_cpu(p: RopeProblem, inplace: bool) -> list[Tensor]:
    outs = list(p.xs) if inplace else [torch.empty_like(x) for x in p.xs]
    extension = native.load()
    assert extension is not None
    extension.rope_cpu(*_arguments(p, outs), torch.get_num_threads())
    return outs


def run_cuda(p: RopeProblem, inplace: bool) -> list[Tensor]:
    outs = list(p.xs) if inplace else [torch.empty_like(x) for x in p.xs]
    native.launch("rope_cuda", p.device, *_arguments(p, outs))
    return outs
