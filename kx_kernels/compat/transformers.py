"""Stands in for the attention of Hugging Face transformers' Nyströmformer.

What is otherwise there, and here:

- Where num_landmarks equals segment_means_seq_len, as in all published checkpoints, attention is softmax attention over
  all tokens. Kept.
- Else the number of tokens has to be segment_means_seq_len there, and twice as many become two sequences before they
  raise; here it may be any.
- `inv_coeff_init_option` raises TypeError there; here it means what it says: a norm of each matrix instead of the
  largest in the batch, on which samples depend.
- An attention mask raises there, or leaves padding in the landmarks. Here landmarks are laid over the tokens that are
  no padding, and outputs at padding are zeros.
- Padding enters the convolution there. With landmarks it does not here; beside softmax attention it does, as there.
- An even conv_kernel_size raises there; here the convolution reaches one token further back than forth.
- bfloat16 raises there, and works here.
- Dropout of attention probabilities is made there and never applied. Kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import reject
from ..ops.nystrom_attention.api import nystrom_attention
from ._masks import kept


class NystromformerSelfAttention(nn.Module):
    """The original's parameters and results; `config` is its NystromformerConfig, or has its attributes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"The hidden size ({config.hidden_size}) is not a multiple of the number of attention heads "
                f"({config.num_attention_heads})"
            )
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.num_landmarks = config.num_landmarks
        self.seq_len = config.segment_means_seq_len
        self.conv_kernel_size = config.conv_kernel_size
        self.init_option = "per_matrix" if config.inv_coeff_init_option else "original"
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        if self.conv_kernel_size is not None:
            self.conv = nn.Conv2d(
                self.num_attention_heads,
                self.num_attention_heads,
                (self.conv_kernel_size, 1),
                padding=(self.conv_kernel_size // 2, 0),
                groups=self.num_attention_heads,
                bias=False,
            )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """(context [B, n, hidden],), with `output_attentions` also the probabilities [B, H, n, n], or F·Z [B, H, n, m].

        Args:
            attention_mask: [B, 1, 1 or n, n], bool (True keeps) or added to scores; or [B, n], bool or integers, 0 for
                padding, as the library's models are given it. With landmarks it tells which keys are padding, and
                nothing else. Other dtypes raise TypeError.
        """
        attention_mask = _by_score(attention_mask)
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (project(hidden_states).unflatten(-1, heads) for project in (self.query, self.key, self.value))
        weight = None if self.conv_kernel_size is None else self.conv.weight
        if self.num_landmarks == self.seq_len:
            context, probs = self._exact(q, k, v, attention_mask, output_attentions)
        else:
            result = nystrom_attention(
                q,
                k,
                v,
                num_landmarks=self.num_landmarks,
                pinv_init=self.init_option,
                key_padding_mask=_kept_keys(attention_mask, q.shape[1]),
                conv_weight=weight,
                landmarks="huggingface" if attention_mask is None else "valid",
                return_factors=output_attentions,
            )
            context, probs = result[:2] if isinstance(result, tuple) else (result, None)
        context = context.flatten(-2)
        return (context, probs) if probs is not None else (context,)

    def _exact(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        context, probs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None
        if output_attentions:
            identity = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:3], -1)
            probs = F.scaled_dot_product_attention(q, k, identity, attn_mask=mask)
        if self.conv_kernel_size is not None:
            context = context + self.conv(v)[:, :, : v.shape[2]]
        return context.transpose(1, 2), probs


def _by_score(mask: Tensor | None) -> Tensor | None:
    """[B, 1, 1 or n, n], bool or added to scores. Floats [B, n] are refused: they could be either's."""
    if mask is None:
        return None
    if mask.dim() == 2 and not mask.is_floating_point():
        return mask.bool()[:, None, None]
    if mask.dim() == 2 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        wanted = "bool or integers [B, n], or bool or floats [B, 1, 1 or n, n] that are added to scores"
        reject("NystromformerSelfAttention", "attention_mask", mask, wanted, TypeError)
    return mask


def _kept_keys(mask: Tensor | None, n: int) -> Tensor | None:
    """[B, n] of a mask by score: the keys that some query sees."""
    if mask is None:
        return None
    seen = kept("NystromformerSelfAttention", "attention_mask", mask)
    return seen.reshape(seen.shape[0], -1, n).any(1)
