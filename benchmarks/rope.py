"""rope: what is measured, against whom, and which goals that decides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kx_kernels as kx
from kx_kernels.ops.rope import api
from kx_kernels.ops.rope.reference import rope as reference

from . import contest
from .contest import Contender, Missing, fraction, imported, on, speedup
from .goals import Goal, Where


@dataclass(frozen=True)
class Case:
    """One call: q [B, T, H, D] and k [B, T, Hk, D], or packed sequences of T tokens in all."""

    name: str
    dtype: torch.dtype
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    interleaved: bool = False
    layout: str = "[B, T, H, D]"  # or "[B, H, T, D]": the order in memory
    what: str = "forward"  # or "backward"
    sequences: int = 0  # packed, of unequal lengths; 0: a batch

    @property
    def bytes_moved(self) -> int:
        """Each value read and written once, each token's row of the tables read once."""
        rows = self.batch * self.length
        return rows * (2 * (self.heads + self.kv_heads) * self.head_dim * self.dtype.itemsize + 4 * self.head_dim)

    @property
    def flops(self) -> int:
        """Six for each rotated pair."""
        return 3 * self.batch * self.length * (self.heads + self.kv_heads) * self.head_dim

    @property
    def work(self) -> int:
        return self.bytes_moved


BASE = Case("float32, half-split", torch.float32, 2, 4096, 12, 12, 64)
LARGE = Case("bfloat16, half-split", torch.bfloat16, 4, 4096, 32, 8, 128)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            BASE,
            replace(BASE, name="float32, interleaved", interleaved=True),
            replace(BASE, name="float32, half-split, memory [B, H, T, D]", layout="[B, H, T, D]"),
            replace(BASE, name="float32, half-split, backward", what="backward"),
            replace(BASE, name="float32, half-split, 37 packed sequences", batch=1, length=8192, sequences=37),
            replace(BASE, name="bfloat16, half-split", dtype=torch.bfloat16),
            replace(BASE, name="decode: float32, T = 1", batch=8, length=1, heads=32, kv_heads=8, head_dim=128),
        ]
    return [
        LARGE,
        replace(LARGE, name="bfloat16, interleaved", interleaved=True),
        replace(LARGE, name="bfloat16, half-split, memory [B, H, T, D]", layout="[B, H, T, D]"),
        replace(LARGE, name="bfloat16, interleaved, memory [B, H, T, D]", layout="[B, H, T, D]", interleaved=True),
        replace(LARGE, name="bfloat16, half-split, backward", what="backward"),
        replace(LARGE, name="bfloat16, interleaved, backward", what="backward", interleaved=True),
        replace(LARGE, name="bfloat16, half-split, 2400 packed sequences", batch=1, length=65536, sequences=2400),
        replace(LARGE, name="float32, half-split", dtype=torch.float32, batch=2),
        replace(LARGE, name="bfloat16, half-split, 20 MB", batch=1, length=1024),
        replace(LARGE, name="decode: bfloat16, T = 1", batch=32, length=1),
    ]


def sweep(device: str) -> list[Case]:
    """The same call at growing lengths."""
    base = BASE if device == "cpu" else replace(LARGE, batch=1)
    last = 14 if device == "cpu" else 18
    return [replace(base, name=f"T = {1 << n}", batch=1, length=1 << n) for n in range(4, last)]


def shared(device: str) -> list[Case]:
    """The same number of tokens in longer and fewer sequences."""
    base, tokens = (BASE, 13) if device == "cpu" else (LARGE, 15)
    return [replace(base, name=f"T = {1 << n}", batch=1 << tokens - n, length=1 << n) for n in range(4, tokens + 1, 3)]


class Inputs:
    """One set of buffers of a case."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        shape = (case.batch, case.length) if not case.sequences else (case.length,)
        self.q, self.k = (self._random(generator, shape, h, device) for h in (case.heads, case.kv_heads))
        self.q_out, self.k_out = torch.empty_like(self.q), torch.empty_like(self.k)
        self.leaves = (self.q, self.k)
        self.grads = tuple(self._random(generator, shape, h, device) for h in (case.heads, case.kv_heads))
        self.cu_seqlens = None
        longest = case.length
        if case.sequences:
            cuts = torch.randperm(case.length - 1, generator=generator)[: case.sequences - 1].sort().values + 1
            ends = torch.cat([torch.zeros(1), cuts, torch.full((1,), case.length)]).int()
            longest = int(ends.diff().max())
            self.cu_seqlens = ends.to(device)
        self.longest = longest
        self.cos, self.sin = kx.rope_tables(longest, case.head_dim, device=device)

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        return self.define(*(t.double() for t in self.leaves))

    def define(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        tables = (self.cos.double(), self.sin.double())
        return reference(q, k, *tables, interleaved=self.case.interleaved, cu_seqlens=self.cu_seqlens)

    def _random(self, generator: torch.Generator, rows: tuple[int, ...], heads: int, device: str) -> Tensor:
        shape = (*rows, heads, self.case.head_dim)
        if self.case.layout == "[B, H, T, D]":
            shape = (rows[0], heads, rows[1], self.case.head_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float32).to(device, self.case.dtype)
        return x.transpose(1, 2) if self.case.layout == "[B, H, T, D]" else x


Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""q, k [B, T, H, D] -> rotated, in whatever memory layout the contender gives."""


