"""`kx_kernels.nystrom_attention`: its contract and checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._core import dispatch
from ..._core.checks import FLOATS, Description, bound, check_int, check_lengths, check_tensor, reject
from ._backends import OPERATOR, backends, read_out_factors
from ._backends import factors as factors_of
from ._problem import NystromProblem
from .presets import CONVENTIONS, INITS, lay_out, masks, roads

OP = "nystrom_attention"


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """O = F (Z (B V)) + w ∗ V: softmax attention by way of m landmarks, at a cost linear in n; for encoders.

    F = softmax(a·Q K̃ᵀ), B = softmax(a·Q̃ Kᵀ), Z is the iterated inverse of softmax(a·Q̃ K̃ᵀ), and the landmarks Q̃ and K̃
    are means of m segments of the queries and of the keys.

    | argument             | shape                               | dtype        | meaning                             |
    |----------------------|-------------------------------------|--------------|-------------------------------------|
    | `q`                  | [B, n_q, H, D], [total, H, D] packed | float        |                                     |
    | `k`                  | [B, n_k, H, D]                      | of q         |                                     |
    | `v`                  | [B, n_k, H, D_v]                    | of q         |                                     |
    | `conv_weight` w      | [H, κ] or [H, 1, κ, 1]              | float        | depthwise convolution of v along    |
    |                      |                                     |              | the sequence; needs n_q = n_k       |
    | `key_padding_mask`   | [B, n_k], or [total] packed         | bool         | False: padding                      |
    | `query_padding_mask` | [B, n_q], or [total] packed         | bool         | None: that of keys where n_q = n_k  |
    | `lengths`            | [B]                                 | int32, int64 | tokens of each sequence, in place   |
    |                      |                                     |              | of a mask; more than n_k is n_k     |
    | `cu_seqlens`         | [N + 1]                             | int32        | ends of packed sequences            |

    Tensors may have any strides. A sequence with no more than m keys, or queries, gets exact softmax attention. No
    result depends on other sequences (but for `pinv_init="original"`), nor on how much padding there is (for
    `landmarks="valid"`): on the CPU in no bit (but for `pinv_init="pinv"`), on CUDA and Triton up to rounding, as the
    parts whose sums are added depend on the sizes of the call.

    Args:
        num_landmarks: m.
        pinv_iterations: steps of the third-order iteration that gives Z. Six have not converged as a rule: their number
            is part of the function.
        pinv_init: its first value: "per_matrix", or "original", whose norm is the largest in the call; or "pinv", which
            is no iteration but torch.linalg.pinv.
        scale: a; 1/√D if None.
        landmarks: "valid": segments that differ by at most one token, of the tokens that are no padding; or as an
            implementation lays them out: "mlpen", "lucidrains", "huggingface" or "xformers".
        ridge: added to the diagonal of the matrix that is inverted.
        causal: refused if True: landmarks are means over the future as well.
        return_factors: also return F·Z and B, whose product is the attention: [B, H, n_q, m] and [B, H, m, n_k]
            ([H, total, m] and [H, m, total] packed), of q's dtype. They are made by torch's operators. Packed, they
            break a graph of torch.compile: `fullgraph=True` raises.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None takes the choice of `kx_kernels.backend`.

    Returns:
        [B, n_q, H, D_v], of q's dtype; with `return_factors` also the factors. Rows of padding, and of sequences
        without keys, are 0 and give no gradient. Sums and the inverse are in float32 (float64 for float64), and an
        output is rounded once. Differentiable in q, k, v and conv_weight, through the inverse and its first value,
        twice (the second gradient takes n × m memory).

    Raises:
        ValueError: a shape, size or value that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.

    Source: Xiong et al., "Nyströmformer" (arXiv:2102.03902).
    """
    p = _checked(
        q,
        k,
        v,
        num_landmarks=num_landmarks,
        pinv_iterations=pinv_iterations,
        pinv_init=pinv_init,
        scale=scale,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        conv_weight=conv_weight,
        landmarks=landmarks,
        ridge=ridge,
        causal=causal,
    )
    if return_factors and cu_seqlens is not None and torch.compiler.is_compiling():
        expected = "False under torch.compile where cu_seqlens is given: sequences are cut where data says"
        reject(OP, "return_factors", return_factors, expected)
    o = OPERATOR.attend(p, dispatch.requested(backend))
    if not return_factors:
        return o if cu_seqlens is None else o[0]
    front, back = read_out_factors(p._replace(q=p.q.contiguous(), k=p.k.contiguous()))
    return (o, front, back) if cu_seqlens is None else (o[0], front[0], back[0])


def factors(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """F [B, H, n_q, m], Z [B, H, m, m] and B [B, H, m, n_k] of a call that is not packed, in float32 at least."""
    p = problem(*args, **kwargs)
    assert p.cu_seqlens is None
    return factors_of(p)[0]


def problem(*args, **kwargs) -> NystromProblem:
    """A call as its backends see it, checked."""
    return _checked(**bound(nystrom_attention, args, kwargs, without=("backend", "return_factors")))


def survey(*args, **kwargs) -> list[tuple[str, str | None]]:
    """For `kx_kernels.explain`: each backend, and why it cannot serve this call or None."""
    return dispatch.survey(backends(), problem(*args, **kwargs))


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int,
    pinv_iterations: int,
    pinv_init: str,
    scale: float | None,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_weight: Tensor | None,
    landmarks: str,
    ridge: float,
    causal: bool,
) -> NystromProblem:
    """The call as a NystromProblem, or the error that names what is wrong with it."""
    if causal:
        reject(OP, "causal", causal, "False: landmarks are means over the future as well; use linear_attention")
    packed = cu_seqlens is not None
    layout = "[total, H, D], as cu_seqlens is given" if packed else "[B, T, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, x, FLOATS, q if isinstance(q, Tensor) else None)
        if x.dim() != (3 if packed else 4):
            reject(OP, name, x, f"shape {layout}")
        if x.dtype != q.dtype:
            reject(OP, name, x, f"the dtype of q, {q.dtype}", TypeError)
    if q.shape[-1] == 0:
        reject(OP, "q", q, "a head dimension above 0")
    if k.shape[-2:] != q.shape[-2:] or k.shape[:-3] != q.shape[:-3]:
        reject(OP, "k", k, f"the batch, the heads and the head dimension of q, {list(q.shape)}")
    if packed and k.shape[0] != q.shape[0]:
        reject(OP, "k", k, f"the number of tokens of q, {q.shape[0]}, as cu_seqlens is given")
    if v.shape[:-1] != k.shape[:-1]:
        reject(OP, "v", v, f"the shape of k, {list(k.shape)}, but for the head dimension")

    for name, number, least in (("num_landmarks", num_landmarks, 1), ("pinv_iterations", pinv_iterations, 0)):
        check_int(OP, name, number)
        if number < least:
            reject(OP, name, number, f"at least {least}")
    for name, value, names in (("pinv_init", pinv_init, INITS), ("landmarks", landmarks, CONVENTIONS)):
        if value not in names:
            reject(OP, name, value, f"one of {', '.join(map(repr, names))}")
    scale = torch.sym_float(q.shape[-1]) ** -0.5 if scale is None else _number("scale", scale)
    if _number("ridge", ridge) < 0:
        reject(OP, "ridge", ridge, "0 or more")

    if packed:
        _check_ends(q, cu_seqlens)
    if lengths is not None:
        check_lengths(OP, lengths, q, cu_seqlens, key_padding_mask)
    for name, mask, like in (("key_padding_mask", key_padding_mask, k), ("query_padding_mask", query_padding_mask, q)):
        if mask is not None:
            check_tensor(OP, name, mask, (torch.bool,), q)
            if mask.shape != like.shape[:-2]:
                reject(OP, name, mask, f"shape {list(like.shape[:-2])}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if conv_weight is not None:
        conv_weight = _checked_convolution(q, k, conv_weight).to(wide)

    if packed:
        q, k, v = q[None], k[None], v[None]
        key_padding_mask, query_padding_mask = (
            None if x is None else x[None] for x in (key_padding_mask, query_padding_mask)
        )
    query_mask, key_mask = masks(q, k, key_padding_mask, query_padding_mask, lengths)
    of_q = lay_out(landmarks, q, query_mask, cu_seqlens, num_landmarks, wide)
    alike = q.shape[1] == k.shape[1] and query_mask is key_mask
    of_k = of_q if alike else lay_out(landmarks, k, key_mask, cu_seqlens, num_landmarks, wide)
    road = roads(landmarks, of_q, of_k)
    ends = None if cu_seqlens is None else cu_seqlens.contiguous()
    tables = (of_q.bounds, of_q.divisors, of_k.bounds, of_k.divisors, road)
    how = (INITS.index(pinv_init), pinv_iterations, scale, float(ridge))
    return NystromProblem(q, k, v, conv_weight, query_mask, key_mask, ends, *tables, *how)


def _number(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        reject(OP, name, Description(repr(x)), "a number", TypeError)
    if not abs(x) < math.inf:
        reject(OP, name, x, "a finite number")
    return float(x)


def _check_ends(q: Tensor, cu_seqlens: Any) -> None:
    check_tensor(OP, "cu_seqlens", cu_seqlens, (torch.int32,), q)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        reject(OP, "cu_seqlens", cu_seqlens, "shape [N + 1], one more than there are sequences")


def _checked_convolution(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """[H, κ]"""
    check_tensor(OP, "conv_weight", weight, FLOATS, q)
    heads = q.shape[-2]
    if weight.dim() == 4 and weight.shape[1] == weight.shape[3] == 1:
        weight = weight[:, 0, :, 0]
    if weight.dim() != 2 or weight.shape[0] != heads or weight.shape[1] == 0:
        reject(OP, "conv_weight", weight, f"shape [H, κ] or [H, 1, κ, 1], H = {heads}")
    if q.shape[-3] != k.shape[-3]:
        reject(OP, "conv_weight", weight, "None, as there are other numbers of queries and keys")
    return weight
