"""Nyström attention: what is measured, against whom, and which goals that decides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kx_kernels as kx
from kx_kernels.ops.nystrom_attention import api
from kx_kernels.ops.nystrom_attention.reference import nystrom_attention as reference

from . import contest
from .contest import Contender, Function, Missing, imported, on, speedup
from .goals import Goal, Measured

KERNEL = 65  # of the convolution, where there is one: Hugging Face's
QUADRATIC = 32768  # tokens: beyond, exact attention takes minutes on a CPU


@dataclass(frozen=True)
class Case:
    """One call: q, k and v [B, n, H, D], m landmarks, six steps. `what`: "forward" or "both"."""

    name: str
    dtype: torch.dtype
    batch: int
    length: int
    heads: int
    head_dim: int
    landmarks: int = 64
    convolution: bool = False
    what: str = "forward"

    @property
    def bytes_moved(self) -> int:
        """Queries read twice, keys and values once, outputs written: 5 units; backward 9 more."""
        unit = self.batch * self.length * self.heads * self.head_dim * self.dtype.itemsize
        return unit * (14 if self.what == "both" else 5)

    @property
    def flops(self) -> int:
        """Of the products with landmarks, of six steps of the inverse and of the convolution; of exact attention, where
        no more tokens than landmarks are. Thrice with their gradients.
        """
        n, m, d = self.length, self.landmarks, self.head_dim
        forward = 4 * n * n * d if n <= m else 8 * n * m * d + 4 * m * m * d + 48 * m**3
        forward += 2 * KERNEL * n * d if self.convolution else 0
        return self.batch * self.heads * forward * (3 if self.what == "both" else 1)

    @property
    def work(self) -> int:
        return self.bytes_moved


BASE = Case("float32", torch.float32, 1, 8192, 12, 64)
LARGE = Case("bfloat16, n = 16384", torch.bfloat16, 8, 16384, 12, 64)
WIDE = Case("bfloat16, B 4 H 16 D 128, n = 65536", torch.bfloat16, 4, 65536, 16, 128)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            BASE,
            replace(BASE, name="float32, forward and backward", what="both"),
            replace(BASE, name="float32, with convolution", convolution=True),
            replace(BASE, name="float32, n = 512", length=512),
            replace(BASE, name="float32, n = 512, forward and backward", length=512, what="both"),
            *(replace(BASE, name=f"float32, {m} landmarks", landmarks=m) for m in (32, 128, 256)),
            replace(BASE, name="bfloat16", dtype=torch.bfloat16),
            replace(BASE, name="float32, one token", length=1),
        ]
    found = [
        replace(case, name=case.name + (", forward and backward" if what == "both" else ""), what=what)
        for case in (
            LARGE,
            replace(LARGE, name="bfloat16, n = 1024", length=1024),
            replace(LARGE, name="bfloat16, n = 65536", length=65536),
            WIDE,
        )
        for what in ("forward", "both")
    ]
    return [*found, replace(LARGE, name="bfloat16, one token", length=1)]


def sweep(device: str) -> list[Case]:
    """The same call at growing lengths; of the variants, at every other one."""
    base = replace(BASE, heads=2) if device == "cpu" else replace(LARGE, batch=1)
    variants: dict[str, dict[str, Any]] = {"": {}, **{f"m = {m}, ": {"landmarks": m} for m in (32, 128, 256)}}
    variants |= {"forward and backward, ": {"what": "both"}, "with convolution, ": {"convolution": True}}
    return [
        replace(base, name=f"{variant}n = {1 << n}", length=1 << n, **how)
        for variant, how in variants.items()
        for n in range(8, 17, 2 if variant else 1)
    ]


def over_landmarks(device: str) -> tuple[str, dict[str, int]]:
    """The place of results, and the landmarks of those cases in it that differ by these alone."""
    where, base, found = "timings", BASE, cases(device)
    if device != "cpu":
        where, base, found = "growth", replace(LARGE, batch=1), sweep(device)
    return where, {c.name: c.landmarks for c in found if replace(c, name=base.name, landmarks=base.landmarks) == base}


def shared(device: str) -> list[Case]:
    """The same number of tokens in longer and fewer sequences."""
    base, tokens = (replace(BASE, heads=2), 14) if device == "cpu" else (LARGE, 17)
    return [replace(base, name=f"n = {1 << n}", batch=1 << tokens - n, length=1 << n) for n in range(8, tokens + 1, 2)]


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
        self.weight = random(case.heads, KERNEL) if case.convolution else None

    def how(self) -> dict[str, Any]:
        return {"num_landmarks": self.case.landmarks, "conv_weight": self.weight}

    @functools.cached_property
    def exact(self) -> Tensor:
        return self.define(*(y.double() for y in self.leaves))

    def define(self, *leaves: Tensor, **convention: str) -> Tensor:
        weight = None if self.weight is None else self.weight.double()
        out = reference(*leaves, **self.how() | {"conv_weight": weight}, **convention)
        assert isinstance(out, Tensor)
        return out


def _exact(landmarks: str) -> Callable[[Inputs], Tensor]:
    """As those have it who start the inverse by the norms of the whole batch."""
    return lambda x: x.define(*(y.double() for y in x.leaves), landmarks=landmarks, pinv_init="original")


def _ours(backend: str) -> Callable[[Inputs], Function]:
    def prepare(x: Inputs) -> Function:
        reasons = dict(api.survey(*x.leaves, **x.how()))
        if reasons[backend] is not None:
            raise Missing(str(reasons[backend]))
        return lambda *leaves: kx.nystrom_attention(*leaves, **x.how(), backend=backend)

    return prepare


def _eager(x: Inputs) -> Function:
    """The same algorithm as one writes it, the inverse in float32."""
    m, scale, weight = x.case.landmarks, x.case.head_dim**-0.5, x.weight
    if x.case.length <= m or x.case.length % m:
        raise Missing("segments of one length only, and more tokens than landmarks")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, n, D]
        q = q * scale
        landmarks = (y.unflatten(2, (m, -1)).mean(3) for y in (q, k))
        small_q, small_k = landmarks
        f = (q @ small_k.mT).softmax(-1)
        a = (small_q.float() @ small_k.float().mT).softmax(-1)
        b = (small_q @ k.mT).softmax(-1)
        z = a.mT / a.sum(-2).amax(-1)[..., None, None]
        eye = torch.eye(m, device=q.device)
        for _ in range(6):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        o = f @ (z @ (b @ v).float()).to(q.dtype)
        if weight is not None:
            o = o + F.conv2d(v, weight[:, None, :, None], padding=(KERNEL // 2, 0), groups=v.shape[1])
        return o.transpose(1, 2)

    return attend


def _compiled(x: Inputs) -> Function:
    return torch.compile(_eager(x), dynamic=False)


def _softmax(x: Inputs) -> Function:
    """The exact attention that it approximates."""
    if x.case.batch * x.case.length > QUADRATIC and x.leaves[0].device.type == "cpu":
        raise Missing("exact attention of so many tokens takes minutes")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)

    return attend


def _softmax_work(case: Case) -> dict[str, int]:
    """Of products with all keys; inputs and output once."""
    unit = case.batch * case.length * case.heads * case.head_dim
    backward = case.what == "both"
    return {
        "flops": (14 if backward else 4) * unit * case.length,
        "bytes": (12 if backward else 4) * unit * case.dtype.itemsize,
    }


class _Given(nn.Module):
    """In the place of a projection: what it is told to give."""

    value: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _hugging_face(x: Inputs) -> Function:
    """Its layer without its projections; the first value of the inverse is over the batch."""
    case = x.case
    if case.length % case.landmarks or case.length < 2 * case.landmarks:
        raise Missing("lengths that landmarks divide only")
    module = imported("transformers.models.nystromformer.modeling_nystromformer", "transformers")
    config = imported("transformers", "transformers").NystromformerConfig(
        hidden_size=case.heads * case.head_dim,
        num_attention_heads=case.heads,
        num_landmarks=case.landmarks,
        segment_means_seq_len=case.length,
        conv_kernel_size=KERNEL,
        attention_probs_dropout_prob=0.0,
    )
    layer = module.NystromformerSelfAttention(config).to(x.leaves[0].device, case.dtype)
    layer.query, layer.key, layer.value = _Given(), _Given(), _Given()
    if x.weight is None:
        layer.conv_kernel_size = None  # which its configuration does not take
    else:
        layer.conv.weight = nn.Parameter(x.weight[:, None, :, None])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, y in (("query", q), ("key", k), ("value", v)):
            getattr(layer, name).value = y.flatten(2)
        return layer(q.flatten(2))[0].unflatten(2, (case.heads, -1))

    return attend


def _lucidrains(x: Inputs) -> Function:
    """Its layer without its projections; the first value of the inverse is over the batch."""
    case = x.case
    module = imported("nystrom_attention", "nystrom-attention")
    layer = module.NystromAttention(
        dim=case.heads * case.head_dim,
        dim_head=case.head_dim,
        heads=case.heads,
        num_landmarks=case.landmarks,
        residual=case.convolution,
        residual_conv_kernel=KERNEL,
    ).to(x.leaves[0].device, case.dtype)
    layer.to_qkv, layer.to_out = _Given(), nn.Identity()
    if x.weight is not None:
        layer.res_conv.weight = nn.Parameter(x.weight[:, None, :, None])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.to_qkv.value = torch.cat([y.flatten(2) for y in (q, k, v)], -1)
        return layer(q.flatten(2)).unflatten(2, (case.heads, -1))

    return attend


CONTENDERS = [
    *(Contender(f"kx {backend}", "ours", _ours(backend)) for backend in ("cuda", "triton", "cpu", "reference")),
    Contender("torch eager", "torch", _eager),
    Contender("torch.compile", "torch", _compiled),
    Contender(
        "softmax attention (SDPA)", "other", _softmax, exact=lambda x: contest.softmax(*x.leaves), work=_softmax_work
    ),
    Contender("Hugging Face", "other", _hugging_face, "transformers", _exact("valid")),
    Contender("nystrom-attention", "other", _lucidrains, "nystrom-attention", _exact("lucidrains")),
]
OURS = ("kx cuda", "kx triton")  # on a GPU
LIMIT = "dst.copy_(src)"
UNIT = "B"  # of a case's work
HOST_GRADIENTS = False
HOST: dict[str, object] = {}  # host times are of the last case
PACKAGES = ("transformers", "nystrom-attention")


def contenders(case: Case) -> list[Contender]:
    return CONTENDERS


def versions() -> dict[str, str | None]:
    return contest.versions(PACKAGES)


def error(function: Function, x: Inputs) -> float:
    """The largest difference from the reference in float64 over the largest value."""
    return contest.off(function(*x.leaves), x.exact)


def limit(sets: list[Inputs]) -> Callable[[int], object]:
    """As many bytes, half of them read and half written."""
    outs = [torch.empty_like(x) for x in sets[0].leaves]
    pairs, odd = divmod(14 if sets[0].case.what == "both" else 5, 2)

    def call(turn: int) -> None:
        x = sets[turn % len(sets)]
        for i in range(pairs):
            outs[i % 3].copy_(x.leaves[i % 3])
        if odd:
            half = x.case.length // 2
            outs[0][:, :half].copy_(x.leaves[0][:, :half])

    return call


def extras() -> dict[str, Any]:
    return {}


def _units(results: dict[str, Any]) -> Measured | None:
    """What the CPU kernel holds at most beside its inputs and its result, in units of one of them."""
    for row in results["memory"]:
        if row["contender"] == "kx cpu" and "peak" in row:
            return (max(0.0, 3 * row["peak"] / row["values"] - 1),) * 3
    return None


def goals() -> list[Goal]:
    cpu, gpu = on("cpu"), on("cuda")
    shape, both = "float32, [1, 8192, 12, 64], 64 landmarks", "float32, forward and backward"
    softmax = "softmax attention (SDPA)"
    found = [
        Goal("as fast as torch eager", cpu, f"{shape}, forward", 3, "×", speedup(BASE.name, "torch eager")),
        Goal("as fast as torch eager", cpu, f"{shape}, forward and backward", 3, "×", speedup(both, "torch eager")),
        Goal(
            "as fast as Hugging Face",
            cpu,
            f"{shape}, with convolution",
            6,
            "×",
            speedup("float32, with convolution", "Hugging Face"),
        ),
        Goal("as fast as SDPA", cpu, "float32, [1, 512, 12, 64]", 1, "×", speedup("float32, n = 512", softmax)),
        Goal("of a unit beside inputs and result", cpu, shape, 0.05, "×", _units, at_most=True),
    ]
    for case, forward, together in (
        ("bfloat16, n = 1024", 0.035, 0.11),
        ("bfloat16, n = 16384", 0.33, 1.0),
        ("bfloat16, n = 65536", 1.25, 3.7),
        (WIDE.name, 1.8, 5.5),
    ):
        for name, target in ((case, forward), (f"{case}, forward and backward", together)):
            found.append(Goal("", gpu, name, target, "ms", contest.milliseconds(name, OURS), at_most=True))
    return found
