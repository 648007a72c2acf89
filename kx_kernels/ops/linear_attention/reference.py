"""The definition of linear attention in plain torch: any dtype, any device; autograd differentiates it itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.padding import without_padding
from ..._core.rounding import HeldGradient
from ..rope.reference import rope as rotate
from .state import LinearAttentionState


def feature(x: Tensor, name: str, stabilizer: float) -> Tensor:
    """φ(x), element by element."""
    if name == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # F.elu(x) + 1 is 0 where e^x is small
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    if name == "exp":
        return (x - stabilizer).exp()
    return x


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    feature_map: str | Callable[[Tensor], Tensor] = "elu1",
    stabilizer: float = 0.0,
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    decay: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_offset: int | Tensor = 0,
    rope_interleaved: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearAttentionState | tuple[Tensor, Tensor | None] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Linear attention by its T × T weights; `kx_kernels.linear_attention` documents the arguments."""
    return _attend(
        q,
        k,
        v,
        causal,
        feature_map,
        stabilizer,
        normalize,
        eps,
        scale,
        decay,
        rope,
        rope_offset,
        rope_interleaved,
        key_padding_mask,
        cu_seqlens,
        initial_state,
        return_state,
        None,
    )


def eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """The same with features, scores and the gradients of sums held in the tensors' dtype, as eager torch would."""
    call = inspect.signature(linear_attention).bind(q, k, v, **options)
    call.apply_defaults()
    return _attend(**call.arguments, held=q.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    feature_map: str | Callable[[Tensor], Tensor],
    stabilizer: float,
    normalize: bool,
    eps: float,
    scale: float,
    decay: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    rope_offset: int | Tensor,
    rope_interleaved: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: LinearAttentionState | tuple[Tensor, Tensor | None] | None,
    return_state: bool,
    held: torch.dtype | None,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        if callable(feature_map):
            mapped = feature_map
            q, k = (without_padding(x, key_padding_mask, cu_seqlens) for x in (q, k))
            q, k, feature_map = mapped(q).to(v.dtype), mapped(k).to(v.dtype), getattr(mapped, "kernel_map", "identity")
        dtype, packed = q.dtype, cu_seqlens is not None
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        if packed:  # a batch of one
            q, k, v = q[None], k[None], v[None]
        batch, length, heads = q.shape[:3]
        group = heads // k.shape[2]
        row = torch.arange(length, device=q.device)
        if cu_seqlens is None:
            starts = row.new_zeros(1)
            sizes = torch.full_like(starts, length)
        else:
            starts = cu_seqlens[:-1].long()
            sizes = cu_seqlens[1:].long() - starts
        # member[n, t]: token t belongs to sequence n; one sequence where nothing is packed.
        member = (row >= starts[:, None]) & (row < (starts + sizes)[:, None])  # [N, T]
        place = (member * (row - starts[:, None])).sum(0)  # [T], in its sequence
        left = (member * ((starts + sizes)[:, None] - 1 - row)).sum(0)  # tokens that follow
        together = (member[:, :, None] & member[:, None, :]).any(0)  # [T, T]

        keep = member.any(0).expand(batch, length)
        if key_padding_mask is not None:
            keep = keep & key_padding_mask.reshape(batch, length)
        keep = keep[..., None, None]
        a = torch.where(keep, q.to(exact), 0)
        if feature_map == "exp" and normalize:
            a = a - a.amax(-1, keepdim=True).detach()  # cancels against the denominator
        a = feature(a, feature_map, 0.0 if normalize else stabilizer)  # [B, T, H, D_k]
        b = feature(torch.where(keep, k.to(exact), 0), feature_map, stabilizer)
        b = torch.where(keep, b, 0)
        if held is not None:
            a, b = a.to(held).to(exact), b.to(held).to(exact)
        values = torch.where(keep, v.to(exact), 0)
        ra, rb = a, b
        if rope is not None:
            cos, sin = (table.to(exact) for table in rope)
            where: Any = {"offset": rope_offset, "interleaved": rope_interleaved}
            if packed:
                ra, rb = rotate(a[0], b[0], cos, sin, cu_seqlens=cu_seqlens, **where)
                ra, rb = ra[None], rb[None]
            else:
                ra, rb = rotate(a, b, cos, sin, **where)
            ra, rb = torch.where(keep, ra, 0), torch.where(keep, rb, 0)  # whatever the tables say of padding
        b, rb, values = (x.repeat_interleave(group, 2) for x in (b, rb, values))

        apart = place[:, None] - place[None, :]
        visible = together & (apart >= 0) if causal else together
        weight = visible.to(exact).expand(heads, length, length)
        gamma = None
        if decay is not None:
            gamma = decay.to(exact).repeat_interleave(group)[:, None]  # [H, 1]
            weight = weight * gamma[..., None] ** apart.clamp(min=0)
        scores = torch.einsum("bihd,bjhd->bhij", ra, rb) * weight
        if held is not None:
            scores = scores.to(held).to(exact)
        numerator = torch.einsum("bhij,bjhe->bihe", scores, values)
        denominator = torch.einsum("bihd,bjhd,hij->bih", a, b, weight) if normalize else None

        members = member.to(exact)
        kept = (
            torch.ones_like(place, dtype=exact) if gamma is None else gamma ** (place + 1)
        )  # [H, T], of an earlier state
        kv0, z0 = (None, None) if initial_state is None else initial_state
        if kv0 is not None:
            lead = (lambda s: s[None]) if packed else (lambda s: s[:, None])
            before = lead(kv0.to(exact).repeat_interleave(group, 1))  # [B, N, H, D_k, D_v]
            kept_rows = kept.expand(heads, length)
            numerator = numerator + torch.einsum("bihd,ni,hi,bnhde->bihe", ra, members, kept_rows, before)
            if denominator is not None and z0 is not None:
                before = lead(z0.to(exact).repeat_interleave(group, 1))
                denominator = denominator + torch.einsum("bihd,ni,hi,bnhd->bih", a, members, kept_rows, before)
        if held is not None:
            numerator = HeldGradient.apply(numerator, held)
            denominator = None if denominator is None else HeldGradient.apply(denominator, held)
        if denominator is None:
            out = scale * numerator
        else:
            denominator = (denominator + eps)[..., None]
            out = torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1), 0)
        out = torch.where(keep, out, 0).to(dtype)
        if packed:
            out = out[0]
        if not return_state:
            return out

        first = slice(None, None, group)  # a state belongs to a head of k
        still = torch.ones(1, length, dtype=exact, device=q.device) if gamma is None else gamma[first] ** left
        still = still.expand(heads // group, length)
        kv = torch.einsum("nj,hj,bjhd,bjhe->bnhde", members, still, rb[:, :, first], values[:, :, first])
        z = torch.einsum("nj,hj,bjhd->bnhd", members, still, b[:, :, first]) if normalize else None
        drop = 0 if packed else 1
        kv, z = kv.squeeze(drop), None if z is None else z.squeeze(drop)
        if kv0 is not None:
            faded = kv.new_ones(1, 1) if gamma is None else gamma[first, 0] ** sizes[:, None]  # [N, H_k]
            kv = kv + faded[..., None, None] * kv0.to(exact)
            z = z + faded[..., None] * z0.to(exact) if z is not None and z0 is not None else z
        return out, LinearAttentionState(kv, z)
