"""Rows that carry no meaning."""

from __future__ import annotations

import torch
from torch import Tensor


def without_padding(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x, [..., T, H, D], with zeros for padding (mask [..., T] False) and for packed rows of no sequence."""
    if mask is not None:
        x = torch.where(mask[..., None, None], x, 0)
    if cu_seqlens is not None:
        row = torch.arange(x.shape[0], device=x.device)
        x = torch.where(((row >= cu_seqlens[0]) & (row < cu_seqlens[-1]))[:, None, None], x, 0)
    return x


def ends_of(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Where packed sequences begin and end, as numbers; somewhere where there is no data, on the meta device."""
    return [0] * (cu_seqlens.shape[0] - 1) + [rows] if cu_seqlens.is_meta else cu_seqlens.tolist()
