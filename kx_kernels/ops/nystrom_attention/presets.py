"""Where landmarks are: tables of segments, by the names of those who lay them out so."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.padding import mask_of

CONVENTIONS = ("valid", "mlpen", "lucidrains", "huggingface", "xformers")
INITS = ("per_matrix", "original", "pinv")

# How a sequence is served: README.md, "Landmarks as tables".
NYSTROM, BY_KEYS, BY_QUERIES, NOTHING = range(4)


class Segments(NamedTuple):
    """The landmarks of each sequence, and how many rows it has."""

    bounds: Tensor  # int64 [N, m + 1], ascending: rows where segments begin, and where the last one ends
    divisors: Tensor  # [N, m], 0 for a dead landmark
    valid: Tensor  # int64 [N]: rows that are no padding
    total: Tensor  # int64 [N]


def lay_out(
    convention: str, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, num_landmarks: int, dtype: torch.dtype
) -> Segments:
    """The segments of x [B, n, ...], mask [B, n]; packed sequences are a batch of one."""
    batch, n = x.shape[:2]
    if mask is None and cu_seqlens is None:
        return _lay_out_whole(convention, batch, n, torch.arange(num_landmarks + 1, device=x.device), dtype)
    if cu_seqlens is None:
        first = torch.zeros(batch, 1, dtype=torch.int64, device=x.device)
        last = torch.full_like(first, n)
    else:
        first, last = (ends.long()[:, None].clamp(0, n) for ends in (cu_seqlens[:-1], cu_seqlens[1:]))
    kept = torch.ones(batch, n, dtype=torch.int64, device=x.device) if mask is None else mask.long()
    before = F.pad(kept.cumsum(1), (1, 0))  # [B, n + 1]: rows without padding before one
    if cu_seqlens is not None:
        before = before[0]

    def kept_before(row: Tensor) -> Tensor:
        return before.gather(1, row) if cu_seqlens is None else before[row]

    start = kept_before(first)
    valid, total = kept_before(last) - start, (last - first).clamp(min=0)  # [N, 1]
    step = torch.arange(num_landmarks + 1, device=x.device)

    if convention == "lucidrains":
        size = (total + num_landmarks - 1) // num_landmarks
        bounds = torch.maximum(last - (num_landmarks - step) * size, first)
        counts = kept_before(bounds).diff()
        divisors = size.expand(-1, num_landmarks).to(dtype)
        if mask is not None:
            divisors = torch.where(counts > 0, counts.to(dtype) + 1e-8, 0)
    else:
        ranks = _balanced(step, valid)
        bounds = torch.minimum(torch.searchsorted(before, start + ranks, right=True) - 1, last)
        divisors = ranks.diff()
        if convention != "valid":
            rows = first + _balanced(step, total)
            exact = total <= num_landmarks
            bounds, divisors = torch.where(exact, bounds, rows), torch.where(exact, divisors, rows.diff())
        divisors = divisors.to(dtype)
    return Segments(bounds.contiguous(), divisors.contiguous(), valid[:, 0], total[:, 0])


def _balanced(step: Tensor, count: int | Tensor) -> Tensor:
    """Where `count` rows are cut into segments that differ by at most one; `step` counts from 0 to their number."""
    num_landmarks = step.shape[0] - 1
    return step * (count // num_landmarks) + (step - (num_landmarks - count % num_landmarks)).clamp(min=0)


def _lay_out_whole(convention: str, batch: int, n: int, step: Tensor, dtype: torch.dtype) -> Segments:
    """The segments of sequences without padding, which are one table."""
    num_landmarks = step.shape[0] - 1
    if convention == "lucidrains":
        size = (n + num_landmarks - 1) // num_landmarks
        bounds, divisors = (n - (num_landmarks - step) * size).clamp(min=0), torch.full_like(step[1:], size)
    else:
        bounds = _balanced(step, n)
        divisors = bounds.diff()
    rows = step.new_full((batch,), n)
    table, of_rows = bounds.expand(batch, -1), divisors.to(dtype).expand(batch, -1)
    return Segments(table.contiguous(), of_rows.contiguous(), rows, rows)


def roads(convention: str, of_q: Segments, of_k: Segments) -> Tensor:
    """int32 [N]: how each sequence is served."""
    num_landmarks = of_q.divisors.shape[1]
    size_q, size_k = (x.valid if convention == "valid" else x.total for x in (of_q, of_k))
    road = torch.zeros_like(size_q)
    if convention != "lucidrains":
        road = torch.where(size_q <= num_landmarks, BY_QUERIES, road)
        road = torch.where(size_k <= num_landmarks, BY_KEYS, road)
    return torch.where((of_q.valid == 0) | (of_k.valid == 0), NOTHING, road).int()


def masks(
    q: Tensor, k: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of queries and of keys, for q and k [B, n, H, D]: those of keys are the queries' where n_q = n_k."""
    if lengths is not None:
        key_mask = mask_of(lengths, k.shape[1])
    if query_mask is None and q.shape[1] == k.shape[1]:
        query_mask = key_mask
    return query_mask, key_mask
