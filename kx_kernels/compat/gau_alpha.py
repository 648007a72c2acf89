"""Stands in for GAU-α's gated attention unit in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gau_attention.api import gau_attention
from ..ops.gau_inputs.api import gau_inputs

NORMALIZATIONS = ("softmax_plus", "squared_relu", "softmax")


class ScaleOffset(nn.Module):
    """A scale `weight`, and an offset `bias` if there is one, [hidden_size]: parameters only."""

    def __init__(self, hidden_size: int = 768, offset: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if offset else None


class GatedAttentionUnit(nn.Module):
    """The layer of GAU-α: [b, n, hidden_size] to a tuple of the same and, if asked for, the weights [b, n, n].

    Args:
        hidden_size: width of inputs and outputs.
        intermediate_size: e, of gate and values.
        attention_key_size: s, of queries and keys.
        activation: "swish", "silu" or "relu".
        use_bias: of both projections, and whether queries and keys have offsets.
        normalization: "softmax_plus" (scores times log l / log 512 for l visible keys), "squared_relu" or "softmax".
        attention_scale: whether scores are divided by √s.
        attention_dropout: of the weights, while it trains; these are n × n in memory then.

    In the original a query that sees nothing sees padding or gives NaN, and by softmax_plus so does one that sees a
    single key. Here the first gives 0, and the second sees that key.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 1536,
        attention_key_size: int = 128,
        activation: str = "swish",
        use_bias: bool = False,
        normalization: str = "softmax_plus",
        attention_scale: bool = True,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}; expected one of {', '.join(NORMALIZATIONS)}")
        if activation not in ("swish", "silu", "relu"):
            raise ValueError(f"activation is {activation!r}; expected swish, silu or relu")
        self.activation = activation
        self.intermediate_size = intermediate_size
        self.attention_key_size = attention_key_size
        self.normalization = normalization
        self.attention_scale = attention_scale
        self.attention_dropout = attention_dropout
        self.use_bias = use_bias
        self.i_dense = nn.Linear(hidden_size, 2 * intermediate_size + attention_key_size, bias=use_bias)
        self.o_dense = nn.Linear(intermediate_size, hidden_size, bias=use_bias)
        self.q_scaleoffset = ScaleOffset(attention_key_size, offset=use_bias)
        self.k_scaleoffset = ScaleOffset(attention_key_size, offset=use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """(output,) or (output, weights).

        Args:
            attention_mask: [b, 1, n] or [b, n, n], 0 for keys that a query does not see, 1 otherwise.
            sinusoidal_pos: sin and cos, each [1, n, s/2], by which neighbouring dimensions turn.
        """
        e, s = self.intermediate_size, self.attention_key_size
        u, v, z = self.i_dense(hidden_states).split((e, e, s), -1)
        of_q, of_k = self.q_scaleoffset, self.k_scaleoffset
        gamma = torch.stack((of_q.weight, of_k.weight))
        beta = None if of_q.bias is None or of_k.bias is None else torch.stack((of_q.bias, of_k.bias))
        tables = None if sinusoidal_pos is None else (sinusoidal_pos[1].squeeze(0), sinusoidal_pos[0].squeeze(0))
        gate, v, q, k = gau_inputs(u, v, z, gamma, beta, activation=self.activation, rope=tables)
        dropping = self.training and self.attention_dropout > 0
        if not output_attentions and not dropping:
            return (self.o_dense(gate * self._attend(q, k, v, attention_mask)),)
        one_by_one = torch.eye(k.shape[1], dtype=v.dtype, device=v.device).expand(len(v), -1, -1)
        weights = F.dropout(self._attend(q, k, one_by_one, attention_mask), self.attention_dropout, self.training)
        output = self.o_dense(gate * (weights @ v))
        return (output, weights) if output_attentions else (output,)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[b, n, e], before the gate."""
        scale: float | Tensor = q.shape[-1] ** -0.5 if self.attention_scale else 1.0
        visible = None if attention_mask is None else attention_mask != 0  # [b, 1 or n, n]
        if self.normalization == "softmax_plus":
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            count = torch.full_like(q[..., 0], k.shape[1], dtype=wide)  # [b, n]
            if visible is not None:
                count = visible.sum(-1).clamp(min=1).to(wide).expand_as(count)
            scale = scale * count.log() / math.log(512)
        if visible is not None and visible.shape[1] > 1:
            return self._attend_by_matrix(q, k, v, scale, visible)
        how: dict[str, Any] = {"activation": "relu2", "normalizer": "valid"}
        if self.normalization != "squared_relu":
            how = {"preset": "gau_alpha", "activation": "softmax"}
        if visible is not None:  # padding is no key, but a query
            mask = visible.squeeze(1)
            how |= {"key_padding_mask": mask, "query_padding_mask": torch.ones_like(mask)}
        return gau_attention(q[:, :, None], k[:, :, None], v[:, :, None], scale=scale, **how).squeeze(2)

    def _attend_by_matrix(self, q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, visible: Tensor) -> Tensor:
        """The same where queries see keys of their own: by torch, as weights are masked one by one."""
        if self.normalization == "squared_relu":
            one_by_one = torch.eye(k.shape[1], dtype=v.dtype, device=v.device).expand(len(v), -1, -1)
            weights = gau_attention(
                q[:, :, None], k[:, :, None], one_by_one[:, :, None], scale=scale, normalizer="none"
            ).squeeze(2)
            return torch.where(visible, weights, 0) / visible.sum(-1, keepdim=True).clamp(min=1) @ v
        q = q * (scale[..., None].to(q.dtype) if isinstance(scale, Tensor) else scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)
