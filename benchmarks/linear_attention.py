"""Linear attention: what is measured, against whom, and which goals that decides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx
from kx_kernels._core import dispatch
from kx_kernels.ops.linear_attention import api
from kx_kernels.ops.linear_attention._backends import step_backends
from kx_kernels.ops.linear_attention.reference import linear_attention as reference

from . import contest
from .contest import Contender, Function, Missing, fraction, imported, on, speedup
from .goals import Goal, Measured, Where

CHUNK = 64  # of the chunked form in torch
TENSORS = {"forward": 4, "backward": 11, "both": 15}  # read or written
QUADRATIC = 2048  # tokens: beyond, a T × T form takes gigabytes


@dataclass(frozen=True)
class Case:
    """One call: q, k and v [B, T, H, D], elu + 1. `what`: "forward", "backward" or "both"; with `past`, one token."""

    name: str
    dtype: torch.dtype
    batch: int
    length: int
    heads: int
    head_dim: int
    normalize: bool = True
    what: str = "forward"
    past: int = 0  # tokens before the one that is decoded

    @property
    def bytes_moved(self) -> int:
        """Each input read and each output written once: q, k, v, o; with the gradients of all four 11 such tensors.

        Decoding reads and writes the states.
        """
        rows = self.batch * self.length * self.heads * self.head_dim * self.dtype.itemsize
        if self.past:
            return 2 * 4 * self.batch * self.heads * self.head_dim * (self.head_dim + 1)
        return TENSORS[self.what] * rows

    @property
    def flops(self) -> int:
        """Of the recurrent form: a state's update by a key, and a query's product with it; twice that backward."""
        forward = 4 * self.batch * self.length * self.heads * self.head_dim**2
        return forward * {"forward": 1, "backward": 2, "both": 3}[self.what]

    @property
    def work(self) -> int:
        return self.bytes_moved


BASE = Case("float32", torch.float32, 2, 4096, 12, 64)
LONG = "bfloat16, D 128, one sequence of 65536"
LARGE = Case("bfloat16, D 128", torch.bfloat16, 8, 8192, 16, 128)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            BASE,
            replace(BASE, name="float32, forward and backward", what="both"),
            replace(BASE, name="float32, not normalised", normalize=False),
            replace(BASE, name="float32, one sequence of 65536", batch=1, length=65536, heads=1),
            replace(BASE, name="bfloat16", dtype=torch.bfloat16),
            replace(BASE, name="decode: float32, one token after 4096", batch=8, length=1, past=4096),
        ]
    return [
        LARGE,
        replace(LARGE, name="bfloat16, D 64", head_dim=64),
        replace(LARGE, name="bfloat16, D 128, backward", what="backward"),
        replace(LARGE, name="bfloat16, D 64, backward", what="backward", head_dim=64),
        replace(LARGE, name="bfloat16, D 128, not normalised", normalize=False),
        replace(LARGE, name="bfloat16, D 128, not normalised, backward", normalize=False, what="backward"),
        replace(LARGE, name=LONG, batch=1, length=65536),
        replace(LARGE, name="decode: bfloat16, one token after 8192", length=1, past=8192),
    ]


def sweep(device: str) -> list[Case]:
    """The same call at growing lengths."""
    base = replace(BASE, batch=1, heads=2) if device == "cpu" else replace(LARGE, batch=1)
    return [replace(base, name=f"T = {1 << n}", length=1 << n) for n in range(8, 17)]


def shared(device: str) -> list[Case]:
    """The same number of tokens in longer and fewer sequences."""
    base, tokens = (replace(BASE, heads=2), 14) if device == "cpu" else (LARGE, 16)
    return [replace(base, name=f"T = {1 << n}", batch=1 << tokens - n, length=1 << n) for n in range(8, tokens + 1, 2)]


class Inputs:
    """One set of buffers of a case."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, case.dtype)

        shape = (case.batch, case.length, case.heads, case.head_dim)
        self.leaves = tuple(random(*shape) for _ in range(3))
        self.grads = (random(*shape),)
        self.outs = tuple(torch.empty_like(x) for x in self.leaves)
        past = (case.batch, case.past, case.heads, case.head_dim)
        self.past = tuple(random(*past) for _ in range(2)) if case.past else ()
        if case.past:
            self.kv = torch.rand(case.batch, case.heads, case.head_dim, case.head_dim, device=device)
            self.z = case.past * torch.rand(case.batch, case.heads, case.head_dim, device=device)

    @functools.cached_property
    def exact(self) -> Tensor:
        """In float64: by the reference, or if long by the chunked form."""
        return self.define(*(y.double() for y in self.leaves))

    def define(self, *leaves: Tensor) -> Tensor:
        if self.case.past:
            return reference(*leaves, initial_state=(self.kv.double(), self.z.double()), return_state=True)[0]
        return (reference if self.case.length <= 512 else chunked)(*leaves, normalize=self.case.normalize)


