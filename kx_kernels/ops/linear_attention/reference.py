"""The definition of linear attention in plain torch: any dtype, any device; autograd differentiates it itself."""

from __future__ import annotations

import contextlib
import inspect
import itertools
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
    return _attend(held=None, **locals())


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
    call = dict(locals())
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        if callable(feature_map):
            q, k = (feature_map(without_padding(x, key_padding_mask, cu_seqlens)).to(v.dtype) for x in (q, k))
            return _attend(**call | {"q": q, "k": k, "feature_map": getattr(feature_map, "kernel_map", "identity")})
        if cu_seqlens is not None:
            return _packed(cu_seqlens, call)
        dtype = q.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        batch, length, heads = q.shape[:3]
        group = heads // k.shape[2]
        place = torch.arange(length, device=q.device)
        keep = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        if key_padding_mask is not None:
            keep = key_padding_mask.reshape(batch, length)
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
            ra, rb = rotate(a, b, cos, sin, offset=rope_offset, interleaved=rope_interleaved)
            ra, rb = torch.where(keep, ra, 0), torch.where(keep, rb, 0)  # whatever the tables say of padding
        b, rb, values = (x.repeat_interleave(group, 2) for x in (b, rb, values))

        apart = place[:, None] - place[None, :]
        visible = apart >= 0 if causal else torch.ones_like(apart, dtype=torch.bool)
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

        kept = (
            torch.ones_like(place, dtype=exact) if gamma is None else gamma ** (place + 1)
        )  # [H, T], of an earlier state
        kv0, z0 = (None, None) if initial_state is None else initial_state
        if kv0 is not None:
            before = kv0.to(exact).repeat_interleave(group, 1)  # [B, H, D_k, D_v]
            kept_rows = kept.expand(heads, length)
            numerator = numerator + torch.einsum("bihd,hi,bhde->bihe", ra, kept_rows, before)
            if denominator is not None and z0 is not None:
                before = z0.to(exact).repeat_interleave(group, 1)
                denominator = denominator + torch.einsum("bihd,hi,bhd->bih", a, kept_rows, before)
        if held is not None:
            numerator = HeldGradient.apply(numerator, held)
            denominator = None if denominator is None else HeldGradient.apply(denominator, held)
        if denominator is None:
            out = scale * numerator
        else:
            denominator = (denominator + eps)[..., None]
            out = torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1), 0)
        out = torch.where(keep, out, 0).to(dtype)
        if not return_state:
            return out

        first = slice(None, None, group)  # a state belongs to a head of k
        left = length - 1 - place  # tokens that follow
        still = torch.ones(1, length, dtype=exact, device=q.device) if gamma is None else gamma[first] ** left
        still = still.expand(heads // group, length)
        kv = torch.einsum("hj,bjhd,bjhe->bhde", still, rb[:, :, first], values[:, :, first])
        z = torch.einsum("hj,bjhd->bhd", still, b[:, :, first]) if normalize else None
        if kv0 is not None:
            faded = kv.new_ones(1) if gamma is None else gamma[first, 0] ** length  # [H_k]
            kv = kv + faded[:, None, None] * kv0.to(exact)
            z = z + faded[:, None] * z0.to(exact) if z is not None and z0 is not None else z
        return out, LinearAttentionState(kv, z)


def _packed(cu_seqlens: Tensor, call: dict[str, Any]) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Every sequence alone; rows of none give 0."""
    q, k, v, mask, offset, state = (
        call[name] for name in ("q", "k", "v", "key_padding_mask", "rope_offset", "initial_state")
    )
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    (total, heads, d_k), (_, heads_k, d_v) = q.shape, v.shape
    ends = cu_seqlens.tolist()
    outs = [v.new_zeros(ends[0], heads, d_v) + q[:0].sum()]  # a function of q, sequences or none
    kv, z = [q.new_zeros(0, heads_k, d_k, d_v, dtype=exact)], [q.new_zeros(0, heads_k, d_k, dtype=exact)]
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        rows, one = slice(start, end), slice(n, n + 1)
        own = {"q": q[None, rows], "k": k[None, rows], "v": v[None, rows], "cu_seqlens": None, "return_state": True}
        own["key_padding_mask"] = None if mask is None else mask.reshape(1, total)[:, rows]
        own["rope_offset"] = offset[one] if isinstance(offset, Tensor) else offset
        own["initial_state"] = None if state is None else tuple(None if s is None else s[one] for s in state)
        o, after = _attend(**call | own)
        outs.append(o[0])
        kv.append(after.kv)
        z.append(after.z)
    o = torch.cat([*outs, v.new_zeros(total - ends[-1], heads, d_v)])
    if not call["return_state"]:
        return o
    return o, LinearAttentionState(torch.cat(kv), torch.cat(z) if call["normalize"] else None)
