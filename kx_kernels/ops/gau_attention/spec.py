"""What gated attention promises: its cases, the calls it refuses, its costs and how they grow."""

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
from ._problem import GauProblem
from .api import gau_attention
from .presets import ACTIVATIONS
from .reference import eager
from .reference import gau_attention as reference


@dataclass(frozen=True)
class GauCase:
    """Sizes and forms of one call."""

    batch: int = 2
    queries: int = 9  # n_q, where `lengths` is None
    keys: int | None = None  # n_k; None: n_q
    heads: int = 1
    kv_heads: int = 1
    key_dim: int = 16  # s
    value_dim: int = 24  # e
    gate: bool = True
    causal: bool = False
    preset: str = "su"
    activation: str | None = None
    scale: float | str | None = None
    normalizer: float | str | None = None
    bias: str = "none"  # "none", "shared", "heads"
    bias_scale: float | str | None = None
    rope: str = "none"  # "none", "interleaved", "half" (with an offset by sequence)
    padding: str = "none"  # "none", "left", "right", "holes" (a sequence of nothing but padding among them)
    query_padding: bool = False  # rows of its own
    by_lengths: bool = False  # the padding on the right as `lengths`
    lengths: tuple[int, ...] | None = None  # of packed sequences
    key_lengths: tuple[int, ...] | None = None  # where they differ
    surplus: int = 0  # packed rows before the first sequence and past the last
    by_row: bool = False  # scale and normalizer as tensors
    layout: str = "plain"  # "plain", "transposed" ([B, H, T, D] memory), "fused" (gate, v, q and k of one buffer)
    size: float = 1.0  # of queries


