"""`kx_kernels.gau_attention`: its contract and checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import dispatch, library
from ..._core.checks import FLOATS, INDICES, Description, bound, check_int, check_lengths, check_tensor, reject
from ..._core.padding import mask_of
from ..rope.api import rope as rotate
from ._backends import OPERATOR, backends
from ._problem import NUM_TENSORS, GauProblem, check_values
from .presets import ACTIVATIONS, NORMALIZERS, PRESETS, SCALES, SOFTMAXES, Preset, resolve

OP = "gau_attention"
_TORCHS = "softmax is served by torch's scaled_dot_product_attention, and by no kernel of ours"


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
    workspace: int = 256 << 20,
    backend: str | None = None,
) -> Tensor:
    """o_i = gate_i ⊙ c_i · Σ_j f(a·q_i·k_j + b·β_{j−i}) v_j over the keys j that query i may see.

    | argument                     | shape                                | dtype        | meaning                   |
    |------------------------------|--------------------------------------|--------------|---------------------------|
    | `q`                          | [B, n_q, H, s], [total, H, s] packed | float        |                           |
    | `k`                          | [B, n_k, H_k, s]                     | of q         | H_k divides H             |
    | `v`                          | [B, n_k, H_k, e]                     | of q         | e is large as a rule      |
    | `gate`                       | [B, n_q, H, e]                       | of q         | None: ones                |
    | `bias` β                     | [2·M − 1] or [H, 2·M − 1]            | float        | by distance j − i, the    |
    |                              |                                      |              | middle is 0; M ≥ n_q, n_k |
    | `rope`                       | two tables [P, R/2]                  | float        | cos and sin, by which q   |
    |                              |                                      |              | and k turn first          |
    | `rope_offset`                | int, or [B] or [N] packed            | int32, int64 | place of the first key    |
    | `key_padding_mask`           | [B, n_k], or [total] packed          | bool         | False: padding            |
    | `query_padding_mask`         | [B, n_q], or [total] packed          | bool         | None: that of keys where  |
    |                              |                                      |              | n_q = n_k                 |
    | `lengths`                    | [B]                                  | int32, int64 | keys of each sequence, in |
    |                              |                                      |              | place of a mask           |
    | `cu_seqlens`, `cu_seqlens_k` | [N + 1]                              | int32        | ends of packed sequences; |
    |                              |                                      |              | of keys, if others        |

    Tensors may have any strides. Queries are aligned with the last keys: query i stands where key i + n_k − n_q does,
    for `causal`, `bias` and `rope`; one query against a cache of keys is a step of decoding.

    Args:
        causal: a query sees no key after it.
        preset: the formula of an implementation: "su" or "bert4keras", "gau_alpha", "flash" (FLASH-pytorch), "mega",
            "rtmpose" or "hstu". It stands for the four arguments below where they are None. Those of "flash" and "hstu"
            divide by the length, padding included; HSTU itself divides by one number for all sequences: give it as
            `normalizer`.
        activation: f: "relu2", "relu", "silu", "sigmoid", "laplace" or "identity"; "softmax" and "softmax_plus" are
            served by torch's scaled_dot_product_attention, with no normalizer and no other backend, and with an
            n_q × n_k mask where there is padding, packing, a bias, or causality of n_q ≠ n_k.
        scale: a: a number, "dim" (1/√s), "length" (1/n_k), "valid" (1 / keys of the sequence that are no padding),
            "visible" (1 / keys that the query sees), or a tensor [B, n_q] ([total] packed).
        normalizer: 1/c: "visible" (keys that the query sees), "valid", "length", "length_squared", "sum" (of the row's
            scores f), "none" or a number; or c itself as a tensor [B, n_q]. Where 1/c is 0, c is.
        bias_scale: b, as scale.
        rope_interleaved: as in `kx_kernels.rope`.
        workspace: bytes that scores may take at a time on a GPU, where they leave the chip. Less makes more passes, but
            what one takes at least is taken in any case: forward 128 rows of scores of one head; backward with Triton
            one block of keys or queries, with CUDA 128 keys for the rows of all heads, 2·B·n_q·H·128 numbers. Beside
            it is what is linear in n: gradients of rows [B, n_q, H, e], and sums. In C++ it has no effect: threads
            hold a few blocks each.
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference"; None takes the choice of `kx_kernels.backend`.

    Returns:
        [B, n_q, H, e], of q's dtype. Rows of padding, and rows that see nothing, are 0 and give no gradient. Sums are
        in float32 (float64 for float64) and an output is rounded once; by backend "torch", whose products give bfloat16
        for bfloat16, before c and the gate as well. Differentiable in q, k, v, gate and bias, twice
        (the second gradient takes n_q × n_k memory); that of relu² at 0 is 0.

    Raises:
        ValueError: a shape, size or value that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.

    Source: Hua et al., "Transformer Quality in Linear Time" (arXiv:2202.10447); Su, kexue.fm/archives/8934.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "preset": preset,
        "activation": activation,
        "scale": scale,
        "normalizer": normalizer,
        "bias": bias,
        "bias_scale": bias_scale,
        "rope": rope,
        "rope_offset": rope_offset,
        "rope_interleaved": rope_interleaved,
        "key_padding_mask": key_padding_mask,
        "query_padding_mask": query_padding_mask,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "workspace": workspace,
    }
    p, how = _checked(q, k, v, gate, **options)
    wanted = dispatch.requested(backend)
    if how.activation in SOFTMAXES:
        if wanted not in (dispatch.AUTO, "torch"):
            raise dispatch.UnsupportedError(f"{OP}: backend {wanted!r} cannot serve this call\n  {wanted}: {_TORCHS}")
        given = [x for x in p[:NUM_TENSORS] if isinstance(x, Tensor)]
        if not library.needs_operator(given) and not library.transforming():
            check_values(p)
        o = _by_softmax(p, how)
    else:
        o = OPERATOR.attend(p, wanted)
    return o if cu_seqlens is None else o[0]


