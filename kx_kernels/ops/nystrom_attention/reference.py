"""The definition of Nyström attention in plain torch: any dtype, any device; autograd differentiates it itself."""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .presets import BY_KEYS, BY_QUERIES, INITS, NOTHING, NYSTROM, lay_out, masks, roads


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_landmarks: int = 64,
    pinv_iterations: int = 6,
    pinv_init: str = "per_matrix",
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    conv_weight: Tensor | None = None,
    landmarks: str = "valid",
    ridge: float = 0.0,
    causal: bool = False,
    return_factors: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Nyström attention by its three factors; `kx_kernels.nystrom_attention` documents the arguments."""
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
        key_padding_mask, query_padding_mask = (
            None if x is None else x[None] for x in (key_padding_mask, query_padding_mask)
        )
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    query_mask, key_mask = masks(q, k, key_padding_mask, query_padding_mask, lengths)
    of_q = lay_out(landmarks, q, query_mask, cu_seqlens, num_landmarks, exact)
    of_k = lay_out(landmarks, k, key_mask, cu_seqlens, num_landmarks, exact)
    how = (INITS.index(pinv_init), pinv_iterations, q.shape[-1] ** -0.5 if scale is None else scale, ridge)
    table = (query_mask, key_mask, of_q.bounds, of_q.divisors, of_k.bounds, of_k.divisors)
    found = factors(q, k, *table, roads(landmarks, of_q, of_k), cu_seqlens, *how)
    if conv_weight is not None:
        conv_weight = conv_weight.reshape(q.shape[2], -1)
    o = read_out(found, v, conv_weight, query_mask, key_mask, cu_seqlens)
    if return_factors:
        front, back = whole(found, q, k, cu_seqlens)
        return (o[0], front[0], back[0]) if packed else (o, front, back)
    return o[0] if packed else o


class Factors(NamedTuple):
    """F, Z and B of README.md, of a batch or of one packed sequence."""

    front: Tensor  # [B, H, n_q, m]
    inverse: Tensor  # [B, H, m, m]
    back: Tensor  # [B, H, m, n_k]


def factors(
    q: Tensor,
    k: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    bounds_q: Tensor,
    divisors_q: Tensor,
    bounds_k: Tensor,
    divisors_k: Tensor,
    road: Tensor,
    cu_seqlens: Tensor | None,
    init: int,
    iterations: int,
    scale: float,
    ridge: float,
) -> list[Factors]:
    """The factors of all sequences at once, or packed of one after the other; in float32 at least."""
    tables = (bounds_q, divisors_q, bounds_k, divisors_k, road)
    with _without_autocast(q):
        if cu_seqlens is None:
            parts = [_kernels(q, k, query_mask, key_mask, *tables, scale)]
        else:
            parts = []
            for n, (first, last) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
                rows = slice(first, last)
                of_q, of_k = (None if mask is None else mask[:, rows] for mask in (query_mask, key_mask))
                bounds_q, divisors_q, bounds_k, divisors_k, how = (x[n : n + 1] for x in tables)
                own = (bounds_q - first, divisors_q, bounds_k - first, divisors_k, how)
                parts.append(_kernels(q[:, rows], k[:, rows], of_q, of_k, *own, scale))
        if not parts:
            return []
        kernels = torch.cat([kernel for _, kernel, _ in parts])  # [N, H, m, m]
        served = (road == NYSTROM)[:, None, None, None]
        identity = torch.eye(kernels.shape[-1], dtype=kernels.dtype, device=kernels.device)
        inverses = _invert(torch.where(served, kernels + ridge * identity, identity), served, init, iterations, ridge)
        inverses = torch.where(served, inverses, identity)
        split = inverses.split([front.shape[0] for front, _, _ in parts])
        return [Factors(front, inverse, back) for (front, _, back), inverse in zip(parts, split, strict=True)]


def read_out(
    found: list[Factors],
    v: Tensor,
    conv_weight: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """F (Z (B V)) + w ∗ V, of v's dtype."""
    with _without_autocast(v):
        wide = found[0].front.dtype if found else v.dtype
        values = v.to(wide) if key_mask is None else torch.where(key_mask[..., None, None], v.to(wide), 0)
        outs = []
        for (front, inverse, back), (first, last) in zip(found, _ends(v, cu_seqlens), strict=True):
            own = values[:, first:last]
            o = (front @ (inverse @ (back @ own.transpose(1, 2)))).transpose(1, 2)  # [B, n_q, H, D_v]
            if conv_weight is not None:
                o = o + _convolve(own, conv_weight.to(wide))
            if query_mask is not None:
                keep = query_mask if cu_seqlens is None else query_mask[:, first:last]
                o = torch.where(keep[..., None, None], o, 0)
            outs.append(o)
        return _placed(outs, cu_seqlens, v.to(wide), 1).to(v.dtype)


