"""The public function: its contract, its errors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from ..._core import dispatch
from ..._core.checks import FLOATS, INDICES, Description, bound, check_int, check_tensor, describe, reject
from ..._core.padding import without_padding
from ._autograd import attend, step
from ._backends import backends
from ._problem import FEATURE_MAPS, LinearAttentionProblem
from .state import LinearAttentionState

OP = "linear_attention"
FeatureMap = str | Callable[[Tensor], Tensor]
State = LinearAttentionState | tuple[Tensor, Tensor | None]


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    feature_map: FeatureMap = ...,
    stabilizer: float = ...,
    normalize: bool = ...,
    eps: float = ...,
    scale: float = ...,
    decay: Tensor | None = ...,
    rope: tuple[Tensor, Tensor] | None = ...,
    rope_offset: int | Tensor = ...,
    rope_interleaved: bool = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    initial_state: State | None = ...,
    return_state: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    feature_map: FeatureMap = ...,
    stabilizer: float = ...,
    normalize: bool = ...,
    eps: float = ...,
    scale: float = ...,
    decay: Tensor | None = ...,
    rope: tuple[Tensor, Tensor] | None = ...,
    rope_offset: int | Tensor = ...,
    rope_interleaved: bool = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    initial_state: State | None = ...,
    return_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, LinearAttentionState]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    feature_map: FeatureMap = "elu1",
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
    initial_state: State | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Linear attention: of each query with the keys up to its own, in time and memory linear in their number.

    o_i = Σ_{j ≤ i} (φ(q_i)·φ(k_j)) v_j / (Σ_{j ≤ i} φ(q_i)·φ(k_j) + eps), head by head.

    | argument           | shape                                   | dtype            | meaning                       |
    |--------------------|-----------------------------------------|------------------|-------------------------------|
    | `q`                | [B, T, H, D_k] or [total, H, D_k]       | float            | queries; the second form with |
    |                    |                                         |                  | `cu_seqlens`                  |
    | `k`                | [B, T, H_k, D_k] or [total, H_k, D_k]   | as `q`           | keys; H is a multiple of H_k  |
    | `v`                | [B, T, H_k, D_v] or [total, H_k, D_v]   | as `q`           | values                        |
    | `decay`            | [H_k]                                   | float32, float64 | factor per token, in (0, 1]   |
    | `rope`             | two of [P, R/2]                         | float            | cos and sin; see `rope_tables`|
    | `rope_offset`      | int or [N]                              | int32, int64     | position of each first token  |
    | `key_padding_mask` | [B, T] or [total]                       | bool             | False for padding             |
    | `cu_seqlens`       | [N + 1]                                 | int32            | where packed sequences begin  |
    | `initial_state`    | kv [N, H_k, D_k, D_v], z [N, H_k, D_k]  | float32; float64 | sums of the tokens before, and|
    |                    |                                         | for float64 `q`  | z only where normalised       |

    "float" is bfloat16, float16, float32 or float64, the tables' independently of q's. N is the number of sequences:
    B, or the packed ones. Strides are free everywhere. Query head h reads head h // (H / H_k) of keys and values.

    Padding has no features and no values: whatever its memory holds changes nothing, its outputs are 0 and the
    gradients of its outputs are not looked at. Its place counts for `decay` and positions. Packed rows that belong to
    no sequence are padding too. A NaN or infinity in a token stays in its sequence and head, but may reach
    tokens before it, whose weights of it are 0 by a product: those of its chunk, in the reference all.

    Args:
        causal: False lets each query attend to all keys of its sequence.
        feature_map: φ. "identity", "elu1" (elu(x) + 1), "relu", "relu2" (relu squared), "exp", or a function that
            q and k go through before the kernel; its attribute `kernel_map`, if any, names the map to apply after it.
        stabilizer: what "exp" lowers the keys by before the exponential, and the queries if nothing is normalised. With
            normalisation a query is lowered by its largest element, which its gradient takes as constant.
        normalize: divide by the sum of weights. A row whose sum and eps are both 0 gives 0.
        eps: added to the sum of weights.
        scale: multiplies all weights; a normalised output does not depend on it.
        decay: a key's weight falls by this factor with every token after it. No gradient; causal only.
        rope: turns φ(q) and φ(k) by the angles of their positions in the numerator, not in the denominator, as RoFormer
            does (equation 19): weights may be negative, and sum to less than 1.
        rope_interleaved: pairs (0, 1), (2, 3), …; False pairs (i, i + R/2). As in `kx_kernels.rope`.
        return_state: also return the state after the last token.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None takes the choice of `kx_kernels.backend`.

    Returns:
        [B, T, H, D_v] or [total, H, D_v], new, of q's dtype, in memory [B, H, T, D_v] if q is; with `return_state` also
        a `LinearAttentionState`. Sums are in float32 (float64 for float64) and an output is rounded once.
        Differentiable in q, k, v and the initial state, twice (the second gradient is quadratic in T).

    Raises:
        ValueError: a shape, size or value that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.

    Source: Katharopoulos et al., "Transformers are RNNs" (arXiv:2006.16236), equations 8 to 12.
    """
    p = _checked(
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
    )
    o, kv, z = attend(p, dispatch.requested(backend))
    if cu_seqlens is not None:
        o = o[0]
    if kv is None:
        return o
    return o, LinearAttentionState(kv, z)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    slots: Tensor | None = None,
    feature_map: FeatureMap = "elu1",
    stabilizer: float = 0.0,
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    decay: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_offset: int | Tensor = 0,
    rope_interleaved: bool = True,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One or a few further tokens of each sequence: their outputs, and the states updated in place, in one launch.

    What `linear_attention` gives for these tokens with `initial_state`, and the state it returns written over it. All
    arguments not named here are as there.

    | argument | shape                                            | dtype        | meaning                          |
    |----------|--------------------------------------------------|--------------|----------------------------------|
    | `q`      | [B, T, H, D_k]; `k` and `v` likewise             | float        | T new tokens, one as a rule      |
    | `state`  | kv [S, H_k, D_k, D_v], z [S, H_k, D_k] (or None) | float32      | S states, without gaps; z only   |
    |          |                                                  |              | where normalised                 |
    | `slots`  | [B]                                              | int32, int64 | which state each sequence has;   |
    |          |                                                  |              | None: the b-th, S = B            |

    States are float64 for float64 `q`. Two sequences must not share a slot; a number that is no slot raises on the CPU
    and is not looked for on a GPU, where it would make the call wait.

    Returns:
        [B, T, H, D_v], of q's dtype. There is no gradient: arguments that require one are refused under autograd.

    Raises:
        ValueError: a shape, size or value that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.
    """
    p = _checked_step(
        q,
        k,
        v,
        state,
        slots,
        feature_map=feature_map,
        stabilizer=stabilizer,
        normalize=normalize,
        eps=eps,
        scale=scale,
        decay=decay,
        rope=rope,
        rope_offset=rope_offset,
        rope_interleaved=rope_interleaved,
        key_padding_mask=key_padding_mask,
    )
    return step(p, dispatch.requested(backend))


def step_problem(*args, **kwargs) -> LinearAttentionProblem:
    """A call of linear_attention_step as its backends see it, checked."""
    return _checked_step(**bound(linear_attention_step, args, kwargs, without=("backend",)))


def _checked_step(q, k, v, state, slots, **options) -> LinearAttentionProblem:
    op = "linear_attention_step"
    check_tensor(op, "q", q, FLOATS)
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        reject(op, "state", Description(f"a {type(state).__name__}"), "a pair of tensors, kv and z", TypeError)
    for name, x in (("q", q), ("k", k), ("v", v), ("state", state[0]), ("state", state[1])):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            given = Description("a tensor that requires grad")
            reject(op, name, given, "one without, as the state is overwritten: use linear_attention to train")
        if name == "state" and isinstance(x, Tensor) and not x.is_contiguous():
            given = Description(f"of shape {list(x.shape)} with strides {list(x.stride())}")
            reject(op, name, given, "tensors without gaps, as they are written in place")
    if slots is not None:
        check_tensor(op, "slots", slots, INDICES, q)
        if slots.shape != q.shape[:1]:
            reject(op, "slots", slots, f"shape [B] = {list(q.shape[:1])}")
        slots = slots.long().contiguous()
    if not isinstance(state[0], Tensor) or state[0].dim() != 4:
        reject(op, "state", state[0], "kv of shape [S, H_k, D_k, D_v]", TypeError)
    states = None if slots is None else state[0].shape[0]
    options |= {"causal": True, "cu_seqlens": None, "initial_state": state, "return_state": False}
    options |= {"states": states, "op": op}
    return _checked(q, k, v, **options)._replace(slots=slots)


def problem(*args, **kwargs) -> LinearAttentionProblem:
    """A call as its backends see it, checked."""
    return _checked(**bound(linear_attention, args, kwargs, without=("backend",)))


def survey(*args, **kwargs) -> list[tuple[str, str | None]]:
    """For `kx_kernels.explain`: each backend, and why it cannot serve this call or None."""
    return dispatch.survey(backends(), problem(*args, **kwargs))


def survey_step(*args, **kwargs) -> list[tuple[str, str | None]]:
    """The same for `linear_attention_step`."""
    return dispatch.survey(backends(), step_problem(*args, **kwargs))


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    feature_map: FeatureMap,
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
    initial_state: State | None,
    return_state: bool,
    states: int | None = None,
    op: str = OP,
) -> LinearAttentionProblem:
    """The call as a LinearAttentionProblem, or the error that names what is wrong with it."""
    packed = cu_seqlens is not None
    layout = "[total, H, D], as cu_seqlens is given" if packed else "[B, T, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, x, FLOATS, q if isinstance(q, Tensor) else None)
        if x.dim() != (3 if packed else 4):
            reject(OP, name, x, f"shape {layout}")
        if x.dtype != q.dtype:
            reject(OP, name, x, f"the dtype of q, {q.dtype}", TypeError)
    heads, key_dim = q.shape[-2:]
    kv_heads, value_dim = v.shape[-2:]
    if key_dim == 0:
        reject(OP, "q", q, "a head dimension above 0")
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != key_dim:
        reject(OP, "k", k, f"the shape of q, {list(q.shape)}, but for the number of heads")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        reject(OP, "k", k, f"a number of heads that divides that of q, {heads}")
    if v.shape[:-1] != k.shape[:-1]:
        reject(OP, "v", v, f"the shape of k, {list(k.shape)}, but for the head dimension")

    sequences = q.shape[0]
    if cu_seqlens is not None:
        check_tensor(OP, "cu_seqlens", cu_seqlens, (torch.int32,), q)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            reject(OP, "cu_seqlens", cu_seqlens, "shape [N + 1], one more than there are sequences")
        sequences = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
    mask = key_padding_mask
    if mask is not None:
        check_tensor(OP, "key_padding_mask", mask, (torch.bool,), q)
        if mask.shape != q.shape[:-2]:
            reject(OP, "key_padding_mask", mask, f"shape {list(q.shape[:-2])}, that of q without heads")

    if q.shape[-2] == 0:
        reject(OP, "q", q, "one head or more")
    if value_dim == 0:
        reject(OP, "v", v, "a head dimension above 0")
    if callable(feature_map):
        features = []
        for name, x in (("q", q), ("k", k)):
            made = feature_map(without_padding(x, mask, cu_seqlens))
            if not isinstance(made, Tensor) or made.shape[:-1] != x.shape[:-1] or made.shape[-1] == 0:
                what = describe(made) if isinstance(made, Tensor) else f"a {type(made).__name__}"
                given = Description(f"a function that makes {what} of {name}")
                lead = ", ".join(map(str, x.shape[:-1]))
                reject(OP, "feature_map", given, f"a tensor of shape [{lead}, D_f], D_f above 0")
            features.append(made)
        q, k = features
        if q.shape[-1] != k.shape[-1]:
            given = Description(f"a function that makes {q.shape[-1]} features of q and {k.shape[-1]} of k")
            reject(OP, "feature_map", given, "as many of both")
        feature_map = getattr(feature_map, "kernel_map", "identity")
        q, k, key_dim = q.to(v.dtype), k.to(v.dtype), q.shape[-1]
    if feature_map not in FEATURE_MAPS:
        reject(OP, "feature_map", feature_map, f"a function, or one of {', '.join(map(repr, FEATURE_MAPS))}")
    for name, number in (("stabilizer", stabilizer), ("eps", eps), ("scale", scale)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            reject(OP, name, number, "a number", TypeError)
    if eps < 0:
        reject(OP, "eps", eps, "0 or more")

    if decay is not None:
        check_tensor(OP, "decay", decay, (torch.float32, torch.float64), q)
        if decay.shape != (kv_heads,):
            reject(OP, "decay", decay, f"shape [H_k] = [{kv_heads}]")
        if not causal:
            reject(OP, "decay", decay, "None, as causal=False gives the tokens no order")
        _reject_gradient("decay", decay)
        decay = decay.double().contiguous()
    cos, sin, first, offsets = _checked_rope(q, rope, rope_offset, sequences, packed)
    sizes = (sequences if states is None else states, kv_heads, key_dim, value_dim)
    kv0, z0 = _checked_state(q, initial_state, sizes, normalize, op, "initial_state" if op == OP else "state")

    if packed:
        q, k, v = q[None], k[None], v[None]
        mask = None if mask is None else mask[None]
    return LinearAttentionProblem(
        q,
        k,
        v,
        decay,
        cos,
        sin,
        offsets,
        mask,
        cu_seqlens,
        kv0,
        z0,
        None,
        FEATURE_MAPS.index(feature_map),
        float(stabilizer),
        bool(normalize),
        float(eps),
        float(scale),
        bool(causal),
        bool(rope_interleaved),
        first,
        bool(return_state),
    )


def _reject_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        reject(OP, name, Description("a tensor that requires grad"), "one without: there is no gradient to it")


def _checked_rope(
    q: Tensor, rope: tuple[Tensor, Tensor] | None, offset: int | Tensor, sequences: int, packed: bool
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
        check_tensor(OP, "rope", table, FLOATS, q)
        if table.dim() != 2 or table.shape != cos.shape or table.dtype != cos.dtype:
            reject(OP, "rope", table, "two tables of one shape [P, R/2] and one dtype")
        _reject_gradient("rope", table)
    if 2 * cos.shape[1] > q.shape[-1]:
        reject(OP, "rope", cos, f"width R/2 with R at most the number of features, {q.shape[-1]}")
    if isinstance(offset, Tensor):
        check_tensor(OP, "rope_offset", offset, INDICES, q)
        if offset.shape != (sequences,):
            reject(OP, "rope_offset", offset, f"an int, or shape [N] = [{sequences}]")
        return cos, sin, 0, offset.long().contiguous()
    check_int(OP, "rope_offset", offset)
    if not packed and q.shape[1] > 0 and offset + q.shape[1] > cos.shape[0]:
        expected = f"rope_offset + T at most the tables' length P = {cos.shape[0]}; T = {q.shape[1]}"
        reject(OP, "rope_offset" if offset else "rope", offset if offset else cos, expected)
    return cos, sin, offset, None


def _checked_state(
    q: Tensor, state: State | None, shape: tuple[int, ...], normalize: bool, op: str, name: str
) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        reject(op, name, Description(f"a {type(state).__name__}"), "a pair of tensors, kv and z", TypeError)
    kv, z = state
    dtypes = (torch.float64 if q.dtype == torch.float64 else torch.float32,)
    check_tensor(op, name, kv, dtypes, q)
    if kv.shape != shape:
        reject(op, name, kv, f"kv of shape [N, H_k, D_k, D_v] = {list(shape)}")
    if not normalize:
        if z is not None:
            reject(op, name, z, "no z, as normalize=False keeps none")
        return kv.contiguous(), None
    check_tensor(op, name, z, dtypes, q)
    assert z is not None
    if z.shape != shape[:-1]:
        reject(op, name, z, f"z of shape [N, H_k, D_k] = {list(shape[:-1])}")
    return kv.contiguous(), z.contiguous()