def _ours(backend: str) -> Callable[[Inputs], Function]:
    def prepare(x: Inputs) -> Function:
        how: dict[str, Any] = {"normalize": x.case.normalize}
        if x.case.past:
            problem = api.step_problem(*x.leaves, (x.kv, x.z), **how)
            reasons = dict(dispatch.survey(step_backends(), problem))
        else:
            reasons = dict(api.survey(*x.leaves, **how))
        if reasons[backend] is not None:
            raise Missing(str(reasons[backend]))
        if backend == "reference" and x.case.length > QUADRATIC:
            raise Missing("its T × T weights would take gigabytes")
        if x.case.past:
            return lambda q, k, v: kx.linear_attention_step(q, k, v, (x.kv, x.z), backend=backend, **how)
        return lambda q, k, v: kx.linear_attention(q, k, v, backend=backend, **how)

    return prepare


def _features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return F.elu(q) + 1, F.elu(k) + 1


def chunked(q: Tensor, k: Tensor, v: Tensor, normalize: bool = True) -> Tensor:
    """The chunked form as torch's own products, every state kept: what one writes without a kernel."""
    batch, length, heads, dim = q.shape
    q, k = _features(q, k)
    shape = (batch, length // CHUNK, CHUNK, heads, dim)
    q, k, v = (x.reshape(shape).permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, T / C, C, D]
    added = k.mT @ v
    state = added.cumsum(2) - added  # before each chunk
    o = (q @ k.mT).tril() @ v + q @ state
    if normalize:
        sums = k.sum(3, keepdim=True)
        z = k.cumsum(3) + sums.cumsum(2) - sums
        o = o / ((q * z).sum(-1, keepdim=True) + 1e-6)
    return o.permute(0, 2, 3, 1, 4).reshape(batch, length, heads, dim)


def _recurrent_step(x: Inputs) -> Function:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = (y[:, 0].float() for y in _features(q, k))
        x.kv.add_(b[..., None] * v[:, 0, :, None].float())
        x.z.add_(b)
        o = (a[:, :, None] @ x.kv)[:, :, 0] / ((a * x.z).sum(-1, keepdim=True) + 1e-6)
        return o[:, None].to(q.dtype)

    return step


def _chunked(x: Inputs) -> Function:
    if x.case.past:
        return _recurrent_step(x)
    return lambda q, k, v: chunked(q, k, v, x.case.normalize)


def _quadratic(x: Inputs) -> Function:
    if x.case.past or x.case.length > QUADRATIC:
        raise Missing("its T × T weights would take gigabytes" if not x.case.past else "decoding has a state")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = (y.transpose(1, 2) for y in _features(q, k))
        scores = (a @ b.mT).tril()
        if x.case.normalize:
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-6)
        return (scores @ v.transpose(1, 2)).transpose(1, 2)

    return attend


