"""One checked call of mixed-chunk attention, as every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.checks import check_ends

NUM_TENSORS = 14


class MixedProblem(NamedTuple):
    """Sizes as in README.md. Packed sequences are a batch of one."""

    quad_q: Tensor  # [B, n, H, s], turned already, as the three after it
    quad_k: Tensor  # [B, n, H_k, s]
    lin_q: Tensor  # [B, n, H, s]
    lin_k: Tensor  # [B, n, H_k, s]
    v: Tensor  # [B, n, H_k, e]
    gate: Tensor | None  # [B, n, H, e]
    bias: Tensor | None  # [1 or H, 2·M − 1], of dtype `wide`
    a: Tensor | None  # [B, n], of dtype `wide`: a factor of each row's scores beside `scale`
    b: Tensor | None  # and of its bias beside `bias_scale`
    c: Tensor | None  # and what its sum within the chunk is multiplied with beside `out_scale`
    d: Tensor | None  # and its sum over other chunks beside `lin_scale`
    query_mask: Tensor | None  # bool [B, n], False for padding
    key_mask: Tensor | None  # bool [B, n]
    cu_seqlens: Tensor | None  # int32 [N + 1]
    chunk_size: int
    activation: int  # place in ACTIVATIONS
    scale: float
    bias_scale: float
    out_scale: float
    lin_scale: float
    causal: bool
    keep: bool = True  # what the backward pass is given as well

    @property
    def device(self) -> torch.device:
        return self.v.device

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        rows = (self.a, self.b, self.c, self.d, self.query_mask, self.key_mask, self.cu_seqlens)
        return self.quad_q, self.quad_k, self.lin_q, self.lin_k, self.v, self.gate, self.bias, *rows

    @property
    def options(self) -> tuple:
        return self[NUM_TENSORS:]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums and of what is by row."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32


class Results(NamedTuple):
    """What a forward pass gives."""

    o: Tensor  # [B, n, H, e]
    ungated: Tensor | None  # as o, where there is a gate whose gradient needs it


class Gradients(NamedTuple):
    """What a backward pass gives."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor
    v: Tensor
    gate: Tensor | None
    bias: Tensor | None


def empty_results(p: MixedProblem) -> Results:
    o = p.v.new_empty(*p.quad_q.shape[:3], p.v.shape[3])
    return Results(o, torch.empty_like(o) if p.keep and p.gate is not None else None)


def empty_gradients(p: MixedProblem) -> Gradients:
    given = (p.quad_q, p.quad_k, p.lin_q, p.lin_k, p.v)
    optional = (None if x is None else torch.empty_like(x) for x in (p.gate, p.bias))
    return Gradients(*(torch.empty_like(x) for x in given), *optional)


def check_values(p: MixedProblem) -> None:
    """On the CPU, where reading data waits for nothing: raises ValueError for values that no kernel could serve."""
    if p.cu_seqlens is None or p.device.type != "cpu":
        return
    check_ends("mixed_chunk_attention", "cu_seqlens", p.cu_seqlens, p.v.shape[1])
    longest = min(p.chunk_size, max([0, *p.cu_seqlens.diff().tolist()]))
    if p.bias is not None and p.bias.shape[-1] < 2 * longest - 1:
        raise ValueError(
            f"mixed_chunk_attention: argument 'bias' has {p.bias.shape[-1]} distances; expected at least "
            f"{2 * longest - 1}, as the longest chunk has {longest} tokens"
        )
