"""What rope promises: its cases, the calls it refuses, its costs and how they grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._core.spec import BadCall, Call, KernelPromise, OpSpec, no_products
from ._problem import RopeProblem
from .api import rope
from .reference import rope as reference
from .tables import rope_tables


@dataclass(frozen=True)
class RopeCase:
    """Sizes and forms of one call."""

    batch: int = 2
    length: int = 7  # T, where `lengths` is None
    heads: int = 3
    kv_heads: int | None = 2  # None: q alone
    head_dim: int = 16
    rotary_dim: int = 16
    start: int = 0
    interleaved: bool = True
    inverse: bool = False
    positions: str = "none"  # "none", "int", "sequence", "token", "padded" (per sequence, negative), "shared" ([1, T])
    index_dtype: torch.dtype = torch.int64
    lengths: tuple[int, ...] | None = None  # of packed sequences
    surplus: int = 0  # packed rows past the last sequence
    layout: str = "plain"  # "plain", "transposed" ([B, H, T, D] memory), "packed" (q and k slices of one tensor)
    table_dtype: torch.dtype = torch.float32
    table_batch: bool = False
    table_layout: str = "half"  # "half", "pairs" (views of [P, R/2, 2]), "full" (views of a full-width table)


def make(case: RopeCase, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    packed = case.lengths is not None
    batch = len(case.lengths) if case.lengths is not None else case.batch
    longest = max(case.lengths, default=0) if case.lengths is not None else case.length
    rows = (sum(case.lengths) + case.surplus,) if case.lengths is not None else (case.batch, case.length)
    kv_heads = case.kv_heads or 0
    if case.layout == "packed":
        both = random(*rows, case.heads + 2 * kv_heads, case.head_dim)
        q, k = both[..., : case.heads, :], both[..., case.heads : case.heads + kv_heads, :]
    elif case.layout == "transposed":
        q, k = (random(*rows[:-1], h, rows[-1], case.head_dim).transpose(-2, -3) for h in (case.heads, kv_heads))
    else:
        q, k = (random(*rows, h, case.head_dim) for h in (case.heads, kv_heads))

    call: Call = {"q": q, "k": None if case.kv_heads is None else k}
    call |= {"start": case.start, "interleaved": case.interleaved, "inverse": case.inverse}
    reach = 0
    if case.positions == "int":
        call["offset"] = reach = 5
    elif case.positions in ("sequence", "padded"):
        low, high = (0, 9) if case.positions == "sequence" else (-longest - 1, 1)
        offset = torch.randint(low, high, (batch,), generator=generator)
        call["offset"] = offset.to(device=device, dtype=case.index_dtype)
        reach = high
    elif case.positions in ("token", "shared"):
        shape = (1, case.length) if case.positions == "shared" else rows
        positions = torch.randint(-2, longest + 9, shape, generator=generator)
        call["positions"] = positions.to(device=device, dtype=case.index_dtype)
        reach = 9
    if packed:
        ends = torch.tensor([0, *case.lengths]).cumsum(0)  # type: ignore[misc]
        call["cu_seqlens"] = ends.to(device=device, dtype=torch.int32)

    length, half = longest + reach, case.rotary_dim // 2
    cos, sin = rope_tables(length, case.rotary_dim, dtype=case.table_dtype, device=device)
    if case.table_batch:  # a table of its own for every sequence: positions stretched
        stretch = torch.arange(1, batch + 1, dtype=torch.float64, device=device)[:, None, None]
        position = torch.arange(length, dtype=torch.float64, device=device)[:, None]
        phase = stretch * position * 0.9 ** torch.arange(half, device=device)  # [B, P, R/2]
        cos, sin = phase.cos().to(case.table_dtype), phase.sin().to(case.table_dtype)
    if case.table_layout == "pairs":
        cos, sin = torch.stack((cos, sin), -1).unbind(-1)
    elif case.table_layout == "full":
        cos, sin = (torch.cat((t, t), -1)[..., :half] for t in (cos, sin))
    return call | {"cos": cos, "sin": sin}


PLAIN = RopeCase()
HALF = RopeCase(interleaved=False)
PACKED = RopeCase(lengths=(3, 0, 5, 1, 0))
CASES = {
    "interleaved": PLAIN,
    "half": HALF,
    "q_alone": replace(PLAIN, kv_heads=None),
    "T0": replace(PLAIN, length=0),
    "T1": replace(PLAIN, length=1),
    "T127": replace(HALF, batch=1, length=127, heads=1, kv_heads=1),
    "T128": replace(PLAIN, batch=1, length=128, heads=1, kv_heads=1),
    "T129": replace(HALF, batch=1, length=129, heads=1, kv_heads=1),
    "B0": replace(PLAIN, batch=0),
    "H1": replace(HALF, heads=1, kv_heads=1, length=5),
    "H73": replace(HALF, heads=73, kv_heads=5, length=2, batch=1),
    "D64": replace(HALF, head_dim=64, rotary_dim=64),
    "D80": replace(HALF, head_dim=80, rotary_dim=80),
    "D92": replace(HALF, head_dim=92, rotary_dim=92, length=3),
    "D128": replace(PLAIN, head_dim=128, rotary_dim=128),
    "D512": replace(HALF, head_dim=512, rotary_dim=512, length=3),
    "R0": replace(PLAIN, rotary_dim=0),
    "R2": replace(HALF, rotary_dim=2),
    "R6_of_17_from_3": replace(HALF, head_dim=17, rotary_dim=6, start=3),
    "R6_of_17_from_3_interleaved": replace(PLAIN, head_dim=17, rotary_dim=6, start=3),
    "R32_of_64_from_32": replace(HALF, head_dim=64, rotary_dim=32, start=32),
    "R20_of_64": replace(PLAIN, head_dim=64, rotary_dim=20),
    "inverse": replace(PLAIN, inverse=True),
    "inverse_half": replace(HALF, inverse=True),
    "offset_int": replace(HALF, positions="int"),
    "offset_per_sequence": replace(PLAIN, positions="sequence", index_dtype=torch.int32),
    "left_padding": replace(PLAIN, positions="padded"),
    "positions": replace(HALF, positions="token"),
    "positions_int32": replace(PLAIN, positions="token", index_dtype=torch.int32),
    "positions_shared": replace(HALF, positions="shared"),
    "transposed": replace(HALF, layout="transposed"),
    "transposed_interleaved": replace(PLAIN, layout="transposed"),
    "packed_qkv": replace(HALF, layout="packed"),
    "packed_qkv_interleaved": replace(PLAIN, layout="packed", positions="int"),
    "cu_seqlens": PACKED,
    "cu_seqlens_half_offsets": replace(PACKED, interleaved=False, positions="sequence"),
    "cu_seqlens_offset": replace(PACKED, positions="int"),
    "cu_seqlens_positions": replace(PACKED, positions="token"),
    "cu_seqlens_surplus": replace(PACKED, surplus=3, layout="packed"),
    "cu_seqlens_tables": replace(PACKED, table_batch=True, positions="token"),
    "cu_seqlens_no_rows": replace(PACKED, lengths=(0, 0)),
    "cu_seqlens_no_sequences": replace(PACKED, lengths=(), surplus=2, positions="int"),
    "table_bf16": replace(HALF, table_dtype=torch.bfloat16),
    "table_f16": replace(PLAIN, table_dtype=torch.float16),
    "table_f64": replace(PLAIN, table_dtype=torch.float64),
    "table_batch": replace(HALF, table_batch=True),
    "table_pairs": replace(PLAIN, table_layout="pairs"),
    "table_full": replace(HALF, table_layout="full", table_dtype=torch.bfloat16),
}


def _set(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: call | changes


def _map(name: str, change: Callable[[Any], Any]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _leaf(call: Call) -> Call:
    return call | {"q": call["q"].detach().requires_grad_(), "inplace": True}


BAD_CALLS = (
    BadCall("q_not_a_tensor", _set(q=[1.0]), TypeError, "q", "a tensor"),
    BadCall("q_integer", _map("q", lambda q: q.long()), TypeError, "q", "dtype bfloat16, float16, float32 or float64"),
    BadCall("q_rank", _map("q", lambda q: q[0]), ValueError, "q", r"shape \[B, T, H, D\]"),
    BadCall(
        "q_rank_packed", _set(cu_seqlens=torch.zeros(1, dtype=torch.int32)), ValueError, "q", "as cu_seqlens is given"
    ),
    BadCall("k_dtype", _map("k", lambda k: k.half()), TypeError, "k", "the dtype of q, torch.float32"),
    BadCall("k_device", _map("k", lambda k: k.to("meta")), ValueError, "k", "the device of q"),
    BadCall("k_length", _map("k", lambda k: k[:, 1:]), ValueError, "k", r"the shape of q, \[2, 7, 3, 16\], but for"),
    BadCall("k_head_dim", _map("k", lambda k: k[..., :8]), ValueError, "k", "but for the number of heads"),
    BadCall("cos_not_a_tensor", _set(cos=None), TypeError, "cos", "a tensor"),
    BadCall("cos_integer", _map("cos", lambda c: c.int()), TypeError, "cos", "dtype bfloat16"),
    BadCall("cos_device", _map("cos", lambda c: c.to("meta")), ValueError, "cos", "the device of q"),
    BadCall(
        "cos_rank", _map("cos", lambda c: c[0]), ValueError, "cos", r"shape \[P, R/2\] or \[B, P, R/2\] with B = 2"
    ),
    BadCall("cos_batch", _map("cos", lambda c: c.expand(3, -1, -1)), ValueError, "cos", "with B = 2"),
    BadCall(
        "cos_requires_grad", _map("cos", lambda c: c.clone().requires_grad_()), ValueError, "cos", "no gradient to its"
    ),
    BadCall(
        "cos_too_short", lambda c: c | {"cos": c["cos"][:6], "sin": c["sin"][:6]}, ValueError, "cos", "P = 6; T = 7"
    ),
    BadCall(
        "cos_wider_than_head",
        lambda c: c | {"q": c["q"][..., :8], "k": None},
        ValueError,
        "cos",
        "head dimension D = 8",
    ),
    BadCall("sin_shape", _map("sin", lambda s: s[1:]), ValueError, "sin", "the shape of cos"),
    BadCall("sin_dtype", _map("sin", lambda s: s.double()), TypeError, "sin", "the dtype of cos"),
    BadCall("rotary_dim_odd", _set(rotary_dim=15), ValueError, "rotary_dim", "an even number"),
    BadCall("rotary_dim_large", _set(rotary_dim=18), ValueError, "rotary_dim", "at most the head dimension D = 16"),
    BadCall("rotary_dim_type", _set(rotary_dim=16.0), TypeError, "rotary_dim", "an int"),
    BadCall("tables_too_wide", _set(rotary_dim=8), ValueError, "cos", r"width R/2 = 4, half of rotary_dim = 8"),
    BadCall("start_negative", _set(start=-2), ValueError, "start", "0 or more"),
    BadCall("start_large", _set(start=2), ValueError, "start", "start \\+ R at most the head dimension D = 16"),
    BadCall("start_type", _set(start=0.0), TypeError, "start", "an int"),
    BadCall("offset_past_table", _set(offset=1), ValueError, "offset", "P = 7; T = 7"),
    BadCall("offset_type", _set(offset=0.5), TypeError, "offset", "an int"),
    BadCall("offset_dtype", _set(offset=torch.zeros(2)), TypeError, "offset", "dtype int32 or int64"),
    BadCall(
        "offset_shape", _set(offset=torch.zeros(3, dtype=torch.long)), ValueError, "offset", r"shape \[B\] = \[2\]"
    ),
    BadCall(
        "offsets_past_table",
        _set(offset=torch.tensor([0, 1])),
        ValueError,
        "offset",
        "every position to be in the tables",
    ),
    BadCall("positions_type", _set(positions=3), TypeError, "positions", "a tensor of dtype int32 or int64"),
    BadCall("positions_dtype", _set(positions=torch.zeros(2, 7)), TypeError, "positions", "dtype int32 or int64"),
    BadCall(
        "positions_shape",
        _set(positions=torch.zeros(7, dtype=torch.long)),
        ValueError,
        "positions",
        r"\[B, T\] = \[2, 7\]",
    ),
    BadCall("positions_past_table", _set(positions=torch.full((2, 7), 7)), ValueError, "positions", "positions 0 to 6"),
    BadCall(
        "positions_and_offset",
        _set(positions=torch.zeros(2, 7, dtype=torch.long), offset=1),
        ValueError,
        "offset",
        "0, as positions",
    ),
    BadCall("backend", _set(backend="gpu"), ValueError, "backend", "'cuda', 'triton', 'cpu', 'torch', 'reference'"),
    BadCall("inplace_leaf", _leaf, ValueError, "q", "not a leaf"),
    BadCall(
        "inplace_expanded",
        lambda c: c | {"q": c["q"][:, :1].expand(-1, 7, -1, -1), "inplace": True},
        ValueError,
        "q",
        "elements that do not overlap",
    ),
    BadCall("inplace_q_is_k", lambda c: c | {"k": c["q"], "inplace": True}, ValueError, "k", "memory of its own"),
)


def flops(call: Call) -> int:
    """Four products and two sums for each rotated pair."""
    pairs = call["cos"].shape[-1]
    return sum(6 * pairs * math.prod(x.shape[:-1]) for x in (call["q"], call["k"]) if x is not None)


def bytes_(call: Call) -> int:
    """Each value read and written once, and each token's row of the tables read once."""
    q, k, cos = call["q"], call["k"], call["cos"]
    rows = math.prod(q.shape[:-2])
    values = q.numel() + (0 if k is None else k.numel())
    return 2 * values * q.itemsize + 2 * rows * cos.shape[-1] * cos.itemsize


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def codegen() -> dict[str, Call]:
    """q and k of a large model in every dtype and pairing, and the forms that add code: partial, packed, transposed."""
    large = RopeCase(heads=32, kv_heads=8, head_dim=128, rotary_dim=128, batch=1, length=64)
    forms = {
        "": large,
        " partial": replace(large, rotary_dim=64, start=64),
        " packed": replace(large, lengths=(24, 40), positions="sequence"),
        " transposed": replace(large, layout="transposed", positions="token"),
    }
    calls = {}
    for interleaved, pairing in ((True, "interleaved"), (False, "half")):
        for form, case in forms.items():
            for dtype in (torch.bfloat16,) if form in (" packed", " transposed") else DTYPES:
                call = make(replace(case, interleaved=interleaved), dtype, torch.device("meta"), 0)
                calls[f"{str(dtype).removeprefix('torch.')} {pairing}{form}"] = call
    return calls


