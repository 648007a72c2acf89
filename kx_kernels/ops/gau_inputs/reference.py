"""The definition of a gated attention's inputs in plain torch: any dtype, any device, no data needed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.padding import mask_of, without_padding
from ..rope.reference import rope as rotate


def activate(x: Tensor, name: str) -> Tensor:
    """φ(x), element by element."""
    if name == "relu":
        return F.relu(x)
    return F.silu(x) if name in ("silu", "swish") else x


def gau_inputs(
    u: Tensor | None,
    v: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    *,
    activation: str = "silu",
    rope: tuple[Tensor, Tensor] | None = None,
    rope_offset: int | Tensor = 0,
    rope_interleaved: bool = True,
    key_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gate, values and heads, written to be read; `kx_kernels.gau_inputs` documents the arguments."""
    kind = z.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        if lengths is not None:
            key_padding_mask = mask_of(lengths, z.shape[1])
        exact = torch.float64 if z.dtype == torch.float64 else torch.float32

        def kept(x: Tensor) -> Tensor:
            return without_padding(x[..., None, :], key_padding_mask, cu_seqlens).squeeze(-2)

        def activated(x: Tensor) -> Tensor:
            return activate(kept(x).to(exact), activation)

        a = activated(z)  # [B, T, s]
        heads = []
        for m in range(gamma.shape[0]):
            head = a * gamma[m].to(exact)
            if beta is not None:
                head = head + beta[m].to(exact)
            if rope is not None:
                where: Any = {"offset": rope_offset, "cu_seqlens": cu_seqlens}
                turned = rotate(head[..., None, :], None, *rope, **where, interleaved=rope_interleaved)
                assert isinstance(turned, Tensor)
                head = turned.squeeze(-2)
            heads.append(kept(head).to(z.dtype))
        return None if u is None else activated(u).to(z.dtype), activated(v).to(z.dtype), *heads
