"""One checked call of gated attention, as every backend takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._core.checks import check_ends

NUM_TENSORS = 12


class GauProblem(NamedTuple):
    """Sizes as in README.md. Packed sequences are a batch of one."""

    q: Tensor  # [B, n_q, H, s], turned already
    k: Tensor  # [B, n_k, H_k, s]
    v: Tensor  # [B, n_k, H_k, e]
    gate: Tensor | None  # [B, n_q, H, e]
    bias: Tensor | None  # [1 or H, 2·M − 1], of dtype `wide`
    a: Tensor | None  # [B, n_q], of dtype `wide`: a factor of each row's scores beside `scale`
    b: Tensor | None  # and of its bias beside `bias_scale`
    c: Tensor | None  # and what its sum is multiplied with beside `out_scale`
    query_mask: Tensor | None  # bool [B, n_q], False for padding
    key_mask: Tensor | None  # bool [B, n_k]
    cu_seqlens: Tensor | None  # int32 [N + 1], of queries
    cu_seqlens_k: Tensor | None  # and of keys
    activation: int  # place in ACTIVATIONS
    scale: float
    bias_scale: float
    out_scale: float
    by_sum: bool  # c is 1 / the sum of a row's scores
    causal: bool
    workspace: int  # bytes
    keep: bool = True  # what the backward pass is given as well

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        required = (self.q, self.k, self.v)
        rows = (self.a, self.b, self.c, self.query_mask, self.key_mask, self.cu_seqlens, self.cu_seqlens_k)
        return *required, self.gate, self.bias, *rows

    @property
    def options(self) -> tuple:
        return self[NUM_TENSORS:]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums and of what is by row."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Results(NamedTuple):
    """What a forward pass gives."""

    o: Tensor  # [B, n_q, H, e]
    ungated: Tensor | None  # as o, or with sums of dtype `wide`, where a gate or sums are and their gradients need it
    sums: Tensor | None  # [B, n_q, H], of dtype `wide`: of rows of scores, where they divide


class Gradients(NamedTuple):
    """What a backward pass gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    bias: Tensor | None


def whole_rounds(tiles: int, slices: int, processors: int) -> int:
    """As many of these tiles, of `slices` each, as come out even on the processors; all of them if they are too few."""
    rounds = tiles * slices // processors
    return rounds * processors // slices if rounds > 0 else tiles


def empty_results(p: GauProblem) -> Results:
    batch, n_q, heads = p.q.shape[:3]
    o = p.q.new_empty(batch, n_q, heads, p.v.shape[3])
    sums = p.q.new_empty((batch, n_q, heads), dtype=p.wide) if p.by_sum else None
    if not p.keep or (p.gate is None and not p.by_sum):
        return Results(o, None, sums)
    # With sums a bias' gradient is exact to `wide`, and cancels with what a row sums up to.
    return Results(o, torch.empty_like(o, dtype=p.wide if p.by_sum else o.dtype), sums)


def empty_gradients(p: GauProblem) -> Gradients:
    gate, bias = (None if x is None else torch.empty_like(x) for x in (p.gate, p.bias))
    return Gradients(torch.empty_like(p.q), torch.empty_like(p.k), torch.empty_like(p.v), gate, bias)


def check_values(p: GauProblem) -> None:
    """On the CPU, where reading data waits for nothing: raises ValueError for values that no kernel could serve."""
    if p.cu_seqlens is None or p.cu_seqlens_k is None or p.device.type != "cpu":
        return
    check_ends("gau_attention", "cu_seqlens", p.cu_seqlens, p.q.shape[1])
    check_ends("gau_attention", "cu_seqlens_k", p.cu_seqlens_k, p.k.shape[1])
    if p.bias is not None:
        longest = max([0, *p.cu_seqlens.diff().tolist(), *p.cu_seqlens_k.diff().tolist()])
        if p.bias.shape[-1] < 2 * longest - 1:
            raise ValueError(
                f"gau_attention: argument 'bias' has {p.bias.shape[-1]} distances; expected at least "
                f"{2 * longest - 1}, as the longest sequence has {longest} tokens"
            )