def problem(*args, **kwargs) -> GauProblem:
    """A call as its backends see it, checked."""
    return _checked(**bound(gau_attention, args, kwargs, without=("backend",)))[0]


def survey(*args, **kwargs) -> list[tuple[str, str | None]]:
    """For `kx_kernels.explain`: each backend, and why it cannot serve this call or None."""
    p, how = _checked(**bound(gau_attention, args, kwargs, without=("backend",)))
    if how.activation in SOFTMAXES:
        return [(b.name, None if b.name == "torch" else _TORCHS) for b in backends()]
    return dispatch.survey(backends(), p)


def _checked(
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
    workspace: int,
) -> tuple[GauProblem, Preset]:
    """The call as a GauProblem, or the error that names what is wrong with it; and what its names stand for."""
    packed = cu_seqlens is not None
    layout = "[total, H, D], as cu_seqlens is given" if packed else "[B, T, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        if name == "gate" and x is None:
            continue
        check_tensor(OP, name, x, FLOATS, q if isinstance(q, Tensor) else None)
        assert x is not None
        if x.dim() != (3 if packed else 4):
            reject(OP, name, x, f"shape {layout}")
        if x.dtype != q.dtype:
            reject(OP, name, x, f"the dtype of q, {q.dtype}", TypeError)
    rows, heads, dim = q.shape[:-2], q.shape[-2], q.shape[-1]
    if dim == 0:
        reject(OP, "q", q, "a head dimension above 0")
    if k.shape[-1] != dim or k.shape[:-3] != q.shape[:-3]:
        reject(OP, "k", k, f"the batch and the head dimension of q, {list(q.shape)}")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        reject(OP, "k", k, f"a number of heads that divides that of q, {heads}")
    if v.shape[:-1] != k.shape[:-1]:
        reject(OP, "v", v, f"the shape of k, {list(k.shape)}, but for the head dimension")
    if gate is not None and gate.shape != (*q.shape[:-1], v.shape[-1]):
        reject(OP, "gate", gate, f"shape {[*q.shape[:-1], v.shape[-1]]}, that of the output")
    check_int(OP, "workspace", workspace)
    if workspace < 0:
        reject(OP, "workspace", workspace, "bytes, 0 or more")

    cu_seqlens, cu_seqlens_k = _checked_ends(q, k, cu_seqlens, cu_seqlens_k)
    if lengths is not None:
        check_lengths(OP, lengths, k, cu_seqlens, key_padding_mask)
        key_padding_mask = mask_of(lengths, k.shape[1])
    masks = []
    for name, mask, like in (
        ("query_padding_mask", query_padding_mask, q),
        ("key_padding_mask", key_padding_mask, k),
    ):
        if mask is not None:
            check_tensor(OP, name, mask, (torch.bool,), q)
            if mask.shape != like.shape[:-2]:
                reject(OP, name, mask, f"shape {list(like.shape[:-2])}")
        masks.append(mask if mask is None or not packed else mask[None])
    query_mask, key_mask = masks
    if query_mask is None and q.shape[:-2] == k.shape[:-2]:
        query_mask = key_mask

    how = _checked_names(preset, activation, scale, bias_scale, normalizer)
    for name, factor in (("scale", scale), ("bias_scale", bias_scale), ("normalizer", normalizer)):
        if isinstance(factor, Tensor):
            check_tensor(OP, name, factor, (torch.float32, torch.float64), q)
            if factor.shape != rows:
                reject(OP, name, factor, f"shape {list(rows)}, a number to each query")
            _reject_gradient(name, factor)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias is not None:
        check_tensor(OP, "bias", bias, FLOATS, q)
        longest = 0 if packed else max(q.shape[1], k.shape[1])
        if bias.dim() not in (1, 2) or bias.shape[-1] % 2 == 0 or bias.shape[-1] < 2 * longest - 1:
            reject(OP, "bias", bias, f"shape [2·M − 1] or [H, 2·M − 1], M at least {max(longest, 1)}")
        if bias.dim() == 2 and bias.shape[0] != heads:
            reject(OP, "bias", bias, f"as many heads as q, {heads}")
        bias = bias.to(wide).reshape(-1, bias.shape[-1])
    if packed:
        q, k, v, gate = q[None], k[None], v[None], None if gate is None else gate[None]
    if rope is not None:
        q, k = _turned(q, k, rope, rope_offset, rope_interleaved, cu_seqlens, cu_seqlens_k)
    elif isinstance(rope_offset, Tensor) or rope_offset != 0:
        reject(OP, "rope_offset", rope_offset, "0, as rope is None")

    by_softmax = how.activation in SOFTMAXES
    if by_softmax and normalizer is not None and how.normalizer != "none":
        reject(OP, "normalizer", normalizer, f"None, as {how.activation} normalises itself")
    counts = _Counts(q, k, causal, query_mask, key_mask, cu_seqlens, cu_seqlens_k, wide)
    a, a_rows = counts.factor(how.scale, inverse=True)
    b, b_rows = counts.factor(how.bias_scale, inverse=True)
    by_sum = isinstance(how.normalizer, str) and how.normalizer == "sum"
    c, c_rows = (1.0, None) if by_sum or by_softmax else counts.factor(how.normalizer, inverse=False)
    return GauProblem(
        q,
        k,
        v,
        gate,
        bias,
        a_rows,
        b_rows if bias is not None else None,
        c_rows,
        query_mask,
        key_mask,
        cu_seqlens,
        cu_seqlens_k,
        0 if by_softmax else ACTIVATIONS.index(how.activation),
        a,
        b,
        c,
        by_sum and not by_softmax,
        bool(causal),
        workspace,
    ), how


