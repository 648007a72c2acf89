"""Performer's random features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FavorFeatures(nn.Module):
    """FAVOR+: positive random features whose products estimate softmax attention's exp(q·k / √D).

    φ(x) = exp(w·y − |y|²/2) / √M with y = x / D^(1/4) and M rows w of normal numbers, orthogonal within each D of them.
    A feature map for `kx_kernels.linear_attention`: calling it gives the logarithms [..., M], by one product in torch;
    the exponential is the kernel's.

    Args:
        head_dim: D.
        num_features: M; D·ln D if None, as the paper finds enough.
        seed: of the draw; the same number gives the same features everywhere. None draws from torch's generator.

    Source: Choromanski et al., "Rethinking Attention with Performers" (arXiv:2009.14794), equations 7 and 9.
    """

    kernel_map = "exp"
    projection: Tensor

    def __init__(self, head_dim: int, num_features: int | None = None, *, seed: int | None = 0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.num_features = num_features or max(1, round(head_dim * torch.tensor(float(head_dim)).log().item()))
        self.register_buffer("projection", torch.empty(self.num_features, head_dim))  # [M, D], rows w
        self.redraw(seed)

    def redraw(self, seed: int | None = None) -> None:
        """Draws other features, from torch's generator or from a seed."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        blocks = []
        for _ in range(-(-self.num_features // self.head_dim)):
            square = torch.randn(self.head_dim, self.head_dim, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(square)
            q = q * r.diagonal().sign()  # evenly among all rotations
            norms = torch.randn(self.head_dim, self.head_dim, generator=generator, dtype=torch.float64).norm(dim=1)
            blocks.append(norms[:, None] * q.T)
        self.projection.copy_(torch.cat(blocks)[: self.num_features])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., M]: the logarithms of the features."""
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"x has shape {list(x.shape)}; expected head_dim = {self.head_dim} in the last dimension")
        y = x * self.head_dim**-0.25
        half_log = torch.tensor(float(self.num_features)).log().item() / 2
        return y @ self.projection.to(y.dtype).T - y.square().sum(-1, keepdim=True) / 2 - half_log

    def extra_repr(self) -> str:
        return f"{self.head_dim}, num_features={self.num_features}"
