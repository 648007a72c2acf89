"""What Nyström attention promises: its cases, the calls it refuses, its costs and how they grow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._core import triton
from ..._core.spec import BadCall, Call, KernelPromise, OpSpec, Work, tiled, whole_tiles
from ._problem import NystromProblem
from .api import nystrom_attention
from .presets import CONVENTIONS
from .reference import nystrom_attention as reference


@dataclass(frozen=True)
class NystromCase:
    """Sizes and forms of one call."""

    batch: int = 2
    queries: int = 40  # n_q, where `lengths` is None
    keys: int | None = None  # n_k; None: n_q
    heads: int = 2
    dim: int = 16
    value_dim: int = 16
    landmarks: int = 8
    iterations: int | None = None
    init: str | None = None
    convention: str | None = None
    scale: float | None = None
    ridge: float | None = None
    conv: int = 0  # κ
    conv_4d: bool = False  # the weight as torch's Conv2d has it
    padding: str = "none"  # "none", "left", "right", "holes", "blocks" (whole segments); the last has none but padding
    by_lengths: bool = False  # the padding on the right as `lengths`
    query_padding: bool = False  # rows of its own
    lengths: tuple[int, ...] | None = None  # of packed sequences
    surplus: int = 0  # packed rows before the first sequence and past the last
    factors: bool = False
    layout: str = "plain"  # "plain", "transposed" ([B, H, T, D] memory), "fused" (q, k and v of one buffer)
    size: float = 1.0  # of queries
    equal: bool = False  # all tokens are alike: the matrix that is inverted has rank one


def make(case: NystromCase, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    packed = case.lengths is not None
    ends = list(itertools.accumulate(case.lengths or (), initial=case.surplus))
    n_q = ends[-1] + case.surplus if packed else case.queries
    n_k = n_q if packed or case.keys is None else case.keys
    lead = () if packed else (case.batch,)
    widths = {"q": case.dim, "k": case.dim, "v": case.value_dim}
    if case.layout == "fused":
        buffer = random(*lead, n_q, case.heads, sum(widths.values()))
        call: Call = dict(zip(widths, buffer.split(list(widths.values()), -1), strict=True))
    else:
        call = {}
        for name, width in widths.items():
            rows = n_q if name == "q" else n_k
            order = (case.heads, rows) if case.layout == "transposed" else (rows, case.heads)
            x = random(*lead, *order, width)
            call[name] = x.transpose(-3, -2) if case.layout == "transposed" else x
        call["q"] = case.size * call["q"]
    if case.equal:
        call |= {name: call[name][:, :1].expand_as(call[name]).clone() for name in ("q", "k")}
    call["num_landmarks"] = case.landmarks
    options: Call = {"pinv_iterations": case.iterations, "pinv_init": case.init, "landmarks": case.convention}
    options |= {"scale": case.scale, "ridge": case.ridge, "return_factors": case.factors or None}
    call |= {name: value for name, value in options.items() if value is not None}
    if case.conv:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = random(case.heads, case.conv, dtype=wide)
        call["conv_weight"] = weight[:, None, :, None] if case.conv_4d else weight
    if case.padding != "none":
        row = torch.arange(n_k, device=device)
        short = 2 + torch.arange(case.batch, device=device)[:, None] * 5
        keep = {
            "left": row >= short,
            "right": row < n_k - short,
            "holes": (row + short) % 4 != 0,
            "blocks": (row < 10) | (row >= 15 + short),  # the third segment of 5, and more
        }[case.padding]
        if case.padding in ("holes", "blocks") and case.batch > 1:
            keep[-1] = False
        if case.by_lengths:
            call["lengths"] = keep.sum(1)
        else:
            call["key_padding_mask"] = keep[0] if packed else keep
    if case.query_padding:
        keep = torch.ones(*lead, n_q, dtype=torch.bool, device=device)
        keep[..., ::3] = False
        call["query_padding_mask"] = keep
    if packed:
        call["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return call


PLAIN = NystromCase()
# Interpreted and emulated kernels take their time by heads and steps.
SHORT = replace(PLAIN, batch=1, heads=1, iterations=1)
TWO_HEADS = replace(SHORT, heads=2)
CASES = {
    "plain": PLAIN,
    "original": replace(PLAIN, init="original"),
    "pinv": replace(PLAIN, init="pinv", size=4.0),
    **{f"iterations_{n}": replace(SHORT, iterations=n) for n in (0, 1, 12, 20)},
    **{f"as_{name}": replace(SHORT, convention=name, queries=43) for name in CONVENTIONS[1:]},
    **{
        f"padded_as_{name}": replace(TWO_HEADS, convention=name, batch=2, padding="blocks", conv=3)
        for name in ("mlpen", "lucidrains")
    },
    "short_as_lucidrains": replace(SHORT, convention="lucidrains", queries=7, size=4.0),
    "short_as_xformers": replace(SHORT, convention="xformers", queries=7, padding="right"),
    "ridge": replace(TWO_HEADS, ridge=0.1, init="original"),
    "scale": replace(SHORT, scale=0.7),
    "conv": replace(TWO_HEADS, conv=33),
    "conv_1": replace(SHORT, conv=1, conv_4d=True),
    "conv_even": replace(SHORT, conv=4),
    "conv_wide": replace(SHORT, conv=65, value_dim=24),
    "conv_exact": replace(SHORT, conv=5, queries=6),
    "padding_left": replace(TWO_HEADS, padding="left", conv=3),
    "padding_holes": replace(SHORT, padding="holes", batch=2, conv=3),
    "lengths": replace(SHORT, batch=2, padding="right", by_lengths=True),
    "cross": replace(PLAIN, batch=1, queries=25, keys=70),
    "cross_few_queries": replace(SHORT, queries=5, keys=30),
    "cross_few_keys": replace(SHORT, queries=30, keys=5),
    "cross_padding": replace(TWO_HEADS, queries=30, keys=41, batch=2, padding="holes", query_padding=True),
    "query_padding": replace(SHORT, query_padding=True, padding="right"),
    "packed": replace(PLAIN, heads=1, lengths=(30, 0, 5, 9, 8)),
    "packed_surplus": replace(TWO_HEADS, lengths=(21, 40), surplus=3, conv=5, init="original"),
    "packed_padding": replace(SHORT, lengths=(14, 26), padding="left"),
    "packed_pinv": replace(SHORT, lengths=(14, 5, 26), init="pinv", size=4.0),
    "packed_mlpen": replace(SHORT, lengths=(14, 5, 26), convention="mlpen", padding="holes", size=4.0),
    "factors": replace(TWO_HEADS, batch=2, factors=True, padding="right"),
    "factors_packed": replace(SHORT, factors=True, lengths=(21, 3, 10), surplus=1),
    "transposed": replace(TWO_HEADS, layout="transposed"),
    "fused": replace(TWO_HEADS, layout="fused", conv=3),
    "equal": replace(SHORT, equal=True),
    "equal_pinv": replace(SHORT, equal=True, init="pinv"),
    "near_identity": replace(PLAIN, batch=1, size=30.0),
    "everything": NystromCase(
        batch=2,
        queries=90,
        heads=3,
        dim=24,
        value_dim=40,
        landmarks=12,
        init="original",
        scale=0.3,
        ridge=0.01,
        conv=5,
        padding="holes",
        query_padding=True,
    ),
    "everything_small": NystromCase(
        batch=2,
        queries=9,
        heads=1,
        dim=3,
        value_dim=2,
        landmarks=3,
        iterations=3,
        init="original",
        conv=3,
        padding="left",
    ),
    "B0": replace(SHORT, batch=0),
    "n0": replace(SHORT, queries=0),
    "n1": replace(SHORT, queries=1),
    "n7": replace(PLAIN, queries=7),
    "n8": replace(PLAIN, queries=8),
    "n9": replace(PLAIN, queries=9),
    "n65": replace(SHORT, queries=65),
    "n130": replace(SHORT, queries=130),
    "m1": replace(SHORT, landmarks=1),
    **{f"m{m}": replace(PLAIN, landmarks=m, queries=140, batch=1, heads=1) for m in (16, 30, 33, 48, 64)},
    **{f"m{m}": replace(SHORT, landmarks=m, queries=140) for m in (100, 128)},
    "m256": replace(SHORT, landmarks=256, queries=270, iterations=0),
    "d32": replace(SHORT, dim=32, value_dim=32),
    "d64": replace(SHORT, dim=64, value_dim=64),
    "d128": replace(SHORT, dim=128, value_dim=128),
    "d256": replace(SHORT, dim=256, value_dim=200),
    "d1": replace(SHORT, dim=1, value_dim=1),
}


def _set(**change: Any) -> Callable[[Call], Call]:
    return lambda call: call | change


def _map(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _packed(ends: Any, **more: Any) -> Callable[[Call], Call]:
    """The call's first sequence alone, packed."""
    ends = torch.tensor(ends, dtype=torch.int32) if isinstance(ends, list) else ends
    return lambda call: call | {n: call[n][0] for n in ("q", "k", "v")} | {"cu_seqlens": ends} | more


