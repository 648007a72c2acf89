"""The definition of gated attention in plain torch: any dtype, any device; autograd differentiates it itself."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.rounding import HeldGradient
from ..rope.reference import rope as rotate
from .presets import SOFTMAXES, resolve


def activate(x: Tensor, name: str) -> Tensor:
    """f(x), element by element."""
    if name == "relu2":
        return F.relu(x).square()
    if name == "relu":
        return F.relu(x)
    if name == "silu":
        return F.silu(x)
    if name == "sigmoid":
        return x.sigmoid()
    if name == "laplace":
        return 0.5 * (1 + ((x - math.sqrt(0.5)) * math.sqrt(2 * math.pi)).erf())
    return x


def gau_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    causal: bool = False,
    preset: str = "su",
    activation: str | None = None,
    scale: float | str | Tensor | None = None,
    normalizer: float | str | Tensor | None = None,
    bias: Tensor | None = None,
    bias_scale: float | str | Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_offset: int | Tensor = 0,
    rope_interleaved: bool = True,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Gated attention by its n_q × n_k scores; `kx_kernels.gau_attention` documents the arguments."""
    return _attend(
        q,
        k,
        v,
        gate,
        causal,
        preset,
        activation,
        scale,
        normalizer,
        bias,
        bias_scale,
        rope,
        rope_offset,
        rope_interleaved,
        key_padding_mask,
        query_padding_mask,
        cu_seqlens,
        cu_seqlens_k,
        None,
    )


