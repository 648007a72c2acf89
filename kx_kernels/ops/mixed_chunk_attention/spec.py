"""What mixed-chunk attention promises: its cases, the calls it refuses, its costs and how they grow."""

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
from ._problem import MixedProblem
from .api import mixed_chunk_attention
from .presets import ACTIVATIONS
from .reference import eager
from .reference import mixed_chunk_attention as reference


@dataclass(frozen=True)
class MixedCase:
    """Sizes and forms of one call."""

    batch: int = 2
    length: int = 19  # n, where `lengths` is None
    chunk: int = 8  # C
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
    lin_normalizer: float | str | None = None
    bias: str = "none"  # "none", "shared", "heads"
    bias_scale: float | str | None = None
    rope: str = "none"  # "none", "interleaved", "half" (with an offset by sequence)
    padding: str = "none"  # "none", "left", "right", "holes" (a sequence of nothing but padding among them)
    query_padding: bool = False  # rows of its own
    by_lengths: bool = False  # the padding on the right as `lengths`
    lengths: tuple[int, ...] | None = None  # of packed sequences
    surplus: int = 0  # packed rows before the first sequence and past the last
    by_row: bool = False  # scale and both normalizers as tensors
    layout: str = "plain"  # "plain", "transposed" ([B, H, T, D] memory), "fused" (all of one buffer)


