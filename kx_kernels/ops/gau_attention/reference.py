"""The definition of gated attention in plain torch: any dtype, any device; autograd differentiates it itself."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.padding import mask_of
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
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Gated attention by its n_q × n_k scores; `kx_kernels.gau_attention` documents the arguments."""
    return _attend(held=None, **locals())


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
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    held: torch.dtype | None,
) -> Tensor:
    call = dict(locals())
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        if cu_seqlens is not None:
            return _packed(cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, call)
        f, a, b, c = resolve(preset, activation, scale, bias_scale, normalizer)
        dtype = q.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        batch, n_q, heads, dim = q.shape
        n_k, group = k.shape[1], heads // k.shape[2]

        place_k = torch.arange(n_k, device=q.device)
        place_q = torch.arange(n_k - n_q, n_k, device=q.device)  # queries stand with the last keys
        apart = place_k[None, :] - place_q[:, None]  # [n_q, n_k]
        keep_k = torch.ones(batch, n_k, dtype=torch.bool, device=q.device)
        keep_q = torch.ones(batch, n_q, dtype=torch.bool, device=q.device)
        if lengths is not None:
            key_padding_mask = mask_of(lengths, n_k)
        if key_padding_mask is not None:
            keep_k = key_padding_mask.reshape(batch, n_k)
            if query_padding_mask is None and n_q == n_k:
                query_padding_mask = key_padding_mask
        if query_padding_mask is not None:
            keep_q = query_padding_mask.reshape(batch, n_q)
        visible = keep_q[:, :, None] & keep_k[:, None, :]  # [B, n_q, n_k]
        if causal:
            visible = visible & (apart <= 0)

        counts = {  # [B, n_q]
            "visible": visible.sum(2).to(exact),
            "valid": keep_k.sum(1, keepdim=True).expand(batch, n_q).to(exact),
            "length": torch.full((batch, n_q), n_k, dtype=exact, device=q.device),
        }

        def by_row(x: Tensor) -> Tensor:
            """[B, n_q], 0 for rows that see no key, where 0 · inf would reach gradients."""
            return torch.where(visible.any(2), x.to(exact).reshape(batch, n_q), 0)

        def factor(x: float | str | Tensor) -> Tensor | float:
            if isinstance(x, Tensor):
                return by_row(x)[:, None, :, None]
            if x == "dim":
                return dim**-0.5
            return _inverse(counts[x])[:, None, :, None] if isinstance(x, str) else x

        queries, keys, values = (
            torch.where(keep[..., None, None], x.to(exact), 0) for keep, x in ((keep_q, q), (keep_k, k), (keep_k, v))
        )
        if rope is not None:
            cos, sin = (table.to(exact) for table in rope)
            queries, keys = (
                _rotate(x, cos, sin, place, rope_offset, rope_interleaved)
                for x, place in ((queries, place_q), (keys, place_k))
            )
            queries, keys = queries.to(dtype).to(exact), keys.to(dtype).to(exact)  # a call of its own, as kx.rope
        keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)

        x = factor(a) * torch.einsum("bihd,bjhd->bhij", queries, keys)
        if bias is not None:
            middle = bias.shape[-1] // 2
            x = x + factor(b) * bias.to(exact).reshape(-1, bias.shape[-1])[:, apart + middle]
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
            o = o * by_row(c)[..., None, None]
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
        return torch.where(keep_q[..., None, None], o, 0).to(dtype)


def _packed(ends_q: Tensor, ends_k: Tensor, call: dict[str, Any]) -> Tensor:
    """Every sequence alone; rows of none give 0."""
    q, k, v, gate, offset = (call[name] for name in ("q", "k", "v", "gate", "rope_offset"))
    (total, heads, _), d_v = q.shape, v.shape[-1]
    of_queries, of_keys = ends_q.tolist(), ends_k.tolist()
    key_mask, query_mask = call["key_padding_mask"], call["query_padding_mask"]
    if query_mask is None:
        shared = key_mask is not None and q.shape[0] == k.shape[0]
        query_mask = key_mask if shared else torch.ones(total, dtype=torch.bool, device=q.device)
    outs = [v.new_zeros(of_queries[0], heads, d_v) + q[:0].sum()]  # a function of q, sequences or none
    for n, (of_q, of_k) in enumerate(zip(itertools.pairwise(of_queries), itertools.pairwise(of_keys), strict=True)):
        rows, columns = slice(*of_q), slice(*of_k)
        own = {"q": q[None, rows], "k": k[None, columns], "v": v[None, columns], "cu_seqlens": None}
        own["gate"] = None if gate is None else gate[None, rows]
        own["rope_offset"] = offset[n : n + 1] if isinstance(offset, Tensor) else offset
        own["key_padding_mask"] = None if key_mask is None else key_mask.reshape(1, -1)[:, columns]
        own["query_padding_mask"] = query_mask.reshape(1, -1)[:, rows]
        for name in ("scale", "normalizer", "bias_scale"):  # by row where a tensor
            own[name] = call[name].reshape(1, -1)[:, rows] if isinstance(call[name], Tensor) else call[name]
        outs.append(_attend(**call | own | {"cu_seqlens_k": None})[0])
    return torch.cat([*outs, v.new_zeros(total - of_queries[-1], heads, d_v)])


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x != 0, 1 / torch.where(x != 0, x, 1), 0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, place: Tensor, offset: int | Tensor, interleaved: bool) -> Tensor:
    """Rows [B, n, H, s] turned by the angles of their places in their sequences, from an offset on."""
    positions = (place + (offset.long()[:, None] if isinstance(offset, Tensor) else offset)).expand(x.shape[:2])
    rotated = rotate(x, None, cos, sin, positions=positions, interleaved=interleaved)
    assert isinstance(rotated, Tensor)
    return rotated
