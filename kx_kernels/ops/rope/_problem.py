"""One call of rope, after the public function has checked it: what every backend is given."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RopeProblem(NamedTuple):
    """Rotates each tensor of `xs`; row t has position positions[b, t], or its place in its sequence plus offset."""

    xs: tuple[torch.Tensor, ...]  # one or two of [B, T, H, D], or [total, H, D] with cu_seqlens; equal but for H
    cos: torch.Tensor  # [P, R/2] or [B, P, R/2]
    sin: torch.Tensor  # as cos
    positions: torch.Tensor | None  # [B, T] or [total], int32 or int64
    offsets: torch.Tensor | None  # [B], int32 or int64
    cu_seqlens: torch.Tensor | None  # [B + 1], int32
    offset: int  # used where positions and offsets are None
    start: int  # first rotated dimension of the head
    interleaved: bool
    inverse: bool

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.xs[0].device


def check_positions(p: RopeProblem) -> None:
    """On the CPU, where reading data waits for nothing: raises ValueError for a position past the table."""
    if p.positions is None and p.offsets is None and p.cu_seqlens is None:
        return  # known from the shapes; the public function has checked it
    if p.device.type != "cpu" or p.xs[0].numel() == 0:
        return
    if p.positions is not None:
        name, last = "positions", int(p.positions.max())
    else:
        lengths = torch.tensor(p.xs[0].shape[1]) if p.cu_seqlens is None else p.cu_seqlens.diff()
        first = p.offset if p.offsets is None else p.offsets.long()
        ends = torch.where(lengths > 0, lengths + first, 0)
        name = "offset" if p.offsets is not None or p.offset else "cu_seqlens"
        last = int(ends.max()) - 1 if ends.numel() else -1
    length = p.cos.shape[-2]
    if last >= length:
        raise ValueError(
            f"rope: argument {name!r} reaches position {last}; expected every position to be in the tables, which hold "
            f"positions 0 to {length - 1}"
        )
