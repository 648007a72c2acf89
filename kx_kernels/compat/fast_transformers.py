"""Stands in for fast-transformers' causal linear attention: its product and its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear_attention.api import linear_attention


def causal_dot_product(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """Σ_{j ≤ i} (Q_i·K_j) V_j, not normalised: Q, K [N, H, L, E] and V [N, H, L, M] to [N, H, L, M]."""
    q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
    return linear_attention(q, k, v, feature_map="identity", normalize=False).transpose(1, 2)


class CausalLinearAttention(nn.Module):
    """Causal linear attention of queries and keys [N, L, H, E] and values [N, L, H, M], normalised.

    Args:
        query_dimensions: E, which a feature map of its own is made for.
        feature_map: as in the original a function that takes E and gives an object with `new_feature_map(device)`,
            `forward_queries` and `forward_keys`; elu(x) + 1 if None.
        eps: added to the sums of weights.
        event_dispatcher: taken and not used.
    """

    def __init__(
        self,
        query_dimensions: int,
        feature_map: Callable[[int], Any] | None = None,
        eps: float = 1e-6,
        event_dispatcher: str = "",
    ) -> None:
        super().__init__()
        self.feature_map = None if feature_map is None else feature_map(query_dimensions)
        self.eps = eps

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Any, query_lengths: Any, key_lengths: Any
    ) -> Tensor:
        """[N, L, H, M]. The masks are the original's: `attn_mask` has to be lower triangular, `key_lengths` may pad.

        Keys and values are cut, or padded, to the length of the queries.
        """
        if not attn_mask.lower_triangular:
            raise RuntimeError("CausalLinearAttention: attn_mask is not lower triangular; expected a causal mask")
        length = queries.shape[1]
        keep = key_lengths.bool_matrix
        if self.feature_map is not None:
            self.feature_map.new_feature_map(queries.device)
            queries, keys = self.feature_map.forward_queries(queries), self.feature_map.forward_keys(keys)
        if keys.shape[1] != length:
            short = max(0, length - keys.shape[1])
            keys, values = (nn.functional.pad(x[:, :length], (0, 0, 0, 0, 0, short)) for x in (keys, values))
            keep = nn.functional.pad(keep[:, :length], (0, short))
        # The original masks keys, not queries: a key without features.
        nothing = -torch.inf if self.feature_map is None else 0.0
        keys = keys.masked_fill(~keep[:, :, None, None], nothing)
        kernel_map = "elu1" if self.feature_map is None else "identity"
        return linear_attention(queries, keys, values, feature_map=kernel_map, eps=self.eps)
