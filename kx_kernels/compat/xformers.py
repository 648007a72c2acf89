"""Stands in for the Nyström attention that xformers had until 2024.

What was otherwise there, and is here:

- `causal=True` leaked the future, and dropped values beyond the first num_landmarks; here it raises.
- A key padding mask that leaves a sequence nothing gave NaN, and outputs at padding were those of keys of zero; here
  both are zeros. Padding entered the convolution there, and does not here.
- In float16 and bfloat16 the inverse was iterated in these; here it is in float32.
- A padded sequence differs from the same without padding, as segments are laid over both. Kept: it is the interface's
  convention; `kx_kernels.nystrom_attention` has `landmarks="valid"`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.nystrom_attention.api import nystrom_attention
from ._masks import kept


class NystromAttention(nn.Module):
    """Attention of q, k and v [B·H, n, d] by way of landmarks; exact where there are no more tokens than landmarks.

    Args:
        dropout: of outputs.
        num_heads: H.
        num_landmarks: m.
        landmark_pooling: None; other poolings than means of segments are not there.
        causal: False: landmarks are means over the future as well.
        use_razavi_pinverse: the iterated inverse; else the exact one.
        pinverse_original_init: the first value of the iteration by the largest norm in the call, not of each matrix.
        inv_iterations: its steps.
        v_skip_connection: a module whose output for v [B, H, n, d] is added to the attention; or None.
        conv_kernel_size: taps of a depthwise convolution that takes its place; or None.
    """

    def __init__(
        self,
        dropout: float,
        num_heads: int,
        num_landmarks: int = 64,
        landmark_pooling: nn.Module | None = None,
        causal: bool = False,
        use_razavi_pinverse: bool = True,
        pinverse_original_init: bool = False,
        inv_iterations: int = 6,
        v_skip_connection: nn.Module | None = None,
        conv_kernel_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if causal:
            raise ValueError("NystromAttention: causal is True; expected False: landmarks are means over the future")
        if landmark_pooling is not None:
            raise ValueError("NystromAttention: landmark_pooling is a module; expected None: means of segments")
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.inv_iterations = inv_iterations
        self.pinv_init = "original" if pinverse_original_init else "per_matrix"
        if not use_razavi_pinverse:
            self.pinv_init = "pinv"
        self.attn_drop = nn.Dropout(dropout)
        self.skip_connection = v_skip_connection
        self.convolves = v_skip_connection is None and conv_kernel_size is not None
        if self.convolves:
            assert conv_kernel_size is not None
            kernel, padding = (conv_kernel_size, 1), (conv_kernel_size // 2, 0)
            self.skip_connection = nn.Conv2d(
                num_heads, num_heads, kernel, padding=padding, groups=num_heads, bias=False
            )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[B·H, n, d].

        Args:
            key_padding_mask: [B, n], or [B·H, 1, n] with the same for all heads of a sequence; bool (True keeps), or
                added to scores (−∞ for padding, or −1000 and less). It tells which keys are padding, and nothing
                else. Another shape raises ValueError, integers TypeError.
        """
        q, k, v = (x.unflatten(0, (-1, self.num_heads)).transpose(1, 2) for x in (q, k, v))  # [B, n, H, d]
        weight = self.skip_connection.weight if self.convolves and self.skip_connection is not None else None
        out = nystrom_attention(
            q,
            k,
            v,
            num_landmarks=self.num_landmarks,
            pinv_iterations=self.inv_iterations,
            pinv_init=self.pinv_init,
            key_padding_mask=self._kept(key_padding_mask, k),
            conv_weight=weight if isinstance(weight, Tensor) else None,
            landmarks="xformers",
        )
        assert isinstance(out, Tensor)
        out = out.transpose(1, 2)
        if self.skip_connection is not None and not self.convolves:
            out = out + self.skip_connection(v.transpose(1, 2))
        return self.attn_drop(out.flatten(0, 1))

    def _kept(self, mask: Tensor | None, k: Tensor) -> Tensor | None:
        """[B, n], bool."""
        if mask is None:
            return None
        batch, n = k.shape[:2]
        if mask.shape == (batch * self.num_heads, 1, n):
            mask = mask[:: self.num_heads, 0]
        if mask.shape != (batch, n):
            raise ValueError(
                f"NystromAttention: key_padding_mask has shape {list(mask.shape)}; expected [{batch}, {n}] or "
                f"[{batch * self.num_heads}, 1, {n}]"
            )
        return kept("NystromAttention", "key_padding_mask", mask)