BAD_CALLS = (
    BadCall("causal", _set(causal=True), ValueError, "causal", "means over the future as well; use linear_attention"),
    BadCall("q_not_a_tensor", _set(q=[1.0]), TypeError, "q", "a tensor of dtype bfloat16, float16, float32 or float64"),
    BadCall("q_rank", _map("q", lambda q: q[0]), ValueError, "q", r"shape \[B, T, H, D\]"),
    BadCall("q_no_dim", _map("q", lambda q: q[..., :0]), ValueError, "q", "a head dimension above 0"),
    BadCall("k_dtype", _map("k", lambda k: k.half()), TypeError, "k", "the dtype of q, torch.float32"),
    BadCall("k_dim", _map("k", lambda k: k[..., :8]), ValueError, "k", r"dimension of q, \[2, 40, 2, 16\]"),
    BadCall("k_heads", _map("k", lambda k: k[:, :, :1]), ValueError, "k", "the heads and the head dimension of q"),
    BadCall("k_batch", _map("k", lambda k: k[:1]), ValueError, "k", "the batch, the heads"),
    BadCall("v_length", _map("v", lambda v: v[:, :5]), ValueError, "v", r"the shape of k, \[2, 40, 2, 16\]"),
    BadCall("device", _map("v", lambda v: v.to("meta")), ValueError, "v", "the device of q, cpu"),
    BadCall("landmarks_0", _set(num_landmarks=0), ValueError, "num_landmarks", "at least 1"),
    BadCall("landmarks_float", _set(num_landmarks=8.0), TypeError, "num_landmarks", "an int"),
    BadCall("iterations", _set(pinv_iterations=-1), ValueError, "pinv_iterations", "at least 0"),
    BadCall("init", _set(pinv_init="exact"), ValueError, "pinv_init", "'per_matrix', 'original', 'pinv'"),
    BadCall("convention", _set(landmarks="hf"), ValueError, "landmarks", "'valid', 'mlpen', 'lucidrains'"),
    BadCall("scale", _set(scale="dim"), TypeError, "scale", "a number"),
    BadCall("scale_nan", _set(scale=math.nan), ValueError, "scale", "a finite number"),
    BadCall("ridge", _set(ridge=-0.1), ValueError, "ridge", "0 or more"),
    BadCall("conv_heads", _set(conv_weight=torch.ones(3, 5)), ValueError, "conv_weight", r"\[H, κ\].*H = 2"),
    BadCall("conv_empty", _set(conv_weight=torch.ones(2, 0)), ValueError, "conv_weight", r"\[H, κ\]"),
    BadCall(
        "conv_cross",
        lambda call: call | {"q": call["q"][:, :9], "conv_weight": torch.ones(2, 3)},
        ValueError,
        "conv_weight",
        "None, as there are other numbers",
    ),
    BadCall(
        "mask_dtype", _set(key_padding_mask=torch.ones(2, 40)), TypeError, "key_padding_mask", "a tensor of dtype bool"
    ),
    BadCall(
        "mask_shape",
        _set(query_padding_mask=torch.ones(2, 8, dtype=torch.bool)),
        ValueError,
        "query_padding_mask",
        r"shape \[2, 40\]",
    ),
    BadCall("lengths_dtype", _set(lengths=torch.ones(2)), TypeError, "lengths", "dtype int32 or int64"),
    BadCall("lengths_shape", _set(lengths=torch.ones(3, dtype=torch.int32)), ValueError, "lengths", r"shape \[2\]"),
    BadCall(
        "lengths_packed", _packed([0, 40], lengths=torch.ones(1, dtype=torch.int32)), ValueError, "lengths", "None, as"
    ),
    BadCall("cu_seqlens_dtype", _packed(torch.zeros(2)), TypeError, "cu_seqlens", "dtype int32"),
    BadCall("cu_seqlens_large", _packed([0, 5, 41]), ValueError, "cu_seqlens", "the number of rows, 40"),
    BadCall("cu_seqlens_descending", _packed([0, 5, 3]), ValueError, "cu_seqlens", "ascending"),
    BadCall("backend", _set(backend="gpu"), ValueError, "backend", "'cuda', 'triton', 'cpu', 'torch', 'reference'"),
)


