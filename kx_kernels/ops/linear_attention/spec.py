"""What linear attention promises: its cases, the calls it refuses, its costs and how they grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._core.spec import BadCall, Call, KernelPromise, OpSpec, Work, tiled
from ._problem import LinearAttentionProblem
from .api import linear_attention
from .reference import eager
from .reference import linear_attention as reference
from .state import LinearAttentionState


@dataclass(frozen=True)
class LinearAttentionCase:
    """Sizes and forms of one call."""

    batch: int = 2
    length: int = 9  # T, where `lengths` is None
    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    causal: bool = True
    feature_map: str = "elu1"
    stabilizer: float = 0.0
    normalize: bool = True
    eps: float = 1e-6
    scale: float = 1.0
    decay: bool = False
    rope: str = "none"  # "none", "interleaved", "half" (of part of the head, with an offset by sequence, some negative)
    padding: str = "none"  # "none", "left", "right", "holes" (a sequence of nothing but padding among them)
    lengths: tuple[int, ...] | None = None  # of packed sequences
    surplus: int = 0  # packed rows before the first sequence and past the last
    state: str = "none"  # "none", "out", "in", "both"
    layout: str = "plain"  # "plain", "transposed" ([B, H, T, D] memory), "packed" (q, k and v slices of one tensor)
    dead: bool = False  # some queries have no feature that is not 0


def make(case: LinearAttentionCase, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    total = sum(case.lengths) + 2 * case.surplus if case.lengths is not None else 0
    rows = (total,) if case.lengths is not None else (case.batch, case.length)
    sequences = len(case.lengths) if case.lengths is not None else case.batch
    longest = max(case.lengths, default=0) if case.lengths is not None else case.length
    shapes = ((case.heads, case.key_dim), (case.kv_heads, case.key_dim), (case.kv_heads, case.value_dim))
    if case.layout == "packed":
        together = random(*rows, case.heads + 2 * case.kv_heads, case.key_dim)
        q, k, v = together.split([case.heads, case.kv_heads, case.kv_heads], dim=-2)
    elif case.layout == "transposed":
        q, k, v = (random(*rows[:-1], h, rows[-1], d).transpose(-2, -3) for h, d in shapes)
    else:
        q, k, v = (random(*rows, h, d) for h, d in shapes)
    if case.dead:
        q = torch.cat((q[:, :1], -q[:, 1:3].abs(), q[:, 3:]), 1)

    call: Call = {"q": q, "k": k, "v": v, "causal": case.causal, "feature_map": case.feature_map}
    call |= {"stabilizer": case.stabilizer, "normalize": case.normalize, "eps": case.eps, "scale": case.scale}
    if case.decay:
        call["decay"] = (1 - 2.0 ** -(1.0 + torch.arange(case.kv_heads))).to(device)
    if case.rope != "none":
        half = case.key_dim // 2 if case.rope == "interleaved" else case.key_dim // 4
        phase = torch.arange(longest + 3)[:, None] * 0.7 ** torch.arange(half)
        call["rope"] = (phase.cos().to(device), phase.sin().to(device))
        call["rope_interleaved"] = case.rope == "interleaved"
        if case.rope == "half":
            call["rope_offset"] = (torch.arange(sequences, device=device) * 4 - 2) % 6 - 3
    if case.lengths is not None:
        ends = torch.tensor([case.surplus, *case.lengths]).cumsum(0)
        call["cu_seqlens"] = ends.to(device=device, dtype=torch.int32)
    if case.padding != "none":
        keep = torch.ones(rows, dtype=torch.bool)
        if case.padding == "left":
            keep[..., :2] = False
        elif case.padding == "right":
            keep[..., -3:] = False
        else:
            keep &= torch.rand(rows, generator=generator) > 0.3
            keep[0] = False
        call["key_padding_mask"] = keep.to(device)
    if case.state in ("in", "both"):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kv = random(sequences, case.kv_heads, case.key_dim, case.value_dim, dtype=wide)
        z = random(sequences, case.kv_heads, case.key_dim, dtype=wide).abs() if case.normalize else None
        call["initial_state"] = LinearAttentionState(kv, z)
    if case.state in ("out", "both"):
        call["return_state"] = True
    return call


PLAIN = LinearAttentionCase()
SUM = replace(PLAIN, feature_map="identity", normalize=False, scale=0.25)
GROUPED = replace(PLAIN, heads=6, kv_heads=2)
PACKED = replace(PLAIN, lengths=(3, 0, 5, 1, 0))
CASES = {
    "elu1": PLAIN,
    "identity": SUM,
    "relu": replace(PLAIN, feature_map="relu", eps=1e-2),
    "relu2": replace(PLAIN, feature_map="relu2", eps=1e-2),
    "exp": replace(PLAIN, feature_map="exp", stabilizer=0.5),
    "exp_sum": replace(SUM, feature_map="exp", stabilizer=0.5),
    "elu1_sum": replace(SUM, feature_map="elu1"),
    "dead_rows": replace(PLAIN, feature_map="relu", eps=0.0, dead=True, state="in"),
    "bidirectional": replace(PLAIN, causal=False),
    "bidirectional_sum": replace(SUM, causal=False, state="both"),
    "bidirectional_grouped": replace(GROUPED, causal=False, padding="right", rope="interleaved"),
    "decay": replace(PLAIN, decay=True, state="both"),
    "decay_sum": replace(SUM, decay=True, length=70, batch=1),
    "decay_long": replace(PLAIN, decay=True, length=130, batch=1, state="both"),
    "rope": replace(PLAIN, rope="interleaved"),
    "rope_half": replace(PLAIN, rope="half", padding="left"),
    "rope_long": replace(PLAIN, rope="half", length=70, kv_heads=1),
    "rope_sum": replace(SUM, rope="interleaved"),
    "padding_left": replace(PLAIN, padding="left", state="both"),
    "padding_right": replace(PLAIN, padding="right", decay=True),
    "padding_holes": replace(PLAIN, padding="holes", length=70),
    "state_out": replace(PLAIN, state="out"),
    "state_in": replace(PLAIN, state="in", length=70),
    "state_both": replace(SUM, state="both"),
    "grouped": replace(GROUPED, state="both"),
    "one_kv_head": replace(GROUPED, kv_heads=1, length=65),
    "packed_sequences": replace(PACKED, state="both"),
    "packed_surplus": replace(PACKED, lengths=(5, 70), surplus=2, rope="half", decay=True),
    "packed_padding": replace(PACKED, padding="left"),
    "transposed": replace(PLAIN, layout="transposed"),
    "packed_qkv": replace(PLAIN, layout="packed", length=17),
    "everything": replace(GROUPED, length=70, decay=True, rope="half", padding="holes", state="both", value_dim=24),
    "everything_wide": replace(
        GROUPED,
        batch=1,
        length=70,
        heads=2,
        kv_heads=1,
        key_dim=128,
        value_dim=96,
        decay=True,
        rope="half",
        padding="holes",
        state="both",
    ),
    "everything_small": LinearAttentionCase(
        length=5, heads=2, kv_heads=1, key_dim=4, value_dim=3, decay=True, rope="half", padding="holes", state="both"
    ),
    "T0": replace(PLAIN, length=0, state="both"),
    "B0": replace(PLAIN, batch=0, state="both"),
    "T1": replace(PLAIN, length=1, state="both"),  # alone, its output does not depend on q and k
    "T15": replace(PLAIN, length=15),
    "T16": replace(PLAIN, length=16),
    "T17": replace(PLAIN, length=17),
    "T63": replace(PLAIN, length=63, batch=1),
    "T64": replace(PLAIN, length=64, batch=1),
    "T65": replace(PLAIN, length=65, batch=1),
    "T127": replace(PLAIN, length=127, batch=1, heads=1, kv_heads=1),
    "D1": replace(PLAIN, key_dim=1, value_dim=1, normalize=False),  # else its output does not depend on q
    "D32": replace(PLAIN, key_dim=32, value_dim=32),
    "D48": replace(PLAIN, key_dim=48, value_dim=80, length=20, batch=1),
    "D60": replace(PLAIN, key_dim=60, value_dim=60, length=20, batch=1),
    "D64": replace(PLAIN, key_dim=64, value_dim=64, length=70, batch=1),
    "D80": replace(PLAIN, key_dim=80, value_dim=100, length=20, batch=1),
    "D100": replace(PLAIN, key_dim=100, value_dim=16, length=20, batch=1),
    "D128": replace(PLAIN, key_dim=128, value_dim=128, length=20, batch=1, heads=1, kv_heads=1),
    "D192": replace(PLAIN, key_dim=192, value_dim=192, length=20, batch=1, heads=1, kv_heads=1),
    "D256": replace(PLAIN, key_dim=256, value_dim=256, length=20, batch=1, heads=1, kv_heads=1),
}


def _set(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: call | changes


def _map(name: str, change: Callable[[Any], Any]) -> Callable[[Call], Call]:
    return lambda call: call | {name: change(call[name])}


def _tables(length: int = 9, half: int = 8, **kind: Any) -> tuple[Tensor, Tensor]:
    return torch.ones(length, half, **kind), torch.zeros(length, half, **kind)


def _state(*shape: int, **kind: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape, **kind), torch.zeros(shape[:-1], **kind)


def _packed(ends: Any) -> Callable[[Call], Call]:
    """The call's first sequence alone, packed."""
    cu_seqlens = torch.tensor(ends, dtype=torch.int32) if isinstance(ends, list) else ends
    return lambda call: call | {n: call[n][0] for n in "qkv"} | {"cu_seqlens": cu_seqlens}


