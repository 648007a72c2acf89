"""Launches the Triton kernels of gated attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core import triton
from ._problem import GauProblem, Gradients, Results, empty_gradients, empty_results, whole_rounds
from .presets import ACTIVATIONS

ON_CHIP_KEYS = 512  # up to which scores are made again for each slice of e, rather than kept in a panel
MAX_ON_CHIP_DIM = 128  # of queries, which a program then has whole
LEAST_WIDTH = 512  # keys of a panel where heads can be fewer instead: gradients of queries are read and written by each


class Sizes(NamedTuple):
    """Of tiles. A panel's are `rows` by `keys`; products go over them in steps of `step`."""

    rows: int
    keys: int
    step: int
    short: int  # steps where more is in registers
    columns: int  # of outputs, or of gradients of values
    depth: int  # of products before a panel
    warps: int


def _sizes(p: GauProblem) -> Sizes:
    """Read from the machine code for sm_80, sm_90a and sm_100a: no spills for s = 128 and e = 1536 in bfloat16."""
    if triton.interpreted():  # whose time goes by operations, not by numbers
        return Sizes(128, 128, 128, 128, 2048, 2048, 8)
    if p.q.dtype == torch.bfloat16:
        return Sizes(128, 128, 64, 32, 256, 64, 8)
    if p.q.dtype == torch.float64:
        return Sizes(32, 32, 32, 32, 32, 16, 4)
    if p.q.dtype == torch.float16:
        return Sizes(128, 64, 32, 32, 128, 32, 8)
    return Sizes(64, 64, 32, 16, 128, 32, 8)


