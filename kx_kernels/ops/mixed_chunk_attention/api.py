"""`kx_kernels.mixed_chunk_attention`: its contract and checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import dispatch
from ..._core.checks import FLOATS, INDICES, Description, bound, check_int, check_lengths, check_tensor, reject
from ..._core.padding import mask_of
from ..rope.api import rope as rotate
from ._backends import OPERATOR, backends
from ._problem import MixedProblem
from .presets import ACTIVATIONS, LIN_NORMALIZERS, NORMALIZERS, PRESETS, SCALES, resolve

OP = "mixed_chunk_attention"


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
    backend: str | None = None,
) -> Tensor:
    """o_i = gate_i ⊙ (c_i · Σ_j f(a·q_i·k_j + b·β_{j−i}) v_j + d_i · Σ_j (q′_i·k′_j) v_j): linear in n, of n tokens.

    The first sum is over tokens j of i's own chunk of C tokens, the second over the whole sequence, or if causal over
    the chunks before i's, and then the first is over j ≤ i.

    | argument             | shape                              | dtype        | meaning                        |
    |----------------------|------------------------------------|--------------|--------------------------------|
    | `quad_q` q           | [B, n, H, s], [n, H, s] packed     | float        |                                |
    | `quad_k` k           | [B, n, H_k, s]                     | of quad_q    | H_k divides H                  |
    | `lin_q` q′           | [B, n, H, s]                       | of quad_q    |                                |
    | `lin_k` k′           | [B, n, H_k, s]                     | of quad_q    |                                |
    | `v`                  | [B, n, H_k, e]                     | of quad_q    | e is large as a rule           |
    | `gate`               | [B, n, H, e]                       | of quad_q    | None: ones                     |
    | `bias` β             | [2·M − 1] or [H, 2·M − 1]          | float        | by distance j − i, the middle  |
    |                      |                                    |              | is 0; M ≥ C, or n if smaller   |
    | `rope`               | two tables [P, R/2]                | float        | cos and sin, by which queries  |
    |                      |                                    |              | and keys turn first, all four  |
    | `rope_offset`        | int, or [B] or [N] packed          | int32, int64 | place of the first token       |
    | `key_padding_mask`   | [B, n], or [n] packed              | bool         | False: padding                 |
    | `query_padding_mask` | [B, n], or [n] packed              | bool         | None: that of keys             |
    | `lengths`            | [B]                                | int32, int64 | keys of each sequence, in      |
    |                      |                                    |              | place of a mask                |
    | `cu_seqlens`         | [N + 1]                            | int32        | ends of packed sequences, each |
    |                      |                                    |              | of which begins a chunk        |

    Tensors may have any strides. Chunks are of consecutive places, padding and all, the last as long as it happens to
    be: padding after a sequence changes nothing, padding before it moves the chunks.

    Args:
        chunk_size: C.
        causal: a token sees none after it.
        preset: the formula of an implementation: "su", or "lucidrains" (FLASH-pytorch). It stands for the five
            arguments below where they are None.
        activation: f: "relu2", "relu", "silu", "sigmoid", "laplace" or "identity".
        scale: a: a number, "dim" (1/√s), "chunk" (1/C), or a tensor [B, n] ([n] packed).
        normalizer: 1/c: "visible" (keys of the chunk that the query sees), "valid" (those that are no padding), "chunk"
            (C), "none" or a number; or c itself as a tensor [B, n]. Where 1/c is 0, c is.
        lin_normalizer: 1/d: "visible" (tokens of its sum that are no padding), "length" (n, padding and all), "chunk",
            "none" or a number; or d itself as a tensor [B, n]. Where 1/d is 0, as in the first chunk, d is.
        bias_scale: b, as scale.
        rope_interleaved: as in `kx_kernels.rope`.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None takes the choice of `kx_kernels.backend`.

    Returns:
        [B, n, H, e], of quad_q's dtype. Rows of padding are 0 and give no gradient. Sums are in float32 (float64 for
        float64) and an output is rounded once. Differentiable in all tensors of features, the gate and β, twice; the
        gradient of relu² at 0 is 0.

    Raises:
        ValueError: a shape, size or value that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.

    Source: Hua et al., "Transformer Quality in Linear Time" (arXiv:2202.10447); Su, kexue.fm/archives/8934.
    """
    given = {name: x for name, x in locals().items() if name != "backend"}
    o = OPERATOR.attend(_checked(**given), dispatch.requested(backend))
    return o if cu_seqlens is None else o[0]


def problem(*args, **kwargs) -> MixedProblem:
    """A call as its backends see it, checked."""
    return _checked(**bound(mixed_chunk_attention, args, kwargs, without=("backend",)))


def survey(*args, **kwargs) -> list[tuple[str, str | None]]:
    """For `kx_kernels.explain`: each backend, and why it cannot serve this call or None."""
    return dispatch.survey(backends(), problem(*args, **kwargs))


def _checked(
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
) -> MixedProblem:
    """The call as a MixedProblem, or the error that names what is wrong with it."""
    packed = cu_seqlens is not None
    _check_features(quad_q, quad_k, lin_q, lin_k, v, gate, packed)
    heads, dim = quad_q.shape[-2:]
    check_int(OP, "chunk_size", chunk_size)
    if not 1 <= chunk_size < 2**31:
        reject(OP, "chunk_size", chunk_size, "1 to 2**31 - 1 tokens")
    if cu_seqlens is not None:
        check_tensor(OP, "cu_seqlens", cu_seqlens, (torch.int32,), quad_q)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            reject(OP, "cu_seqlens", cu_seqlens, "shape [N + 1], one more than there are sequences")
        cu_seqlens = cu_seqlens.contiguous()
    if lengths is not None:
        check_lengths(OP, lengths, v, cu_seqlens, key_padding_mask)
        key_padding_mask = mask_of(lengths, v.shape[1])
    rows = v.shape[:-2]
    for name, mask in (("key_padding_mask", key_padding_mask), ("query_padding_mask", query_padding_mask)):
        if mask is not None:
            check_tensor(OP, name, mask, (torch.bool,), quad_q)
            if mask.shape != rows:
                reject(OP, name, mask, f"shape {list(rows)}")
    if query_padding_mask is None:
        query_padding_mask = key_padding_mask

    _check_names(preset, activation)
    for name, x, names in (
        ("scale", scale, SCALES),
        ("bias_scale", bias_scale, SCALES),
        ("normalizer", normalizer, NORMALIZERS),
        ("lin_normalizer", lin_normalizer, LIN_NORMALIZERS),
    ):
        _check_factor(name, x, names, rows, quad_q)
    how = resolve(preset, causal, activation, scale, bias_scale, normalizer, lin_normalizer)
    if bias is not None:
        check_tensor(OP, "bias", bias, FLOATS, quad_q)
        longest = max(1, 0 if packed else min(chunk_size, v.shape[1]))
        if bias.dim() not in (1, 2) or bias.shape[-1] % 2 == 0 or bias.shape[-1] < 2 * longest - 1:
            reject(OP, "bias", bias, f"shape [2·M − 1] or [H, 2·M − 1], M at least {longest}")
        if bias.dim() == 2 and bias.shape[0] != heads:
            reject(OP, "bias", bias, f"as many heads as quad_q, {heads}")
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        bias = bias.to(wide).reshape(-1, bias.shape[-1])
    if packed:
        quad_q, quad_k, lin_q, lin_k, v = (x[None] for x in (quad_q, quad_k, lin_q, lin_k, v))
        gate, key_padding_mask, query_padding_mask = (
            None if x is None else x[None] for x in (gate, key_padding_mask, query_padding_mask)
        )
    if rope is not None:
        _check_rope(rope, rope_offset, dim, v, cu_seqlens)
        quad_q, quad_k = _turned(quad_q, quad_k, rope, rope_offset, rope_interleaved, cu_seqlens)
        lin_q, lin_k = _turned(lin_q, lin_k, rope, rope_offset, rope_interleaved, cu_seqlens)
    elif isinstance(rope_offset, Tensor) or rope_offset != 0:
        reject(OP, "rope_offset", rope_offset, "0, as rope is None")

    p = MixedProblem(
        quad_q,
        quad_k,
        lin_q,
        lin_k,
        v,
        gate,
        bias,
        *(None,) * 4,
        query_padding_mask,
        key_padding_mask,
        cu_seqlens,
        chunk_size,
        ACTIVATIONS.index(how.activation),
        *(1.0,) * 4,
        bool(causal),
    )
    a, a_rows = _factor(p, how.scale, inverse=False)
    b, b_rows = _factor(p, 1.0 if bias is None else how.bias_scale, inverse=False)
    c, c_rows = _factor(p, how.normalizer, inverse=True)
    d, d_rows = _factor(p, how.lin_normalizer, inverse=True, linear=True)
    return p._replace(a=a_rows, b=b_rows, c=c_rows, d=d_rows, scale=a, bias_scale=b, out_scale=c, lin_scale=d)


def _check_features(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, gate: Tensor | None, packed: bool
) -> None:
    layout = "[total, H, D], as cu_seqlens is given" if packed else "[B, T, H, D]"
    names = {"quad_q": quad_q, "quad_k": quad_k, "lin_q": lin_q, "lin_k": lin_k, "v": v, "gate": gate}
    for name, x in names.items():
        if name == "gate" and x is None:
            continue
        check_tensor(OP, name, x, FLOATS, quad_q if isinstance(quad_q, Tensor) else None)
        assert x is not None
        if x.dim() != (3 if packed else 4):
            reject(OP, name, x, f"shape {layout}")
        if x.dtype != quad_q.dtype:
            reject(OP, name, x, f"the dtype of quad_q, {quad_q.dtype}", TypeError)
    if quad_q.shape[-1] == 0:
        reject(OP, "quad_q", quad_q, "a head dimension above 0")
    if quad_k.shape[-1] != quad_q.shape[-1] or quad_k.shape[:-2] != quad_q.shape[:-2]:
        reject(OP, "quad_k", quad_k, f"the shape of quad_q, {list(quad_q.shape)}, but for the number of heads")
    if quad_k.shape[-2] == 0 or quad_q.shape[-2] % quad_k.shape[-2]:
        reject(OP, "quad_k", quad_k, f"a number of heads that divides that of quad_q, {quad_q.shape[-2]}")
    if lin_q.shape != quad_q.shape:
        reject(OP, "lin_q", lin_q, f"the shape of quad_q, {list(quad_q.shape)}")
    if lin_k.shape != quad_k.shape:
        reject(OP, "lin_k", lin_k, f"the shape of quad_k, {list(quad_k.shape)}")
    if v.shape[:-1] != quad_k.shape[:-1]:
        reject(OP, "v", v, f"the shape of quad_k, {list(quad_k.shape)}, but for the head dimension")
    if gate is not None and gate.shape != (*quad_q.shape[:-1], v.shape[-1]):
        reject(OP, "gate", gate, f"shape {[*quad_q.shape[:-1], v.shape[-1]]}, that of the output")


def _check_names(preset: Any, activation: Any) -> None:
    if preset not in PRESETS:
        reject(OP, "preset", preset, f"one of {', '.join(map(repr, PRESETS))}")
    if activation is not None and activation not in ACTIVATIONS:
        reject(OP, "activation", activation, f"one of {', '.join(map(repr, ACTIVATIONS))}")


def _check_factor(name: str, x: Any, names: tuple[str, ...], rows: torch.Size, like: Tensor) -> None:
    if x is None or (isinstance(x, str) and x in names):
        return
    if isinstance(x, Tensor):
        check_tensor(OP, name, x, (torch.float32, torch.float64), like)
        if x.shape != rows:
            reject(OP, name, x, f"shape {list(rows)}, a number to each query")
        _reject_gradient(name, x)
        return
    if isinstance(x, (str, bool)) or not isinstance(x, (int, float)):
        error = ValueError if isinstance(x, str) else TypeError
        reject(OP, name, x, f"a number, a tensor, or one of {', '.join(map(repr, names))}", error)
    if name.endswith("normalizer") and x == 0:
        reject(OP, name, x, "a number other than 0")


def _reject_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        reject(OP, name, Description("a tensor that requires grad"), "one without: there is no gradient to it")


def _check_rope(rope: Any, offset: Any, dim: int, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        reject(OP, "rope", Description(f"a {type(rope).__name__}"), "a pair of tables, cos and sin", TypeError)
    cos, _ = rope
    for table in rope:
        check_tensor(OP, "rope", table, FLOATS, v)
        if table.dim() != 2 or table.shape != cos.shape or 2 * table.shape[1] > dim:
            reject(OP, "rope", table, f"two tables of one shape [P, R/2], R at most {dim}")
        _reject_gradient("rope", table)
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(offset, Tensor):
        check_tensor(OP, "rope_offset", offset, INDICES, v)
        if offset.shape != (sequences,):
            reject(OP, "rope_offset", offset, f"an int, or shape [N] = [{sequences}]")
    else:
        check_int(OP, "rope_offset", offset)


def _turned(
    q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor], offset: int | Tensor, interleaved: bool, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q and k turned by the angles of their places."""
    if ends is None:
        return rotate(q, k, *rope, offset=offset, interleaved=interleaved)
    q, k = rotate(q[0], k[0], *rope, offset=offset, cu_seqlens=ends, interleaved=interleaved)
    return q[None], k[None]