_Q, _STATE = r"\[2, 9, 2, 16\]", "initial_state"
BAD_CALLS = (
    BadCall("q_not_a_tensor", _set(q=[1.0]), TypeError, "q", "a tensor of dtype bfloat16, float16, float32 or float64"),
    BadCall("q_integer", _map("q", lambda q: q.long()), TypeError, "q", "bfloat16, float16, float32 or float64"),
    BadCall("q_rank", _map("q", lambda q: q[0]), ValueError, "q", r"shape \[B, T, H, D\]"),
    BadCall(
        "q_rank_packed", _set(cu_seqlens=torch.zeros(1, dtype=torch.int32)), ValueError, "q", "as cu_seqlens is given"
    ),
    BadCall("q_no_features", lambda c: c | {n: c[n][..., :0] for n in "qk"}, ValueError, "q", "dimension above 0"),
    BadCall("k_dtype", _map("k", lambda k: k.half()), TypeError, "k", "the dtype of q, torch.float32"),
    BadCall("k_device", _map("k", lambda k: k.to("meta")), ValueError, "k", "the device of q"),
    BadCall("k_length", _map("k", lambda k: k[:, 1:]), ValueError, "k", f"the shape of q, {_Q}, but for the number"),
    BadCall("k_head_dim", _map("k", lambda k: k[..., :8]), ValueError, "k", "but for the number of heads"),
    BadCall("k_heads", lambda c: c | {n: c[n].repeat(1, 1, 2, 1) for n in "kv"}, ValueError, "k", "divides that of q"),
    BadCall("v_dtype", _map("v", lambda v: v.double()), TypeError, "v", "the dtype of q"),
    BadCall("v_heads", _map("v", lambda v: v[:, :, :1]), ValueError, "v", f"the shape of k, {_Q}, but for the head"),
    BadCall("v_length", _map("v", lambda v: v[:, 1:]), ValueError, "v", "the shape of k"),
    BadCall("feature_map", _set(feature_map="softmax"), ValueError, "feature_map", "'identity', 'elu1', 'relu'"),
    BadCall("feature_map_shape", _set(feature_map=lambda x: x[:, 1:]), ValueError, "feature_map", r"\[2, 9, 2, D_f\]"),
    BadCall("feature_map_none", _set(feature_map=lambda x: None), ValueError, "feature_map", "a tensor of shape"),
    BadCall("v_no_dim", _map("v", lambda v: v[..., :0]), ValueError, "v", "a head dimension above 0"),
    BadCall("stabilizer", _set(stabilizer="max"), TypeError, "stabilizer", "a number"),
    BadCall("eps_type", _set(eps=None), TypeError, "eps", "a number"),
    BadCall("eps_negative", _set(eps=-1e-6), ValueError, "eps", "0 or more"),
    BadCall("scale", _set(scale=torch.ones(())), TypeError, "scale", "a number"),
    BadCall("decay_type", _set(decay=0.9), TypeError, "decay", "a tensor of dtype float32 or float64"),
    BadCall("decay_shape", _set(decay=torch.ones(3)), ValueError, "decay", r"shape \[H_k\] = \[2\]"),
    BadCall("decay_large", _set(decay=torch.tensor([0.5, 1.5])), ValueError, "decay", "above 0 and up to 1"),
    BadCall("decay_nan", _set(decay=torch.tensor([0.5, torch.nan])), ValueError, "decay", "above 0 and up to 1"),
    BadCall("decay_no_order", _set(decay=torch.ones(2), causal=False), ValueError, "decay", "no order"),
    BadCall("decay_gradient", _set(decay=torch.ones(2, requires_grad=True)), ValueError, "decay", "no gradient"),
    BadCall("rope_type", _set(rope=torch.ones(9, 8)), TypeError, "rope", "a pair of tables"),
    BadCall("rope_dtype", _set(rope=_tables(dtype=torch.int32)), TypeError, "rope", "dtype bfloat16"),
    BadCall("rope_rank", _set(rope=(torch.ones(8), torch.ones(8))), ValueError, "rope", r"shape \[P, R/2\]"),
    BadCall("rope_shapes", _set(rope=(torch.ones(9, 8), torch.ones(9, 7))), ValueError, "rope", "one shape"),
    BadCall("rope_wide", _set(rope=_tables(half=9)), ValueError, "rope", "number of features, 16"),
    BadCall("rope_short", _set(rope=_tables(8)), ValueError, "rope", "P = 8; T = 9"),
    BadCall("rope_gradient", _set(rope=_tables(requires_grad=True)), ValueError, "rope", "no gradient"),
    BadCall("rope_offset_alone", _set(rope_offset=1), ValueError, "rope_offset", "0, as rope is None"),
    BadCall("rope_offset_type", _set(rope=_tables(), rope_offset=0.5), TypeError, "rope_offset", "an int"),
    BadCall("rope_offset_large", _set(rope=_tables(), rope_offset=1), ValueError, "rope_offset", "P = 9; T = 9"),
    BadCall(
        "rope_offset_shape",
        _set(rope=_tables(), rope_offset=torch.zeros(3, dtype=torch.long)),
        ValueError,
        "rope_offset",
        r"shape \[N\] = \[2\]",
    ),
    BadCall("rope_offsets_large", _set(rope=_tables(), rope_offset=torch.tensor([0, 1])), ValueError, "rope", "to 8"),
    BadCall("mask_dtype", _set(key_padding_mask=torch.ones(2, 9)), TypeError, "key_padding_mask", "dtype bool"),
    BadCall(
        "mask_shape",
        _set(key_padding_mask=torch.ones(2, 8, dtype=torch.bool)),
        ValueError,
        "key_padding_mask",
        r"shape \[2, 9\]",
    ),
    BadCall("cu_seqlens_dtype", _packed(torch.zeros(2)), TypeError, "cu_seqlens", "dtype int32"),
    BadCall("cu_seqlens_shape", _packed(torch.zeros(0, dtype=torch.int32)), ValueError, "cu_seqlens", "one more than"),
    BadCall("cu_seqlens_large", _packed([0, 5, 10]), ValueError, "cu_seqlens", "the number of rows, 9"),
    BadCall("cu_seqlens_descending", _packed([0, 5, 3]), ValueError, "cu_seqlens", "ascending"),
    BadCall("cu_seqlens_negative", _packed([-1, 5]), ValueError, "cu_seqlens", "ascending places between 0"),
    BadCall("state_type", _set(initial_state=torch.ones(2)), TypeError, _STATE, "a pair of tensors"),
    BadCall(
        "state_dtype", _set(initial_state=_state(2, 2, 16, 16, dtype=torch.half)), TypeError, _STATE, "dtype float32"
    ),
    BadCall("state_shape", _set(initial_state=_state(2, 2, 8, 16)), ValueError, _STATE, r"\[2, 2, 16, 16\]"),
    BadCall("state_no_z", _set(initial_state=(_state(2, 2, 16, 16)[0], None)), TypeError, _STATE, "a tensor of dtype"),
    BadCall(
        "state_z_unused", _set(initial_state=_state(2, 2, 16, 16), normalize=False), ValueError, _STATE, "no z, as"
    ),
    BadCall("backend", _set(backend="gpu"), ValueError, "backend", "'cuda', 'triton', 'cpu', 'torch', 'reference'"),
)


