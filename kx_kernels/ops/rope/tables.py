"""The cos and sin tables, with phases computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._core.checks import reject


def rope_tables(
    num_positions: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    inv_freq: Tensor | None = None,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · inv_freq, each [num_positions, rotary_dim / 2], for `rope`.

    The phase is computed in float64 and each entry is rounded once to `dtype`: a float32 phase is already wrong by
    6.2e-2 up to position 2^20, a float64 phase by less than a float32 rounding at any position that fits in memory.

    Args:
        num_positions: P, the number of positions, counted from `start`.
        rotary_dim: R, an even number of rotated dimensions.
        base: inv_freq[i] = base^(−2i/R), in radians per position.
        inv_freq: [R/2], frequencies to use instead of `base`'s, in radians per position (position interpolation,
            NTK-aware and YaRN scaling are choices of it).
        start: first position; may be negative.
        dtype: of the tables.
        device: of the tables.

    Raises:
        ValueError: a negative num_positions, an odd or negative rotary_dim, or inv_freq of another shape.

    Source: Su et al., "RoFormer" (arXiv:2104.09864), section 3.2.2.
    """
    if num_positions < 0:
        reject("rope_tables", "num_positions", num_positions, "0 or more")
    if rotary_dim < 0 or rotary_dim % 2:
        reject("rope_tables", "rotary_dim", rotary_dim, "an even number that is not negative")
    if inv_freq is None:
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / max(rotary_dim, 1)
        inv_freq = torch.as_tensor(base, dtype=torch.float64, device=device) ** -exponent
    elif inv_freq.shape != (rotary_dim // 2,):
        reject("rope_tables", "inv_freq", inv_freq, f"shape [R/2] = [{rotary_dim // 2}]")
    position = torch.arange(start, start + num_positions, dtype=torch.float64, device=device)
    phase = position[:, None] * inv_freq.to(device=device, dtype=torch.float64)  # [P, R/2]
    return phase.cos().to(dtype), phase.sin().to(dtype)
