"""Launches the Triton kernel of linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core import triton
from ._problem import (
    FEATURE_MAPS,
    SEGMENT,
    Gradients,
    LinearAttentionProblem,
    Results,
    empty_gradients,
    empty_results,
    segments_for,
)

MAX_DIM = 256


def unsupported(p: LinearAttentionProblem) -> str | None:
    _, length, heads, key_dim = p.q.shape
    if max(key_dim, p.v.shape[3]) > MAX_DIM:
        return f"a head has {max(key_dim, p.v.shape[3])} dimensions; its state would not fit on chip above {MAX_DIM}"
    return triton.unsupported(p.device, p.q.dtype, p.sequences * heads * (length // SEGMENT + 1) * (MAX_DIM // 16))


def _sizes(p: LinearAttentionProblem) -> tuple[int, int]:
    """Tokens of a chunk, and numbers of a state that a program keeps: as many as registers hold.

    Read from the machine code for sm_80, sm_90a and sm_100a: no spills for heads of up to 128 in 16 bits.
    """
    if triton.interpreted():  # whose time goes by operations, not by numbers
        return 64, 8192
    return 32 if p.q.dtype == torch.bfloat16 else 16, 4096 if p.q.element_size() == 2 else 2048


def _block(dim: int) -> int:
    return max(16, triton.power_of_two(dim))


class Launch:
    """The passes of one call: what they share, and how each role's tensors lie."""

    def __init__(
        self, p: LinearAttentionProblem, denominator: Tensor | None, grad_o: Tensor | None, e_parts: int = 1
    ) -> None:
        self.p = p
        self.key_dim, self.value_dim = p.q.shape[3], p.v.shape[3]
        self.how = triton.arithmetic(p.q.dtype)
        self.block_t, self.state = _sizes(p)
        self.denominator = denominator
        self.e_parts = e_parts
        shape = (e_parts, *p.q.shape[:3])
        self.e = p.q.new_empty(shape, dtype=p.wide) if grad_o is not None and p.normalize else None
        self.grad_o = grad_o

    def slices(self, role: str) -> tuple[int, int, int]:
        """Widths of the columns of keys and of values in one program, and how many programs a head takes."""
        inner, outer = (self.key_dim, self.value_dim) if role in ("o", "dv") else (self.value_dim, self.key_dim)
        whole = _block(inner)
        part = min(_block(outer), max(16, self.state // whole))
        return (whole, part, -(-outer // part)) if role in ("o", "dv") else (part, whole, -(-outer // part))

    def tensors(self, out: Tensor | None) -> dict[str, Any]:
        p = self.p
        return {
            "q": triton.with_strides(p.q, 4),
            "k": triton.with_strides(p.k, 4),
            "v": triton.with_strides(p.v, 4),
            "out": triton.with_strides(out, 4),
            "decay_ptr": p.decay,
            "tables": (triton.with_strides(p.cos, 2), triton.with_strides(p.sin, 2)),
            "offsets_ptr": p.offsets,
            "mask": triton.with_strides(p.mask, 2),
        }

    def numbers(self) -> dict[str, Any]:
        p = self.p
        heads = p.q.shape[2]
        return {
            "length": p.q.shape[1],
            "heads": heads,
            "table_length": 0 if p.cos is None else p.cos.shape[0],
            "offset": p.offset,
            "stabilizer": p.stabilizer,
            "eps": p.eps,
            "scale": p.scale,
            "K": self.key_dim,
            "V": self.value_dim,
            "R": 0 if p.cos is None else 2 * p.cos.shape[1],
            "INTERLEAVED": p.interleaved,
            "FEATURE": FEATURE_MAPS[p.feature],
            "NORMALIZE": p.normalize,
            "GROUP": heads // p.k.shape[2],
        }

    def __call__(
        self,
        role: str,
        out: Tensor | None,
        state: tuple[Tensor | None, Tensor | None] = (None, None),
        end: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """One pass: for segments, and without causality, two."""
        from ._triton_kernel import linear_attention_kernel

        p = self.p
        batch, length, heads = p.q.shape[:3]
        kv_heads = p.k.shape[2]
        block_k, block_v, slices = self.slices(role)
        reverse = role in ("dk", "dv")
        turned = role in ("dq", "dk", "e")  # the state's columns are those of keys
        segments = segments_for(p, p.sequences * slices * (kv_heads if reverse else heads))
        segment = self.block_t * max(1, -(-length // (self.block_t * segments)))
        sums = z_sums = None
        if segments > 1 or not p.causal:
            rows = p.sequences * segments * kv_heads * slices
            sums = p.q.new_empty(rows * block_k * block_v, dtype=p.wide)
            z_sums = p.q.new_empty(rows * block_k, dtype=p.wide)

        def oriented(x: Tensor | None) -> tuple:
            x = x.transpose(2, 3) if x is not None and turned else x
            return triton.with_strides(x, 4)

        arguments: dict[str, Any] = {
            **self.tensors(out),
            **self.numbers(),
            "g": triton.with_strides(self.grad_o, 4),
            "den_ptr": self.denominator,
            "e_ptr": self.e,
            "state_in": oriented(state[0]),
            "z_in": triton.with_strides(state[1], 3),
            "state_out": oriented(end[0]),
            "z_out": triton.with_strides(end[1], 3),
            "sums_ptr": sums,
            "z_sums_ptr": z_sums,
            "batches": batch,
            "segment": segment,
            "segments": segments,
            "cu_seqlens_ptr": p.cu_seqlens,
            "ROLE": role,
            "CAUSAL": p.causal,
            "SLICES": slices,
            "E_PARTS": self.e_parts,
            "ALL_K": _block(self.key_dim),
            "BT": self.block_t,
            "BK": block_k,
            "BV": block_v,
            **self.how,
            "num_warps": 8,
        }
        for is_sum in (True, False) if sums is not None else (False,):
            programs = p.sequences * segments * slices * (kv_heads if is_sum or reverse else heads)
            if programs > 0:
                linear_attention_kernel[(programs,)](SUM=is_sum, **arguments)


def run(p: LinearAttentionProblem) -> Results:
    results = empty_results(p)
    if p.cu_seqlens is not None:
        results.o.zero_()  # rows of no sequence
    with triton.on(p.device):
        Launch(p, results.denominator, None)("o", results.o, (p.kv0, p.z0), (results.kv, results.z))
    return results


def run_backward(
    p: LinearAttentionProblem,
    denominator: Tensor | None,
    grad_o: Tensor,
    grad_kv: Tensor | None,
    grad_z: Tensor | None,
) -> Gradients:
    gradients = empty_gradients(p)
    if p.cu_seqlens is not None:
        for x in gradients[:3]:
            x.zero_()
    with triton.on(p.device):
        launch = Launch(p, denominator, grad_o)
        if p.normalize and launch.slices("dq")[2] > 1:  # no program sees whole rows of both gradients
            launch = Launch(p, denominator, grad_o, launch.slices("e")[2])
            launch("e", None, (p.kv0, None))
        launch("dq", gradients.q, (p.kv0, p.z0))
        launch("dk", gradients.k, (grad_kv, grad_z), (None, gradients.z0))
        launch("dv", gradients.v, (grad_kv, None), (gradients.kv0, None))
    return gradients


def run_step(p: LinearAttentionProblem) -> Tensor:
    from ._triton_kernel import linear_attention_step_kernel

    o = empty_results(p).o
    key_dim = p.q.shape[3]
    batch, _, kv_heads, value_dim = p.v.shape
    block_k = max(2, triton.power_of_two(key_dim))
    launch = Launch(p, None, None)
    programs = batch * kv_heads
    with triton.on(p.device):
        if programs > 0:
            linear_attention_step_kernel[(programs,)](
                **launch.tensors(o),
                kv_ptr=p.kv0,
                z_ptr=p.z0,
                slots_ptr=p.slots,
                **launch.numbers(),
                BK=block_k,
                BV=min(triton.power_of_two(value_dim), max(1, 4096 // block_k)),
                ACC=launch.how["ACC"],
                num_warps=4,
            )
    return o
