"""What a gated attention's inputs promise: cases, the calls that are refused, costs and how they grow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._core.spec import BadCall, Call, KernelPromise, OpSpec, no_products
from ._problem import GauInputsProblem
from .api import gau_inputs
from .reference import gau_inputs as reference


@dataclass(frozen=True)
class GauInputsCase:
    """Sizes and forms of one call."""

    batch: int = 2
    length: int = 7  # T, where `lengths` is None
    gate_dim: int = 24  # e; 0: no gate
    value_dim: int = 24  # e'
    key_dim: int = 16  # s
    heads: int = 2  # M
    beta: bool = True
    wide_affine: bool = False  # gamma and beta in float32 at least
    activation: str | None = None
    rotary_dim: int = 0
    interleaved: bool = True
    offset: str = "none"  # "none", "int", "sequence" (int32), "padded" (negative for some)
    table_dtype: torch.dtype = torch.float32
    padding: str = "none"  # "none", "left", "right", "holes"
    by_lengths: bool = False  # the padding on the right as `lengths`
    lengths: tuple[int, ...] | None = None  # of packed sequences
    surplus: int = 0  # packed rows before the first sequence and past the last
    layout: str = "plain"  # "plain", "fused" (u, v and z of one buffer), "transposed" ([B, D, T] memory)


def make(case: GauInputsCase, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    packed = case.lengths is not None
    ends = list(itertools.accumulate(case.lengths or (), initial=case.surplus))
    rows = (ends[-1] + case.surplus,) if packed else (case.batch, case.length)
    widths = (case.gate_dim, case.value_dim, case.key_dim)
    if case.layout == "fused":
        u, v, z = (2 * random(*rows, sum(widths))).split(widths, -1)
    elif case.layout == "transposed":
        u, v, z = (2 * random(*rows[:-1], width, rows[-1]).mT for width in widths)
    else:
        u, v, z = (2 * random(*rows, width) for width in widths)
    affine = torch.promote_types(dtype, torch.float32) if case.wide_affine else dtype
    call: Call = {"u": u if case.gate_dim else None, "v": v, "z": z}
    call["gamma"] = random(case.heads, case.key_dim, dtype=affine)
    if case.beta:
        call["beta"] = random(case.heads, case.key_dim, dtype=affine)
    if case.activation is not None:
        call["activation"] = case.activation
    sequences = len(case.lengths) if case.lengths is not None else case.batch
    if case.rotary_dim:
        angles = 3 * random(rows[-1] + 5, case.rotary_dim // 2, dtype=torch.float64)
        call["rope"] = (angles.cos().to(case.table_dtype), angles.sin().to(case.table_dtype))
        call["rope_interleaved"] = case.interleaved
    if case.offset == "int":
        call["rope_offset"] = 5
    elif case.offset != "none":
        low, kind = (0, torch.int32) if case.offset == "sequence" else (-4, torch.int64)
        call["rope_offset"] = low + torch.arange(sequences, dtype=kind, device=device) % 6
    if case.padding != "none":
        row = torch.arange(rows[-1], device=device)
        short = 2 + torch.arange(case.batch, device=device)[:, None] * 3
        keep = {"left": row >= short, "right": row < rows[-1] - short, "holes": (row + short) % 4 != 0}[case.padding]
        if case.by_lengths:
            call["lengths"] = keep.sum(1)
        else:
            call["key_padding_mask"] = keep[0] if packed else keep
    if packed:
        call["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    return call


PLAIN = GauInputsCase()
ROPE = GauInputsCase(rotary_dim=16)
PACKED = replace(ROPE, lengths=(3, 0, 5, 1, 0))
CASES = {
    "plain": PLAIN,
    "rope": ROPE,
    "rope_half": replace(ROPE, interleaved=False),
    "rope_partial": replace(ROPE, rotary_dim=6, interleaved=False, offset="int"),
    "rope_partial_interleaved": replace(ROPE, rotary_dim=10, key_dim=17),
    "rope_offsets": replace(ROPE, offset="sequence"),
    "rope_padded": replace(ROPE, offset="padded", interleaved=False),
    "rope_bf16": replace(ROPE, table_dtype=torch.bfloat16),
    "rope_f64": replace(ROPE, table_dtype=torch.float64, interleaved=False),
    "relu": replace(ROPE, activation="relu"),
    "identity": replace(PLAIN, activation="identity"),
    "swish": replace(PLAIN, activation="swish"),
    "no_beta": replace(ROPE, beta=False),
    "no_gate": replace(ROPE, gate_dim=0),
    "wide_affine": replace(ROPE, wide_affine=True),
    "flash": replace(ROPE, heads=4, rotary_dim=8, wide_affine=True),
    "one_head": replace(ROPE, heads=1, beta=False, gate_dim=0),
    "widths": replace(PLAIN, gate_dim=5, value_dim=33, key_dim=7),
    "padding_left": replace(ROPE, padding="left", offset="padded"),
    "padding_holes": replace(ROPE, padding="holes", length=9),
    "lengths": replace(ROPE, padding="right", by_lengths=True),
    "packed": PACKED,
    "packed_surplus": replace(PACKED, surplus=2, offset="sequence", interleaved=False),
    "packed_padding": replace(PACKED, padding="holes", surplus=1, rotary_dim=0),
    "packed_no_rows": replace(PACKED, lengths=(0, 0)),
    "packed_no_sequences": replace(PACKED, lengths=(), surplus=1),
    "fused": replace(ROPE, layout="fused"),
    "fused_odd": replace(ROPE, layout="fused", gate_dim=25, value_dim=25, key_dim=18, rotary_dim=18, interleaved=False),
    "transposed": replace(ROPE, layout="transposed"),
    "everything": GauInputsCase(
        batch=3,
        length=20,
        gate_dim=40,
        value_dim=35,
        key_dim=20,
        heads=4,
        wide_affine=True,
        rotary_dim=10,
        interleaved=False,
        offset="padded",
        padding="holes",
        layout="fused",
    ),
    "everything_small": GauInputsCase(
        batch=1, length=4, gate_dim=3, value_dim=2, key_dim=5, rotary_dim=4, offset="sequence", padding="left"
    ),
    "B0": replace(ROPE, batch=0),
    "T0": replace(ROPE, length=0),
    "T1": replace(ROPE, length=1),
    "T127": replace(ROPE, batch=1, length=127),
    "T128": replace(ROPE, batch=1, length=128, interleaved=False),
    "T129": replace(ROPE, length=129, batch=1),
    "e1536": replace(ROPE, gate_dim=1536, value_dim=1536, key_dim=128, rotary_dim=128, length=3, layout="fused"),
    "e1537": replace(ROPE, gate_dim=1537, value_dim=300, key_dim=130, rotary_dim=64, length=3),
    "e1": replace(PLAIN, gate_dim=1, value_dim=1, key_dim=1),
}


def _set(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: call | changes


def _map(name: str, change: Callable[[Any], Any]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _packed(ends: Any, **more: Any) -> Callable[[Call], Call]:
    """The call's first sequence alone, packed."""
    ends = torch.tensor(ends, dtype=torch.int32) if isinstance(ends, list) else ends
    return lambda call: call | {n: call[n][0] for n in ("u", "v", "z")} | {"cu_seqlens": ends} | more


