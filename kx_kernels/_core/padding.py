"""Rows that carry no meaning."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of(lengths: Tensor, rows: int) -> Tensor:
    """[B, rows]: True for as many of the first as each sequence has."""
    return torch.arange(rows, device=lengths.device) < lengths[:, None]


def without_padding(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x, [..., T, H, D], with zeros for padding (mask [..., T] False) and for packed rows of no sequence."""
    if mask is not None:
        x = torch.where(mask[..., None, None], x, 0)
    if cu_seqlens is not None:
        row = torch.arange(x.shape[0], device=x.device)
        x = torch.where(((row >= cu_seqlens[0]) & (row < cu_seqlens[-1]))[:, None, None], x, 0)
    return x
