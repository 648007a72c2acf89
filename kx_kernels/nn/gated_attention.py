"""The gated attention unit with its projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gau_attention.api import PRESETS, gau_attention
from ..ops.gau_inputs.api import ACTIVATIONS, gau_inputs
from .rotary import RotaryEmbedding


@dataclass
class GatedAttentionCache:
    """The keys and values of the tokens so far, in memory that doubles when it is full."""

    keys: Tensor  # [B, capacity, s], turned already
    values: Tensor  # [B, capacity, e]
    mask: Tensor  # bool [B, capacity], False for padding
    length: int = 0

    def append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Further tokens [B, T, ·]."""
        if self.length == 0:  # under autocast they are not as the weights
            self.keys, self.values = self.keys.to(keys.dtype), self.values.to(values.dtype)
        end = self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            more = max(end, 2 * self.keys.shape[1]) - self.keys.shape[1]
            self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.mask = nn.functional.pad(self.mask, (0, more), value=True)
        rows = slice(self.length, end)
        self.keys[:, rows], self.values[:, rows] = keys, values
        if mask is not None:
            self.mask[:, rows] = mask
        self.length = end


class GatedAttentionUnit(nn.Module):
    """Gated attention of a layer's input with itself, in place of attention and feed-forward layer.

    [B, T, embed_dim] to [B, T, embed_dim], without norm and residual: (u, v, z) = φ(x W), queries and keys are
    z ⊙ γ + β, turned, and the output is (u ⊙ attention of v) W_o.

    Args:
        embed_dim: width of inputs and outputs.
        expand_dim: e, of gate and values; 2·embed_dim if None.
        key_dim: s, of queries and keys.
        activation: φ, as in `kx_kernels.gau_inputs`.
        preset, scale, normalizer, causal: as in `kx_kernels.gau_attention`.
        rotary: turns queries and keys by their positions, or None.
        beta: whether queries and keys have offsets β, which begin as 0.
        gamma_mean, gamma_std: of the normal numbers that γ begins as.
        bias: of both projections.

    Source: Hua et al., "Transformer Quality in Linear Time" (arXiv:2202.10447); Su, kexue.fm/archives/8934.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        expand_dim: int | None = None,
        key_dim: int = 128,
        activation: str = "silu",
        preset: str = "su",
        scale: float | str | None = None,
        normalizer: float | str | None = None,
        causal: bool = False,
        rotary: RotaryEmbedding | None = None,
        beta: bool = True,
        gamma_mean: float = 1.0,
        gamma_std: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in (*ACTIVATIONS, "swish"):
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join((*ACTIVATIONS, 'swish'))}")
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
        if rotary is not None and (rotary.start != 0 or rotary.rotary_dim > key_dim):
            what = f"dimensions {rotary.start} to {rotary.start + rotary.rotary_dim}"
            raise ValueError(f"rotary turns {what}; expected to start at 0 and end by key_dim = {key_dim}")
        self.expand_dim = 2 * embed_dim if expand_dim is None else expand_dim
        self.key_dim = key_dim
        self.activation = activation
        self.preset = preset
        self.scale = scale
        self.normalizer = normalizer
        self.causal = causal
        self.rotary = rotary
        kind: Any = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, 2 * self.expand_dim + key_dim, bias=bias, **kind)
        self.out_proj = nn.Linear(self.expand_dim, embed_dim, bias=bias, **kind)
        self.gamma = nn.Parameter(torch.empty(2, key_dim, **kind))  # of queries, of keys
        self.beta = nn.Parameter(torch.zeros(2, key_dim, **kind)) if beta else None
        nn.init.normal_(self.gamma, gamma_mean, gamma_std)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, T, embed_dim], or [total, embed_dim] with cu_seqlens, to the same.

        Args:
            key_padding_mask: [B, T] or [total], bool, False for padding, whose outputs are out_proj's of 0.
            lengths: [B], int32 or int64: tokens of each sequence, in place of a mask.
            cu_seqlens: [N + 1], int32: where packed sequences begin.
        """
        padding: Any = {"key_padding_mask": key_padding_mask, "lengths": lengths, "cu_seqlens": cu_seqlens}
        return self._attend(*self._prepare(x, 0, **padding), **padding)

    def prefill(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> tuple[Tensor, GatedAttentionCache]:
        """As `forward`, and what to go on from with `step`. Padding takes up positions, so it belongs in front."""
        self._check_goes_on()
        gate, v, q, k = self._prepare(x, 0, key_padding_mask=key_padding_mask)
        cache = self.new_cache(x.shape[0], x.shape[1], dtype=v.dtype, device=v.device)
        cache.append(k.detach(), v.detach(), key_padding_mask)
        return self._attend(gate, v, q, k, key_padding_mask=key_padding_mask), cache

    def new_cache(
        self,
        batch: int,
        capacity: int = 0,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> GatedAttentionCache:
        """The cache before the first token, with memory for so many of them. The first tokens decide its dtype."""
        device = self.gamma.device if device is None else device
        kind: Any = {"device": device, "dtype": self.gamma.dtype if dtype is None else dtype}
        keys, values = (torch.zeros(batch, capacity, width, **kind) for width in (self.key_dim, self.expand_dim))
        return GatedAttentionCache(keys, values, torch.ones(batch, capacity, dtype=torch.bool, device=device))

    @torch.no_grad()
    def step(self, x: Tensor, cache: GatedAttentionCache) -> Tensor:
        """One or a few further tokens [B, T, embed_dim]; `cache` grows in place. No gradient."""
        self._check_goes_on()
        gate, v, q, k = self._prepare(x, cache.length)
        cache.append(k, v, None)
        keys, values, mask = (y[:, : cache.length] for y in (cache.keys, cache.values, cache.mask))
        kept = torch.ones_like(mask[:, -x.shape[1] :])
        return self._attend(gate, values, q, keys, key_padding_mask=mask, query_padding_mask=kept)

    def _prepare(self, x: Tensor, offset: int, **padding: Any) -> tuple[Tensor, ...]:
        """Gate, values, queries and keys."""
        u, v, z = self.in_proj(x).split((self.expand_dim, self.expand_dim, self.key_dim), -1)
        where: dict[str, Any] = {}
        if self.rotary is not None:
            length = offset + x.shape[-2]
            where = {"rope": self.rotary.tables(length, x.device), "rope_offset": offset}
            where["rope_interleaved"] = self.rotary.interleaved
        return gau_inputs(u, v, z, self.gamma, self.beta, activation=self.activation, **padding, **where)

    def _attend(self, gate: Tensor, v: Tensor, q: Tensor, k: Tensor, **masks: Any) -> Tensor:
        gate, v, q, k = (y.unsqueeze(-2) for y in (gate, v, q, k))
        formula: Any = {"preset": self.preset, "scale": self.scale, "normalizer": self.normalizer}
        return self.out_proj(gau_attention(q, k, v, gate, causal=self.causal, **formula, **masks).squeeze(-2))

    def _check_goes_on(self) -> None:
        """Rejects a layer whose outputs depend on tokens to come."""
        if not self.causal:
            raise ValueError("causal is False; expected a causal layer: a cache has seen no later tokens")
        for name in ("scale", "normalizer"):
            x = getattr(self, name)
            x = getattr(PRESETS[self.preset], name) if x is None else x
            if x in ("length", "length_squared", "valid"):
                raise ValueError(f"{name} is {x!r}, which later tokens change; expected one that they do not")

    def extra_repr(self) -> str:
        return f"expand_dim={self.expand_dim}, key_dim={self.key_dim}, preset={self.preset!r}, causal={self.causal}"