def flops(call: Call) -> int:
    """Of the products with landmarks, of those of the inverse, four for each step and two beside, and the convolution.
    Where no more tokens than landmarks are, of exact attention. Packed sequences are taken for longer ones.
    """
    return _products(call, 1, 1, 4) + _convolved(call)


def backward_flops(call: Call) -> int:
    """Of five products to the two of each factor: scores and their gradients, and sums that are gradients; of a step's
    four once more and their two gradients; and of both gradients of the convolution.
    """
    return _products(call, 3, 2, 12) + 2 * _convolved(call)


def _products(call: Call, of_queries: int, of_values: int, of_steps: int) -> int:
    """Of so many of each factor as wide as queries and as values are, and of each step of the inverse."""
    q, k, v, m = call["q"], call["k"], call["v"], call["num_landmarks"]
    wide = of_queries * q.shape[-1] + of_values * v.shape[-1]
    if "cu_seqlens" not in call and call.get("landmarks") != "lucidrains" and min(q.shape[1], k.shape[1]) <= m:
        return 2 * math.prod(q.shape[:-1]) * k.shape[1] * wide
    rows = math.prod(q.shape[:-1]) + math.prod(k.shape[:-1])
    return 2 * m * rows * wide + 2 * _units(call) * (m * m * wide + of_steps * _steps(call) * m**3)


