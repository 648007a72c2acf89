"""Multi-head Nyström attention with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.nystrom_attention.api import nystrom_attention


class NystromAttention(nn.Module):
    """Attention of a layer's input with itself by way of landmarks: [B, T, embed_dim] to [B, T, embed_dim].

    It sees the future: for encoders.

    Args:
        embed_dim: width of inputs and outputs.
        num_heads: H.
        head_dim: D; embed_dim / H if None.
        num_landmarks, pinv_iterations, pinv_init, ridge: as in `kx_kernels.nystrom_attention`. Sequences of no more
            than `num_landmarks` tokens get exact softmax attention.
        conv_kernel_size: taps of a depthwise convolution of the values, which is added to the heads' outputs; or None.
        bias: of the four projections.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
        pinv_init: str = "per_matrix",
        ridge: float = 0.0,
        conv_kernel_size: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of embed_dim = {embed_dim}, or a head_dim")
        if conv_kernel_size is not None and conv_kernel_size < 1:
            raise ValueError(f"conv_kernel_size is {conv_kernel_size}; expected 1 or more, or None")
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.pinv_init = pinv_init
        self.ridge = ridge
        kind: Any = {"bias": bias, "device": device, "dtype": dtype}
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, inner, **kind) for _ in range(3))
        self.out_proj = nn.Linear(inner, embed_dim, **kind)
        self.conv_weight: nn.Parameter | None = None
        if conv_kernel_size is not None:
            self.conv_weight = nn.Parameter(torch.empty(num_heads, conv_kernel_size, device=device, dtype=dtype))
            nn.init.uniform_(self.conv_weight, -(conv_kernel_size**-0.5), conv_kernel_size**-0.5)

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
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nystrom_attention(
            q,
            k,
            v,
            num_landmarks=self.num_landmarks,
            pinv_iterations=self.pinv_iterations,
            pinv_init=self.pinv_init,
            ridge=self.ridge,
            conv_weight=self.conv_weight,
            key_padding_mask=key_padding_mask,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
        )
        assert isinstance(out, Tensor)
        return self.out_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_landmarks={self.num_landmarks}, pinv_init={self.pinv_init!r}"