def _tables(length: int = 7, half: int = 8) -> tuple[Tensor, Tensor]:
    return torch.ones(length, half), torch.zeros(length, half)


BAD_CALLS = (
    BadCall("z_not_a_tensor", _set(z=[1.0]), TypeError, "z", "a tensor of dtype bfloat16, float16, float32 or float64"),
    BadCall("z_rank", _map("z", lambda z: z[0]), ValueError, "z", r"shape \[B, T, s\]"),
    BadCall("z_empty", _map("z", lambda z: z[..., :0]), ValueError, "z", "s above 0"),
    BadCall("z_packed", _set(cu_seqlens=torch.zeros(1, dtype=torch.int32)), ValueError, "z", "as cu_seqlens is given"),
    BadCall("v_integer", _map("v", lambda v: v.long()), TypeError, "v", "dtype bfloat16, float16, float32 or float64"),
    BadCall("v_dtype", _map("v", lambda v: v.half()), TypeError, "v", "the dtype of z, torch.float32"),
    BadCall("v_length", _map("v", lambda v: v[:, 1:]), ValueError, "v", r"the shape of z, \[2, 7, 16\], but for the"),
    BadCall("v_none", _set(v=None), TypeError, "v", "a tensor"),
    BadCall("u_batch", _map("u", lambda u: u[:1]), ValueError, "u", "the shape of z"),
    BadCall("u_device", _map("u", lambda u: u.to("meta")), ValueError, "u", "the device of z, cpu"),
    BadCall("gamma_dtype", _map("gamma", lambda g: g.double()), TypeError, "gamma", "a tensor of dtype float32"),
    BadCall("gamma_rank", _map("gamma", lambda g: g[0]), ValueError, "gamma", r"shape \[M, s\] with M above 0"),
    BadCall("gamma_none", _map("gamma", lambda g: g[:0]), ValueError, "gamma", r"M above 0 and s = 16"),
    BadCall("gamma_width", _map("gamma", lambda g: g[:, 1:]), ValueError, "gamma", "s = 16"),
    BadCall("beta_shape", _map("beta", lambda b: b[1:]), ValueError, "beta", r"the shape of gamma, \[2, 16\]"),
    BadCall("beta_dtype", _map("beta", lambda b: b.half()), TypeError, "beta", "a tensor of dtype float32"),
    BadCall("activation", _set(activation="gelu"), ValueError, "activation", "'silu', 'relu', 'identity', 'swish'"),
    BadCall("rope_one", _set(rope=torch.ones(7, 8)), TypeError, "rope", "a pair of tables"),
    BadCall("rope_shapes", _set(rope=(torch.ones(7, 8), torch.ones(7, 7))), ValueError, "rope", "tables of one shape"),
    BadCall("rope_wide", _set(rope=_tables(half=9)), ValueError, "rope", "R at most the width of z, 16"),
    BadCall("rope_short", _set(rope=_tables(length=6)), ValueError, "rope", "P = 6; T = 7"),
    BadCall(
        "rope_grad", _set(rope=(torch.ones(7, 8).requires_grad_(), torch.ones(7, 8))), ValueError, "rope", "one without"
    ),
    BadCall("offset_alone", _set(rope=None, rope_offset=1), ValueError, "rope_offset", "0, as rope is None"),
    BadCall("offset_large", _set(rope=_tables(), rope_offset=1), ValueError, "rope_offset", "P = 7; T = 7"),
    BadCall("offset_type", _set(rope=_tables(), rope_offset=0.5), TypeError, "rope_offset", "an int"),
    BadCall(
        "offset_shape",
        _set(rope=_tables(), rope_offset=torch.zeros(3, dtype=torch.long)),
        ValueError,
        "rope_offset",
        r"an int, or shape \[N\] = \[2\]",
    ),
    BadCall(
        "offsets_large", _set(rope=_tables(), rope_offset=torch.tensor([0, 1])), ValueError, "rope", "up to position 7"
    ),
    BadCall("mask_dtype", _set(key_padding_mask=torch.ones(2, 7)), TypeError, "key_padding_mask", "dtype bool"),
    BadCall(
        "mask_shape",
        _set(key_padding_mask=torch.ones(7, dtype=torch.bool)),
        ValueError,
        "key_padding_mask",
        r"shape \[2, 7\]",
    ),
    BadCall("lengths_dtype", _set(lengths=torch.ones(2)), TypeError, "lengths", "dtype int32 or int64"),
    BadCall("lengths_shape", _set(lengths=torch.ones(3, dtype=torch.int32)), ValueError, "lengths", r"shape \[2\]"),
    BadCall(
        "lengths_packed", _packed([0, 7], lengths=torch.ones(1, dtype=torch.int32)), ValueError, "lengths", "None, as"
    ),
    BadCall(
        "lengths_and_mask",
        _set(lengths=torch.ones(2, dtype=torch.int32), key_padding_mask=torch.ones(2, 7, dtype=torch.bool)),
        ValueError,
        "lengths",
        "None, as cu_seqlens or key_padding_mask",
    ),
    BadCall("lengths_device", _set(lengths=torch.ones(2).int().to("meta")), ValueError, "lengths", "the device of"),
    BadCall("cu_seqlens_dtype", _packed(torch.zeros(2)), TypeError, "cu_seqlens", "dtype int32"),
    BadCall("cu_seqlens_rank", _packed(torch.zeros(1, 2).int()), ValueError, "cu_seqlens", r"shape \[N \+ 1\]"),
    BadCall("cu_seqlens_large", _packed([0, 8]), ValueError, "cu_seqlens", "the number of rows, 7"),
    BadCall("cu_seqlens_descending", _packed([0, 5, 3]), ValueError, "cu_seqlens", "ascending"),
    BadCall("backend", _set(backend="gpu"), ValueError, "backend", "'cuda', 'triton', 'cpu', 'torch', 'reference'"),
)


