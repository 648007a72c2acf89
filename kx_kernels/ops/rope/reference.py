"""The definition of rope in plain torch: any dtype, any device, no data needed; autograd differentiates it itself."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def _row_positions(
    x: Tensor, positions: Tensor | None, offset: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each row's position and sequence, both [B, T] (or [total]); a row that belongs to no sequence has position −1."""
    if cu_seqlens is None:
        batch, length = x.shape[:2]
        sequence = torch.arange(batch, device=x.device)[:, None].expand(batch, length)
        place = torch.arange(length, device=x.device).expand(batch, length)
        inside = torch.ones_like(place, dtype=torch.bool)
    else:
        row = torch.arange(x.shape[0], device=x.device)
        last = cu_seqlens.shape[0] - 2
        sequence = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
        inside = (sequence >= 0) & (sequence <= last)
        sequence = sequence.clamp(0, max(last, 0))
        place = row - cu_seqlens[sequence]
    if positions is not None:
        position = positions.long().expand(place.shape)
    elif isinstance(offset, Tensor) and offset.numel() > 0:
        position = place + offset.long()[sequence]
    else:
        position = place + (0 if isinstance(offset, Tensor) else offset)
    return torch.where(inside, position, -1), sequence


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, sequence: Tensor, start: int, interleaved: bool
) -> Tensor:
    length, half = cos.shape[-2:]
    rotated = x[..., start : start + 2 * half]  # [..., H, R]
    x0, x1 = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])

    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    x0, x1 = x0.to(arithmetic), x1.to(arithmetic)
    known = position < length
    row = position.clamp(0, max(length - 1, 0))
    if length == 0:
        c = s = position.new_full((*position.shape, 1, half), torch.nan, dtype=arithmetic)
    else:
        index = (row,) if cos.dim() == 2 else (sequence if cos.shape[0] > 1 else 0 * sequence, row)
        c, s = (  # [..., 1, R/2]; a position past the table has no angle
            torch.where(known[..., None], table[index].to(arithmetic), torch.nan)[..., None, :] for table in (cos, sin)
        )
    y0, y1 = x0 * c - x1 * s, x1 * c + x0 * s
    y = torch.stack((y0, y1), -1).flatten(-2) if interleaved else torch.cat((y0, y1), -1)
    y = torch.where((position < 0)[..., None, None], rotated, y.to(x.dtype))  # padding passes through
    return torch.cat((x[..., :start], y, x[..., start + 2 * half :]), -1)


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    rotary_dim: int | None = None,
    start: int = 0,
    interleaved: bool = True,
    inverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding, written to be read; `kx_kernels.rope` documents the arguments."""
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        position, sequence = _row_positions(q, positions, offset, cu_seqlens)
        sin = -sin if inverse else sin
        rotated_q = _rotate(q, cos, sin, position, sequence, start, interleaved)
        return rotated_q if k is None else (rotated_q, _rotate(k, cos, sin, position, sequence, start, interleaved))