def _softmax(x: Inputs) -> Function:
    """What linear attention replaces: causal softmax attention, with its cache of keys and values to decode."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if x.case.past:
            k, v = (torch.cat((past, new), 1) for past, new in zip(x.past, (k, v), strict=True))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=not x.case.past).transpose(1, 2)

    return attend


def _softmax_exact(x: Inputs) -> Tensor:
    q, k, v = x.leaves
    if x.case.past:
        k, v = (torch.cat((past, new), 1) for past, new in zip(x.past, (k, v), strict=True))
    return contest.softmax(q, k, v, causal=not x.case.past)


def _softmax_work(case: Case) -> dict[str, int]:
    """Of products with the keys before, which decoding reads, and the values: two forward, five backward."""
    products = 2 * case.batch * case.heads * case.head_dim
    if case.past:
        return {"flops": 2 * products * case.past, "bytes": products * case.past * case.dtype.itemsize}
    count = {"forward": 2, "backward": 5, "both": 7}[case.what]
    return {"flops": count * products * case.length**2 // 2}


def _compiled(prepare: Callable[[Inputs], Function]) -> Callable[[Inputs], Function]:
    return lambda x: torch.compile(prepare(x), dynamic=False)


def _fla(x: Inputs) -> Function:
    if x.leaves[0].device.type == "cpu":
        raise Missing("its kernels are Triton's and need a GPU")
    if x.case.past:
        raise Missing("its decoding gives a new state instead of changing one")
    module = imported("fla.ops.linear_attn", "flash-linear-attention")
    return lambda q, k, v: module.chunk_linear_attn(*_features(q, k), v, scale=1.0, normalize=x.case.normalize)[0]


def _fast_transformers(x: Inputs) -> Function:
    if x.case.past or x.case.dtype != torch.float32:
        raise Missing("it decodes in torch" if x.case.past else "its product is float32's")
    product = imported("fast_transformers.causal_product", "pytorch-fast-transformers").causal_dot_product

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = _features(q, k)
        o = product(*(y.transpose(1, 2).contiguous() for y in (a, b, v))).transpose(1, 2)
        return o / ((a * b.cumsum(1)).sum(-1, keepdim=True) + 1e-6) if x.case.normalize else o

    return attend


def _performer(x: Inputs) -> Function:
    if x.case.past or not x.case.normalize:
        raise Missing("it has no state and is normalised always")
    module = imported("performer_pytorch.performer_pytorch", "performer-pytorch")
    imported("fast_transformers.causal_product", "performer-pytorch's product, pytorch-fast-transformers,")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = _features(q, k)
        return module.causal_linear_attention(*(y.transpose(1, 2) for y in (a, b, v))).transpose(1, 2)

    return attend


CONTENDERS = [
    *(Contender(f"kx {backend}", "ours", _ours(backend)) for backend in ("cuda", "triton", "cpu", "reference")),
    Contender("chunked, torch eager", "torch", _chunked),
    Contender("chunked, torch.compile", "torch", _compiled(_chunked)),
    Contender("quadratic, torch eager", "torch", _quadratic),
    Contender("quadratic, torch.compile", "torch", _compiled(_quadratic)),
    Contender("softmax attention (SDPA)", "other", _softmax, exact=_softmax_exact, work=_softmax_work),
    Contender("flash-linear-attention", "peer", _fla, "flash-linear-attention"),
    Contender("fast-transformers", "peer", _fast_transformers, "pytorch-fast-transformers"),
    Contender("performer-pytorch", "peer", _performer, "performer-pytorch"),
]
OURS = ("kx cuda", "kx triton")  # on a GPU
LIMIT = "dst.copy_(src)"
UNIT = "B"  # of a case's work
HOST_GRADIENTS = False  # a step has none
HOST: dict[str, object] = {}  # host times are of the last case
PACKAGES = ("flash-linear-attention", "pytorch-fast-transformers", "performer-pytorch")


def contenders(case: Case) -> list[Contender]:
    return CONTENDERS


def versions() -> dict[str, str | None]:
    return contest.versions(PACKAGES)


def error(function: Function, x: Inputs) -> float:
    """The largest difference from what is exact, over the largest value.

    A step changes the state it starts from, so it is given a copy.
    """
    if not x.case.past:
        return contest.off(function(*x.leaves), x.exact)
    kv, z = x.kv, x.z
    x.kv, x.z = kv.clone(), z.clone()
    out = function(*x.leaves)
    x.kv, x.z = kv, z
    return contest.off(out, x.exact)


def limit(sets: list[Inputs]) -> Callable[[int], object]:
    """The limit: as many bytes, half of them read and half written."""

    def call(turn: int) -> None:
        x = sets[turn % len(sets)]
        if x.case.past:
            x.kv.copy_(x.kv.clone())
            return
        pairs, odd = divmod(TENSORS[x.case.what], 2)
        for i in range(pairs):
            x.outs[i % 3].copy_(x.leaves[i % 3])
        if odd:
            half = x.case.length // 2
            x.outs[0][:, :half].copy_(x.leaves[0][:, :half])

    return call


def extras() -> dict[str, Any]:
    return {}


def goals() -> list[Goal]:
    cpu, gpu = on("cpu"), on("cuda")
    shape = "float32, [2, 4096, 12, 64], elu + 1, normalised"
    eager, both = "chunked, torch eager", "float32, forward and backward"
    found = [
        Goal(f"as fast as {eager}", cpu, f"{shape}, forward", 5, "×", speedup(BASE.name, eager)),
        Goal(f"as fast as {eager}", cpu, f"{shape}, forward and backward", 4, "×", speedup(both, eager)),
        Goal("as fast as fast-transformers", cpu, f"{shape}, forward", 3, "×", speedup(BASE.name, "fast-transformers")),
    ]
    for case, target in (
        ("bfloat16, D 128", 0.65),
        ("bfloat16, D 64", 0.55),
        ("bfloat16, D 128, backward", 0.55),
        ("bfloat16, D 64, backward", 0.55),
    ):
        value = fraction(case, OURS)
        found.append(Goal("bandwidth of the copy", gpu, f"{case}, [8, 8192, 16, D]", target, "×", value))
    fla = "flash-linear-attention"
    for case, target in (
        ("bfloat16, D 128", 4),
        ("bfloat16, D 128, backward", 3),
        ("bfloat16, D 128, not normalised", 1.8),
        ("bfloat16, D 128, not normalised, backward", 2),
    ):
        found.append(Goal(f"as fast as {fla}", gpu, f"{case}, [8, 8192, 16, D]", target, "×", speedup(case, fla, OURS)))
    per_token = "the time per token of [8, 8192, 16, 128]"
    found.append(Goal(per_token, gpu, LONG, 1.7, "×", _long_per_token, at_most=True))
    anywhere = Where("a CPU, counted", lambda environment: environment["device_kind"] == "cpu")
    for name, most in (("forward", 1), ("backward", 2)):
        value = _launches("cuda", "float16, T 256, one head of 64", name)
        found.append(Goal("launches", anywhere, f"CUDA, {name}", most, "", value, at_most=True))
    return found


def _long_per_token(results: dict[str, Any]) -> Measured | None:
    """One long sequence against eight shorter ones with as many tokens: how many times as long it takes."""
    best = {
        case: min(
            (
                row["seconds"]
                for row in results["timings"]
                if row["case"] == case and row["contender"] in OURS and row["seconds"]
            ),
            key=lambda seconds: seconds["median"],
            default=None,
        )
        for case in (LARGE.name, LONG)
    }
    long, short = best[LONG], best[LARGE.name]
    if long is None or short is None:
        return None
    return long["median"] / short["median"], long["low"] / short["high"], long["high"] / short["low"]


def _launches(backend: str, case: str, name: str) -> Callable[[dict[str, Any]], Measured | None]:
    def value(results: dict[str, Any]) -> Measured | None:
        for row in results.get("counts", ()):
            if (row["backend"], row["case"], row["pass"]) == (backend, case, name):
                return (row["launches"],) * 3
        return None

    return value