def _values(call: Call) -> int:
    """Numbers that go in by row."""
    return sum(call[name].numel() for name in ("u", "v", "z") if call[name] is not None)


def flops(call: Call) -> int:
    """Four for each activation, two for each element of a head, and six for each pair that turns."""
    pairs = call["rope"][0].shape[1] if "rope" in call else 0
    rows, heads = math.prod(call["z"].shape[:-1]), call["gamma"].shape[0]
    return 4 * _values(call) + rows * heads * (2 * call["z"].shape[-1] + 6 * pairs)


def bytes_(call: Call) -> int:
    """u, v and z read once, gate, values and heads written once, and each row's angles read once."""
    z, heads = call["z"], call["gamma"].shape[0]
    tables = 0
    if "rope" in call:
        tables = 2 * math.prod(z.shape[:-1]) * call["rope"][0].shape[1] * call["rope"][0].itemsize
    return (2 * _values(call) + (heads - 1) * z.numel()) * z.itemsize + tables


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def codegen() -> dict[str, Call]:
    """A large model's unit, of slices of one projection, in every dtype; FLASH's four heads and more in bfloat16."""
    unit = GauInputsCase(
        batch=1, length=64, gate_dim=1536, value_dim=1536, key_dim=128, rotary_dim=128, layout="fused", wide_affine=True
    )
    forms = {
        "": unit,
        " half": replace(unit, interleaved=False),
        " flash": replace(unit, heads=4, rotary_dim=32),
        " packed": replace(unit, lengths=(24, 40), offset="sequence"),
    }
    calls = {}
    for form, case in forms.items():
        for dtype in (torch.bfloat16,) if form else DTYPES:
            calls[str(dtype).removeprefix("torch.") + form] = make(case, dtype, torch.device("meta"), 0)
    return calls


