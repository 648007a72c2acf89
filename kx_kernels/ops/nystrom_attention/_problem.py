"""One checked call of Nyström attention, as every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.checks import check_ends

NUM_TENSORS = 12


class NystromProblem(NamedTuple):
    """Symbols as in README.md. Packed sequences are a batch of one; N sequences are batch entries or packed ones."""

    q: Tensor  # [B, n_q, H, D]
    k: Tensor  # [B, n_k, H, D]
    v: Tensor  # [B, n_k, H, D_v]
    conv_weight: Tensor | None  # [H, κ], of dtype `wide`
    query_mask: Tensor | None  # bool [B, n_q], False for padding
    key_mask: Tensor | None  # bool [B, n_k]
    cu_seqlens: Tensor | None  # int32 [N + 1]
    bounds_q: Tensor  # int64 [N, m + 1], rows of q
    divisors_q: Tensor  # [N, m], of dtype `wide`
    bounds_k: Tensor  # int64 [N, m + 1], rows of k
    divisors_k: Tensor  # [N, m]
    road: Tensor  # int32 [N]: how a sequence is served, one of those in presets.py
    init: int  # place in INITS
    iterations: int
    scale: float
    ridge: float

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        required = (self.q, self.k, self.v)
        tables = (self.bounds_q, self.divisors_q, self.bounds_k, self.divisors_k, self.road)
        return *required, self.conv_weight, self.query_mask, self.key_mask, self.cu_seqlens, *tables

    @property
    def options(self) -> tuple:
        return self[NUM_TENSORS:]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums, of the inverse and of what is kept for the backward pass."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Results(NamedTuple):
    """What a forward pass gives: o, and of dtype `wide` what its gradient needs."""

    o: Tensor  # [B, n_q, H, D_v]
    landmarks_q: Tensor  # [N, H, m, D]: Q̃
    landmarks_k: Tensor  # [N, H, m, D]: K̃
    summary: Tensor  # [N, H, m, D_v]: Y
    weighted: Tensor  # [N, H, m, D_v]: W
    norms: Tensor  # [N, H, m, 2]: of rows of B, the largest score x, and Σ e^(score − x)


class Gradients(NamedTuple):
    """What a backward pass gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    conv_weight: Tensor | None


def empty_results(p: NystromProblem) -> Results:
    (batch, n_q, heads, dim), value_dim = p.q.shape, p.v.shape[3]
    lead = (p.divisors_q.shape[0], heads, p.divisors_q.shape[1])
    shapes = ((*lead, dim), (*lead, dim), (*lead, value_dim), (*lead, value_dim), (*lead, 2))
    return Results(
        p.q.new_empty(batch, n_q, heads, value_dim), *(p.q.new_empty(shape, dtype=p.wide) for shape in shapes)
    )


def empty_gradients(p: NystromProblem) -> Gradients:
    conv = None if p.conv_weight is None else torch.empty_like(p.conv_weight)
    return Gradients(torch.empty_like(p.q), torch.empty_like(p.k), torch.empty_like(p.v), conv)


def check_values(p: NystromProblem) -> None:
    """On the CPU, where reading data waits for nothing: raises ValueError for values that no kernel could serve."""
    if p.cu_seqlens is not None and p.device.type == "cpu":
        check_ends("nystrom_attention", "cu_seqlens", p.cu_seqlens, p.q.shape[1])