def _units(call: Call) -> int:
    """Heads of all sequences."""
    q, ends = call["q"], call.get("cu_seqlens")
    return (q.shape[0] if ends is None else ends.shape[0] - 1) * q.shape[-2]


def _steps(call: Call) -> int:
    return 0 if call.get("pinv_init") == "pinv" else call.get("pinv_iterations", 6)


def _convolved(call: Call) -> int:
    weight = call.get("conv_weight")
    return 0 if weight is None else 2 * weight.numel() // weight.shape[0] * call["v"].numel()


def bytes_(call: Call) -> int:
    """q, k and v read once, o written once; q has to be read twice, as its landmarks come first."""
    q, k, v = call["q"], call["k"], call["v"]
    return (q.numel() + k.numel() + v.numel() + math.prod(q.shape[:-1]) * v.shape[-1]) * q.itemsize


def beside_torch(call: Call) -> dict[str, int]:
    q, k = call["q"], call["k"]
    means = 2 * call["num_landmarks"] * (q.numel() + k.numel())
    return {"means of segments, as products with the matrix of who is in them": means}


def backward_beside_torch(call: Call) -> dict[str, int]:
    """Each product forward has two gradients, which are products as large, but a mean one."""
    kept = _products(call, 1, 0, 4)
    of_other_heads = (call["q"].shape[-2] - 1) * _convolved(call)
    return beside_torch(call) | {
        "scores and steps are kept, and not made again": -kept,
        "gradients of the convolution's weights, counted as if all heads had all": of_other_heads,
    }