def eager(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, **options: Any) -> Tensor:
    """The same with f(x), its gradient and that of the sums held in the tensors' dtype, as eager torch would."""
    call = inspect.signature(gau_attention).bind(q, k, v, gate, **options)
    call.apply_defaults()
    return _attend(**call.arguments, held=q.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    causal: bool,
    preset: str,
    activation: str | None,
    scale: float | str | Tensor | None,
    normalizer: float | str | Tensor | None,
    bias: Tensor | None,
    bias_scale: float | str | Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    rope_offset: int | Tensor,
    rope_interleaved: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    held: torch.dtype | None,
) -> Tensor:
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        f, a, b, c = resolve(preset, activation, scale, bias_scale, normalizer)
        dtype, packed = q.dtype, cu_seqlens is not None
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        if packed:  # a batch of one
            q, k, v = q[None], k[None], v[None]
            gate = None if gate is None else gate[None]
        batch, n_q, heads, dim = q.shape
        n_k, group = k.shape[1], heads // k.shape[2]

        # Which sequence a row is of, where it stands in it, and how many keys that has.
        row, column = torch.arange(n_q, device=q.device), torch.arange(n_k, device=q.device)
        ends_q = row.new_tensor([0, n_q]) if cu_seqlens is None else cu_seqlens.long()
        ends_k = row.new_tensor([0, n_k]) if cu_seqlens is None else cu_seqlens.long()
        if cu_seqlens_k is not None:
            ends_k = cu_seqlens_k.long()
        member_q = (row >= ends_q[:-1, None]) & (row < ends_q[1:, None])  # [N, n_q]
        member_k = (column >= ends_k[:-1, None]) & (column < ends_k[1:, None])  # [N, n_k]
        together = (member_q[:, :, None] & member_k[:, None, :]).any(0)  # [n_q, n_k]
        aligned = ends_k.diff() - ends_q.diff()  # queries stand with the last keys
        place_q = (member_q * (row - ends_q[:-1, None] + aligned[:, None])).sum(0)
        place_k = (member_k * (column - ends_k[:-1, None])).sum(0)
        apart = place_k[None, :] - place_q[:, None]

        keep_k = member_k.any(0).expand(batch, n_k)
        keep_q = member_q.any(0).expand(batch, n_q)
        if key_padding_mask is not None:
            keep_k = keep_k & key_padding_mask.reshape(batch, n_k)
            if query_padding_mask is None and n_q == n_k:
                query_padding_mask = key_padding_mask
        if query_padding_mask is not None:
            keep_q = keep_q & query_padding_mask.reshape(batch, n_q)
        visible = together & keep_q[:, :, None] & keep_k[:, None, :]  # [B, n_q, n_k]
        if causal:
            visible = visible & (apart <= 0)

        def by_row(of_sequences: Tensor) -> Tensor:  # [B or 1, N] -> [B or 1, n_q]
            return of_sequences.to(exact) @ member_q.to(exact)

        counts = {
            "visible": visible.sum(2).to(exact),
            "valid": by_row((keep_k[:, None, :] & member_k).sum(2)),
            "length": by_row(ends_k.diff()[None]),
        }

        def factor(x: float | str | Tensor) -> Tensor | float:
            if isinstance(x, Tensor):
                return x.to(exact).reshape(batch, 1, n_q, 1)
            if x == "dim":
                return dim**-0.5
            return _inverse(counts[x])[:, None, :, None] if isinstance(x, str) else x

        queries, keys, values = (
            torch.where(keep[..., None, None], x.to(exact), 0) for keep, x in ((keep_q, q), (keep_k, k), (keep_k, v))
        )
        if rope is not None:
            cos, sin = (table.to(exact) for table in rope)
            queries, keys = (
                _rotate(x, cos, sin, place, _by_row(rope_offset, member, packed), rope_interleaved)
                for x, place, member in ((queries, place_q, member_q), (keys, place_k, member_k))
            )
            queries, keys = queries.to(dtype).to(exact), keys.to(dtype).to(exact)  # a call of its own, as kx.rope
        keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)

        x = factor(a) * torch.einsum("bihd,bjhd->bhij", queries, keys)
        if bias is not None:
            middle = bias.shape[-1] // 2
            at = torch.where(together, apart, 0) + middle
            x = x + factor(b) * bias.to(exact).reshape(-1, bias.shape[-1])[:, at]
        seen = visible[:, None]  # [B, 1, n_q, n_k]
        if f in SOFTMAXES:
            if f == "softmax_plus":
                x = x * (counts["visible"].clamp(min=16).log() / math.log(512))[:, None, :, None]
            p = torch.where(seen, x, -torch.inf).softmax(-1)
            p = torch.where(seen.any(-1, keepdim=True), p, 0)
        else:
            if held is not None:
                x = HeldGradient.apply(x, held)
            p = torch.where(seen, activate(torch.where(seen, x, 0), f), 0)
        if held is not None:
            p = p.to(held).to(exact)
        o = torch.einsum("bhij,bjhe->bihe", p, values)
        if isinstance(c, Tensor):
            o = o * c.to(exact).reshape(batch, n_q, 1, 1)
        elif c == "sum":
            o = o * _inverse(p.sum(-1)).transpose(1, 2)[..., None]
        elif c == "length_squared":
            o = o * _inverse(counts["length"].square())[..., None, None]
        elif not isinstance(c, str):
            o = o / c
        elif c != "none":
            o = o * _inverse(counts[c])[..., None, None]
        if held is not None:
            o = HeldGradient.apply(o, held)
        if gate is not None:
            o = o * torch.where(keep_q[..., None, None], gate.to(exact), 0)
        o = torch.where(keep_q[..., None, None], o, 0).to(dtype)
        return o[0] if packed else o


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x != 0, 1 / torch.where(x != 0, x, 1), 0)


def _by_row(offset: int | Tensor, member: Tensor, packed: bool) -> int | Tensor:
    """An offset by sequence as one by row, [B or 1, n or 1]."""
    if not isinstance(offset, Tensor):
        return offset
    return (offset.long()[:, None] * member).sum(0, keepdim=True) if packed else offset.long()[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, place: Tensor, offset: int | Tensor, interleaved: bool) -> Tensor:
    """Rows [B, n, H, s] turned by the angles of their places in their sequences, from an offset on."""
    positions = (place + offset).expand(x.shape[:2])
    rotated = rotate(x, None, cos, sin, positions=positions, interleaved=interleaved)
    assert isinstance(rotated, Tensor)
    return rotated