def whole(found: list[Factors], q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """F·Z [B, H, n_q, m] and B [B, H, m, n_k], of q's dtype."""
    with _without_autocast(q):
        front = [x.front @ x.inverse for x in found]
        like = q.transpose(1, 2)
        left = _placed(front, cu_seqlens, like, 2)
        right = _placed([x.back.mT for x in found], cu_seqlens, k.transpose(1, 2), 2).mT
        return left.to(q.dtype), right.to(q.dtype)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _kernels(
    q: Tensor,
    k: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    bounds_q: Tensor,
    divisors_q: Tensor,
    bounds_k: Tensor,
    divisors_k: Tensor,
    road: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """F, softmax(Q̃ K̃ᵀ) and B; where attention is exact, F or B of ones and zeros."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    how = road[:, None, None, None]
    keep_q, keep_k = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        for x, mask in ((q, query_mask), (k, key_mask))
    )
    queries, keys = (
        torch.where(keep[..., None, None], x.to(exact), 0).transpose(1, 2) for x, keep in ((q, keep_q), (k, keep_k))
    )  # [B, H, n, D]
    in_q, in_k = _inside(bounds_q, keep_q), _inside(bounds_k, keep_k)  # [B, 1, m, n]
    alive_q, alive_k = ((divisors != 0)[:, None, :, None] for divisors in (divisors_q, divisors_k))
    landmarks_q, landmarks_k = (
        torch.where(alive, inside.to(exact) / torch.where(alive, divisors[:, None, :, None], 1), 0) @ x
        for alive, inside, divisors, x in (
            (alive_q, in_q, divisors_q, queries),
            (alive_k, in_k, divisors_k, keys),
        )
    )  # [B, H, m, D]
    front = _softmax(scale * queries @ landmarks_k.mT, alive_k.mT)
    kernel = _softmax(scale * landmarks_q @ landmarks_k.mT, alive_q & alive_k.mT)
    back = _softmax(scale * landmarks_q @ keys.mT, alive_q & keep_k[:, None, None])
    front = torch.where(how == BY_QUERIES, in_q.mT.to(exact), front)
    front = torch.where(keep_q[:, None, :, None] & (how != NOTHING), front, 0)
    back = torch.where(how == BY_KEYS, in_k.to(exact), back)
    return front, kernel, back


def _inside(bounds: Tensor, keep: Tensor) -> Tensor:
    """[B, 1, m, n]: whether a row without padding is in a segment."""
    row = torch.arange(keep.shape[1], device=keep.device)
    inside = (row >= bounds[:, :-1, None]) & (row < bounds[:, 1:, None])
    return (inside & keep[:, None])[:, None]


def _softmax(x: Tensor, seen: Tensor) -> Tensor:
    """Over the last dimension; a row that sees nothing is uniform."""
    return torch.where(seen.any(-1, keepdim=True), torch.where(seen, x, -torch.inf), 0).softmax(-1)


def _invert(a: Tensor, served: Tensor, init: int, iterations: int, ridge: float) -> Tensor:
    """Z of matrices [N, H, m, m], of which those count that are `served`."""
    if INITS[init] == "pinv":
        return torch.linalg.pinv(a)
    if a.numel() == 0:
        return a
    columns = torch.where(served, a.sum(-2, keepdim=True), 0.5)  # those that count have a sum of 1 or more
    largest = columns.amax() if INITS[init] == "original" else columns.amax(-1, keepdim=True)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / (largest * (1 + ridge))
    for _ in range(iterations):
        x = a @ z
        z = 0.25 * z @ (13 * identity - x @ (15 * identity - x @ (7 * identity - x)))
    return z


def _convolve(v: Tensor, weight: Tensor) -> Tensor:
    """w ∗ V of v [B, n, H, D_v] and weight [H, κ]."""
    batch, n, heads, dim = v.shape
    x = v.permute(0, 3, 2, 1).reshape(batch * dim, heads, n)
    if x.numel() == 0:
        return v
    out = F.conv1d(x, weight[:, None], padding=weight.shape[1] // 2, groups=heads)[..., :n]
    return out.reshape(batch, dim, heads, n).permute(0, 3, 2, 1)


def _ends(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    return [(0, x.shape[1])] if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))


def _placed(parts: list[Tensor], cu_seqlens: Tensor | None, like: Tensor, dim: int) -> Tensor:
    """One tensor of the parts' rows; rows of no sequence are 0."""
    if cu_seqlens is None:
        return parts[0]
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    shape = list(parts[0].shape if parts else like.shape)
    before, after = (
        like.new_zeros((*shape[:dim], n, *shape[dim + 1 :]), dtype=parts[0].dtype if parts else like.dtype)
        for n in (first, like.shape[dim] - last)
    )
    return torch.cat([before, *parts, after], dim)