def _reject_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        reject(OP, name, Description("a tensor that requires grad"), "one without: there is no gradient to it")


def _checked_ends(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            reject(OP, "cu_seqlens_k", cu_seqlens_k, "None, as cu_seqlens is None")
        return None, None
    for name, ends in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is None:
            continue
        check_tensor(OP, name, ends, (torch.int32,), q)
        if ends.dim() != 1 or ends.shape[0] == 0 or ends.shape != cu_seqlens.shape:
            reject(OP, name, ends, "shape [N + 1], one more than there are sequences")
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            reject(OP, "k", k, f"the number of tokens of q, {q.shape[0]}, as cu_seqlens_k is None")
        cu_seqlens_k = cu_seqlens
    return cu_seqlens.contiguous(), cu_seqlens_k.contiguous()


def _checked_names(preset: Any, activation: Any, scale: Any, bias_scale: Any, normalizer: Any) -> Preset:
    if preset not in PRESETS:
        reject(OP, "preset", preset, f"one of {', '.join(map(repr, PRESETS))}")
    if activation is not None and activation not in (*ACTIVATIONS, *SOFTMAXES):
        reject(OP, "activation", activation, f"one of {', '.join(map(repr, (*ACTIVATIONS, *SOFTMAXES)))}")
    for name, x, names in (
        ("scale", scale, SCALES),
        ("bias_scale", bias_scale, SCALES),
        ("normalizer", normalizer, NORMALIZERS),
    ):
        if x is None or isinstance(x, Tensor) or (isinstance(x, str) and x in names):
            continue
        if isinstance(x, (str, bool)) or not isinstance(x, (int, float)):
            error = ValueError if isinstance(x, str) else TypeError
            reject(OP, name, x, f"a number, a tensor, or one of {', '.join(map(repr, names))}", error)
        if name == "normalizer" and x == 0:
            reject(OP, name, x, "a number other than 0")
    return resolve(preset, activation, scale, bias_scale, normalizer)


def _turned(
    q: Tensor,
    k: Tensor,
    rope: Any,
    offset: int | Tensor,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q and k turned by the angles of their places; a query's is that of the key it is aligned with."""
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        reject(OP, "rope", Description(f"a {type(rope).__name__}"), "a pair of tables, cos and sin", TypeError)
    cos, sin = rope
    for table in (cos, sin):
        check_tensor(OP, "rope", table, FLOATS, q)
        if table.dim() != 2 or table.shape != cos.shape or 2 * table.shape[1] > q.shape[3]:
            reject(OP, "rope", table, f"two tables of one shape [P, R/2], R at most {q.shape[3]}")
        _reject_gradient("rope", table)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(offset, Tensor):
        check_tensor(OP, "rope_offset", offset, INDICES, q)
        if offset.shape != (sequences,):
            reject(OP, "rope_offset", offset, f"an int, or shape [N] = [{sequences}]")
    else:
        check_int(OP, "rope_offset", offset)
    by = dispatch.AUTO if dispatch.requested(None) == "torch" else None  # which turns nothing itself
    if q.shape[1] == k.shape[1] and cu_seqlens is cu_seqlens_k:
        if cu_seqlens is None:
            return rotate(q, k, cos, sin, offset=offset, interleaved=interleaved, backend=by)
        turned = rotate(q[0], k[0], cos, sin, offset=offset, cu_seqlens=cu_seqlens, interleaved=interleaved, backend=by)
        return turned[0][None], turned[1][None]
    places = _places(q, k, cu_seqlens, cu_seqlens_k)
    by_row = offset
    out = []
    for x, place, ends in ((q, places[0], cu_seqlens), (k, places[1], cu_seqlens_k)):
        if isinstance(offset, Tensor):
            by_row = offset[:, None] if ends is None else offset[_sequence(x, ends)][None]
        positions = (place + by_row).expand(x.shape[:2])
        out.append(rotate(x, None, cos, sin, positions=positions, interleaved=interleaved, backend=by))
    return out[0], out[1]


def _sequence(x: Tensor, ends: Tensor, none: int | None = None) -> Tensor:
    """[n]: the packed sequence that a row is of; for rows of none `none`, or the nearest."""
    row = torch.arange(x.shape[1], device=x.device)
    nearest = (torch.searchsorted(ends, row, right=True) - 1).clamp(0, max(ends.shape[0] - 2, 0))
    return nearest if none is None else torch.where((row >= ends[0]) & (row < ends[-1]), nearest, none)


def _places(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n_q] and [n_k]: where rows stand in their sequences, queries aligned with the last keys."""
    row, column = (torch.arange(x.shape[1], device=x.device) for x in (q, k))
    if cu_seqlens is None or cu_seqlens_k is None:
        return row + (k.shape[1] - q.shape[1]), column
    of_q, of_k = _sequence(q, cu_seqlens), _sequence(k, cu_seqlens_k)
    aligned = cu_seqlens_k.diff() - cu_seqlens.diff()
    return row - cu_seqlens[of_q] + aligned[of_q], column - cu_seqlens_k[of_k]


class _Counts:
    """How many keys there are to a query, by name; made when they are asked for."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        causal: bool,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        wide: torch.dtype,
    ) -> None:
        self.q, self.k, self.causal, self.wide = q, k, causal, wide
        self.query_mask, self.key_mask = query_mask, key_mask
        self.cu_seqlens, self.cu_seqlens_k = cu_seqlens, cu_seqlens_k

    def factor(self, x: float | str | Tensor, inverse: bool) -> tuple[float, Tensor | None]:
        """A number, and one by row [B, n_q] or None, whose product is what x says; for `inverse` numbers are theirs."""
        if isinstance(x, Tensor):
            by_row = x.to(self.wide).reshape(self.q.shape[:2])
            return 1.0, torch.where(self.sees_keys(), by_row, 0)  # or 0 · inf would reach gradients
        if not isinstance(x, str):
            return (float(x) if inverse else 1 / x), None
        if x == "none":
            return 1.0, None
        if x == "dim":
            return torch.sym_float(self.q.shape[3]) ** -0.5, None
        power = 2 if x == "length_squared" else 1
        causal = self.causal and self.q.shape[1] != 1  # one query stands with the last key
        if self.cu_seqlens is None and (
            x.startswith("length") or (self.key_mask is None and (x == "valid" or not causal))
        ):
            return 1 / torch.sym_float(max(self.k.shape[1], 1)) ** power, None
        count = self._by_row(x.removesuffix("_squared")).to(self.wide) ** power
        return 1.0, torch.where(count > 0, 1 / count.clamp(min=1), 0).expand(self.q.shape[:2]).contiguous()

    def sees_keys(self) -> Tensor:
        """bool [B or 1, n_q]: queries that are no padding and see a key."""
        seen = self._by_row("visible") > 0
        return seen if self.query_mask is None else seen & self.query_mask

    def _by_row(self, name: str) -> Tensor:
        """[B or 1, n_q]"""
        n_k = self.k.shape[1]
        if name == "visible" and self.causal and self.key_mask is None and self.cu_seqlens is None:
            place, _ = _places(self.q, self.k, None, None)
            return (place + 1).clamp(0, n_k)[None]
        kept = torch.ones(1, n_k, dtype=torch.bool, device=self.k.device)
        if self.key_mask is not None and name != "length":
            kept = self.key_mask
        before = F.pad(kept.long().cumsum(1), (1, 0))  # [B or 1, n_k + 1]: keys before one
        place, _ = _places(self.q, self.k, self.cu_seqlens, self.cu_seqlens_k)
        if self.cu_seqlens is None or self.cu_seqlens_k is None:
            first, last = place.new_zeros(()), place.new_full((), n_k)
        else:
            of_q = _sequence(self.q, self.cu_seqlens)
            first, last = self.cu_seqlens_k[:-1].long()[of_q], self.cu_seqlens_k[1:].long()[of_q]
        if name == "visible" and self.causal:
            last = torch.minimum(last, torch.maximum(first + place + 1, first))
        first, last = (x.expand_as(place).clamp(0, n_k) for x in (first, last))  # ends of packed rows may be wrong
        return before[:, last] - before[:, first]


def _visible(p: GauProblem) -> tuple[Tensor | None, Tensor]:
    """What sees what, bool [B or 1, 1, n_q, n_k], with rows that see nothing as if they saw all; None where torch needs
    no mask for it. And which rows see a key, [B or 1, n_q].
    """
    n_q, n_k = p.q.shape[1], p.k.shape[1]
    rows_of_all = all(x is None for x in (p.key_mask, p.query_mask, p.cu_seqlens, p.bias))
    if rows_of_all and (not p.causal or n_q == n_k) and n_k > 0:
        return None, torch.ones(1, n_q, dtype=torch.bool, device=p.device)
    place_q, place_k = _places(p.q, p.k, p.cu_seqlens, p.cu_seqlens_k)
    apart = place_k[None, :] - place_q[:, None]
    visible = torch.ones_like(apart, dtype=torch.bool)[None]  # [B or 1, n_q, n_k]
    if p.cu_seqlens is not None and p.cu_seqlens_k is not None:
        of_q, of_k = _sequence(p.q, p.cu_seqlens, none=-1), _sequence(p.k, p.cu_seqlens_k, none=-2)
        visible = (of_q[:, None] == of_k)[None]
    if p.causal:
        visible = visible & (apart <= 0)
    if p.key_mask is not None:
        visible = visible & p.key_mask[:, None, :]
    if p.query_mask is not None:
        visible = visible & p.query_mask[:, :, None]
    seen = visible.any(-1)
    return (visible | ~seen[..., None])[:, None], seen


def _by_softmax(p: GauProblem, how: Preset) -> Tensor:
    """softmax and softmax_plus, by torch's own attention."""
    counts = _Counts(p.q, p.k, p.causal, p.query_mask, p.key_mask, p.cu_seqlens, p.cu_seqlens_k, p.wide)
    group = p.q.shape[2] // p.k.shape[2]
    mask, seen = _visible(p)
    factor = p.q.new_full((1, 1, 1, 1), p.scale, dtype=p.wide)
    if p.a is not None:
        factor = factor * p.a[..., None, None]
    stretch = factor.new_ones(())
    if how.activation == "softmax_plus":
        length = counts._by_row("visible").clamp(min=16).to(p.wide)
        stretch = (length.log() / torch.log(length.new_tensor(512.0)))[..., None, None]
    wide_q = torch.where(seen[..., None, None], p.q.to(p.wide) * factor * stretch, 0)
    keys, values = p.k, p.v
    if p.key_mask is not None:
        keys, values = (torch.where(p.key_mask[..., None, None], x, 0) for x in (keys, values))
    if group > 1:
        keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
    if p.bias is not None and mask is not None:
        place_q, place_k = _places(p.q, p.k, p.cu_seqlens, p.cu_seqlens_k)
        reach = p.bias.shape[1] // 2
        at = (place_k[None, :] - place_q[:, None]).clamp(-reach, reach) + reach
        distance = p.bias_scale * p.bias[:, at][None]
        if p.b is not None:
            distance = distance * p.b[:, None, :, None]
        distance = distance * (stretch.squeeze(-1)[:, None] if stretch.dim() else 1)
        mask = torch.where(mask, distance, -torch.inf).to(p.q.dtype)
    o = F.scaled_dot_product_attention(
        wide_q.to(p.q.dtype).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=p.causal and mask is None,
        scale=1.0,
    ).transpose(1, 2)
    o = torch.where(seen[..., None, None], o, 0)
    if p.gate is not None:
        o = o * torch.where(seen[..., None, None], p.gate, 0)
    return o
