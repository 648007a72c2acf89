"""Launches the Triton kernels of Nyström attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core import triton
from ._problem import Gradients, NystromProblem, Results, empty_gradients, empty_results
from .presets import INITS, NYSTROM

MAX_DIM = 256  # of a head, and landmarks


class Sizes(NamedTuple):
    """Of tiles, and of parts that rows of a head are cut into."""

    part: int  # rows, at least
    rows: int  # of a tile
    out_rows: int  # of one of outputs
    numbers: int  # of landmarks at hand, and of their sums
    shallow: int  # numbers where there are two sums of gradients
    pooled: int  # of a tile of the means, and of rows of a matrix
    summed: int  # that a program adds of parts
    tile: int  # of matrices
    warps: int


def _sizes(p: NystromProblem) -> Sizes:
    """Read from the machine code for sm_80, sm_90a and sm_100a: no spills for m = 64 and D = 64 in bfloat16."""
    if triton.interpreted():  # whose time goes by operations, not by numbers
        rows = triton.block(max(p.q.shape[1], p.k.shape[1]), 256)
        return Sizes(4096, rows, rows, 1024, 1024, 1 << 18, 1 << 17, 256, 4)
    large, wide = p.divisors_q.shape[1] > 64, p.q.element_size() > 2
    rows, numbers = (16, 2048) if wide else (32, 4096)
    out_rows, warps = rows if large or wide else 64, 8 if large else 4
    return Sizes(256, rows, out_rows, numbers, numbers // 2, 4096, 1024, 32, warps)


def unsupported(p: NystromProblem) -> str | None:
    m, dim = p.divisors_q.shape[1], max(p.q.shape[3], p.v.shape[3])
    if m > MAX_DIM:
        return f"there are {m} landmarks; a row of scores would not fit on chip above {MAX_DIM}"
    if dim > MAX_DIM:
        return f"a head has {dim} dimensions; landmarks would not fit on chip above {MAX_DIM}"
    sizes = _sizes(p)
    places = max(Parts.of(p, n, sizes).places for n in (p.q.shape[1], p.k.shape[1]))
    return triton.unsupported(p.device, p.q.dtype, max(places * (MAX_DIM // 16), p.road.shape[0] * p.q.shape[2] * m))


def _whole(dim: int) -> int:
    return triton.block(dim, MAX_DIM)


class Parts(NamedTuple):
    """How the queries, or the keys, are cut."""

    rows: int  # of a part
    blocks: int  # of a head: for packed sequences, at most
    places: int  # of all heads

    @staticmethod
    def of(p: NystromProblem, length: int, sizes: Sizes) -> Parts:
        batch, heads = p.q.shape[0], p.q.shape[2]
        wanted = -(-4 * triton.processors(p.device) // max(1, batch * heads))  # for all processors to have some
        rows = max(triton.power_of_two(-(-length // wanted)), sizes.part)
        blocks = -(-length // rows) if p.cu_seqlens is None else length // rows + p.road.shape[0]
        return Parts(rows, blocks, batch * heads * blocks)


class Launch:
    """The kernels of one call: what they share."""

    def __init__(self, p: NystromProblem) -> None:
        import triton.language as tl

        self.p, self.sizes = p, _sizes(p)
        self.batch, self.n_q, self.heads, self.dim = p.q.shape
        self.n_k, self.value_dim = p.k.shape[1], p.v.shape[3]
        self.sequences, self.m = p.divisors_q.shape
        self.units = self.sequences * self.heads
        self.of_q, self.of_k = (Parts.of(p, n, self.sizes) for n in (self.n_q, self.n_k))
        self.conv = None if p.conv_weight is None else p.conv_weight.contiguous()
        self.taps = 0 if self.conv is None else self.conv.shape[1]
        bf16, double = p.q.dtype == torch.bfloat16, p.q.dtype == torch.float64
        acc = tl.float64 if double else tl.float32
        self.exact = {"ACC": acc, "PRECISION": "ieee" if double else "tf32x3"}
        self.how = self.exact | {
            "DOT": tl.bfloat16 if bf16 else acc,
            "num_warps": self.sizes.warps,
            "num_stages": 2 if double else 3,
        }
        self.landmarks = {"M": self.m, "BM": _whole(self.m)}
        self.dims = {"D": self.dim, "E": self.value_dim}

    def wide(self, *shape: int) -> Tensor:
        return self.p.q.new_empty(shape, dtype=self.p.wide)

    def parts(self, parts: Parts) -> dict[str, Any]:
        return {"heads": self.heads, "parts": parts.blocks, "span": parts.rows, "ends_ptr": self.p.cu_seqlens}

    def width(self, numbers: int, dim: int) -> int:
        """Columns of as many numbers of all landmarks."""
        return min(_whole(dim), max(16, numbers // _whole(self.m)))

    def slices(self) -> dict[str, int]:
        """Of the columns of landmarks that a program sums up."""
        width = max(16, self.sizes.numbers // _whole(self.m))
        count = max(-(-self.dim // width), -(-self.value_dim // width))
        return {"SLICES": count, "BK": min(width, _whole(self.dim)), "BV": min(width, _whole(self.value_dim))}

    def matrices(self) -> dict[str, Any]:
        """What makes A."""
        p, sizes = self.p, self.sizes
        return {
            "divisors_q_ptr": p.divisors_q,
            "divisors_k_ptr": p.divisors_k,
            "road_ptr": p.road,
            "heads": self.heads,
            "sequences": self.sequences,
            "iterations": p.iterations,
            "scale": p.scale,
            "ridge": p.ridge,
            **self.landmarks,
            **self.dims,
            "ROWS": min(_whole(self.m), max(1, sizes.pooled // _whole(self.m))),
            "TILE": min(_whole(self.m), sizes.tile),
            **self.exact,
            "num_warps": 8,
        }


def _pool(launch: Launch, out: Tensor) -> None:
    """Landmarks of queries."""
    from ._triton_kernel import nystrom_pool_kernel

    p, m, width = launch.p, launch.m, _whole(launch.dim)
    segment = triton.power_of_two(-(-launch.n_q * launch.batch // (launch.sequences * m)))
    rows = min(max(1, segment), launch.sizes.pooled // width)
    together = min(launch.sizes.pooled // width // rows, triton.power_of_two(m))
    groups = -(-m // together)
    triton.launch(
        nystrom_pool_kernel,
        launch.units * groups,
        x=triton.with_strides(p.q, 4),
        mask=triton.with_strides(p.query_mask, 2),
        packed=p.cu_seqlens,
        bounds_ptr=p.bounds_q,
        divisors_ptr=p.divisors_q,
        out_ptr=out,
        heads=launch.heads,
        groups=groups,
        M=m,
        D=launch.dim,
        BM=together,
        BR=rows,
        BD=width,
        ACC=launch.how["ACC"],
        num_warps=4,
    )


def _meet_keys(launch: Launch, results: Results) -> None:
    """K̃ and Y."""
    from ._triton_kernel import nystrom_combine_kernel, nystrom_keys_kernel

    p, parts, slices = launch.p, launch.of_k, launch.slices()
    tops, sums = (launch.wide(parts.places, launch.m) for _ in range(2))
    shared = {
        **launch.parts(parts),
        **launch.landmarks,
        **launch.dims,
        **slices,
        "road_ptr": p.road,
        "n_k": launch.n_k,
        "tops_ptr": tops,
        "sums_ptr": sums,
        "sum_keys_ptr": launch.wide(parts.places, launch.m, launch.dim),
        "sum_values_ptr": launch.wide(parts.places, launch.m, launch.value_dim),
    }
    triton.launch(
        nystrom_keys_kernel,
        parts.places * slices["SLICES"],
        **shared,
        k=triton.with_strides(p.k, 4),
        v=triton.with_strides(p.v, 4),
        key_mask=triton.with_strides(p.key_mask, 2),
        bounds_ptr=p.bounds_k,
        landmarks_q_ptr=results.landmarks_q,
        sequences=launch.sequences,
        scale=p.scale,
        BT=launch.sizes.rows,
        BD=launch.width(launch.sizes.numbers, launch.dim),
        **launch.how,
    )
    triton.launch(
        nystrom_combine_kernel,
        launch.units * slices["SLICES"],
        **shared,
        divisors_q_ptr=p.divisors_q,
        divisors_k_ptr=p.divisors_k,
        landmarks_k_ptr=results.landmarks_k,
        summary_ptr=results.summary,
        weighted_ptr=results.weighted,
        norms_ptr=results.norms,
        ACC=launch.how["ACC"],
        num_warps=4,
    )


def _scratch(launch: Launch, matrices: int) -> Tensor:
    side = _whole(launch.m)
    return launch.wide(launch.sequences, launch.heads, matrices, side, side)


def _inverse(launch: Launch, results: Results) -> Tensor | None:
    """[N, H, m, m]: what no iteration gives, of the matrices that the kernel makes."""
    if INITS[launch.p.init] != "pinv":
        return None
    m = launch.m
    columns, scratch = launch.wide(launch.units, m), _scratch(launch, 1)
    _weigh(launch, results, "measure", None, columns, scratch)
    served = (launch.p.road == NYSTROM)[:, None, None, None]
    identity = torch.eye(m, dtype=launch.p.wide, device=launch.p.device)
    return torch.linalg.pinv(torch.where(served, scratch[:, :, 0, :m, :m], identity)).contiguous()


def _columns(launch: Launch, results: Results) -> Tensor | None:
    """[N·H, m]: the sums of those of A, 0 where nothing is inverted; for a norm that is the largest of the call."""
    if INITS[launch.p.init] != "original":
        return None
    columns = launch.wide(launch.units, launch.m)
    _weigh(launch, results, "measure", None, columns, _scratch(launch, 1))
    return columns


def _weigh(
    launch: Launch, results: Results, role: str, inverse: Tensor | None, columns: Tensor | None, scratch: Tensor
) -> None:
    from ._triton_kernel import nystrom_inverse_kernel

    triton.launch(
        nystrom_inverse_kernel,
        launch.units,
        **launch.matrices(),
        landmarks_q_ptr=results.landmarks_q,
        landmarks_k_ptr=results.landmarks_k,
        inverse_ptr=inverse,
        columns_ptr=columns,
        scratch_ptr=scratch,
        MATRICES=scratch.shape[2],
        summary_ptr=results.summary,
        weighted_ptr=results.weighted,
        ROLE=role,
    )


def run(p: NystromProblem) -> Results:
    from ._triton_kernel import nystrom_output_kernel

    results = empty_results(p)
    launch = Launch(p)
    if p.cu_seqlens is not None:
        results.o.zero_()  # rows of no sequence
    if launch.units == 0:
        return results
    with triton.on(p.device):
        _pool(launch, results.landmarks_q)
        _meet_keys(launch, results)
        inverse = _inverse(launch, results)
        _weigh(
            launch, results, "weigh", inverse, _columns(launch, results), _scratch(launch, 6 if inverse is None else 0)
        )
        sizes = launch.sizes
        triton.launch(
            nystrom_output_kernel,
            launch.of_q.places,
            **launch.parts(launch.of_q),
            **launch.landmarks,
            **launch.dims,
            q=triton.with_strides(p.q, 4),
            v=triton.with_strides(p.v, 4),
            out=triton.with_strides(results.o, 4),
            query_mask=triton.with_strides(p.query_mask, 2),
            key_mask=triton.with_strides(p.key_mask, 2),
            bounds_ptr=p.bounds_q,
            divisors_k_ptr=p.divisors_k,
            road_ptr=p.road,
            landmarks_k_ptr=results.landmarks_k,
            weighted_ptr=results.weighted,
            conv_ptr=launch.conv,
            n_q=launch.n_q,
            sequences=launch.sequences,
            scale=p.scale,
            TAPS=launch.taps,
            BT=sizes.out_rows,
            BC=sizes.out_rows,
            BD=launch.width(sizes.numbers, launch.dim),
            BE=launch.width(sizes.numbers, launch.value_dim),
            **launch.how,
        )
    return results


def run_backward(p: NystromProblem, results: Results, grad_o: Tensor) -> Gradients:
    from ._triton_kernel import nystrom_keys_backward_kernel, nystrom_queries_backward_kernel, nystrom_queries_kernel

    gradients = empty_gradients(p)
    launch = Launch(p)
    sizes, slices, m, wider = launch.sizes, launch.slices(), launch.m, max(launch.dim, launch.value_dim)
    if p.cu_seqlens is not None:
        for x in gradients[:3]:
            x.zero_()  # rows of no sequence
    if launch.units == 0:
        return gradients if launch.conv is None else gradients._replace(conv_weight=torch.zeros_like(launch.conv))
    of_queries = {
        **launch.parts(launch.of_q),
        **launch.landmarks,
        **launch.dims,
        "q": triton.with_strides(p.q, 4),
        "g": triton.with_strides(grad_o, 4),
        "query_mask": triton.with_strides(p.query_mask, 2),
        "bounds_ptr": p.bounds_q,
        "divisors_k_ptr": p.divisors_k,
        "road_ptr": p.road,
        "landmarks_k_ptr": results.landmarks_k,
        "weighted_ptr": results.weighted,
        "n_q": launch.n_q,
        "sequences": launch.sequences,
        "scale": p.scale,
        "BT": sizes.rows,
        **launch.how,
    }
    with triton.on(p.device):
        sums = launch.wide(launch.of_q.places, m * (launch.value_dim + launch.dim))
        triton.launch(
            nystrom_queries_kernel,
            launch.of_q.places * slices["SLICES"],
            **of_queries,
            **slices,
            sums_ptr=sums,
            BD=launch.width(sizes.shallow, wider),
        )
        of_landmarks = launch.wide(launch.units, sums.shape[1])
        _sum(launch, launch.of_q, launch.n_q, sums, None, 1.0, of_landmarks)
        grad_summary = torch.empty_like(results.summary)
        grad_landmarks_q, grad_landmarks_k = (torch.empty_like(results.landmarks_q) for _ in range(2))
        _invert_backward(launch, results, of_landmarks, grad_summary, grad_landmarks_q, grad_landmarks_k)
        sums = launch.wide(launch.of_k.places, m * launch.dim)
        triton.launch(
            nystrom_keys_backward_kernel,
            launch.of_k.places * slices["SLICES"],
            **launch.parts(launch.of_k),
            **launch.landmarks,
            **launch.dims,
            **slices,
            k=triton.with_strides(p.k, 4),
            v=triton.with_strides(p.v, 4),
            g=triton.with_strides(grad_o, 4),
            grad_k=triton.with_strides(gradients.k, 4),
            grad_v=triton.with_strides(gradients.v, 4),
            query_mask=triton.with_strides(p.query_mask, 2),
            key_mask=triton.with_strides(p.key_mask, 2),
            bounds_ptr=p.bounds_k,
            divisors_k_ptr=p.divisors_k,
            road_ptr=p.road,
            landmarks_q_ptr=results.landmarks_q,
            norms_ptr=results.norms,
            summary_ptr=results.summary,
            grad_summary_ptr=grad_summary,
            grad_landmarks_k_ptr=grad_landmarks_k,
            sums_ptr=sums,
            conv_ptr=launch.conv,
            n_k=launch.n_k,
            sequences=launch.sequences,
            scale=p.scale,
            TAPS=launch.taps,
            BT=sizes.rows,
            BC=sizes.rows,
            BD=launch.width(sizes.numbers, wider),
            **launch.how | {"num_warps": 8},
        )
        _sum(launch, launch.of_k, launch.n_k, sums, grad_landmarks_q, p.scale, grad_landmarks_q)
        triton.launch(
            nystrom_queries_backward_kernel,
            launch.of_q.places,
            **of_queries,
            grad_q=triton.with_strides(gradients.q, 4),
            divisors_q_ptr=p.divisors_q,
            grad_landmarks_q_ptr=grad_landmarks_q,
            BD=launch.width(sizes.numbers, wider),
            BK=launch.width(sizes.numbers, launch.dim),
        )
        return gradients._replace(conv_weight=_grad_conv(launch, grad_o))


def _sum(launch: Launch, parts: Parts, length: int, x: Tensor, also: Tensor | None, scale: float, out: Tensor) -> None:
    """out = scale·(the sums of what parts x [places, numbers] have, and another tensor)."""
    from ._triton_kernel import nystrom_sum_kernel

    block = min(triton.power_of_two(x.shape[1]), launch.sizes.summed)
    triton.launch(
        nystrom_sum_kernel,
        launch.units * -(-x.shape[1] // block),
        **launch.parts(parts),
        x_ptr=x,
        also_ptr=also,
        out_ptr=out,
        length=length,
        numbers=x.shape[1],
        scale=scale,
        BLOCK=block,
        ACC=launch.how["ACC"],
        num_warps=4,
    )


def _invert_backward(
    launch: Launch, results: Results, of_landmarks: Tensor, grad_summary: Tensor, grad_q: Tensor, grad_k: Tensor
) -> None:
    """∂Y, ∂K̃ and what the matrix adds to ∂Q̃ / a, of ∂W and ∂K̃ / a."""
    from ._triton_kernel import nystrom_inverse_backward_kernel

    inverse, columns = _inverse(launch, results), _columns(launch, results)
    norms = None if columns is None else launch.wide(launch.units)
    scratch = _scratch(launch, 9 if inverse is not None else 9 + launch.p.iterations)
    for role in ("all",) if columns is None else ("iterate", "finish"):
        triton.launch(
            nystrom_inverse_backward_kernel,
            launch.units,
            **launch.matrices(),
            landmarks_q_ptr=results.landmarks_q,
            landmarks_k_ptr=results.landmarks_k,
            inverse_ptr=inverse,
            columns_ptr=columns,
            norms_ptr=norms,
            scratch_ptr=scratch,
            summary_ptr=results.summary,
            sums_ptr=of_landmarks,
            grad_summary_ptr=grad_summary,
            grad_q_ptr=grad_q,
            grad_k_ptr=grad_k,
            MATRICES=scratch.shape[2],
            ROLE=role,
        )


def _grad_conv(launch: Launch, grad_o: Tensor) -> Tensor | None:
    """∂w [H, κ]."""
    from ._triton_kernel import nystrom_conv_kernel

    p, taps, parts, rows = launch.p, launch.taps, launch.of_k, launch.sizes.rows
    if launch.conv is None:
        return None
    sums = p.q.new_zeros((launch.batch, launch.heads, parts.blocks, taps), dtype=torch.float64)
    triton.launch(
        nystrom_conv_kernel,
        parts.places * -(-taps // rows),
        **launch.parts(parts),
        v=triton.with_strides(p.v, 4),
        g=triton.with_strides(grad_o, 4),
        query_mask=triton.with_strides(p.query_mask, 2),
        key_mask=triton.with_strides(p.key_mask, 2),
        sums_ptr=sums,
        length=launch.n_k,
        sequences=launch.sequences,
        E=launch.value_dim,
        TAPS=taps,
        BT=rows,
        BE=min(_whole(launch.value_dim), launch.sizes.out_rows),
        **launch.how,
    )
    return sums.sum((0, 2)).to(p.wide)