def _rows(length: int, parts: Any, tile: int) -> int:
    """Those of all tiles of a head's parts."""
    return sum(tiled(min(parts.rows, length - first), tile) for first in range(0, length, parts.rows))


def beside_triton(call: Call, problem: NystromProblem) -> dict[str, int]:
    """Of more tokens than landmarks, and an inverse that starts from a norm of its own."""
    from . import _triton

    launch = _triton.Launch(problem)
    sizes, slices, m, of_m = launch.sizes, launch.slices(), launch.m, triton.block(launch.m, _triton.MAX_DIM)
    tile, heads = launch.matrices()["TILE"], 2 * launch.batch * launch.heads
    keys, queries = _rows(launch.n_k, launch.of_k, sizes.rows), _rows(launch.n_q, launch.of_q, sizes.out_rows)
    scored = tiled(launch.dim, launch.width(sizes.numbers, launch.dim)) * of_m
    width = launch.width(sizes.numbers, launch.value_dim)
    read = tiled(launch.value_dim, width)
    by_keys = keys * (slices["SLICES"] * (scored + of_m * (slices["BK"] + slices["BV"])))
    inverse = of_m**2 * tiled(launch.dim, tile) + tiled(m, tile) ** 2 * tiled(launch.value_dim, tile)
    inverse += 4 * _steps(call) * of_m**3
    band = queries * read * tiled(sizes.out_rows + launch.taps - 1, sizes.out_rows) if launch.taps else 0
    found = {
        "means of keys' segments, as products": heads * m * launch.n_k * launch.dim,
        "scores of keys, made again for each slice of columns": heads * keys * (slices["SLICES"] - 1) * scored,
        "the convolution, as a product with a band in a matrix": heads * band - _convolved(call),
    }
    total = heads * (by_keys + inverse + queries * (scored + of_m * read) + band)
    return found | {whole_tiles(causal=False): total - flops(call) - sum(found.values())}


def backward_beside_triton(call: Call, problem: NystromProblem) -> dict[str, int]:
    """Of the same calls."""
    from . import _triton

    launch = _triton.Launch(problem)
    sizes, slices, m, of_m = launch.sizes, launch.slices(), launch.m, triton.block(launch.m, _triton.MAX_DIM)
    tile, heads, taps = launch.matrices()["TILE"], 2 * launch.batch * launch.heads, launch.taps
    dims = (launch.dim, launch.value_dim)
    keys, queries = _rows(launch.n_k, launch.of_k, sizes.rows), _rows(launch.n_q, launch.of_q, sizes.rows)
    # Of a row's scores and gradients of weights; and where two sums of gradients leave room for fewer columns.
    scored, shallow = (
        of_m * sum(tiled(dim, launch.width(numbers, max(dims))) for dim in dims)
        for numbers in (sizes.numbers, sizes.shallow)
    )
    count, summed = slices["SLICES"], slices["SLICES"] * of_m * (slices["BK"] + slices["BV"])
    again = queries * count * shallow + keys * (count - 1) * scored
    once = (queries + keys) * (scored + summed)
    once += of_m * (queries * tiled(launch.dim, launch.width(sizes.numbers, launch.dim)) + keys * count * slices["BK"])
    of_dim, of_value_dim = (tiled(dim, tile) for dim in dims)
    inverse = of_m**2 * (of_dim + of_value_dim) + tiled(m, tile) ** 2 * (2 * of_dim + of_value_dim)
    steps = _steps(call) * of_m**3
    band = keys * count * slices["BV"] * tiled(sizes.rows + taps - 1, sizes.rows)
    columns = tiled(launch.value_dim, triton.block(launch.value_dim, sizes.out_rows))
    convolved = band + 2 * keys * tiled(taps, sizes.rows) * columns if taps else 0
    found = {
        "scores and gradients of weights, made again for each slice of columns and for queries": heads * again,
        "products within a step of the inverse, made again after the step": heads * 3 * steps,
        "the convolution, as products of tiles with a band in a matrix": heads * convolved - 2 * _convolved(call),
    }
    total = heads * (again + once + inverse + 15 * steps + convolved)
    return found | {whole_tiles(causal=False): total - backward_flops(call) - sum(found.values())}