def metered() -> dict[str, Call]:
    case = GauInputsCase(
        batch=1, length=64, gate_dim=192, value_dim=192, key_dim=32, rotary_dim=32, layout="fused", wide_affine=True
    )
    return {"float32, T 64, e 192, s 32": make(case, torch.float32, torch.device("cpu"), 0)}


def passes(backend: Any, problem: GauInputsProblem) -> Iterator[str]:
    results = backend.run(problem)
    yield "forward"
    backend.run_backward(problem, results)
    yield "backward"


SPEC = OpSpec(
    name="gau_inputs",
    function=gau_inputs,
    reference=reference,
    backends=("cuda", "triton", "cpu", "reference"),
    dtypes=DTYPES,
    cannot={("triton", "cpu", torch.bfloat16): "truncates to bfloat16"},
    eager={},
    differentiable=("z", "u", "v", "gamma", "beta"),
    cases=CASES,
    make=make,
    example="plain",
    differentiated="everything_small",
    compiled=("plain", "everything", "packed", "one_head"),
    bad_calls=BAD_CALLS,
    bytes=bytes_,
    work=no_products(flops),
    codegen=codegen,
    metered=metered,
    passes=passes,
    promises=(
        KernelPromise("cuda", max_registers=80, blocks=3),  # with code for tables and rows of every kind
        # A thread has less than 16 bytes of half a head or of a part of it; positions are scalars.
        KernelPromise("triton", "half|flash|packed", max_registers=128, wide=0.4, blocks=2),
        KernelPromise("triton", max_registers=128, wide=0.7, blocks=2),
    ),
    growth={"flops": {"length": 1.0, "batch": 1.0}, "bytes": {"length": 1.0, "batch": 1.0}},
)