def metered() -> dict[str, Call]:
    case = RopeCase(batch=1, length=16, heads=12, kv_heads=12, head_dim=64, rotary_dim=64)
    return {"float32, T 16, 12 heads of 64": make(case, torch.float32, torch.device("cpu"), 0)}


def passes(backend: Any, problem: RopeProblem) -> Iterator[str]:
    """A gradient takes the same pass, the other way round."""
    backend.run(problem, False)
    yield "forward"


SPEC = OpSpec(
    name="rope",
    function=rope,
    reference=reference,
    backends=("cuda", "triton", "cpu", "reference"),
    dtypes=DTYPES,
    cannot={("triton", "cpu", torch.bfloat16): "truncates to bfloat16"},
    eager={},
    differentiable=("q", "k"),
    cases=CASES,
    make=make,
    example="interleaved",
    differentiated="interleaved",
    compiled=("interleaved", "half", "positions", "cu_seqlens"),
    bad_calls=BAD_CALLS,
    bytes=bytes_,
    work=no_products(flops),
    codegen=codegen,
    metered=metered,
    passes=passes,
    promises=(
        # Positions are scalars. A CUDA kernel has code for tables of four dtypes, in vectors and in scalars, of which a
        # call runs one.
        KernelPromise("triton", "packed|transposed", max_registers=96, wide=0.5, blocks=5),
        KernelPromise("triton", max_registers=96, wide=0.9, blocks=5),
        KernelPromise("cuda", r"rope_kernel (float32 4|bfloat16 8|float16 8|float64 2) ", 96, wide=0.2, blocks=5),
        KernelPromise("cuda", max_registers=96, blocks=5),
    ),
    growth={"flops": {"length": 1.0, "batch": 1.0}, "bytes": {"length": 1.0, "batch": 1.0}},
)
