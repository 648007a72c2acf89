"""Stands in for flash-linear-attention's linear attention, retention and lightning attention (fla.ops).

Where the original differs from its own definition, these keep to the definition: the sums of keys are float32 always
(the original keeps them in the dtype of k, where they stop growing), and a row without weights gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear_attention.api import linear_attention

State = Tensor | tuple[Tensor | None, Tensor | None] | None

EPS = 1e-10  # that the original adds to its denominators, which are `scale` times ours


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Causal linear attention of features: q and k [B, T, H, K] as they come out of a feature map, v [B, T, H, V].

    Args:
        scale: of the weights; K^(−1/2) if None.
        initial_state: [N, H, K, V], or with `normalize` a pair of that and of the sums of keys [N, 1, H, K]; float32.
        output_final_state: also return the state after the last token.
        normalize: divide by the sum of weights plus 1e-10.
        cu_seqlens: [N + 1]; B is 1 and holds N packed sequences.

    Returns:
        o [B, T, H, V], and the state in the form of `initial_state`, float32. With `normalize` that is a pair always;
        its first is None unless `output_final_state`.
    """
    return _attend(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, None)


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As `chunk_linear_attn`, but for the default of `normalize`; `reverse` goes from the last token to the first."""
    if reverse:
        order = _reversed_rows(q, cu_seqlens)
        q, k, v = (x.index_select(1, order) for x in (q, k, v))
    o, state = _attend(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, None)
    return (o.index_select(1, order) if reverse else o), state


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, State]:
    """Retention: not normalised, and head h forgets by the factor 1 − 2^(−5 − h) a token.

    Source: Sun et al., "Retentive Network" (arXiv:2307.08621), equation 8.
    """
    _check_options(kwargs)
    head = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)
    decay = 1 - 2.0 ** (-5 - head)
    return _attend(q, k, v, scale, initial_state, output_final_state, False, cu_seqlens, decay)


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, State]:
    """Lightning attention: not normalised, and head h of H forgets by exp(−8h/H · (1 − layer_idx / num_layers)).

    Source: Qin et al., "Lightning Attention-2" (arXiv:2401.04658).
    """
    _check_options(kwargs)
    heads = q.shape[2]
    head = torch.arange(heads, dtype=torch.float64, device=q.device)
    decay = (-8 / heads * (1 - layer_idx / num_layers) * head).exp()
    return _attend(q, k, v, scale, initial_state, output_final_state, False, cu_seqlens, decay)


def _check_options(options: dict[str, object]) -> None:
    """chunk_size has no meaning here; what changes results is refused."""
    unknown = set(options) - {"chunk_size"}
    if unknown:
        raise TypeError(f"unexpected keyword arguments {sorted(unknown)}; inputs are [B, T, H, D] always")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: State,
    output_final_state: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
    decay: Tensor | None,
) -> tuple[Tensor, State]:
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    packed = cu_seqlens is not None
    if packed and q.shape[0] != 1:
        raise ValueError(f"q has batch size {q.shape[0]}; expected 1, as cu_seqlens is given")
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else q.shape[0]
    kv, z = initial_state if isinstance(initial_state, (tuple, list)) else (initial_state, None)
    if kv is not None and kv.shape[0] != sequences:
        raise ValueError(f"initial_state holds {kv.shape[0]} states; expected {sequences}, one per sequence")
    state = None
    if kv is not None or z is not None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        shape = (sequences, k.shape[2], k.shape[3], v.shape[3])
        kv = q.new_zeros(shape, dtype=wide) if kv is None else kv.to(wide)
        if normalize:
            z = q.new_zeros(shape[:-1], dtype=wide) if z is None else z.squeeze(1).to(wide)
        state = (kv, z if normalize else None)
    o, end = linear_attention(
        *((x[0] for x in (q, k, v)) if packed else (q, k, v)),
        feature_map="identity",
        normalize=normalize,
        eps=EPS / scale,
        scale=scale,
        decay=decay,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.int(),
        initial_state=state,
        return_state=True,
    )
    o = o[None] if packed else o
    last = end.kv if output_final_state else None
    if end.z is None:
        return o, last
    return o, (last, end.z[:, None])


def _reversed_rows(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each row's mirror image in its sequence."""
    row = torch.arange(q.shape[1], device=q.device)
    if cu_seqlens is None:
        return row.flip(0)
    ends = cu_seqlens.long()
    sequence = torch.searchsorted(ends, row, right=True).clamp(1, ends.shape[0] - 1)
    mirrored = ends[sequence - 1] + ends[sequence] - 1 - row
    return torch.where((row >= ends[0]) & (row < ends[-1]), mirrored, row)
