"""Multi-head linear attention with its projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear_attention.api import FEATURE_MAPS, linear_attention, linear_attention_step
from ..ops.linear_attention.state import LinearAttentionState
from .rotary import RotaryEmbedding


@dataclass
class DecodingState:
    """What a layer remembers of the tokens so far: their sums, and how many they were."""

    attention: LinearAttentionState
    length: int = 0


class LinearAttention(nn.Module):
    """Linear attention of a layer's input with itself: [B, T, embed_dim] to [B, T, embed_dim].

    Args:
        embed_dim: width of inputs and outputs.
        num_heads: H, of queries.
        num_kv_heads: H_k, of keys and values; divides H. H if None.
        head_dim: D_k, of queries and keys; embed_dim / H if None.
        value_dim: D_v; D_k if None.
        feature_map: φ, as in `kx_kernels.linear_attention`; a module becomes part of this one. For `new_state`, one
            that makes other than head_dim features says how many as its attribute `num_features`.
        normalize, eps, causal: as there.
        decay: [H_k], factors per token, or None. In no checkpoint: it belongs to the construction.
        rotary: turns the features in the numerator by their positions, or None; of at most as many dimensions as there
            are features.
        bias: of the four projections.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str | Callable[[Tensor], Tensor] = "elu1",
        normalize: bool = True,
        eps: float = 1e-6,
        causal: bool = True,
        decay: Tensor | None = None,
        rotary: RotaryEmbedding | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of embed_dim = {embed_dim}, or a head_dim")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; expected a divisor of num_heads = {num_heads}")
        if isinstance(feature_map, str) and feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map is {feature_map!r}; expected a function, or one of {', '.join(FEATURE_MAPS)}"
            )
        if rotary is not None and rotary.start != 0:
            raise ValueError(f"rotary starts at dimension {rotary.start}; expected 0")
        if decay is not None and not isinstance(decay, Tensor):
            raise TypeError(f"decay is {decay!r}; expected a tensor of shape [{self.num_kv_heads}]")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        features = getattr(feature_map, "num_features", self.head_dim)
        if rotary is not None and rotary.rotary_dim > features:
            raise ValueError(f"rotary turns {rotary.rotary_dim} dimensions; expected at most {features}, the features")
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.feature_map = feature_map
        self.normalize = normalize
        self.eps = eps
        self.causal = causal
        self.rotary = rotary
        self.decay = decay  # no buffer: casting the module leaves it as it is
        kind: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, **kind)
        self.k_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, **kind)
        self.v_proj = nn.Linear(embed_dim, self.num_kv_heads * self.value_dim, **kind)
        self.out_proj = nn.Linear(num_heads * self.value_dim, embed_dim, **kind)

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """[B, T, embed_dim], or [total, embed_dim] with cu_seqlens, to the same.

        Args:
            key_padding_mask: [B, T] or [total], bool, False for padding, whose outputs are out_proj's of 0.
            cu_seqlens: [N + 1], int32: where packed sequences begin.
        """
        length = x.shape[0] if cu_seqlens is not None else x.shape[1]
        out = linear_attention(
            *self._project(x), **self._options(x, 0, length), causal=self.causal, key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.out_proj(out.flatten(-2))

    def prefill(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> tuple[Tensor, DecodingState]:
        """As `forward`, and what to go on from with `step`. Padding takes up positions, so it belongs in front."""
        if not self.causal:
            raise ValueError("causal is False; expected a causal layer: a state has seen no later tokens")
        out, state = linear_attention(
            *self._project(x), **self._options(x, 0, x.shape[1]), key_padding_mask=key_padding_mask, return_state=True
        )
        return self.out_proj(out.flatten(-2)), DecodingState(state, x.shape[1])

    def new_state(self, batch: int, device: torch.device | str | None = None) -> DecodingState:
        """The state before the first token."""
        device = self.q_proj.weight.device if device is None else device
        wide = torch.float64 if self.q_proj.weight.dtype == torch.float64 else torch.float32
        features = getattr(self.feature_map, "num_features", self.head_dim)
        shape = (batch, self.num_kv_heads, features, self.value_dim)
        z = torch.zeros(shape[:-1], dtype=wide, device=device) if self.normalize else None
        return DecodingState(LinearAttentionState(torch.zeros(shape, dtype=wide, device=device), z))

    @torch.no_grad()
    def step(self, x: Tensor, state: DecodingState) -> Tensor:
        """One or a few further tokens [B, T, embed_dim]; `state` is changed in place. No gradient."""
        if not self.causal:
            raise ValueError("causal is False; expected a causal layer: a state has seen no later tokens")
        length = x.shape[1]
        out = linear_attention_step(*self._project(x), state.attention, **self._options(x, state.length, length))
        state.length += length
        return self.out_proj(out.flatten(-2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return q, k, self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim))

    def _options(self, x: Tensor, offset: int, length: int) -> dict[str, Any]:
        options: dict[str, Any] = {"feature_map": self.feature_map, "normalize": self.normalize, "eps": self.eps}
        options["decay"] = None if self.decay is None else self.decay.to(x.device)
        if self.rotary is not None:
            options["rope"] = self.rotary.tables(offset + length, x.device)
            options |= {"rope_offset": offset, "rope_interleaved": self.rotary.interleaved}
        return options

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, feature_map={self.feature_map!r}"