def make(case: MixedCase, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    packed = case.lengths is not None
    ends = list(itertools.accumulate(case.lengths or (), initial=case.surplus))
    length = ends[-1] + case.surplus if packed else case.length
    lead = () if packed else (case.batch,)
    widths = dict.fromkeys(("quad_q", "quad_k", "lin_q", "lin_k"), case.key_dim)
    widths |= dict.fromkeys(("v", "gate"), case.value_dim)
    if case.layout == "fused":
        buffer = random(*lead, length, case.heads, sum(widths.values()))
        call: Call = dict(zip(widths, buffer.split(list(widths.values()), -1), strict=True))
    else:
        call = {}
        for name, width in widths.items():
            heads = case.heads if name in ("quad_q", "lin_q", "gate") else case.kv_heads
            order = (heads, length) if case.layout == "transposed" else (length, heads)
            x = random(*lead, *order, width)
            call[name] = x.transpose(-3, -2) if case.layout == "transposed" else x
    if not case.gate:
        del call["gate"]
    call |= {"chunk_size": case.chunk, "causal": case.causal}
    for name in ("preset", "activation", "scale", "normalizer", "lin_normalizer", "bias_scale"):
        if getattr(case, name) is not None:
            call[name] = getattr(case, name)
    if case.by_row:
        for name in ("scale", "normalizer", "lin_normalizer"):
            call[name] = random(*lead, length, dtype=torch.float32).abs() + 0.1
        call["scale"] *= case.key_dim**-0.5  # scores of order one: no row's errors drown the others'
    if case.bias != "none":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        call["bias"] = random(*((case.heads,) if case.bias == "heads" else ()), 2 * case.chunk + 3, dtype=wide)
    sequences = case.batch if case.lengths is None else len(case.lengths)
    if case.rope != "none":
        half = case.key_dim // 2 if case.rope == "interleaved" else max(1, case.key_dim // 4)
        angles = random(length + 5, half, dtype=torch.float32)
        call["rope"], call["rope_interleaved"] = (angles.cos(), angles.sin()), case.rope == "interleaved"
        if case.rope == "half":
            call["rope_offset"] = torch.arange(sequences, device=device) % 3
    if case.padding != "none":
        row = torch.arange(length, device=device)
        short = 2 + torch.arange(case.batch, device=device)[:, None] * 3
        keep = {"left": row >= short, "right": row < length - short, "holes": (row + short) % 4 != 0}[case.padding]
        if case.padding == "holes" and case.batch > 1:
            keep[-1] = False
        if case.by_lengths:
            call["lengths"] = keep.sum(1)
        else:
            call["key_padding_mask"] = keep[0] if packed else keep
    if case.query_padding:
        keep = torch.ones(*lead, length, dtype=torch.bool, device=device)
        keep[..., ::3] = False
        call["query_padding_mask"] = keep
    if packed:
        call["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return call


PLAIN = MixedCase()
CASES = {
    "su": PLAIN,
    "causal": replace(PLAIN, causal=True),
    "lucidrains": replace(PLAIN, preset="lucidrains", bias="shared", padding="right"),
    "lucidrains_causal": replace(PLAIN, preset="lucidrains", bias="shared", causal=True),
    **{name: replace(PLAIN, activation=name, causal=name in ("silu", "laplace")) for name in ACTIVATIONS[1:]},
    **{f"c_{name}": replace(PLAIN, normalizer=name, padding="right") for name in ("visible", "valid", "none")},
    "c_visible_causal": replace(PLAIN, normalizer="visible", causal=True, padding="holes"),
    "c_number": replace(PLAIN, normalizer=7.0, lin_normalizer=3.0),
    **{f"d_{name}": replace(PLAIN, lin_normalizer=name, padding="left") for name in ("length", "chunk", "none")},
    "by_row": replace(PLAIN, by_row=True, causal=True),
    "bias_heads": replace(PLAIN, bias="heads", heads=2, kv_heads=2, causal=True, bias_scale=0.5),
    "no_gate": replace(PLAIN, gate=False, causal=True),
    "rope": replace(PLAIN, rope="interleaved", causal=True),
    "rope_half": replace(PLAIN, rope="half"),
    "padding_left": replace(PLAIN, padding="left", causal=True),
    "padding_right": replace(PLAIN, padding="right", causal=True),
    "padding_holes": replace(PLAIN, padding="holes", causal=True),
    "lengths": replace(PLAIN, padding="right", by_lengths=True, causal=True),
    "query_padding": replace(PLAIN, padding="holes", query_padding=True),
    "grouped": replace(PLAIN, batch=1, heads=6, kv_heads=2, causal=True, bias="heads"),
    "grouped_full": replace(PLAIN, batch=1, heads=4, kv_heads=2),
    "packed": replace(PLAIN, lengths=(3, 0, 15, 1, 0), causal=True),
    "packed_full": replace(PLAIN, lengths=(13, 8), bias="shared", surplus=3),
    "packed_surplus": replace(PLAIN, lengths=(5, 40), surplus=2, rope="half", bias="shared", causal=True),
    "packed_padding": replace(PLAIN, lengths=(4, 26), padding="left", normalizer="valid", lin_normalizer="length"),
    "transposed": replace(PLAIN, layout="transposed", heads=2, kv_heads=2, causal=True),
    "fused": replace(PLAIN, layout="fused", causal=True),
    "everything": MixedCase(
        batch=3,
        length=19,
        heads=2,
        kv_heads=1,
        causal=True,
        bias="heads",
        bias_scale=0.3,
        rope="half",
        padding="holes",
        query_padding=True,
        normalizer="visible",
    ),
    "everything_small": MixedCase(
        batch=1,
        length=7,
        chunk=3,
        heads=2,
        kv_heads=1,
        key_dim=4,
        value_dim=3,
        causal=True,
        activation="laplace",
        bias="heads",
        rope="half",
        padding="left",
    ),
    "B0": replace(PLAIN, batch=0),
    "n0": replace(PLAIN, length=0),
    "n1": replace(PLAIN, length=1),
    "n8": replace(PLAIN, length=8, causal=True),
    "n9": replace(PLAIN, length=9, causal=True),
    "n16": replace(PLAIN, length=16),
    "n300": replace(PLAIN, batch=1, length=300, chunk=64, causal=True),
    "n300_full": replace(PLAIN, batch=1, length=300, chunk=100),
    "C1": replace(PLAIN, batch=1, length=9, chunk=1, causal=True),
    "C5": replace(PLAIN, chunk=5, causal=True),
    "C128": replace(PLAIN, batch=1, length=300, chunk=128, causal=True),
    "C256": replace(PLAIN, chunk=256),
    "s32": replace(PLAIN, key_dim=32, value_dim=64, causal=True),
    "s64": replace(PLAIN, length=9, key_dim=64, value_dim=512, batch=1),
    "e1536": replace(PLAIN, length=9, key_dim=128, value_dim=1536, batch=1, causal=True),
    "e1537": replace(PLAIN, length=9, key_dim=128, value_dim=1537, batch=1),
    "s1": replace(PLAIN, key_dim=1, value_dim=1),
}


def _set(**change: Any) -> Callable[[Call], Call]:
    return lambda call: call | change


def _map(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _packed(ends: Any, **more: Any) -> Callable[[Call], Call]:
    """The call's first sequence alone, packed."""
    ends = torch.tensor(ends, dtype=torch.int32) if isinstance(ends, list) else ends
    names = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate")
    return lambda call: call | {n: call[n][0] for n in names} | {"cu_seqlens": ends} | more


def _tables(length: int = 19, half: int = 8) -> tuple[Tensor, Tensor]:
    return torch.ones(length, half), torch.zeros(length, half)


BAD_CALLS = (
    BadCall("q_not_a_tensor", _set(quad_q=[1.0]), TypeError, "quad_q", "a tensor of dtype bfloat16, float16, float32"),
    BadCall("q_rank", _map("quad_q", lambda x: x[0]), ValueError, "quad_q", r"shape \[B, T, H, D\]"),
    BadCall("q_no_dim", _map("quad_q", lambda x: x[..., :0]), ValueError, "quad_q", "a head dimension above 0"),
    BadCall("k_dtype", _map("quad_k", lambda x: x.half()), TypeError, "quad_k", "the dtype of quad_q, torch.float32"),
    BadCall("k_dim", _map("quad_k", lambda x: x[..., :8]), ValueError, "quad_k", r"of quad_q, \[2, 19, 1, 16\]"),
    BadCall("k_length", _map("quad_k", lambda x: x[:, :5]), ValueError, "quad_k", r"of quad_q, \[2, 19, 1, 16\]"),
    BadCall("k_heads", _map("quad_k", lambda x: x.repeat(1, 1, 2, 1)), ValueError, "quad_k", "divides that of quad_q"),
    BadCall("lin_q", _map("lin_q", lambda x: x[..., :8]), ValueError, "lin_q", r"of quad_q, \[2, 19, 1, 16\]"),
    BadCall("lin_k", _map("lin_k", lambda x: x[:1]), ValueError, "lin_k", r"of quad_k, \[2, 19, 1, 16\]"),
    BadCall("v_length", _map("v", lambda x: x[:, :5]), ValueError, "v", r"the shape of quad_k, \[2, 19, 1, 16\]"),
    BadCall("gate_shape", _map("gate", lambda x: x[..., :5]), ValueError, "gate", r"shape \[2, 19, 1, 24\]"),
    BadCall("device", _map("v", lambda x: x.to("meta")), ValueError, "v", "the device of q, cpu"),
    BadCall("chunk_0", _set(chunk_size=0), ValueError, "chunk_size", "1 to "),
    BadCall("chunk_large", _set(chunk_size=2**31), ValueError, "chunk_size", "1 to "),
    BadCall("chunk_type", _set(chunk_size=8.0), TypeError, "chunk_size", "an int"),
    BadCall("preset", _set(preset="gau_alpha"), ValueError, "preset", "'su', 'lucidrains'"),
    BadCall("activation", _set(activation="softmax"), ValueError, "activation", "'relu2', 'relu', 'silu'"),
    BadCall("scale_name", _set(scale="length"), ValueError, "scale", "'dim', 'chunk'"),
    BadCall("scale_type", _set(scale=[1.0]), TypeError, "scale", "a number, a tensor, or one of"),
    BadCall("scale_shape", _set(scale=torch.ones(19)), ValueError, "scale", r"shape \[2, 19\], a number to each query"),
    BadCall("scale_grad", _set(scale=torch.ones(2, 19, requires_grad=True)), ValueError, "scale", "one without"),
    BadCall("normalizer", _set(normalizer="sum"), ValueError, "normalizer", "'visible', 'valid', 'chunk'"),
    BadCall("lin_normalizer", _set(lin_normalizer="valid"), ValueError, "lin_normalizer", "'visible', 'length'"),
    BadCall("lin_normalizer_0", _set(lin_normalizer=0), ValueError, "lin_normalizer", "a number other than 0"),
    BadCall("bias_even", _set(bias=torch.ones(18)), ValueError, "bias", r"\[2·M − 1\]"),
    BadCall("bias_short", _set(bias=torch.ones(13)), ValueError, "bias", "M at least 8"),
    BadCall("bias_heads", _set(bias=torch.ones(2, 17)), ValueError, "bias", "as many heads as quad_q, 1"),
    BadCall("bias_packed", _packed([0, 19], bias=torch.ones(13)), ValueError, "bias", "at least 15"),
    BadCall("rope_one", _set(rope=torch.ones(19, 8)), TypeError, "rope", "a pair of tables"),
    BadCall("rope_wide", _set(rope=_tables(half=9)), ValueError, "rope", "R at most 16"),
    BadCall("rope_offset_alone", _set(rope_offset=1), ValueError, "rope_offset", "0, as rope is None"),
    BadCall(
        "mask_dtype", _set(key_padding_mask=torch.ones(2, 19)), TypeError, "key_padding_mask", "a tensor of dtype bool"
    ),
    BadCall(
        "mask_shape",
        _set(query_padding_mask=torch.ones(2, 8, dtype=torch.bool)),
        ValueError,
        "query_padding_mask",
        r"shape \[2, 19\]",
    ),
    BadCall("lengths_dtype", _set(lengths=torch.ones(2)), TypeError, "lengths", "dtype int32 or int64"),
    BadCall("lengths_shape", _set(lengths=torch.ones(3, dtype=torch.int32)), ValueError, "lengths", r"shape \[2\]"),
    BadCall(
        "lengths_packed", _packed([0, 19], lengths=torch.ones(1, dtype=torch.int32)), ValueError, "lengths", "None, as"
    ),
    BadCall(
        "lengths_and_mask",
        _set(lengths=torch.ones(2, dtype=torch.int32), key_padding_mask=torch.ones(2, 19, dtype=torch.bool)),
        ValueError,
        "lengths",
        "None, as cu_seqlens or key_padding_mask",
    ),
    BadCall("lengths_device", _set(lengths=torch.ones(2).int().to("meta")), ValueError, "lengths", "the device of"),
    BadCall("cu_seqlens_dtype", _packed(torch.zeros(2)), TypeError, "cu_seqlens", "dtype int32"),
    BadCall("cu_seqlens_large", _packed([0, 5, 20]), ValueError, "cu_seqlens", "the number of rows, 19"),
    BadCall("cu_seqlens_descending", _packed([0, 5, 3]), ValueError, "cu_seqlens", "ascending"),
    BadCall("backend", _set(backend="gpu"), ValueError, "backend", "'cuda', 'triton', 'cpu', 'torch', 'reference'"),
)


def flops(call: Call) -> int:
    """Of both products within chunks, and of the sum of states and its product with queries."""
    return _seen_within(call, 1, 1) + _with_states(call, 1, 1)


def backward_flops(call: Call) -> int:
    """Within chunks of five, as gated attention has them. Of states once more and of their gradients; and of products
    with these for linear queries, linear keys and values.
    """
    return _seen_within(call, 3, 2) + _with_states(call, 2, 3)


def _within(call: Call, of_queries: int, of_values: int) -> int:
    """Of so many products within chunks, of all tokens with all, as wide as queries and as values are."""
    q, v = call["quad_q"], call["v"]
    pairs = math.prod(q.shape[:-1]) * min(call["chunk_size"], q.shape[-3])
    return 2 * pairs * (of_queries * q.shape[-1] + of_values * v.shape[-1])


def _seen_within(call: Call, of_queries: int, of_values: int) -> int:
    """Half of them if causal."""
    return _within(call, of_queries, of_values) // (2 if call["causal"] else 1)


def _with_states(call: Call, of_queries: int, of_keys: int) -> int:
    """Of so many products with a state to a token of each head of queries, and of keys."""
    q, k, v = call["quad_q"], call["quad_k"], call["v"]
    heads = of_queries * q.shape[-2] + of_keys * k.shape[-2]
    return 2 * math.prod(q.shape[:-2]) * heads * q.shape[-1] * v.shape[-1]


def bytes_(call: Call) -> int:
    """Every input read once, o written once."""
    q, k, v = call["quad_q"], call["quad_k"], call["v"]
    wide = math.prod(q.shape[:-1]) * v.shape[-1]
    return (2 * q.numel() + 2 * k.numel() + v.numel() + wide * (2 if "gate" in call else 1)) * q.itemsize


def beside_torch(call: Call) -> dict[str, int]:
    n = call["quad_q"].shape[-3]
    filled = tiled(n, min(call["chunk_size"], n)) - n
    return {
        "scores of keys to come, made and masked": _within(call, 1, 1) - _seen_within(call, 1, 1),
        "states are those of every query's head": _with_states(call, 1, -1),
        "the last chunk is filled up": filled * (_within(call, 1, 1) + _with_states(call, 2, 0)) // n,
    }


def backward_beside_torch(call: Call) -> dict[str, int]:
    """Each product forward has two gradients, which are products as large."""
    twice = {why: 2 * count for why, count in beside_torch(call).items()}
    kept = _seen_within(call, 1, 0) + _with_states(call, 0, 1)
    return twice | {"scores and states are kept, and not made again": -kept}


def _chunks(launch: Any) -> list[int]:
    """Tokens of each."""
    return [min(launch.chunk, launch.n - begin) for begin in range(0, launch.n, launch.chunk)]


def _seen(launch: Any) -> list[int]:
    """How many keys each block of queries sees."""
    rows, causal = launch.sizes.rows, launch.p.causal
    blocks = ((first, tokens) for tokens in _chunks(launch) for first in range(0, tokens, rows))
    return [min(first + rows, tokens) if causal else tokens for first, tokens in blocks]


def beside_triton(call: Call, problem: MixedProblem) -> dict[str, int]:
    """Of chunks that are segments."""
    from . import _triton

    launch = _triton.Launch(problem)
    sizes, columns, chunks, seen = launch.sizes, launch.e_slices * launch.columns, _chunks(launch), _seen(launch)
    rows, pairs = len(seen) * sizes.rows, sum(sizes.rows * tiled(keys, sizes.short) for keys in seen)
    taken = chunks[:-1] if problem.causal else chunks
    summed = sum(tiled(tokens, sizes.short) for tokens in taken)
    units = 2 * launch.batch
    local = pairs * launch.heads * (launch.e_slices * tiled(launch.s, triton.block(launch.s, 128)) + columns)
    through = rows * launch.heads * tiled(launch.s, triton.block(launch.s, sizes.least)) * columns
    sums = summed * launch.kv_heads * launch.s_slices * launch.dim * columns
    untaken = units * (launch.n - sum(taken)) * launch.kv_heads * launch.s * launch.e
    total = units * (local + sums + through * launch.has_states)
    return {
        "nothing takes the last chunk's state": -untaken,
        whole_tiles(problem.causal): total - flops(call) + untaken,
    }


def backward_beside_triton(call: Call, problem: MixedProblem) -> dict[str, int]:
    """Of chunks that are segments, whose scores and their gradients are made once, in panels."""
    from . import _triton

    launch = _triton.Launch(problem)
    sizes, chunks, seen = launch.sizes, _chunks(launch), _seen(launch)
    made, by_queries = (sum(sizes.rows * tiled(keys, tile) for keys in seen) for tile in (sizes.keys, sizes.step))
    blocks = [(key, tokens) for tokens in chunks for key in range(0, tokens, sizes.keys)]
    by_keys = sum(sizes.keys * tiled(tokens - key if problem.causal else tokens, sizes.least) for key, tokens in blocks)
    grad_s, grad_e = launch.s_slices * launch.dim, launch.e_slices * launch.columns
    s, e = (tiled(dim, triton.block(dim, sizes.depth)) for dim in (launch.s, launch.e))
    within = launch.heads * (made * (s + e) + by_keys * (grad_s + grad_e) + by_queries * grad_s)

    taken, giving = (chunks[:-1], chunks[1:]) if problem.causal else (chunks, chunks)  # of S, and of U
    of_s, of_u = (sum(tiled(tokens, sizes.short) for tokens in summed) for summed in (taken, giving))
    sums = (launch.kv_heads * of_s + launch.heads * of_u) * grad_s * grad_e
    narrow = tiled(launch.s, triton.block(launch.s, sizes.least))
    through = len(seen) * sizes.rows * launch.heads * e * grad_s
    through += len(blocks) * sizes.keys * launch.kv_heads * (narrow * grad_e + e * grad_s)

    units = 2 * launch.batch
    untaken = (launch.n - sum(taken)) * launch.kv_heads + (launch.n - sum(giving)) * launch.heads
    untaken *= units * launch.s * launch.e
    total = units * (within + (sums + through) * launch.has_states)
    return {
        "nothing takes the last chunk's state, and the first one's has no gradient": -untaken,
        whole_tiles(problem.causal): total - backward_flops(call) + untaken,
    }


def codegen() -> dict[str, Call]:
    """The sizes that the kernels are tuned for; and forms that add code, chunks shorter than a tile among them."""
    wide = MixedCase(batch=1, length=1024, chunk=256, key_dim=128, value_dim=1536, causal=True)
    form = replace(
        CASES["everything"], chunk=32, key_dim=128, value_dim=512, lengths=(100, 300), padding="right", by_row=True
    )
    return {
        name: make(case, torch.bfloat16, torch.device("meta"), 0)
        for name, case in {"bfloat16": wide, "form everything": form}.items()
    }


def metered() -> dict[str, Call]:
    case = MixedCase(batch=1, length=256, chunk=64, key_dim=64, value_dim=256)
    return {
        f"float16, n 256, C 64, s 64, e 256{name}": make(form, torch.float16, torch.device("cpu"), 0)
        for name, form in (("", case), (", causal", replace(case, causal=True)))
    }


def passes(backend: Any, problem: MixedProblem) -> Iterator[str]:
    results = backend.run(problem)
    yield "forward"
    backend.run_backward(problem, results, results.o)
    yield "backward"


SPEC = OpSpec(
    name="mixed_chunk_attention",
    function=mixed_chunk_attention,
    reference=reference,
    backends=("cuda", "triton", "cpu", "reference"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cannot={
        ("cuda", "cpu", torch.float64): "those of tensor cores",
        ("cuda", "cuda", torch.float64): "those of tensor cores",
        ("triton", "cpu", torch.bfloat16): "truncates to bfloat16",
    },
    eager={"cuda": eager, "triton": eager},  # tensor cores take operands of the tensors' dtype
    differentiable=("quad_q", "quad_k", "lin_q", "lin_k", "v", "gate", "bias"),
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
        KernelPromise("cuda", "prepare|chain|bias"),
        KernelPromise(  # up to six registers
            "cuda", "scores_kernel float32", tensor_core=True, async_copies=True, shared=76 << 10, may_spill=True
        ),
        KernelPromise("cuda", "scores_kernel float16", tensor_core=True, shared=76 << 10),  # converted on the way
        KernelPromise("cuda", "states_kernel float16", tensor_core=True, shared=76 << 10),
        KernelPromise("cuda", " 256 ", tensor_core=True, async_copies=True, shared=150 << 10),
        KernelPromise("cuda", tensor_core=True, async_copies=True, shared=100 << 10),
        KernelPromise("triton", " rows_kernel|mixed_chain_kernel", wide=0.6),
        KernelPromise("triton", "mixed_bias_kernel"),  # along diagonals
        KernelPromise("triton", "form", tensor_core=True, async_copies=True, may_spill=True),
        KernelPromise("triton", wide=0.8, tensor_core=True, async_copies=True),
    ),
    growth={"flops": {"length": 1.0, "batch": 1.0}, "bytes": {"length": 1.0, "batch": 1.0}},
)