def codegen() -> dict[str, Call]:
    """The sizes that the kernels are tuned for, and what adds code and fills the chip."""
    tuned = NystromCase(batch=1, queries=4096, heads=1, dim=64, value_dim=64, landmarks=64)
    large = replace(tuned, landmarks=256, dim=256, value_dim=256, lengths=(4096,), conv=33, init="original")
    meta = torch.device("meta")
    return {
        "bfloat16": make(tuned, torch.bfloat16, meta, 0),
        "form float32": make(large, torch.float32, meta, 0),
    }


def metered() -> dict[str, Call]:
    case = NystromCase(batch=1, queries=512, dim=64, value_dim=64, landmarks=32)
    return {
        f"float16, n 512, m 32, D 64{name}": make(form, torch.float16, torch.device("cpu"), 0)
        for name, form in (("", case), (", conv 33", replace(case, conv=33)))
    }


def passes(backend: Any, problem: NystromProblem) -> Iterator[str]:
    results = backend.run(problem)
    yield "forward"
    backend.run_backward(problem, results, results.o)
    yield "backward"


SPEC = OpSpec(
    name="nystrom_attention",
    function=nystrom_attention,
    reference=reference,
    backends=("cuda", "triton", "cpu", "reference"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cannot={
        ("cuda", "cpu", torch.float64): "those of tensor cores",
        ("cuda", "cuda", torch.float64): "those of tensor cores",
        ("triton", "cpu", torch.bfloat16): "truncates to bfloat16",
    },
    eager={},
    differentiable=("q", "k", "v", "conv_weight"),
    cases=CASES,
    make=make,
    example="plain",
    differentiated="everything_small",
    compiled=("plain", "everything", "packed"),
    bad_calls=BAD_CALLS,
    bytes=bytes_,
    work={
        "forward": Work(flops, beside_torch, beside_triton),
        "backward": Work(backward_flops, backward_beside_torch, backward_beside_triton),
    },
    codegen=codegen,
    metered=metered,
    passes=passes,
    promises=(
        KernelPromise("cuda", "pool|combine|sum_kernel"),
        KernelPromise("cuda", "inverse", tensor_core=True, shared=154 << 10),  # for 64 landmarks
        KernelPromise("cuda", " float32", tensor_core=True, async_copies=True, shared=138 << 10, may_spill=True),
        KernelPromise("cuda", " float16", tensor_core=True, shared=138 << 10, may_spill=True),  # converted on the way
        KernelPromise(  # for more than 64 landmarks: 16 bytes, on sm_100a
            "cuda",
            "keys_backward_kernel bfloat16 1 0",
            tensor_core=True,
            async_copies=True,
            shared=110 << 10,
            may_spill=True,
        ),
        KernelPromise(
            "cuda", "backward_kernel|queries_kernel bfloat16 0", tensor_core=True, async_copies=True, shared=110 << 10
        ),
        KernelPromise("cuda", tensor_core=True, async_copies=True, shared=74 << 10, blocks=2),
        KernelPromise("triton", "pool|combine|sum_kernel"),
        KernelPromise("triton", "form", tensor_core=True, async_copies=True, may_spill=True),
        KernelPromise("triton", "bfloat16", wide=0.35, tensor_core=True, async_copies=True),
    ),
    growth={
        "flops": {"batch": 1.0, "heads": 1.0},  # with the inverse, which is the same for all lengths
        "bytes": {"queries": 1.0, "batch": 1.0, "landmarks": 0.0},
    },
)