def unsupported(p: GauProblem) -> str | None:
    sizes = _sizes(p)
    batch, n_q, heads, s = p.q.shape
    blocks = max(n_q, p.k.shape[1]) // min(sizes.rows // 16, sizes.keys) + _sequences(p) + 1
    slices = -(-s // sizes.columns) + -(-p.v.shape[3] // sizes.columns)
    tiles = p.workspace // (sizes.rows * sizes.keys * p.q.itemsize)
    return triton.unsupported(p.device, p.q.dtype, max(batch * heads * blocks * slices, tiles))


def _sequences(p: GauProblem) -> int:
    return p.q.shape[0] if p.cu_seqlens is None else p.cu_seqlens.shape[0] - 1


class Launch:
    """The kernels of one call: what they share."""

    def __init__(self, p: GauProblem) -> None:
        self.p, self.sizes, self.sequences = p, _sizes(p), _sequences(p)
        self.batch, self.n_q, self.heads, self.s = p.q.shape
        self.n_k, self.e = p.k.shape[1], p.v.shape[3]
        self.group = self.heads // p.k.shape[2]
        self.packed = p.cu_seqlens is not None
        self.panel_dtype = p.wide if p.q.dtype == torch.float16 else p.q.dtype  # what products take
        self.how = triton.arithmetic(p.q.dtype)
        self.by_row = [None if x is None else x.contiguous() for x in (p.a, p.b, p.c)]

    def blocks(self, size: int) -> int:
        """Blocks of queries of a head: for packed sequences, at most."""
        return self.n_q // size + self.sequences if self.packed else -(-self.n_q // size)

    def where(self, size: int) -> dict[str, Any]:
        """What says which rows a block of queries has."""
        p = self.p
        return {
            "query_mask": triton.with_strides(p.query_mask, 2),
            "ends": (p.cu_seqlens, p.cu_seqlens_k),
            "n_q": self.n_q,
            "n_k": self.n_k,
            "heads": self.heads,
            "sequences": self.sequences,
            "blocks": self.blocks(size),
            "BM": size,
        }

    def scores(self) -> dict[str, Any]:
        """What makes scores."""
        p = self.p
        a, b, c = self.by_row
        return {
            **self.where(self.sizes.rows),
            "q": triton.with_strides(p.q, 4),
            "k": triton.with_strides(p.k, 4),
            "v": triton.with_strides(p.v, 4),
            "gate": triton.with_strides(p.gate, 4),
            "bias": triton.distances(p.bias),
            "a_ptr": a,
            "b_ptr": b,
            "c_ptr": c,
            "key_mask": triton.with_strides(p.key_mask, 2),
            "scale": p.scale,
            "bias_scale": p.bias_scale,
            "out_scale": p.out_scale,
            "S": self.s,
            "E": self.e,
            "F": ACTIVATIONS[p.activation],
            "CAUSAL": p.causal,
            "GROUP": self.group,
            "BS": triton.block(self.s, self.sizes.depth),
            **self.how,
            "num_warps": self.sizes.warps,
        }

    def gradients(self, results: Results, grad_o: Tensor, delta: Tensor | None) -> dict[str, Any]:
        """What makes their gradients."""
        return {
            **self.scores(),
            "g": triton.with_strides(grad_o, 4),
            "sums_ptr": results.sums,
            "delta_ptr": delta,
            "BD": triton.block(self.e, self.sizes.depth),
        }

    def panels(self) -> tuple[int, int, int]:
        """Of a backward pass: how many heads of keys have a panel at once, its width, and the keys of all panels."""
        p, sizes = self.p, self.sizes
        longest = self.n_k
        if self.packed and p.bias is not None:
            longest = min(longest, p.bias.shape[1] // 2 + 1)
        keys = max(1, -(-longest // sizes.keys)) * sizes.keys
        pairs = max(1, self.batch * p.k.shape[2])
        if self.on_chip_backward:
            return pairs, keys, keys
        a_key = 2 * self.group * self.blocks(sizes.rows) * sizes.rows * self.panel_dtype.itemsize
        fit = p.workspace // max(1, a_key)
        pairs = min(max(1, fit // min(keys, LEAST_WIDTH)), pairs)
        return pairs, min(max(1, fit // pairs // sizes.keys) * sizes.keys, keys), keys

    @property
    def on_chip_backward(self) -> bool:
        """How long packed sequences are is known where there is a bias for as many distances, and else to the GPU."""
        return self.packed and self.p.bias is None


def _units_of_a_panel(launch: Launch, units: int, slices: int, unit_bytes: int) -> int:
    """How many blocks of queries have a panel at once: of those that fit, so many that no processor waits for others.

    0 where that would leave more of them idle than making scores again for each slice would cost.
    """
    fit = launch.p.workspace // unit_bytes
    processors = triton.processors(launch.p.device)
    if fit >= units:
        return units
    if fit * slices >= processors:
        return whole_rounds(fit, slices, processors)
    once, again = launch.s + launch.e, slices * launch.s + launch.e
    return fit if fit * slices * again >= processors * once else 0


def run(p: GauProblem) -> Results:
    from ._triton_kernel import gau_attention_kernel, gau_scores_kernel

    results = empty_results(p)
    if p.cu_seqlens is not None:
        for x in results:
            if x is not None:
                x.zero_()  # rows of no sequence
    launch = Launch(p)
    sizes = launch.sizes
    columns = triton.block(launch.e, sizes.columns)
    slices = max(1, -(-launch.e // columns))
    units = launch.batch * launch.heads * launch.blocks(sizes.rows) if launch.sequences > 0 else 0
    width = max(1, -(-launch.n_k // sizes.keys)) * sizes.keys
    in_panel = _units_of_a_panel(launch, units, slices, sizes.rows * width * launch.panel_dtype.itemsize)
    on_chip = slices == 1 or launch.n_k <= ON_CHIP_KEYS or launch.packed or in_panel == 0
    if on_chip and launch.s <= MAX_ON_CHIP_DIM:
        in_panel, panel = max(1, units), None
    else:
        in_panel = max(1, in_panel)
        panel = p.q.new_empty(in_panel * sizes.rows * width, dtype=launch.panel_dtype)
    shared = launch.scores() | {"sums_ptr": results.sums, "panel_ptr": panel, "width": width}
    with triton.on(p.device):
        for first in range(0, units, in_panel):
            count = min(in_panel, units - first)
            if panel is not None:
                gau_scores_kernel[(count * (width // sizes.keys),)](
                    **shared,
                    g=(None,),
                    delta_ptr=None,
                    grad_panel_ptr=None,
                    first_unit=first,
                    first_key=0,
                    key_blocks=width // sizes.keys,
                    BN=sizes.keys,
                    BD=sizes.depth,
                )
            gau_attention_kernel[(count * slices,)](
                **shared | {"BS": triton.block(launch.s, MAX_ON_CHIP_DIM)},
                out=triton.with_strides(results.o, 4),
                ungated=triton.with_strides(results.ungated, 4),
                first_unit=first,
                count=count,
                SLICES=slices,
                BN=sizes.short if panel is None else sizes.step,
                BE=columns,
            )
    return results


def run_backward(p: GauProblem, results: Results, grad_o: Tensor) -> Gradients:
    gradients = empty_gradients(p)
    if gradients.bias is not None:
        gradients.bias.zero_()
    if p.cu_seqlens is not None:
        for x in gradients[:4]:
            if x is not None:
                x.zero_()  # rows of no sequence
    launch = Launch(p)
    if launch.sequences == 0:
        return gradients
    with triton.on(p.device):
        delta = None if results.sums is None else torch.empty_like(results.sums)
        # grad_o times the gate lies where the gradient of the gate will; in float16 it might leave the range.
        gated = None if p.q.dtype == torch.float16 else gradients.gate
        if gated is not None or delta is not None:
            _run_rows(launch, grad_o, p.gate, gated, results, delta)
        scores = launch.gradients(results, grad_o, delta)
        if gated is not None:
            scores |= {"g": triton.with_strides(gated, 4), "gate": triton.with_strides(None, 4)}
        _run_panels(launch, scores, gradients)
        if p.gate is not None:
            _run_rows(launch, grad_o, results.ungated, gradients.gate, results, None)
    return gradients


def _run_rows(
    launch: Launch, g: Tensor, factor: Tensor | None, out: Tensor | None, results: Results, delta: Tensor | None
) -> None:
    """out = g times a factor, and δ."""
    from ..._core.triton_kernel import rows_kernel

    rows = max(1, launch.sizes.rows // 16)
    triton.launch(
        rows_kernel,
        launch.batch * launch.heads * launch.blocks(rows),
        **launch.where(rows),
        g=triton.with_strides(g, 4),
        factor=triton.with_strides(factor, 4),
        ungated=triton.with_strides(results.ungated, 4),
        out=triton.with_strides(out, 4),
        sums_ptr=results.sums,
        delta_ptr=delta,
        E=launch.e,
        BE=triton.block(launch.e, launch.sizes.columns),
        ACC=launch.how["ACC"],
        num_warps=4,
    )


def _run_panels(launch: Launch, scores: dict[str, Any], gradients: Gradients) -> None:
    """Those of values, keys, queries and the bias, panel by panel."""
    from ._triton_kernel import gau_bias_kernel, gau_keys_kernel, gau_queries_kernel, gau_scores_kernel

    p, sizes = launch.p, launch.sizes
    all_pairs, blocks = launch.batch * p.k.shape[2], launch.group * launch.blocks(sizes.rows)
    pairs, width, keys = launch.panels()
    panel: Tensor | None = None
    grad_panel: Tensor | None = None
    if not launch.on_chip_backward:
        panel, grad_panel = (
            p.q.new_empty(pairs * blocks * sizes.rows * width, dtype=launch.panel_dtype) for _ in range(2)
        )
    carry: Tensor | None = None  # what the panels so far have added to the gradients of queries
    if width < keys:
        carry = gradients.q if p.q.dtype == p.wide else p.q.new_empty(p.q.shape, dtype=p.wide)
    columns, key_columns = triton.block(launch.e, sizes.columns), triton.block(launch.s, sizes.columns)
    slices, key_slices = -(-launch.e // columns), -(-launch.s // key_columns)
    key_blocks = launch.n_k // sizes.keys + launch.sequences if launch.packed else width // sizes.keys
    for first_pair in range(0, all_pairs, pairs):
        count = min(pairs, all_pairs - first_pair)
        for first_key in range(0, keys, width):
            here = {"first_key": first_key, "width": width, "grad_panel_ptr": grad_panel}
            units = {"first_unit": first_pair * blocks}
            if panel is not None:
                triton.launch(
                    gau_scores_kernel,
                    count * blocks * (width // sizes.keys),
                    **scores | here | units,
                    panel_ptr=panel,
                    key_blocks=width // sizes.keys,
                    BN=sizes.keys,
                )
            triton.launch(
                gau_keys_kernel,
                count * key_blocks * (slices + key_slices),
                **scores | here,
                panel_ptr=panel,
                grad_k=triton.with_strides(gradients.k, 4),
                grad_v=triton.with_strides(gradients.v, 4),
                first_pair=first_pair,
                key_blocks=key_blocks,
                S_SLICES=key_slices,
                E_SLICES=slices,
                BN=sizes.keys,
                BR=sizes.short,
                BK=key_columns,
                BE=columns,
            )
            triton.launch(
                gau_queries_kernel,
                count * blocks * key_slices,
                **scores | here | units,
                carry=triton.with_strides(carry, 4),
                grad_q=triton.with_strides(gradients.q, 4),
                is_first=int(first_key == 0),
                is_last=int(first_key + width >= keys),
                S_SLICES=key_slices,
                BN=sizes.step,
                BK=key_columns,
            )
            if gradients.bias is not None:
                triton.launch(
                    gau_bias_kernel,
                    gradients.bias.shape[0] * -(-gradients.bias.shape[1] // sizes.keys),
                    **here,
                    b_ptr=launch.by_row[1],
                    grad_bias=triton.distances(gradients.bias),
                    ends=(p.cu_seqlens, p.cu_seqlens_k),
                    n_q=launch.n_q,
                    n_k=launch.n_k,
                    heads=launch.heads,
                    sequences=launch.sequences,
                    blocks=launch.blocks(sizes.rows),
                    first_head=first_pair * launch.group,
                    rows_of_heads=count * launch.group,
                    bias_scale=p.bias_scale,
                    CAUSAL=p.causal,
                    SHARED=gradients.bias.shape[0] == 1,
                    BM=sizes.rows,
                    BI=sizes.step,
                    BR=sizes.keys,
                    ACC=launch.how["ACC"],
                )
