"""`kx_kernels.gau_inputs`: its contract and checks."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from ..._core import dispatch
from ..._core.checks import FLOATS, INDICES, Description, bound, check_int, check_lengths, check_tensor, reject
from ..._core.padding import mask_of
from ._autograd import prepare
from ._backends import backends
from ._problem import ACTIVATIONS, GauInputsProblem

OP = "gau_inputs"


@overload
def gau_inputs(
    u: Tensor,
    v: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor | None = ...,
    *,
    activation: str = ...,
    rope: tuple[Tensor, Tensor] | None = ...,
    rope_offset: int | Tensor = ...,
    rope_interleaved: bool = ...,
    key_padding_mask: Tensor | None = ...,
    lengths: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, ...]: ...


@overload
def gau_inputs(
    u: None,
    v: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor | None = ...,
    *,
    activation: str = ...,
    rope: tuple[Tensor, Tensor] | None = ...,
    rope_offset: int | Tensor = ...,
    rope_interleaved: bool = ...,
    key_padding_mask: Tensor | None = ...,
    lengths: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Any, ...]: ...


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
    backend: str | None = None,
) -> tuple[Any, ...]:
    """φ(u), φ(v) and M heads RoPE(φ(z) ⊙ γ_m + β_m) in one pass: what `gau_attention` is given.

    | argument           | shape                       | dtype          | meaning                                   |
    |--------------------|-----------------------------|----------------|-------------------------------------------|
    | `u`                | [B, T, e], [total, e] packed| of z           | the gate before φ, or None                |
    | `v`                | [B, T, e']                  | of z           | values before φ                           |
    | `z`                | [B, T, s]                   | float          | what all heads have in common             |
    | `gamma` γ          | [M, s]                      | of z, or float32 | scales of heads; M is 2 for GAU (q, k), |
    |                    |                             |                | 4 for FLASH                               |
    | `beta` β           | [M, s]                      | of gamma       | offsets of heads; None: 0                 |
    | `rope`             | two tables [P, R/2]         | float          | cos and sin, by which the first R         |
    |                    |                             |                | dimensions of heads turn                  |
    | `rope_offset`      | int, or [B], or [N] packed  | int32, int64   | position of each sequence's first row     |
    | `key_padding_mask` | [B, T], or [total] packed   | bool           | False: padding                            |
    | `lengths`          | [B]                         | int32, int64   | rows of each sequence, in place of a mask |
    | `cu_seqlens`       | [N + 1]                     | int32          | ends of packed sequences                  |

    Tensors may have any strides: u, v and z are slices of one projection as a rule.

    Args:
        activation: φ: "silu" (or "swish", the same), "relu" or "identity".
        rope_interleaved: as in `kx_kernels.rope`, whose rules for positions hold: a negative one does not turn, one
            past the tables is an error on the CPU and gives NaN elsewhere.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None takes the choice of `kx_kernels.backend`.

    Returns:
        The gate (None if u is) and values, of the shapes of u and v, and M heads of that of z: new tensors without gaps
        of z's dtype. Rows of padding, and packed rows of no sequence, are 0 and give no gradient, whatever they hold.
        Arithmetic is in float32 (float64 for float64) and rounds once. Differentiable in u, v, z, gamma and beta,
        twice.

    Raises:
        ValueError: a shape, size or value that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.

    Source: Hua et al., "Transformer Quality in Linear Time" (arXiv:2202.10447); Su, kexue.fm/archives/8934.
    """
    p = _checked(
        u, v, z, gamma, beta, activation, rope, rope_offset, rope_interleaved, key_padding_mask, lengths, cu_seqlens
    )  # fmt: skip
    results = prepare(p, dispatch.requested(backend))
    if cu_seqlens is not None:
        results = [x[0] for x in results]
    return (None, *results) if u is None else tuple(results)


def problem(*args, **kwargs) -> GauInputsProblem:
    """A call as its backends see it, checked."""
    return _checked(**bound(gau_inputs, args, kwargs, without=("backend",)))


def survey(*args, **kwargs) -> list[tuple[str, str | None]]:
    """For `kx_kernels.explain`: each backend, and why it cannot serve this call or None."""
    return dispatch.survey(backends(), problem(*args, **kwargs))


def _checked(
    u: Tensor | None,
    v: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    activation: str,
    rope: tuple[Tensor, Tensor] | None,
    rope_offset: int | Tensor,
    rope_interleaved: bool,
    key_padding_mask: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> GauInputsProblem:
    """The call as a GauInputsProblem, or the error that names what is wrong with it."""
    packed = cu_seqlens is not None
    for name, x in (("z", z), ("v", v), ("u", u)):
        if name == "u" and x is None:
            continue
        _check(name, x, FLOATS, z)
        assert x is not None
        if x.dim() != (2 if packed else 3) or x.shape[-1] == 0:
            dim = {"z": "s", "v": "e'", "u": "e"}[name]
            rows = "[total, {}], as cu_seqlens is given," if packed else "[B, T, {}]"
            reject(OP, name, x, f"shape {rows.format(dim)} with {dim} above 0")
        if x.dtype != z.dtype:
            reject(OP, name, x, f"the dtype of z, {z.dtype}", TypeError)
        if x.shape[:-1] != z.shape[:-1]:
            reject(OP, name, x, f"the shape of z, {list(z.shape)}, but for the width")
    width = z.shape[-1]
    _check("gamma", gamma, tuple(dict.fromkeys((z.dtype, _wide(z)))), z)
    if gamma.dim() != 2 or gamma.shape[0] == 0 or gamma.shape[1] != width:
        reject(OP, "gamma", gamma, f"shape [M, s] with M above 0 and s = {width}")
    if beta is not None:
        _check("beta", beta, (gamma.dtype,), z)
        if beta.shape != gamma.shape:
            reject(OP, "beta", beta, f"the shape of gamma, {list(gamma.shape)}")
    if activation not in (*ACTIVATIONS, "swish"):
        reject(OP, "activation", activation, f"one of {', '.join(map(repr, (*ACTIVATIONS, 'swish')))}")

    sequences = z.shape[0]
    if cu_seqlens is not None:
        _check("cu_seqlens", cu_seqlens, (torch.int32,), z)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            reject(OP, "cu_seqlens", cu_seqlens, "shape [N + 1], one more than there are sequences")
        sequences = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
    if lengths is not None:
        check_lengths(OP, lengths, z, cu_seqlens, key_padding_mask)
        key_padding_mask = mask_of(lengths, z.shape[1])
    if key_padding_mask is not None:
        _check("key_padding_mask", key_padding_mask, (torch.bool,), z)
        if key_padding_mask.shape != z.shape[:-1]:
            reject(OP, "key_padding_mask", key_padding_mask, f"shape {list(z.shape[:-1])}, that of z's rows")
    cos, sin, offset, offsets = _checked_rope(z, rope, rope_offset, sequences, packed)

    def batched(x: Tensor | None) -> Tensor | None:
        return x[None] if packed and x is not None else x

    v, z = (x[None] if packed else x for x in (v, z))
    return GauInputsProblem(
        batched(u),
        v,
        z,
        gamma,
        beta,
        cos,
        sin,
        offsets,
        batched(key_padding_mask),
        cu_seqlens,
        ACTIVATIONS.index("silu" if activation == "swish" else activation),
        offset,
        bool(rope_interleaved),
    )


def _wide(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _check(name: str, x: object, dtypes: tuple[torch.dtype, ...], z: object) -> None:
    """Rejects what is no tensor, has none of `dtypes`, or is on another device than z."""
    check_tensor(OP, name, x, dtypes)
    if isinstance(x, Tensor) and isinstance(z, Tensor) and x.device != z.device:
        reject(OP, name, x, f"the device of z, {z.device}")


def _checked_rope(
    z: Tensor, rope: tuple[Tensor, Tensor] | None, offset: int | Tensor, sequences: int, packed: bool
) -> tuple[Tensor | None, Tensor | None, int, Tensor | None]:
    """cos, sin, and the first position as an int or by sequence."""
    if rope is None:
        if isinstance(offset, Tensor) or offset != 0:
            reject(OP, "rope_offset", offset, "0, as rope is None")
        return None, None, 0, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        reject(OP, "rope", Description(f"a {type(rope).__name__}"), "a pair of tables, cos and sin", TypeError)
    cos, sin = rope
    for table in (cos, sin):
        _check("rope", table, FLOATS, z)
        if table.dim() != 2 or table.shape != cos.shape or table.dtype != cos.dtype:
            reject(OP, "rope", table, "two tables of one shape [P, R/2] and one dtype")
        if table.requires_grad and torch.is_grad_enabled():
            given = Description("a tensor that requires grad")
            reject(OP, "rope", given, "one without: there is no gradient to it")
    if 2 * cos.shape[1] > z.shape[-1]:
        reject(OP, "rope", cos, f"width R/2 with R at most the width of z, {z.shape[-1]}")
    if isinstance(offset, Tensor):
        _check("rope_offset", offset, INDICES, z)
        if offset.shape != (sequences,):
            reject(OP, "rope_offset", offset, f"an int, or shape [N] = [{sequences}]")
        return cos, sin, 0, offset.long().contiguous()
    check_int(OP, "rope_offset", offset)
    if not packed and z.shape[1] > 0 and offset + z.shape[1] > cos.shape[0]:
        expected = f"rope_offset + T at most the tables' length P = {cos.shape[0]}; T = {z.shape[1]}"
        reject(OP, "rope_offset" if offset else "rope", offset if offset else cos, expected)
    return cos, sin, offset, None