def _ours(backend: str, inplace: bool = False) -> Callable[[Inputs], Rotate]:
    def prepare(x: Inputs) -> Rotate:
        how: dict[str, Any] = {"interleaved": x.case.interleaved, "cu_seqlens": x.cu_seqlens, "backend": backend}
        if inplace and x.case.what == "backward":
            raise Missing("the gradient does not depend on where the result went")
        reasons = dict(api.survey(x.q, x.k, x.cos, x.sin, **how))
        if reasons[backend] is not None:
            raise Missing(str(reasons[backend]))
        return lambda q, k: kx.rope(q, k, x.cos, x.sin, inplace=inplace, **how)

    return prepare


def _no_packed(x: Inputs, name: str) -> None:
    if x.case.sequences:
        raise Missing(f"{name} takes no packed sequences")


def _hugging_face_function(x: Inputs) -> Rotate:
    """q and k as [B, H, S, D] views and full-width tables of q's dtype, as Llama's attention calls it; GPT-J's if
    interleaved, on [B, S, H, D] with half-width tables."""
    _no_packed(x, "transformers")
    if x.case.interleaved:
        gptj = imported("transformers.models.gptj.modeling_gptj", "transformers")
        sin, cos = (t[None].to(x.case.dtype) for t in (x.sin, x.cos))
        return lambda q, k: (
            gptj.apply_rotary_pos_emb(q, sin, cos),
            gptj.apply_rotary_pos_emb(k, sin, cos),
        )
    llama = imported("transformers.models.llama.modeling_llama", "transformers")
    cos, sin = (torch.cat((t, t), -1)[None].to(x.case.dtype) for t in (x.cos, x.sin))

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rotate


def _hugging_face_compiled(x: Inputs) -> Rotate:
    rotate = _hugging_face_function(x)
    return torch.compile(rotate, dynamic=False)


def _flash_attn(x: Inputs) -> Rotate:
    rotary = imported("flash_attn.layers.rotary", "flash-attn")
    how: dict[str, Any] = {"interleaved": x.case.interleaved}
    if x.cu_seqlens is not None:
        how |= {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.longest}
    cos, sin = x.cos.to(x.case.dtype), x.sin.to(x.case.dtype)
    return lambda q, k: (rotary.apply_rotary_emb(q, cos, sin, **how), rotary.apply_rotary_emb(k, cos, sin, **how))


def _liger(x: Inputs) -> Rotate:
    _no_packed(x, "liger-kernel")
    if x.case.interleaved:
        raise Missing("its rope is half-split only")
    if x.q.device.type == "cpu":
        raise Missing("its kernels are Triton's and need a GPU")
    liger = imported("liger_kernel.transformers.rope", "liger-kernel")
    cos, sin = (torch.cat((t, t), -1)[None].to(x.case.dtype) for t in (x.cos, x.sin))

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = liger.liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rotate


def _fla(x: Inputs) -> Rotate:
    rotary = imported("fla.modules.rotary", "flash-linear-attention")
    how: dict[str, Any] = {"interleaved": x.case.interleaved}
    if x.cu_seqlens is not None:
        how["cu_seqlens"] = x.cu_seqlens
    pad = (lambda t: t[None]) if x.cu_seqlens is not None else (lambda t: t)
    crop = (lambda t: t[0]) if x.cu_seqlens is not None else (lambda t: t)
    cos, sin = x.cos.to(x.case.dtype), x.sin.to(x.case.dtype)

    def one(t: Tensor) -> Tensor:
        return crop(rotary.rotary_embedding(pad(t), cos, sin, **how))

    return lambda q, k: (one(q), one(k))


def _rotary_embedding_torch(x: Inputs) -> Rotate:
    _no_packed(x, "rotary-embedding-torch")
    if not x.case.interleaved:
        raise Missing("its rope is interleaved only")
    module = imported("rotary_embedding_torch", "rotary-embedding-torch")
    rotary = module.RotaryEmbedding(x.case.head_dim, cache_max_seq_len=x.case.length, seq_before_head_dim=True)
    rotary = rotary.to(x.q.device)
    return lambda q, k: (rotary.rotate_queries_or_keys(q), rotary.rotate_queries_or_keys(k))


