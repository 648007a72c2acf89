"""Stands in for FLASH-pytorch's layer of mixed-chunk attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.mixed_chunk_attention.api import mixed_chunk_attention


class OffsetScale(nn.Module):
    """[..., dim] to `heads` tensors of that shape, x ⊙ γ + β with a γ and a β each."""

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.02 * torch.randn(heads, dim))
        self.beta = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.addcmul(self.beta.to(x.dtype), x.unsqueeze(-2), self.gamma.to(x.dtype)).unbind(-2)


class T5RelativePositionBias(nn.Module):
    """A learned number to each of the distances of T5: near ones alone, far ones in buckets that grow with them.

    Args:
        scale: what the numbers are multiplied with.
        causal: keys after the query share the bucket of distance 0.
        num_buckets: of them; half for each direction if not causal.
        max_distance: from which on all share the last.
    """

    def __init__(self, scale: float, causal: bool = False, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.scale = scale
        self.causal = causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, 1)

    def forward(self, length: int) -> Tensor:
        """[2·length − 1]: by the distance from query to key, as `kx_kernels` takes it."""
        weight = self.relative_attention_bias.weight
        back = torch.arange(length - 1, -length, -1, device=weight.device)  # how far the key is before the query
        buckets, first = self.num_buckets, 0 * back
        if self.causal:
            back = back.clamp(min=0)
        else:
            buckets //= 2
            first = torch.where(back < 0, buckets, 0)
            back = back.abs()
        exact = buckets // 2
        growth = torch.log(back.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return weight[first + torch.where(back < exact, back, far), 0] * self.scale


class FLASH(nn.Module):
    """A layer x + to_out(gate ⊙ attention), as the original's: [b, n, dim] to the same.

    Args:
        dim: width of inputs and outputs.
        group_size: tokens of a chunk.
        query_key_dim: s.
        expansion_factor: e / dim.
        causal: a token sees none after it.
        dropout: of the weights within groups. The kernels have none: training with it is refused.
        rotary_pos_emb: an object with the original's `rotate_queries_or_keys`, or None.
        norm_klass: makes the norm before the layer from dim.
        shift_tokens: the first half of the features are those of the token before.
        laplace_attn_fn: "laplace" for squared relu.
        reduce_group_non_causal_attn: if not causal, the linear sum is over the sequence; if False, over the group.
    """

    def __init__(
        self,
        *,
        dim: int,
        group_size: int = 256,
        query_key_dim: int = 128,
        expansion_factor: float = 2.0,
        causal: bool = False,
        dropout: float = 0.0,
        rotary_pos_emb: Any = None,
        norm_klass: Callable[[int], nn.Module] = nn.LayerNorm,
        shift_tokens: bool = False,
        laplace_attn_fn: bool = False,
        reduce_group_non_causal_attn: bool = True,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * expansion_factor)
        self.group_size = group_size
        self.causal = causal
        self.shift_tokens = shift_tokens
        self.activation = "laplace" if laplace_attn_fn else "relu2"
        self.reduce_group_non_causal_attn = reduce_group_non_causal_attn
        self.rotary_pos_emb = rotary_pos_emb
        self.rel_pos_bias = T5RelativePositionBias(query_key_dim**0.5, causal=causal)
        self.norm = norm_klass(dim)
        self.dropout = nn.Dropout(dropout)
        self.to_hidden = nn.Sequential(nn.Linear(dim, hidden_dim * 2), nn.SiLU())
        self.to_qk = nn.Sequential(nn.Linear(dim, query_key_dim), nn.SiLU())
        self.qk_offset_scale = OffsetScale(query_key_dim, heads=4)
        self.to_out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`mask` [b, n], bool: no token sees one that is False, but such a token sees others."""
        if self.training and self.dropout.p > 0:
            raise NotImplementedError(
                f"dropout is {self.dropout.p}; expected 0 in training: no kernel drops weights of attention"
            )
        batch, length, _ = x.shape
        normed = self.norm(x)
        if self.shift_tokens:
            shifted, kept = normed.chunk(2, -1)
            normed = torch.cat((F.pad(shifted, (0, 0, 1, -1)), kept), -1)
        v, gate = self.to_hidden(normed).chunk(2, -1)
        features = self.qk_offset_scale(self.to_qk(normed))
        if self.rotary_pos_emb is not None:
            features = tuple(self.rotary_pos_emb.rotate_queries_or_keys(x) for x in features)
        quad_q, lin_q, quad_k, lin_k = features
        rows = [t.unsqueeze(-2) for t in (quad_q, quad_k, lin_q, lin_k, v, gate)]  # [b, n, 1, s or e]
        if mask is not None:
            mask = mask.reshape(batch, length)
        how: dict[str, Any] = {"causal": self.causal}
        if not self.causal and not self.reduce_group_non_causal_attn:  # groups are sequences, packed
            starts = torch.arange(0, max(length, 1), self.group_size, dtype=torch.int32, device=x.device)
            starts = starts + length * torch.arange(batch, dtype=torch.int32, device=x.device)[:, None]
            how = {"cu_seqlens": F.pad(starts.flatten(), (0, 1), value=batch * length)}
            how["lin_normalizer"] = float(max(length, 1))
            rows = [t.flatten(0, 1) for t in rows]
            mask = None if mask is None else mask.flatten()
        out = mixed_chunk_attention(
            *rows,
            chunk_size=self.group_size,
            preset="lucidrains",
            activation=self.activation,
            bias=self.rel_pos_bias(self.group_size),
            key_padding_mask=mask,
            query_padding_mask=None if mask is None else torch.ones_like(mask),
            **how,
        )
        return self.to_out(out.reshape(batch, length, -1)) + x
