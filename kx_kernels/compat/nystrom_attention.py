"""Stands in for nystrom-attention (lucidrains).

What is otherwise there, and here:

- Its first value of the inverse has the largest norms of the whole batch: a sample depends on its batch mates. Kept, as
  it is what checkpoints were trained with.
- Where n is no multiple of num_landmarks it pads with zeros in front, which without a mask are attended to. Kept.
- With a mask, outputs at padding are those of uniform weights there, and `to_out`'s of zeros here; the rows that belong
  to padding in returned attentions are zeros as well. A sample of nothing but padding is zeros.
- A module in float16 or bfloat16 raises there without autocast, and works here, the inverse being in float32.
- `return_attn` makes n × n attentions; `kx_kernels.nystrom_attention(return_factors=True)` does without.
- `eps` may be any number there; here 1e-8, its default, or ValueError.
- An even `residual_conv_kernel` raises there; here the convolution reaches one token further back than forth.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.nystrom_attention.api import factors, nystrom_attention


class NystromAttention(nn.Module):
    """Attention of x [B, n, dim] with itself by way of landmarks, with the parameters of the original.

    Args:
        dim: width of inputs and outputs.
        dim_head, heads: D and H.
        num_landmarks, pinv_iterations: as in `kx_kernels.nystrom_attention`.
        residual: whether a depthwise convolution of the values is added, of `residual_conv_kernel` taps.
        eps: added to the numbers of tokens that landmarks are divided by under a mask; 1e-8 is what there is.
        dropout: of outputs.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        residual: bool = True,
        residual_conv_kernel: int = 33,
        eps: float = 1e-8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if eps != 1e-8:
            raise ValueError(f"NystromAttention: eps is {eps!r}; expected 1e-8, which landmarks as lucidrains' have")
        self.eps = eps
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.heads = heads
        self.scale = dim_head**-0.5
        self.residual = residual
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        if residual:
            kernel, padding = (residual_conv_kernel, 1), (residual_conv_kernel // 2, 0)
            self.res_conv = nn.Conv2d(heads, heads, kernel, padding=padding, groups=heads, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_attn: bool = False, return_attn_matrices: bool = False
    ) -> Any:
        """[B, n, dim]; mask [B, n] is bool, False for padding.

        Returns:
            [B, n, dim]; with `return_attn` also the attention [B, H, n', n'], n' being n and the zeros in front; with
            `return_attn_matrices` its three factors [B, H, n', m], [B, H, m, m] and [B, H, m, n'] instead.
        """
        n = x.shape[1]
        short = -n % self.num_landmarks
        x = F.pad(x, (0, 0, short, 0))
        if mask is not None:
            mask = F.pad(mask.bool(), (short, 0))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.to_qkv(x).chunk(3, -1))
        how: dict[str, Any] = {
            "num_landmarks": self.num_landmarks,
            "pinv_iterations": self.pinv_iterations,
            "pinv_init": "original",
            "scale": self.scale,
            "key_padding_mask": mask,
            "landmarks": "lucidrains",
        }
        o = nystrom_attention(q, k, v, conv_weight=self.res_conv.weight if self.residual else None, **how)
        assert isinstance(o, Tensor)
        out = self.to_out(o.flatten(-2))[:, short:]
        if not (return_attn or return_attn_matrices):
            return out
        matrices = tuple(y.to(x.dtype) for y in factors(q, k, v, **how))
        if return_attn_matrices:
            return out, matrices
        front, inverse, back = matrices
        return out, front @ inverse @ back