CONTENDERS = [
    *(Contender(f"kx {backend}", "ours", _ours(backend)) for backend in ("cuda", "triton", "cpu", "reference")),
    Contender("kx in place", "ours", lambda x: _ours("cuda" if x.q.is_cuda else "cpu", inplace=True)(x)),
    Contender("Hugging Face eager", "torch", _hugging_face_function, "transformers"),
    Contender("Hugging Face, torch.compile", "torch", _hugging_face_compiled, "transformers"),
    Contender("flash-attn", "peer", _flash_attn, "flash-attn"),
    Contender("liger-kernel", "peer", _liger, "liger-kernel"),
    Contender("flash-linear-attention", "peer", _fla, "flash-linear-attention"),
    Contender("rotary-embedding-torch", "peer", _rotary_embedding_torch, "rotary-embedding-torch"),
]
LIMIT = "dst.copy_(src)"
UNIT = "B"  # of a case's work
HOST_GRADIENTS = True
HOST: dict[str, object] = {}  # host times are of the last case
PACKAGES = ("transformers", "flash-attn", "liger-kernel", "flash-linear-attention", "rotary-embedding-torch")


def contenders(case: Case) -> list[Contender]:
    return CONTENDERS


def versions() -> dict[str, str | None]:
    return contest.versions(PACKAGES)


def error(rotate: Rotate, x: Inputs) -> float:
    """The largest difference from the float64 reference, over the largest value."""
    return max(map(contest.off, rotate(x.q.clone(), x.k.clone()), x.exact))


def limit(sets: list[Inputs]) -> Callable[[int], object]:
    """The limit: as many bytes, read and written once."""

    def call(turn: int) -> None:
        x = sets[turn % len(sets)]
        x.q_out.copy_(x.q)
        x.k_out.copy_(x.k)

    return call


def _decode_host(results: dict[str, Any]) -> tuple[float, float, float] | None:
    rows = [r for r in results["host"] if r["contender"] == "kx cuda" and "median" in r]
    row = next((r for r in rows if not r["gradient"]), None)
    return (row["median"] * 1e6, row["low"] * 1e6, row["high"] * 1e6) if row else None


def _import(results: dict[str, Any]) -> tuple[float, float, float] | None:
    extra = results["import"]["extra"]
    return extra["median"] * 1e3, extra["low"] * 1e3, extra["high"] * 1e3


def goals() -> list[Goal]:
    cpu, base = on("cpu"), cases("cpu")[0].name
    shape, eager, compiled = (
        f"{base}, q and k of [2, 4096, 12, 64]",
        "Hugging Face eager",
        "Hugging Face, torch.compile",
    )
    found = [
        Goal("bandwidth of the copy", cpu, shape, 0.7, "×", fraction(base, ("kx cpu",))),
        Goal(f"as fast as {eager}", cpu, shape, 8, "×", speedup(base, eager)),
        Goal(f"as fast as {compiled}", cpu, shape, 3, "×", speedup(base, compiled)),
    ]
    for case in cases("cuda")[:6]:
        value = fraction(case.name, ("kx cuda", "kx triton"))
        size = f"{case.bytes_moved / 1e6:.0f} MB"
        found.append(Goal("bandwidth of the copy", on("cuda"), f"{case.name}, {size}", 0.95, "×", value))
    what = "host time of decoding"
    case = "bfloat16, T = 1, 32 and 8 heads"
    found.append(Goal(what, on("cuda"), case, 15, "µs", _decode_host, at_most=True))
    anywhere = Where("any machine", lambda environment: True)
    return [*found, Goal("on top of torch", anywhere, "import kx_kernels", 50, "ms", _import, at_most=True)]


def _tables() -> list[dict[str, Any]]:
    """Largest error of the cosines at growing positions: ours, and with the phase computed in float32."""
    found = []
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    for exponent in range(6, 21):
        last = 1 << exponent
        positions = torch.arange(max(0, last - 4096), last + 1)
        exact = (positions.double()[:, None] * frequencies).cos()
        single = (positions.float()[:, None] * frequencies.float()).cos()
        ours = kx.rope_tables(last + 1, 128)[0][positions]
        errors = {"ours": ours, "float32_phase": single}
        found.append({"position": last, **{n: (t.double() - exact).abs().max().item() for n, t in errors.items()}})
    return found


def extras() -> dict[str, Any]:
    """What is measured of this operator alone."""
    return {"tables": _tables()}
