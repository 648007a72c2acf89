"""One call of linear attention, after the public function has checked it: what every backend is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core.checks import check_ends

FEATURE_MAPS = ("identity", "elu1", "relu", "relu2", "exp")  # in the order of csrc/linear_attention/problem.h
NUM_TENSORS = 12


class LinearAttentionProblem(NamedTuple):
    """Packed sequences are a batch of one; N is the number of sequences, packed or not."""

    q: Tensor  # [B, T, H, D_k]
    k: Tensor  # [B, T, H_k, D_k]
    v: Tensor  # [B, T, H_k, D_v]
    decay: Tensor | None  # [H_k], float64
    cos: Tensor | None  # [P, R/2]
    sin: Tensor | None
    offsets: Tensor | None  # [N], int64: the position of a sequence's first token
    mask: Tensor | None  # [B, T], bool: False for padding
    cu_seqlens: Tensor | None  # [N + 1], int32
    kv0: Tensor | None  # [N, H_k, D_k, D_v], without gaps, of the dtype that arithmetic is done in
    z0: Tensor | None  # [N, H_k, D_k]
    slots: Tensor | None  # [N], int64: which of the states in kv0 and z0 a sequence has, where they are not in order

    feature: int  # index in FEATURE_MAPS
    stabilizer: float
    normalize: bool
    eps: float
    scale: float
    causal: bool
    interleaved: bool
    offset: int  # used where offsets is None
    with_state: bool  # whether the states that the sequences end with are wanted

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        required = (self.q, self.k, self.v)
        tables = (self.decay, self.cos, self.sin, self.offsets, self.mask, self.cu_seqlens)
        return *required, *tables, self.kv0, self.z0, self.slots

    @property
    def options(self) -> tuple:
        return self[NUM_TENSORS:]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums, states and denominators."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class Results(NamedTuple):
    """What a forward pass gives."""

    o: Tensor  # [B, T, H, D_v]
    denominator: Tensor | None  # [B, T, H], of dtype `wide`, where normalised
    kv: Tensor | None  # as kv0, where the state is wanted
    z: Tensor | None  # as z0, where it is and there is one


class Gradients(NamedTuple):
    """What a backward pass gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv0: Tensor | None  # where there was one
    z0: Tensor | None


def _empty_rows(p: LinearAttentionProblem) -> Tensor:
    """[B, T, H, D_v], in memory [B, H, T, D_v] if q is."""
    batch, length, heads, value_dim = *p.q.shape[:3], p.v.shape[3]
    if p.q.stride(1) < p.q.stride(2):
        return torch.empty((batch, heads, length, value_dim), dtype=p.q.dtype, device=p.device).transpose(1, 2)
    return torch.empty((batch, length, heads, value_dim), dtype=p.q.dtype, device=p.device)


def empty_results(p: LinearAttentionProblem) -> Results:
    batch, length, heads, key_dim = p.q.shape
    kv_heads, value_dim = p.v.shape[2:]
    wide: Any = {"dtype": p.wide, "device": p.device}
    return Results(
        _empty_rows(p),
        torch.empty((batch, length, heads), **wide) if p.normalize else None,
        torch.empty((p.sequences, kv_heads, key_dim, value_dim), **wide) if p.with_state else None,
        torch.empty((p.sequences, kv_heads, key_dim), **wide) if p.with_state and p.normalize else None,
    )


def empty_gradients(p: LinearAttentionProblem) -> Gradients:
    kv0, z0 = (None if x is None else torch.empty_like(x) for x in (p.kv0, p.z0))
    return Gradients(torch.empty_like(p.q), torch.empty_like(p.k), torch.empty_like(p.v), kv0, z0)


SEGMENT = 512  # tokens of a sequence that are worth a block of their own


def segments_for(p: LinearAttentionProblem, blocks: int) -> int:
    """Into how many parts sequences are cut, so that `blocks` of them at a time fill a GPU."""
    if p.device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(p.device).multi_processor_count
    if blocks >= processors:
        return 1
    return min(-(-2 * processors // max(blocks, 1)), max(p.q.shape[1] // SEGMENT, 1))


def check_values(p: LinearAttentionProblem) -> None:
    """On the CPU, where reading data waits for nothing: raises ValueError for values that no kernel could serve."""
    if p.device.type != "cpu":
        return
    if p.decay is not None and not bool(((p.decay > 0) & (p.decay <= 1)).all()):
        raise ValueError(
            f"linear_attention: argument 'decay' holds {p.decay.tolist()}; expected factors above 0 and up to 1"
        )
    lengths = torch.full((p.sequences,), p.q.shape[1])
    if p.cu_seqlens is not None:
        lengths = p.cu_seqlens.diff()
        check_ends("linear_attention", "cu_seqlens", p.cu_seqlens, p.q.shape[1])
    if p.slots is not None and p.kv0 is not None:
        used = p.slots.tolist()
        if len(set(used)) < len(used) or not all(0 <= slot < p.kv0.shape[0] for slot in used):
            raise ValueError(
                f"linear_attention_step: argument 'slots' is {used}; expected different numbers of the "
                f"{p.kv0.shape[0]} states"
            )
    if p.cos is not None and p.sequences > 0:
        starts = p.offsets if p.offsets is not None else p.offset
        last = int(torch.where(lengths > 0, lengths + starts, 0).max()) - 1
        if last >= p.cos.shape[0]:
            raise ValueError(
                f"linear_attention: argument 'rope' holds positions 0 to {p.cos.shape[0] - 1}; expected a table up to "
                f"position {last}, which the tokens reach"
            )
