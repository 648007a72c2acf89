"""Stands in for performer-pytorch's causal linear attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear_attention.api import linear_attention


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalised causal linear attention of features: q and k [B, H, N, D], v [B, H, N, E] to [B, H, N, E].

    As in the original eps is added to every feature of the sums of keys, not to the sums of weights.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv = q.new_zeros((*k.shape[:2], k.shape[3], v.shape[3]), dtype=wide)
    before = (kv, kv.new_full(kv.shape[:-1], eps))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return linear_attention(q, k, v, feature_map="identity", eps=0.0, initial_state=before).transpose(1, 2)