def _factor(
    p: MixedProblem, x: float | str | Tensor, *, inverse: bool, linear: bool = False
) -> tuple[float, Tensor | None]:
    """A number, and one by row [B, n] or None, whose product is what x says, or 1 / x for a number x if `inverse`."""
    batch, length = p.v.shape[:2]
    if isinstance(x, Tensor):  # of rows whose sum has a key: 0 · inf would reach gradients
        seen = _count(p, "visible", linear) > 0
        seen = seen if p.query_mask is None else seen & p.query_mask
        return 1.0, torch.where(seen, x.to(p.wide).reshape(batch, length), 0)
    if not isinstance(x, str):
        return 1 / x if inverse else float(x), None
    if x == "none":
        return 1.0, None
    if x == "dim":
        return torch.sym_float(p.quad_q.shape[3]) ** -0.5, None
    if x == "chunk":
        return 1 / p.chunk_size, None
    if p.cu_seqlens is None and linear and (x == "length" or (p.key_mask is None and not p.causal)):
        return 1 / torch.sym_float(max(length, 1)), None
    count = _count(p, x, linear).to(p.wide)
    return 1.0, torch.where(count > 0, 1 / count.clamp(min=1), 0).expand(batch, length).contiguous()


def _count(p: MixedProblem, name: str, linear: bool) -> Tensor:
    """[B or 1, n]: how many keys there are to each token's sum, within its chunk or over others."""
    length = p.v.shape[1]
    row = torch.arange(length, device=p.device)
    begin, end = torch.zeros_like(row), torch.full_like(row, length)  # of a token's sequence
    if p.cu_seqlens is not None:
        of = (torch.searchsorted(p.cu_seqlens, row, right=True) - 1).clamp(0, max(p.cu_seqlens.shape[0] - 2, 0))
        begin, end = p.cu_seqlens[of].long(), p.cu_seqlens[(of + 1).clamp(max=p.cu_seqlens.shape[0] - 1)].long()
    first = row - (row - begin) % p.chunk_size  # of its chunk
    last = torch.minimum(first + p.chunk_size, end)
    if linear:
        first, last = begin, first if p.causal and name == "visible" else end
    elif p.causal and name == "visible":
        last = row + 1
    kept = torch.ones(1, length, dtype=torch.bool, device=p.device)
    if p.key_mask is not None and name != "length":
        kept = p.key_mask
    before = F.pad(kept.long().cumsum(1), (1, 0))  # [B or 1, n + 1]: keys before one
    first, last = (x.clamp(0, length) for x in (first, last))  # packed ends may be wrong
    return before[:, last] - before[:, first]
