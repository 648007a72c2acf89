"""The definition of mixed-chunk attention in plain torch: any dtype, any device; autograd differentiates it itself."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.padding import mask_of
from ..._core.rounding import HeldGradient
from ..gau_attention.reference import activate
from ..rope.reference import rope as rotate
from .presets import resolve


def mixed_chunk_attention(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    chunk_size: int = 256,
    causal: bool = False,
    preset: str = "su",
    activation: str | None = None,
    scale: float | str | Tensor | None = None,
    normalizer: float | str | Tensor | None = None,
    lin_normalizer: float | str | Tensor | None = None,
    bias: Tensor | None = None,
    bias_scale: float | str | Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_offset: int | Tensor = 0,
    rope_interleaved: bool = True,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention within chunks and between them; `kx_kernels.mixed_chunk_attention` documents the arguments."""
    return _attend(held=None, **locals())


def eager(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The same with f(x), states and the gradients of x, states and A held in their dtype, as eager torch would."""
    call = inspect.signature(mixed_chunk_attention).bind(quad_q, quad_k, lin_q, lin_k, v, gate, **options)
    call.apply_defaults()
    return _attend(**call.arguments, held=v.dtype)


def _attend(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    chunk_size: int,
    causal: bool,
    preset: str,
    activation: str | None,
    scale: float | str | Tensor | None,
    normalizer: float | str | Tensor | None,
    lin_normalizer: float | str | Tensor | None,
    bias: Tensor | None,
    bias_scale: float | str | Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    rope_offset: int | Tensor,
    rope_interleaved: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    held: torch.dtype | None,
) -> Tensor:
    call = dict(locals())
    kind = v.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        if cu_seqlens is not None:
            return _packed(cu_seqlens, call)
        f, a, b, c, d = resolve(preset, causal, activation, scale, bias_scale, normalizer, lin_normalizer)
        dtype = v.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        batch, length, heads, dim = quad_q.shape
        group = heads // quad_k.shape[2]
        size = max(1, min(chunk_size, length))
        chunks = -(-length // size)

        def chunked(x: Tensor) -> Tensor:
            """[B, n, ...] to [B, G, size, ...], zeros after the last token."""
            short = chunks * size - length
            return F.pad(x, (0, 0) * (x.dim() - 2) + (0, short)).unflatten(1, (chunks, size))

        everywhere = torch.ones(batch, length, dtype=torch.bool, device=v.device)
        if lengths is not None:
            key_padding_mask = mask_of(lengths, length)
        keep_k = everywhere if key_padding_mask is None else key_padding_mask.reshape(batch, length)
        keep_q = keep_k if query_padding_mask is None else query_padding_mask.reshape(batch, length)
        qq, lq = (torch.where(keep_q[..., None, None], x.to(exact), 0) for x in (quad_q, lin_q))
        qk, lk = (torch.where(keep_k[..., None, None], x.to(exact), 0) for x in (quad_k, lin_k))
        if rope is not None:
            cos, sin = (table.to(exact) for table in rope)
            where: Any = {"offset": rope_offset, "interleaved": rope_interleaved}
            (qq, qk), (lq, lk) = rotate(qq, qk, cos, sin, **where), rotate(lq, lk, cos, sin, **where)
            qq, qk, lq, lk = (x.to(dtype).to(exact) for x in (qq, qk, lq, lk))  # calls of their own, as kx.rope
            lq, lk = (torch.where(keep[..., None, None], x, 0) for keep, x in ((keep_q, lq), (keep_k, lk)))
        values = torch.where(keep_k[..., None, None], v.to(exact), 0)
        qk, lk, values = (x.repeat_interleave(group, 2) for x in (qk, lk, values))
        qq, qk, lq, lk, values = (chunked(x) for x in (qq, qk, lq, lk, values))  # [B, G, size, H, s or e]
        rows, columns = chunked(keep_q), chunked(keep_k)  # [B, G, size]

        apart = torch.arange(size, device=v.device) - torch.arange(size, device=v.device)[:, None]
        seen = rows[..., :, None] & columns[..., None, :]  # [B, G, size, size]
        if causal:
            seen = seen & (apart <= 0)
        own = columns.sum(2)  # [B, G]: keys of a chunk, and those that its rows take a linear sum of
        reached = own.cumsum(1) - own if causal else own.sum(1, keepdim=True).expand_as(own)
        counts = {"visible": seen.sum(3), "valid": own[..., None].expand(rows.shape)}
        lin_counts = {
            "visible": reached[..., None].expand(rows.shape),
            "length": torch.full_like(counts["valid"], length),
        }

        def factor(x: float | str | Tensor, counts: dict[str, Tensor]) -> Tensor | float:
            """A number, or one by row: [B, G, size]."""
            if isinstance(x, Tensor):  # of rows whose sum has a key: 0 · inf would reach gradients
                return torch.where(rows & (counts["visible"] > 0), chunked(x.to(exact).reshape(batch, length)), 0)
            if not isinstance(x, str):
                return x
            if x in counts:
                count = counts[x].to(exact)
                return torch.where(count > 0, 1 / count.clamp(min=1), 0)
            return {"dim": dim**-0.5, "chunk": 1 / chunk_size, "none": 1.0}[x]

        def hold(x: Tensor) -> Tensor:
            return x if held is None else x.to(held).to(exact)

        def hold_gradient(x: Tensor) -> Tensor:
            return x if held is None else HeldGradient.apply(x, held)

        def times(x: Tensor, factor: Tensor | float) -> Tensor:
            return x * (factor[..., None, None] if isinstance(factor, Tensor) else factor)

        scores = times(torch.einsum("bgihs,bgjhs->bgihj", qq, qk), factor(a, counts))
        if bias is not None:
            middle = bias.shape[-1] // 2
            distances = (
                bias.to(exact).reshape(-1, bias.shape[-1])[:, apart + middle].transpose(0, 1)
            )  # [size, 1 or H, size]
            scores = scores + times(distances.expand(scores.shape), factor(b, counts))
        seen = seen[..., None, :]
        p = hold(torch.where(seen, activate(torch.where(seen, hold_gradient(scores), 0), f), 0))
        if not isinstance(c, (str, Tensor)):
            c = 1 / c
        if not isinstance(d, (str, Tensor)):
            d = 1 / d
        o = times(torch.einsum("bgihj,bgjhe->bgihe", p, values), factor(c, counts))
        states = hold_gradient(torch.einsum("bgjhs,bgjhe->bghse", lk, values))
        if causal:  # of the chunks before
            states = torch.cat([torch.zeros_like(states[:, :1]), states.cumsum(1)[:, :-1]], 1)
        else:
            states = states.sum(1, keepdim=True).expand_as(states)
        o = o + times(torch.einsum("bgihs,bghse->bgihe", lq, hold(states)), factor(d, lin_counts))
        o = hold_gradient(o.flatten(1, 2)[:, :length])
        if gate is not None:
            o = o * torch.where(keep_q[..., None, None], gate.to(exact), 0)
        return torch.where(keep_q[..., None, None], o, 0).to(dtype)


def _packed(ends: Tensor, call: dict[str, Any]) -> Tensor:
    """Every sequence alone; rows of none give 0."""
    v, heads = call["v"], call["quad_q"].shape[1]
    outs = [v.new_zeros(int(ends[0]), heads, v.shape[2]) + call["quad_q"][:0].sum()]  # a function of it in any case
    for n, (first, last) in enumerate(itertools.pairwise(ends.tolist())):
        own: dict[str, Any] = {}
        for name, x in call.items():
            by_row = isinstance(x, Tensor) and name not in ("bias", "rope_offset", "cu_seqlens")
            own[name] = x[None, first:last] if by_row else x
        own["cu_seqlens"] = None
        if isinstance(call["rope_offset"], Tensor):
            own["rope_offset"] = call["rope_offset"][n : n + 1]
        outs.append(_attend(**own)[0])
    return torch.cat([*outs, v.new_zeros(v.shape[0] - int(ends[-1]), heads, v.shape[2])])
