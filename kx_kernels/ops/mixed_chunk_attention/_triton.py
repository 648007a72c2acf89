"""Launches the Triton kernels of mixed-chunk attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core import triton
from ._problem import Gradients, MixedProblem, Results, empty_gradients, empty_results
from .presets import ACTIVATIONS

WORKSPACE = 64 << 20  # bytes that both panels of a backward pass may take where they could be narrower
LEAST_WIDTH = 512  # keys of a panel, however many bytes that is
ROWS = 16  # of a program that multiplies them with the gate, or with what it was multiplied with
CHAIN = 1024  # numbers of states that a program adds up
ON_CHIP_DIM = 128  # of queries and keys that a program has at once beside outputs


class Sizes(NamedTuple):
    """Of tiles. Those of scores are `rows` by `keys`; products go over them in steps of `step`."""

    segment: int  # tokens that small chunks are put together to
    rows: int
    keys: int
    step: int
    short: int  # steps where more is in registers
    columns: int  # of outputs, states and gradients of values
    dim: int  # of keys, in states and gradients
    depth: int  # of products before scores
    shares: int  # programs that sum the gradients of a distance
    warps: int


def _sizes(p: MixedProblem) -> Sizes:
    """Read from the machine code for sm_80, sm_90a and sm_100a: no spills for s = 128 and e = 1536 in bfloat16."""
    if triton.interpreted():  # whose time goes by operations first, and then by numbers
        tile = triton.block(min(p.chunk_size, p.v.shape[1]), 128)
        return Sizes(16, tile, tile, tile, tile, 2048, 2048, 2048, 2, 8)
    if p.v.dtype == torch.bfloat16:
        return Sizes(128, 128, 128, 64, 32, 256, 128, 64, 64, 8)
    if p.v.dtype == torch.float64:
        return Sizes(32, 32, 32, 32, 32, 32, 32, 16, 64, 4)
    if p.v.dtype == torch.float16:
        return Sizes(128, 128, 64, 32, 32, 128, 128, 32, 64, 8)
    return Sizes(64, 64, 64, 32, 16, 128, 128, 32, 64, 8)


def unsupported(p: MixedProblem) -> str | None:
    launch = Launch(p)
    units = launch.batch * launch.heads * launch.blocks(min(launch.sizes.rows, launch.sizes.keys))
    slices = -(-launch.e // launch.sizes.columns) + 2 * -(-launch.s // launch.sizes.dim)
    states = 2 * launch.batch * launch.kv_heads * launch.places * launch.s_slices * launch.e_slices
    tiles = launch.batch * launch.heads * launch.blocks(launch.sizes.rows) * (launch.width // launch.sizes.keys)
    return triton.unsupported(p.device, p.v.dtype, max(units * slices, states, tiles))


class Launch:
    """The kernels of one call: what they share."""

    def __init__(self, p: MixedProblem) -> None:
        self.p, self.sizes = p, _sizes(p)
        self.batch, self.n, self.heads, self.s = p.quad_q.shape
        self.kv_heads, self.e = p.v.shape[2:]
        self.sequences = self.batch if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1
        self.chunk = max(1, min(p.chunk_size, self.n))
        self.span = max(1, self.sizes.segment // self.chunk) * self.chunk  # tokens of a segment
        self.segments = -(-self.n // self.span)  # of a sequence that is not packed
        self.places = self.segments if p.cu_seqlens is None else self.n // self.span + self.sequences
        self.columns, self.dim = triton.block(self.e, self.sizes.columns), triton.block(self.s, self.sizes.dim)
        self.e_slices, self.s_slices = -(-self.e // self.columns), -(-self.s // self.dim)
        # What products take: of float16 in TF32.
        self.operands = p.wide if p.v.dtype == torch.float16 else p.v.dtype
        keys = -(-min(self.span, max(1, self.n)) // self.sizes.keys) * self.sizes.keys
        fit = WORKSPACE // max(1, 2 * self.batch * self.n * self.heads * self.operands.itemsize)
        self.width = min(keys, max(fit, LEAST_WIDTH) // self.sizes.keys * self.sizes.keys)  # of a panel
        self.panels = -(-keys // self.width)

    @property
    def has_states(self) -> bool:
        """Whether any segment takes a state."""
        return not self.p.causal or self.span < self.n

    def blocks(self, size: int) -> int:
        """Blocks of so many tokens of a head: for packed sequences, at most."""
        whole, rest = divmod(self.n, self.span)
        of_segments = whole * -(-self.span // size)
        if self.p.cu_seqlens is None:
            return of_segments + -(-rest // size)
        return of_segments + rest // size + self.sequences

    def arguments(self) -> dict[str, Any]:
        """What kernels are launched with, by name."""
        p, sizes = self.p, self.sizes
        a, b, c, d = (None if x is None else x.contiguous() for x in (p.a, p.b, p.c, p.d))
        return {
            "quad_q": triton.with_strides(p.quad_q, 4),
            "quad_k": triton.with_strides(p.quad_k, 4),
            "lin_q": triton.with_strides(p.lin_q, 4),
            "lin_k": triton.with_strides(p.lin_k, 4),
            "v": triton.with_strides(p.v, 4),
            "gate": triton.with_strides(p.gate, 4),
            "bias": triton.distances(p.bias),
            "a_ptr": a,
            "b_ptr": b,
            "c_ptr": c,
            "d_ptr": d,
            "query_mask": triton.with_strides(p.query_mask, 2),
            "key_mask": triton.with_strides(p.key_mask, 2),
            "ends_ptr": p.cu_seqlens,
            "batches": self.batch,
            "n": self.n,
            "heads": self.heads,
            "sequences": self.sequences,
            "blocks": self.blocks(sizes.rows),
            "places": self.places,
            "span": self.span,
            "chunk": self.chunk,
            "width": self.width,
            "scale": p.scale,
            "bias_scale": p.bias_scale,
            "out_scale": p.out_scale,
            "lin_scale": p.lin_scale,
            "S": self.s,
            "E": self.e,
            "F": ACTIVATIONS[p.activation],
            "CAUSAL": p.causal,
            "SEVERAL": self.span > self.chunk,
            "GROUP": self.heads // self.kv_heads,
            "S_SLICES": self.s_slices,
            "E_SLICES": self.e_slices,
            "BM": sizes.rows,
            "BN": sizes.keys,
            "BR": sizes.short,
            "BK": self.dim,
            "BE": self.columns,
            "BS": triton.block(self.s, sizes.depth),
            "BD": triton.block(self.e, sizes.depth),
            **triton.arithmetic(p.v.dtype),
        }

    def run(self, kernel: Any, programs: int, **own: Any) -> None:
        """With those arguments that the kernel has, and its own."""
        arguments = self.arguments() | own
        named = {name: arguments[name] for name in kernel.arg_names}
        triton.launch(kernel, programs, **named, num_warps=self.sizes.warps)

    def states(self, g: tuple = (None,), gate: tuple = (None,)) -> tuple[Tensor, ...] | tuple[None, None]:
        """What segments take of S, and where there are gradients g of U."""
        from ._triton_kernel import mixed_chain_kernel, mixed_states_kernel

        if not self.has_states:
            return None, None
        kinds = 1 if g[0] is None else 2
        shape = (kinds, self.batch * self.places, self.kv_heads, self.s, self.e)
        own = self.p.v.new_empty(shape, dtype=self.p.wide)
        sums = own if self.operands == self.p.wide else torch.empty_like(own, dtype=self.operands)
        self.run(
            mixed_states_kernel,
            kinds * self.batch * self.places * self.kv_heads * self.s_slices * self.e_slices,
            s_ptr=own[0],
            u_ptr=own[1] if kinds > 1 else None,
            g=g,
            gate=gate,
            BR=self.sizes.step,
        )
        block = CHAIN if not triton.interpreted() else triton.power_of_two(own[0, :1].numel())
        self.run(
            mixed_chain_kernel,
            kinds * self.sequences * -(-self.kv_heads * self.s * self.e // block),
            states_ptr=own,
            sums_ptr=sums,
            BLOCK=block,
        )
        return sums[0], sums[kinds - 1]


def run(p: MixedProblem) -> Results:
    from ._triton_kernel import mixed_attention_kernel

    results = empty_results(p)
    if p.cu_seqlens is not None:
        for x in results:
            if x is not None:
                x.zero_()  # rows of no sequence
    launch = Launch(p)
    if launch.sequences == 0 or launch.n == 0:
        return results
    with triton.on(p.device):
        s_sums, _ = launch.states()
        slices = max(1, launch.e_slices)
        launch.run(
            mixed_attention_kernel,
            launch.batch * launch.heads * launch.blocks(launch.sizes.rows) * slices,
            s_ptr=s_sums,
            out=triton.with_strides(results.o, 4),
            ungated=triton.with_strides(results.ungated, 4),
            SLICES=slices,
            BN=launch.sizes.short,
            BS=triton.block(launch.s, ON_CHIP_DIM),
        )
    return results


def run_backward(p: MixedProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    if p.cu_seqlens is not None:
        for x in gradients[:6]:
            if x is not None:
                x.zero_()  # rows of no sequence
    launch = Launch(p)
    if launch.sequences == 0 or launch.n == 0:
        return gradients if gradients.bias is None else gradients._replace(bias=gradients.bias.zero_())
    with triton.on(p.device):
        g, gate = triton.with_strides(grad_o, 4), triton.with_strides(p.gate, 4)
        if gradients.gate is not None and p.v.dtype != torch.float16:
            # grad_o times the gate lies where the gradient of the gate will; in float16 it might leave the range.
            _run_rows(launch, grad_o, p.gate, gradients.gate)
            g, gate = triton.with_strides(gradients.gate, 4), (None,)
        _run_panels(launch, g, gate, gradients)
        if gradients.gate is not None:
            _run_rows(launch, grad_o, results.ungated, gradients.gate)
    return gradients


def _run_rows(launch: Launch, g: Tensor, factor: Tensor | None, out: Tensor) -> None:
    """out = g times a factor."""
    from ..._core.triton_kernel import rows_kernel

    blocks = -(-launch.n // ROWS) if launch.p.cu_seqlens is None else launch.n // ROWS + launch.sequences
    launch.run(
        rows_kernel,
        launch.batch * launch.heads * blocks,
        g=triton.with_strides(g, 4),
        factor=triton.with_strides(factor, 4),
        ungated=(None,),
        out=triton.with_strides(out, 4),
        sums_ptr=None,
        delta_ptr=None,
        ends=(launch.p.cu_seqlens, launch.p.cu_seqlens),
        n_q=launch.n,
        n_k=launch.n,
        blocks=blocks,
        BM=ROWS,
    )


def _run_panels(launch: Launch, g: tuple, gate: tuple, gradients: Gradients) -> None:
    """Those of queries, keys, values and the bias, of gradients g of what the gate is multiplied with."""
    from ._triton_kernel import mixed_bias_kernel, mixed_keys_kernel, mixed_queries_kernel, mixed_scores_kernel

    p, sizes = launch.p, launch.sizes
    panel, grad_panel = (p.v.new_empty((*p.quad_q.shape[:3], launch.width), dtype=launch.operands) for _ in range(2))
    carry: Tensor | None = None  # what the panels so far have added to the gradients of queries
    if launch.panels > 1:
        carry = gradients.quad_q if p.v.dtype == p.wide else torch.empty_like(p.quad_q, dtype=p.wide)
    rows, key_blocks = launch.batch * launch.heads * launch.blocks(sizes.rows), launch.blocks(sizes.keys)
    units = launch.batch * launch.places * (launch.heads if p.bias is None else launch.heads // p.bias.shape[0])
    share = -(-units // sizes.shares)
    sums: Tensor | None = None
    if p.bias is not None:
        sums = p.bias.new_zeros((-(-units // share), *p.bias.shape))
    s_sums, u_sums = launch.states(g, gate)
    for first_key in range(0, launch.panels * launch.width, launch.width):
        here = {"g": g, "gate": gate, "panel_ptr": panel, "grad_panel_ptr": grad_panel, "first_key": first_key}
        launch.run(mixed_scores_kernel, rows * (launch.width // sizes.keys), **here)
        launch.run(
            mixed_keys_kernel,
            launch.batch * launch.kv_heads * key_blocks * (launch.e_slices + 2 * launch.s_slices),
            **here,
            u_ptr=u_sums,
            grad_quad_k=triton.with_strides(gradients.quad_k, 4),
            grad_lin_k=triton.with_strides(gradients.lin_k, 4),
            grad_v=triton.with_strides(gradients.v, 4),
            blocks=key_blocks,
        )
        launch.run(
            mixed_queries_kernel,
            rows * 2 * launch.s_slices,
            **here,
            s_ptr=s_sums,
            carry=triton.with_strides(carry, 4),
            grad_quad_q=triton.with_strides(gradients.quad_q, 4),
            grad_lin_q=triton.with_strides(gradients.lin_q, 4),
            is_first=int(first_key == 0),
            is_last=int(first_key + launch.width >= launch.panels * launch.width),
            BN=sizes.step,
        )
        if sums is not None:
            launch.run(
                mixed_bias_kernel,
                sums.shape[0] * sums.shape[1] * -(-sums.shape[2] // sizes.keys),
                **here,
                sums_ptr=sums,
                units=units,
                share=share,
                bias_heads=sums.shape[1],
                distances=sums.shape[2],
                BI=sizes.step,
                BR=sizes.keys,
            )
    if sums is not None:
        assert gradients.bias is not None
        torch.sum(sums, 0, out=gradients.bias)
