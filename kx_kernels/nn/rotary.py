"""Rotary position embedding with its tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rope.api import rope
from ..ops.rope.tables import rope_tables


class RotaryEmbedding(nn.Module):
    """Holds the float32 tables of `kx_kernels.rope` and makes them longer as positions grow.

    The tables are no buffers: they follow the device of the queries, casting the module leaves them in float32, and no
    checkpoint holds them.

    Args:
        rotary_dim: R, even; how many dimensions of each head turn.
        base: inv_freq[i] = base^(−2i/R), in radians per position.
        inv_freq: [R/2], frequencies to use instead of `base`'s.
        interleaved: pairs (0, 1), (2, 3), … if True; (i, i + R/2) if False.
        start: first rotated dimension of the head.
        max_positions: length of the first tables.
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        base: float = 10000.0,
        inv_freq: Tensor | None = None,
        interleaved: bool = True,
        start: int = 0,
        max_positions: int = 2048,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim
        self.base = base
        self.inv_freq = None if inv_freq is None else inv_freq.detach().double().cpu()
        self.interleaved = interleaved
        self.start = start
        self.max_positions = max_positions
        self._tables = rope_tables(0, rotary_dim, base=base, inv_freq=self.inv_freq)

    def tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin on `device`, each [P, R/2] float32, with P at least num_positions."""
        cos, _ = self._tables
        if cos.device != device or cos.shape[0] < num_positions or cos.shape[0] == 0:
            length = max(self.max_positions, num_positions)
            if num_positions > self.max_positions:
                length = max(length, 2 * cos.shape[0])  # doubling: a growing sequence rebuilds them seldom
            self._tables = rope_tables(length, self.rotary_dim, base=self.base, inv_freq=self.inv_freq, device=device)
        return self._tables

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        num_positions: int | None = None,
        inverse: bool = False,
        inplace: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates q, or q and k; the arguments are those of `kx_kernels.rope`.

        Args:
            num_positions: how many positions the tables have to hold (one past the largest position). Needed only where
                positions or offsets lie on a GPU and may pass the tables built so far: reading them would wait for it.
        """
        if num_positions is None:
            num_positions = _known_positions(q, positions, offset, cu_seqlens)
        cos, sin = self.tables(num_positions, q.device)
        where: Any = {"positions": positions, "offset": offset, "cu_seqlens": cu_seqlens}
        how: Any = {"start": self.start, "interleaved": self.interleaved, "inverse": inverse, "inplace": inplace}
        return rope(q, k, cos, sin, rotary_dim=self.rotary_dim, **where, **how)

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, base={self.base}, interleaved={self.interleaved}, start={self.start}"


def _known_positions(q: Tensor, positions: Tensor | None, offset: int | Tensor, cu_seqlens: Tensor | None) -> int:
    """One past the largest position, as far as it is known without waiting for a device."""
    given = positions if positions is not None else offset
    if isinstance(given, Tensor):
        if given.device.type != "cpu" or given.numel() == 0:
            return 0
        last = int(given.max())
        return last + 1 if positions is not None else last + _longest(q, cu_seqlens)
    return given + _longest(q, cu_seqlens)


def _longest(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """The length of the longest sequence, or a bound on it."""
    if cu_seqlens is None:
        return q.shape[1]
    if cu_seqlens.device.type == "cpu" and cu_seqlens.shape[0] > 1:
        return int(cu_seqlens.diff().max())
    return q.shape[0]