def make(case: GauCase, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    packed = case.lengths is not None
    ends = [list(itertools.accumulate(n or (), initial=case.surplus)) for n in (case.lengths, case.key_lengths)]
    if packed and case.key_lengths is None:
        ends[1] = ends[0]
    n_q = ends[0][-1] + case.surplus if packed else case.queries
    n_k = ends[1][-1] + case.surplus if packed else case.queries if case.keys is None else case.keys
    lead = () if packed else (case.batch,)
    widths = {"gate": case.value_dim, "v": case.value_dim, "q": case.key_dim, "k": case.key_dim}
    if case.layout == "fused":
        buffer = random(*lead, n_q, case.heads, sum(widths.values()))
        made = dict(zip(widths, buffer.split(list(widths.values()), -1), strict=True))
    else:
        made = {}
        for name, width in widths.items():
            rows, heads = (n_q, case.heads) if name in ("gate", "q") else (n_k, case.kv_heads)
            order = (heads, rows) if case.layout == "transposed" else (rows, heads)
            x = random(*lead, *order, width)
            made[name] = x.transpose(-3, -2) if case.layout == "transposed" else x
    call: Call = {"q": case.size * made["q"], "k": made["k"], "v": made["v"], "causal": case.causal}
    if case.layout == "fused":
        call["q"] = made["q"]
    if case.gate:
        call["gate"] = made["gate"]
    for name in ("preset", "activation", "scale", "normalizer", "bias_scale"):
        if getattr(case, name) is not None:
            call[name] = getattr(case, name)
    if case.by_row:
        call["scale"], call["normalizer"] = (random(*lead, n_q, dtype=torch.float32).abs() + 0.1 for _ in range(2))
    sequences = case.batch if case.lengths is None else len(case.lengths)
    longest = max(n_q, n_k)
    if case.bias != "none":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        call["bias"] = random(*((case.heads,) if case.bias == "heads" else ()), 2 * longest + 1, dtype=wide)
    if case.rope != "none":
        half = case.key_dim // 2 if case.rope == "interleaved" else max(1, case.key_dim // 4)
        angles = random(longest + 5, half, dtype=torch.float32)
        call["rope"], call["rope_interleaved"] = (angles.cos(), angles.sin()), case.rope == "interleaved"
        if case.rope == "half":
            call["rope_offset"] = torch.arange(sequences, device=device) % 3
    if case.padding != "none":
        row = torch.arange(n_k, device=device)
        short = 2 + torch.arange(case.batch, device=device)[:, None] * 3
        keep = {"left": row >= short, "right": row < n_k - short, "holes": (row + short) % 4 != 0}[case.padding]
        if case.padding == "holes" and case.batch > 1:
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
        call["cu_seqlens"] = torch.tensor(ends[0], dtype=torch.int32, device=device)
        if case.key_lengths is not None:
            call["cu_seqlens_k"] = torch.tensor(ends[1], dtype=torch.int32, device=device)
    return call


PLAIN = GauCase()
CASES = {
    "su": PLAIN,
    "causal": replace(PLAIN, causal=True),
    **{name: replace(PLAIN, activation=name, causal=name in ("silu", "laplace")) for name in ACTIVATIONS[1:]},
    **{
        f"c_{name}": replace(PLAIN, normalizer=name, padding="right")
        for name in ("valid", "length", "length_squared", "sum", "none")
    },
    "sum_causal": replace(PLAIN, normalizer="sum", activation="sigmoid", causal=True),
    "c_number": replace(PLAIN, normalizer=7.0),
    "by_row": replace(PLAIN, by_row=True),
    "flash": replace(PLAIN, preset="flash", bias="shared", causal=True, size=9.0),
    "mega": replace(PLAIN, preset="mega", bias="shared", padding="left", size=9.0),
    "mega_causal": replace(PLAIN, preset="mega", bias="shared", padding="left", causal=True, size=9.0),
    "a_valid": replace(PLAIN, scale="valid", bias_scale="visible", bias="shared", causal=True, padding="holes"),
    "rtmpose": replace(PLAIN, preset="rtmpose", bias="shared"),
    "hstu": replace(PLAIN, preset="hstu", causal=True, heads=2, kv_heads=2, key_dim=8, value_dim=8, normalizer=12.0),
    "bias_heads": replace(PLAIN, bias="heads", heads=2, kv_heads=2, causal=True, bias_scale=0.5),
    "no_gate": replace(PLAIN, gate=False),
    "rope": replace(PLAIN, rope="interleaved", causal=True),
    "rope_half": replace(PLAIN, rope="half", keys=12),
    "padding_left": replace(PLAIN, padding="left", causal=True),
    "padding_right": replace(PLAIN, padding="right"),
    "padding_holes": replace(PLAIN, padding="holes", causal=True),
    "lengths": replace(PLAIN, padding="right", by_lengths=True, causal=True),
    "lengths_cross": replace(PLAIN, queries=5, keys=13, padding="right", by_lengths=True, normalizer="sum"),
    "cross": replace(PLAIN, queries=5, keys=13, causal=True),
    "cross_longer": replace(PLAIN, queries=13, keys=5, causal=True),  # the first queries see nothing
    "cross_padding": replace(PLAIN, queries=5, keys=13, padding="holes", query_padding=True),
    "one_query": replace(PLAIN, queries=1, keys=17, causal=True, heads=2, kv_heads=2),
    "grouped": replace(PLAIN, heads=6, kv_heads=2, causal=True, bias="heads"),
    "packed": replace(PLAIN, lengths=(3, 0, 5, 1, 0), causal=True),
    "packed_surplus": replace(PLAIN, lengths=(5, 40), surplus=2, rope="half", bias="shared"),
    "packed_cross": replace(PLAIN, lengths=(3, 0, 4, 2), key_lengths=(5, 2, 0, 9), rope="half", causal=True),
    "packed_padding": replace(PLAIN, lengths=(4, 6), padding="left", normalizer="valid"),
    "transposed": replace(PLAIN, layout="transposed", heads=2, kv_heads=2),
    "fused": replace(PLAIN, layout="fused", causal=True),
    "everything": GauCase(
        batch=3,
        queries=20,
        keys=37,
        heads=4,
        kv_heads=2,
        causal=True,
        bias="heads",
        bias_scale=0.3,
        rope="half",
        padding="holes",
        query_padding=True,
        normalizer="sum",
    ),
    "everything_small": GauCase(
        batch=1,
        queries=4,
        keys=5,
        heads=2,
        kv_heads=1,
        key_dim=4,
        value_dim=3,
        causal=True,
        activation="laplace",
        bias="heads",
        rope="half",
        padding="left",
        normalizer="sum",
    ),
    "B0": replace(PLAIN, batch=0),
    "n0": replace(PLAIN, queries=0),
    "n1": replace(PLAIN, queries=1),
    "n17": replace(PLAIN, queries=17, causal=True),
    "n127": replace(PLAIN, batch=1, queries=127, causal=True),
    "n128": replace(PLAIN, batch=1, queries=128),
    "n129": replace(PLAIN, batch=1, queries=129, causal=True),
    # Heads too wide for scores on chip; and a cache so long that its keys are cut into segments.
    "s130": replace(PLAIN, key_dim=130, queries=130, keys=140, batch=1, causal=True),
    "s130_packed": replace(PLAIN, key_dim=130, lengths=(3, 0, 130), normalizer="sum"),
    "cache": replace(PLAIN, queries=3, keys=520, padding="left", bias="shared", normalizer="sum", causal=True),
    "s32": replace(PLAIN, key_dim=32, value_dim=64, queries=20),
    "s64": replace(PLAIN, key_dim=64, value_dim=512, queries=20, batch=1),
    "s128": replace(PLAIN, key_dim=128, value_dim=768, queries=20, batch=1),
    "e1536": replace(PLAIN, key_dim=128, value_dim=1536, queries=20, batch=1, causal=True),
    "e1537": replace(PLAIN, key_dim=128, value_dim=1537, queries=20, batch=1),
    "s1": replace(PLAIN, key_dim=1, value_dim=1),
}


def _set(**change: Any) -> Callable[[Call], Call]:
    return lambda call: call | change


def _map(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _packed(ends: Any, **more: Any) -> Callable[[Call], Call]:
    """The call's first sequence alone, packed."""
    ends = torch.tensor(ends, dtype=torch.int32) if isinstance(ends, list) else ends
    return lambda call: call | {n: call[n][0] for n in ("q", "k", "v", "gate")} | {"cu_seqlens": ends} | more


def _tables(length: int = 9, half: int = 8) -> tuple[Tensor, Tensor]:
    return torch.ones(length, half), torch.zeros(length, half)


BAD_CALLS = (
    BadCall("q_not_a_tensor", _set(q=[1.0]), TypeError, "q", "a tensor of dtype bfloat16, float16, float32 or float64"),
    BadCall("q_rank", _map("q", lambda q: q[0]), ValueError, "q", r"shape \[B, T, H, D\]"),
    BadCall("q_no_dim", _map("q", lambda q: q[..., :0]), ValueError, "q", "a head dimension above 0"),
    BadCall("k_dtype", _map("k", lambda k: k.half()), TypeError, "k", "the dtype of q, torch.float32"),
    BadCall("k_dim", _map("k", lambda k: k[..., :8]), ValueError, "k", r"the head dimension of q, \[2, 9, 1, 16\]"),
    BadCall("k_batch", _map("k", lambda k: k[:1]), ValueError, "k", "the batch and the head dimension of q"),
    BadCall("k_heads", _map("k", lambda k: k.repeat(1, 1, 2, 1)), ValueError, "k", "divides that of q, 1"),
    BadCall("v_length", _map("v", lambda v: v[:, :5]), ValueError, "v", r"the shape of k, \[2, 9, 1, 16\]"),
    BadCall("gate_shape", _map("gate", lambda g: g[..., :5]), ValueError, "gate", r"shape \[2, 9, 1, 24\]"),
    BadCall("device", _map("v", lambda v: v.to("meta")), ValueError, "v", "the device of q, cpu"),
    BadCall("preset", _set(preset="bert"), ValueError, "preset", "'su', 'bert4keras'"),
    BadCall("activation", _set(activation="gelu"), ValueError, "activation", "'relu2', 'relu', 'silu'"),
    BadCall("scale_name", _set(scale="sqrt"), ValueError, "scale", "'dim', 'length', 'valid', 'visible'"),
    BadCall("scale_type", _set(scale=[1.0]), TypeError, "scale", "a number, a tensor, or one of"),
    BadCall("scale_shape", _set(scale=torch.ones(9)), ValueError, "scale", r"shape \[2, 9\], a number to each query"),
    BadCall("scale_grad", _set(scale=torch.ones(2, 9, requires_grad=True)), ValueError, "scale", "one without"),
    BadCall("normalizer", _set(normalizer="rows"), ValueError, "normalizer", "'visible', 'valid', 'length'"),
    BadCall("normalizer_0", _set(normalizer=0), ValueError, "normalizer", "a number other than 0"),
    BadCall("bias_even", _set(bias=torch.ones(18)), ValueError, "bias", r"\[2·M − 1\]"),
    BadCall("bias_short", _set(bias=torch.ones(15)), ValueError, "bias", "M at least 9"),
    BadCall("bias_heads", _set(bias=torch.ones(2, 17)), ValueError, "bias", "as many heads as q, 1"),
    BadCall("bias_packed", _packed([0, 9], bias=torch.ones(15)), ValueError, "bias", "at least 17"),
    BadCall("rope_one", _set(rope=torch.ones(9, 8)), TypeError, "rope", "a pair of tables"),
    BadCall("rope_wide", _set(rope=_tables(half=9)), ValueError, "rope", "R at most 16"),
    BadCall("rope_offset_alone", _set(rope_offset=1), ValueError, "rope_offset", "0, as rope is None"),
    BadCall(
        "mask_dtype", _set(key_padding_mask=torch.ones(2, 9)), TypeError, "key_padding_mask", "a tensor of dtype bool"
    ),
    BadCall(
        "mask_shape",
        _set(query_padding_mask=torch.ones(2, 8, dtype=torch.bool)),
        ValueError,
        "query_padding_mask",
        r"shape \[2, 9\]",
    ),
    BadCall(
        "cu_seqlens_k_alone", _set(cu_seqlens_k=torch.zeros(2, dtype=torch.int32)), ValueError, "cu_seqlens_k", "None"
    ),
    BadCall("lengths_dtype", _set(lengths=torch.ones(2)), TypeError, "lengths", "dtype int32 or int64"),
    BadCall("lengths_shape", _set(lengths=torch.ones(3, dtype=torch.int32)), ValueError, "lengths", r"shape \[2\]"),
    BadCall(
        "lengths_packed", _packed([0, 9], lengths=torch.ones(1, dtype=torch.int32)), ValueError, "lengths", "None, as"
    ),
    BadCall(
        "lengths_and_mask",
        _set(lengths=torch.ones(2, dtype=torch.int32), key_padding_mask=torch.ones(2, 9, dtype=torch.bool)),
        ValueError,
        "lengths",
        "None, as cu_seqlens or key_padding_mask",
    ),
    BadCall("lengths_device", _set(lengths=torch.ones(2).int().to("meta")), ValueError, "lengths", "the device of"),
    BadCall("cu_seqlens_dtype", _packed(torch.zeros(2)), TypeError, "cu_seqlens", "dtype int32"),
    BadCall("cu_seqlens_large", _packed([0, 5, 10]), ValueError, "cu_seqlens", "the number of rows, 9"),
    BadCall("cu_seqlens_descending", _packed([0, 5, 3]), ValueError, "cu_seqlens", "ascending"),
    BadCall("cu_seqlens_softmax", _packed([0, 5, 10], preset="gau_alpha"), ValueError, "cu_seqlens", "of rows, 9"),
    BadCall("workspace", _set(workspace=-1), ValueError, "workspace", "bytes, 0 or more"),
    BadCall("backend", _set(backend="gpu"), ValueError, "backend", "'cuda', 'triton', 'cpu', 'torch', 'reference'"),
)


def flops(call: Call) -> int:
    """Of both matrix products."""
    return _products(call, 1, 1)


def backward_flops(call: Call) -> int:
    """Of five: scores and their gradients, and the sums that are the gradients of queries, keys and values."""
    return _products(call, 3, 2)


def _products(call: Call, of_queries: int, of_values: int) -> int:
    """Of so many as wide as queries and as values are; half of each if causal."""
    q, k, v = call["q"], call["k"], call["v"]
    pairs = math.prod(q.shape[:-3]) * q.shape[-3] * k.shape[-3]
    wide = of_queries * q.shape[-1] + of_values * v.shape[-1]
    return 2 * pairs * q.shape[-2] * wide // (2 if call["causal"] else 1)


def bytes_(call: Call) -> int:
    """q, k, v and the gate read once, o written once."""
    q, k, v = call["q"], call["k"], call["v"]
    wide = math.prod(q.shape[:-1]) * v.shape[-1]
    return (q.numel() + k.numel() + v.numel() + wide * (2 if "gate" in call else 1)) * q.itemsize


def beside_torch(call: Call) -> dict[str, int]:
    return {"scores of keys to come, made and masked": flops(call)} if call["causal"] else {}


def backward_beside_torch(call: Call) -> dict[str, int]:
    """Each product forward has two gradients, which are products as large."""
    twice = {why: 2 * count for why, count in beside_torch(call).items()}
    return twice | {"scores are kept, and not made again": -_products(call, 1, 0)}


def _seen(launch: Any) -> list[int]:
    """How many keys each block of queries sees."""
    rows, shift = launch.sizes.rows, launch.n_k - launch.n_q
    ends = (min(first + rows, launch.n_q) + shift for first in range(0, launch.n_q, rows))
    return [max(end, 0) if launch.p.causal else launch.n_k for end in ends]


def beside_triton(call: Call, problem: GauProblem) -> dict[str, int]:
    """Where scores are made on chip, once for each slice of the columns of values."""
    from . import _triton

    launch = _triton.Launch(problem)
    sizes = launch.sizes
    pairs = launch.batch * launch.heads * sum(sizes.rows * tiled(keys, sizes.short) for keys in _seen(launch))
    columns = triton.block(launch.e, sizes.columns)
    slices = -(-launch.e // columns)
    scores = 2 * pairs * triton.block(launch.s, _triton.MAX_ON_CHIP_DIM)
    again = (slices - 1) * scores
    rest = scores + 2 * pairs * slices * columns - flops(call)
    return {"scores are made again for each slice of columns": again, whole_tiles(problem.causal): rest}


def backward_beside_triton(call: Call, problem: GauProblem) -> dict[str, int]:
    """Scores and their gradients are made once, in panels."""
    from . import _triton

    launch = _triton.Launch(problem)
    sizes, shift, seen = launch.sizes, launch.n_k - launch.n_q, _seen(launch)
    made, by_queries = (sum(sizes.rows * tiled(keys, tile) for keys in seen) for tile in (sizes.keys, sizes.step))
    unseeing = (
        max(key - shift, 0) // sizes.short * sizes.short if problem.causal else 0  # queries before a block of keys
        for key in range(0, launch.n_k, sizes.keys)
    )
    by_keys = sum(sizes.keys * (tiled(launch.n_q, sizes.short) - first) for first in unseeing)
    s, e, grad_s, grad_e = (
        tiled(dim, triton.block(dim, most)) for most in (sizes.depth, sizes.columns) for dim in (launch.s, launch.e)
    )
    products = made * (s + e) + by_keys * (grad_s + grad_e) + by_queries * grad_s
    return {whole_tiles(problem.causal): 2 * launch.batch * launch.heads * products - backward_flops(call)}


def codegen() -> dict[str, Call]:
    """The sizes that the kernels are tuned for, with scores in a panel and on chip; and forms that add code."""
    wide = GauCase(batch=1, key_dim=128, value_dim=1536)
    forms = {
        "everything": replace(CASES["everything"], key_dim=128, value_dim=512, normalizer="sum", padding="right"),
        "packed": replace(CASES["packed_surplus"], key_dim=128, value_dim=512),
        "packed causal": replace(CASES["packed"], key_dim=128, value_dim=512, bias="none"),
    }
    calls = {f"form {name}": make(case, torch.bfloat16, torch.device("meta"), 0) for name, case in forms.items()}
    for name, dtype, queries in (
        ("bfloat16 panel", torch.bfloat16, 1024),
        ("bfloat16 on chip", torch.bfloat16, 512),
        ("float16 panel", torch.float16, 1024),
        ("float32 on chip", torch.float32, 512),
    ):
        case = replace(wide, queries=queries, causal="chip" in name)
        calls[name] = make(case, dtype, torch.device("meta"), 0)
    return calls


def metered() -> dict[str, Call]:
    case = GauCase(batch=1, queries=256, key_dim=128, value_dim=512)
    return {
        f"float16, n 256, s 128, e 512{name}": make(form, torch.float16, torch.device("cpu"), 0)
        for name, form in (("", case), (", causal", replace(case, causal=True)))
    }


def passes(backend: Any, problem: GauProblem) -> Iterator[str]:
    results = backend.run(problem)
    yield "forward"
    backend.run_backward(problem, results, results.o)
    yield "backward"


SPEC = OpSpec(
    name="gau_attention",
    function=gau_attention,
    reference=reference,
    backends=("cuda", "triton", "cpu", "reference"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cannot={
        ("triton", "cpu", torch.bfloat16): "truncates to bfloat16",
        ("cuda", "cpu", torch.float64): "those of tensor cores",
        ("cuda", "cuda", torch.float64): "those of tensor cores",
    },
    eager={"cuda": eager, "triton": eager, "torch": eager},  # products take operands of the tensors' dtype
    differentiable=("q", "k", "v", "gate", "bias"),
    cases=CASES,
    make=make,
    example="su",
    differentiated="everything_small",
    compiled=("su", "everything", "packed"),
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
        KernelPromise("cuda", "prepare|bias"),
        KernelPromise("cuda", "combine", shared=68 << 10),
        KernelPromise("cuda", "resident", tensor_core=True, async_copies=True, shared=225 << 10),
        KernelPromise(
            "cuda", "gau_fused.* float32", tensor_core=True, async_copies=True, shared=142 << 10, may_spill=True
        ),
        KernelPromise("cuda", "gau_fused_kernel float16", tensor_core=True, shared=142 << 10),  # converted on the way
        KernelPromise("cuda", "gau_fused_kernel bfloat16 256 1", tensor_core=True, async_copies=True, shared=178 << 10),
        KernelPromise("cuda", "gau_fused_kernel", tensor_core=True, async_copies=True, shared=140 << 10),
        KernelPromise(  # six registers
            "cuda", "scores_kernel float32", tensor_core=True, async_copies=True, shared=76 << 10, may_spill=True
        ),
        KernelPromise("cuda", "scores_kernel float16", tensor_core=True, shared=76 << 10),  # converted on the way
        KernelPromise("cuda", "bfloat16 128 1 1", tensor_core=True, async_copies=True, shared=131 << 10),  # by TMA
        KernelPromise("cuda", "bfloat16 256 1 1", tensor_core=True, async_copies=True, shared=195 << 10),
        KernelPromise("cuda", " 256 ", tensor_core=True, async_copies=True, shared=150 << 10),
        KernelPromise("cuda", tensor_core=True, async_copies=True, shared=100 << 10),
        KernelPromise("triton", " rows_kernel", wide=0.6),
        KernelPromise("triton", "gau_bias_kernel"),  # along diagonals
        KernelPromise("triton", "form", tensor_core=True, async_copies=True, may_spill=True),
        KernelPromise("triton", "bfloat16", wide=0.8, tensor_core=True, async_copies=True),
        KernelPromise("triton", wide=0.8, tensor_core=True, async_copies=True, may_spill=True),
    ),
    growth={"flops": {"queries": 2.0, "batch": 1.0}, "bytes": {"queries": 1.0, "batch": 1.0}},
)