def flops(call: Call) -> int:
    """Of the recurrent form, which does the least: a state's update by a key, and a query's product with it."""
    return _products(call, 1, 1)


def backward_flops(call: Call) -> int:
    """Of the same form: the states once more, and gradients of queries by them; those that queries update from the end
    on, and gradients of keys and of values by these.
    """
    return _products(call, 2, 3)


def _products(call: Call, of_queries: int, of_keys: int) -> int:
    """Of so many with a state to a token of each head of queries, and of keys."""
    q, k, v = call["q"], call["k"], call["v"]
    heads = of_queries * q.shape[-2] + of_keys * k.shape[-2]
    return 2 * math.prod(q.shape[:-2]) * heads * q.shape[-1] * v.shape[-1]


def bytes_(call: Call) -> int:
    """q, k and v read once, o written once."""
    q, k, v = call["q"], call["k"], call["v"]
    return (q.numel() + k.numel() + v.numel() + v.numel() * q.shape[-2] // k.shape[-2]) * q.itemsize


NO_STATE = "the definition has a weight of every key, and no state"
OF_HEADS = "states are those of every query's head, and tiles whole at the ends"


def _defined(call: Call, times: int) -> int:
    """Of each of the definition's products so many times, and of the denominator's sums over given weights once."""
    q, v = call["q"], call["v"]
    divided = times * q.shape[-1] + 1 if call["normalize"] else 0
    return 2 * math.prod(q.shape[:-1]) * q.shape[-3] * (times * (q.shape[-1] + v.shape[-1]) + divided)


def beside_torch(call: Call) -> dict[str, int]:
    return {NO_STATE: _defined(call, 1) - flops(call)}


def backward_beside_torch(call: Call) -> dict[str, int]:
    """Each product forward has two gradients, which are products as large."""
    return {NO_STATE: _defined(call, 2) - backward_flops(call)}


def _of_role(launch: Any, role: str) -> tuple[int, int, int]:
    """Of a pass of the kernel: of the products within chunks, of the updates of states, and of products with them."""
    p = launch.p
    keys, values, slices = launch.slices(role)
    batch, length, heads = p.q.shape[:3]
    rows, kv_heads, reverse = 2 * batch * tiled(length, launch.block_t) * slices, p.k.shape[2], role in ("dk", "dv")
    # What normalising adds: to gradients of features, and to outputs the scores of features that do not turn.
    divided = keys if p.normalize and (role in ("dq", "dk") or (role == "o" and p.cos is not None)) else 0
    within = rows * heads * launch.block_t * (keys + values + divided) if p.causal else 0
    updates, uses = heads if reverse or p.causal else kv_heads, kv_heads if reverse else heads
    return within, rows * updates * keys * values, rows * uses * keys * values


def beside_triton(call: Call, problem: LinearAttentionProblem) -> dict[str, int]:
    from . import _triton

    launch = _triton.Launch(problem, None, None)
    within, *states = _of_role(launch, "o")
    return {
        f"within chunks of {launch.block_t} tokens, all with all": within,
        OF_HEADS: sum(states) - flops(call),
    }


def backward_beside_triton(call: Call, problem: LinearAttentionProblem) -> dict[str, int]:
    from . import _triton

    launch = _triton.Launch(problem, None, None)
    alone = problem.normalize and launch.slices("dq")[2] > 1  # whether no program sees whole rows of both gradients
    passes = {role: _of_role(launch, role) for role in ("dq", "dk", "dv")}
    within, again = sum(x[0] for x in passes.values()), passes["dv"][1]
    return {
        f"within chunks of {launch.block_t} tokens, all with all": within,
        "a pass for gradients of denominators, which are of all columns": sum(_of_role(launch, "e")) if alone else 0,
        "states that queries update are made again, for gradients of values": again,
        OF_HEADS: sum(sum(x[1:]) for x in passes.values()) - again - backward_flops(call),
    }


def codegen() -> dict[str, Call]:
    """The head dimensions that the kernels are tuned for in every dtype of tensor cores, and forms that add code."""
    calls = {}
    for form in ("everything", "bidirectional_grouped", "packed_surplus"):
        calls[f"form {form}"] = make(CASES[form], torch.bfloat16, torch.device("meta"), 0)
    for dtype, dims in ((torch.bfloat16, (64, 128)), (torch.float16, (64, 128)), (torch.float32, (64,))):
        for dim in dims:
            case = LinearAttentionCase(batch=1, length=64, key_dim=dim, value_dim=dim, state="both")
            calls[f"{str(dtype).removeprefix('torch.')} {dim}"] = make(case, dtype, torch.device("meta"), 0)
    return calls


def metered() -> dict[str, Call]:
    case = LinearAttentionCase(batch=1, length=256)
    return {
        f"float16, T 256, one head of {dim}": make(
            replace(case, heads=1, kv_heads=1, key_dim=dim, value_dim=dim), torch.float16, torch.device("cpu"), 0
        )
        for dim in (64, 128)
    }


def passes(backend: Any, problem: LinearAttentionProblem) -> Iterator[str]:
    results = backend.run(problem)
    yield "forward"
    backend.run_backward(problem, results.denominator, results.o, results.kv, results.z)
    yield "backward"


SPEC = OpSpec(
    name="linear_attention",
    function=linear_attention,
    reference=reference,
    backends=("cuda", "triton", "cpu", "reference"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    cannot={
        ("triton", "cpu", torch.bfloat16): "truncates to bfloat16",
        ("cuda", "cpu", torch.float64): "those of tensor cores",
        ("cuda", "cuda", torch.float64): "those of tensor cores",
    },
    eager={"cuda": eager, "triton": eager},  # tensor cores take operands of the tensors' dtype
    differentiable=("q", "k", "v", "initial_state"),
    cases=CASES,
    make=make,
    example="elu1",
    differentiated="everything_small",
    compiled=("elu1", "state_both", "everything", "packed_sequences"),
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
        KernelPromise("cuda", "step"),
        # Shared memory without the rows that are fetched ahead, which a machine may have no room for.
        KernelPromise("cuda", "64 64", 160, tensor_core=True, async_copies=True, shared=66 << 10),
        KernelPromise("cuda", " 256 ", tensor_core=True, async_copies=True, shared=158 << 10),
        KernelPromise(  # two registers, for gradients of keys
            "cuda", "128 128 1", tensor_core=True, async_copies=True, shared=110 << 10, may_spill=True
        ),
        KernelPromise("cuda", tensor_core=True, async_copies=True, shared=116 << 10),
        KernelPromise("triton", "form", may_spill=True),
        KernelPromise("triton", "float32", wide=0.7, tensor_core=True, async_copies=True, may_spill=True),
        KernelPromise("triton", wide=0.7, tensor_core=True, async_copies=True),
    ),
    growth={"flops": {"length": 1.0, "batch": 1.0}, "bytes": {"length": 1.0, "batch": 1.0}},
)
