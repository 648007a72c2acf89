"""What linear attention remembers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearAttentionState(NamedTuple):
    """All that later tokens need of earlier ones, in float32 (float64 for float64 inputs); sums, so states add.

    kv: S = Σ φ(k) vᵀ, [N, H_k, D_k, D_v].
    z: Σ φ(k), [N, H_k, D_k]; None where nothing is normalised.
    """

    kv: Tensor
    z: Tensor | None
