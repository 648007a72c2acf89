"""FLASH's layer with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.gau_inputs.api import gau_inputs
from ..ops.mixed_chunk_attention.api import mixed_chunk_attention
from .rotary import RotaryEmbedding


class FLASH(nn.Module):
    """A unit of mixed-chunk attention, [B, n, embed_dim] to the same; two stand in for attention and feed-forward.

    u, v, z = silu(in_proj(x)), split into widths e, e and s; quad_q, quad_k, lin_q, lin_k = z ⊙ γ + β with a γ and a β
    each; out_proj(mixed_chunk_attention(quad_q, quad_k, lin_q, lin_k, v, u)). One head; neither norm nor residual.

    Args:
        embed_dim: width of inputs and outputs.
        value_dim: e; 2 · embed_dim if None.
        key_dim: s.
        chunk_size, causal, preset, activation: as in `kx_kernels.mixed_chunk_attention`.
        rotary: turns queries and keys by their positions, or None; of at most key_dim dimensions.
        bias: of both projections.

    γ begins as ones: where it begins near 0, as in the paper, squares of scores vanish in half precision.

    Source: Hua et al., "Transformer Quality in Linear Time" (arXiv:2202.10447); Su, kexue.fm/archives/8934.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        value_dim: int | None = None,
        key_dim: int = 128,
        chunk_size: int = 256,
        causal: bool = False,
        preset: str = "su",
        activation: str | None = None,
        rotary: RotaryEmbedding | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rotary is not None and rotary.start != 0:
            raise ValueError(f"rotary starts at dimension {rotary.start}; expected 0")
        if rotary is not None and rotary.rotary_dim > key_dim:
            raise ValueError(f"rotary turns {rotary.rotary_dim} dimensions; expected at most key_dim = {key_dim}")
        self.value_dim = 2 * embed_dim if value_dim is None else value_dim
        self.key_dim = key_dim
        self.chunk_size = chunk_size
        self.causal = causal
        self.preset = preset
        self.activation = activation
        self.rotary = rotary
        kind: Any = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, 2 * self.value_dim + key_dim, bias=bias, **kind)
        self.gamma = nn.Parameter(torch.ones(4, key_dim, **kind))
        self.beta = nn.Parameter(torch.zeros(4, key_dim, **kind))
        self.out_proj = nn.Linear(self.value_dim, embed_dim, bias=bias, **kind)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, n, embed_dim], or [total, embed_dim] with cu_seqlens, to the same.

        Args:
            key_padding_mask: [B, n] or [total], bool, False for padding, whose outputs are out_proj's of 0.
            lengths: [B], int32 or int64: tokens of each sequence, in place of a mask.
            cu_seqlens: [N + 1], int32: where packed sequences begin.
        """
        widths = (self.value_dim, self.value_dim, self.key_dim)
        u, v, z = self.in_proj(x).split(widths, -1)
        padding: Any = {"key_padding_mask": key_padding_mask, "lengths": lengths, "cu_seqlens": cu_seqlens}
        rows = gau_inputs(u, v, z, self.gamma, self.beta, **padding)
        u, v, quad_q, quad_k, lin_q, lin_k = (y.unsqueeze(-2) for y in rows)  # [..., 1, width]
        how: dict[str, Any] = {"preset": self.preset, "activation": self.activation, "causal": self.causal}
        if self.rotary is not None:
            length = x.shape[0] if cu_seqlens is not None else x.shape[1]
            how |= {"rope": self.rotary.tables(length, x.device), "rope_interleaved": self.rotary.interleaved}
        how |= padding | {"chunk_size": self.chunk_size}
        return self.out_proj(mixed_chunk_attention(quad_q, quad_k, lin_q, lin_k, v, u, **how).flatten(-2))

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, causal={self.causal}, preset={self.preset!r}"
