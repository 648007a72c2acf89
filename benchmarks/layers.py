"""Whole layers and their parts: attention, what is said to replace it, and the feed-forward layer beside it.

Su's counts are about encoders: nothing here is causal but decoding. Head dimension 64, as in BERT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kx_kernels as kx

from . import measure
from .gau_attention import eager_scores

HEAD_DIM = 64
WIDTHS = {"small": 384, "base": 768, "large": 1024}
KEY_DIM = 128  # of a gated attention unit
CHUNK = 256  # of FLASH
LANDMARKS = (32, 64, 128, 256)
FEATURES = 256  # of Performer: four times the head dimension
LENGTHS = {"small": (256, 512, 1024, 2048, 4096), "base": (128, 256, 512, 1024, 2048, 4096, 8192)}
LENGTHS["large"] = (512, 1024, 2048, 4096, 8192)
SHORT = (32, 64)  # of mixing alone, where linear attention should begin to win
MOST_BYTES = 4e9  # of scores that are kept: beyond, a row says that there is no room

Mix = Callable[..., Tensor]


# Mixing: q, k [B, n, H, D], v [B, n, H, E], and a gate as wide where the layer has one.
def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (F.elu(q) + 1).transpose(1, 2), (F.elu(k) + 1).transpose(1, 2), v.transpose(1, 2)
    return (q @ (k.mT @ v) / (q @ k.sum(2)[..., None] + 1e-6)).transpose(1, 2)


def linear_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = kx.linear_attention(q, k, v, causal=False)
    assert isinstance(out, Tensor)
    return out


def performer_ours() -> Mix:
    features = kx.nn.FavorFeatures(HEAD_DIM, FEATURES)

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kx.linear_attention(q, k, v, causal=False, feature_map=features)
        assert isinstance(out, Tensor)
        return out

    return mix


def nystrom(landmarks: int) -> Mix:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        small_q, small_k = (x.unflatten(2, (landmarks, -1)).mean(3) for x in (q, k))
        a = (small_q @ small_k.mT).softmax(-1)
        z, eye = a.mT / a.sum(-2).amax(-1)[..., None, None], torch.eye(landmarks, device=q.device, dtype=q.dtype)
        for _ in range(6):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return ((q @ small_k.mT).softmax(-1) @ (z @ ((small_q @ k.mT).softmax(-1) @ v))).transpose(1, 2)

    return mix


def nystrom_ours(landmarks: int) -> Mix:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kx.nystrom_attention(q, k, v, num_landmarks=landmarks)
        assert isinstance(out, Tensor)
        return out

    return mix


def gau(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    q, k, v, gate = (x[:, :, 0] for x in (q, k, v, gate))
    return (gate * (eager_scores(q, k) @ v / k.shape[1]))[:, :, None]


def gau_ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return kx.gau_attention(q, k, v, gate)


def mixed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """FLASH's sum within chunks and over all."""
    n, (q, k, v, gate) = q.shape[1], (x[:, :, 0] for x in (q, k, v, gate))
    chunks = [x.unflatten(1, (-1, min(CHUNK, n))) for x in (q, k, v)]
    near = eager_scores(chunks[0], chunks[1]) @ chunks[2] / chunks[1].shape[2]
    return (gate * (near.flatten(1, 2) + q @ (k.mT @ v) / n))[:, :, None]


def causal_states(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention in parallel: the state after every token."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = (k[..., :, None] * v[..., None, :]).cumsum(1)  # [B, n, H, D, E]
    return torch.einsum("bnhd,bnhde->bnhe", q, states) / ((q * k.cumsum(1)).sum(-1, keepdim=True) + 1e-6)


def causal_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = kx.linear_attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


def mixed_ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=CHUNK)


def mixed_causal(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=CHUNK, causal=True)


class Attention(nn.Module):
    """The four projections and what is between them."""

    def __init__(self, width: int, mix: Mix | None) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in self.inputs(x).chunk(3, -1))
        return self.output((v if self.mix is None else self.mix(q, k, v)).flatten(-2))


class Gated(nn.Module):
    """Su's gated attention unit, or FLASH's, in eager torch."""

    def __init__(self, width: int, mix: Mix) -> None:
        super().__init__()
        self.widths = (2 * width, 2 * width, KEY_DIM)
        self.inputs = nn.Linear(width, sum(self.widths))
        self.output = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.ones(2, KEY_DIM))
        self.beta = nn.Parameter(torch.zeros(2, KEY_DIM))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        gate, v, z = F.silu(self.inputs(x)).split(self.widths, -1)
        q, k = (z[..., None, :] * self.gamma + self.beta).unbind(-2)
        return self.output(self.mix(*(y[:, :, None] for y in (q, k, v, gate)))[:, :, 0])


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


@dataclass(frozen=True)
class Part:
    """Something to time. `level`: "mixing" alone, on heads of `dims`; or "layer", on rows as wide as the model."""

    name: str
    by: str  # "eager", "torch.compile", or "ours"
    level: str
    build: Callable[[int], Callable[..., Tensor]]  # given the width of the model
    dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM)  # of queries and keys, of values; mixing
    gated: bool = False
    kept: int = 0  # numbers per pair of tokens, or of a token and a dimension, that the forward pass holds
    multiple: int = 1  # of which a length has to be

    def inputs(self, width: int, length: int, device: str, gradient: bool) -> list[Tensor]:
        if self.level == "layer":
            shapes = [(1, length, width)]
        elif self.gated:
            shapes = [(1, length, 1, d) for d in (KEY_DIM, KEY_DIM, 2 * width, 2 * width)]
        else:
            shapes = [(1, length, width // HEAD_DIM, d) for d in (self.dims[0], self.dims[0], self.dims[1])]
        generator = torch.Generator().manual_seed(length)
        made = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        return [x.requires_grad_(gradient) for x in made]

    def missing(self, width: int, length: int, what: str) -> str | None:
        copies = 3 if what == "both" else 2
        heads = 1 if self.gated else width // HEAD_DIM
        wide = HEAD_DIM if self.by == "every state" else length
        if self.kept * copies * heads * length * wide * 4 > MOST_BYTES:
            return "what it keeps has no room"
        return f"its eager form takes multiples of {self.multiple} tokens" if length % self.multiple else None


def _attention(mix: Mix | None) -> Callable[[int], nn.Module]:
    return lambda width: Attention(width, mix)


def _twice(build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: nn.Sequential(build(width), build(width))


def parts() -> Iterator[Part]:
    yield Part("attention", "eager", "mixing", lambda _: materialised, kept=1)
    yield Part("attention", "fused", "mixing", lambda _: fused)
    for name, dims in (
        ("linear attention", (HEAD_DIM, HEAD_DIM)),
        ("linear attention, keys and values 4d", (4 * HEAD_DIM, 4 * HEAD_DIM)),
        ("linear attention, keys 4d", (4 * HEAD_DIM, HEAD_DIM)),
    ):
        yield Part(name, "eager", "mixing", lambda _: linear, dims)
        yield Part(name, "ours", "mixing", lambda _: linear_ours, dims)
    for m in LANDMARKS:
        yield Part(f"Nyström, m = {m}", "eager", "mixing", lambda _, m=m: nystrom(m), multiple=m)
        yield Part(f"Nyström, m = {m}", "ours", "mixing", lambda _, m=m: nystrom_ours(m))
    yield Part("GAU", "eager", "mixing", lambda _: gau, gated=True, kept=1)
    yield Part("GAU", "ours", "mixing", lambda _: gau_ours, gated=True)
    yield Part("FLASH", "eager", "mixing", lambda _: mixed, gated=True, multiple=128)
    yield Part("FLASH", "ours", "mixing", lambda _: mixed_ours, gated=True)

    yield Part("FLASH, causal", "ours", "mixing", lambda _: mixed_causal, gated=True)
    yield Part("causal linear attention", "every state", "mixing", lambda _: causal_states, kept=HEAD_DIM)
    yield Part("causal linear attention", "ours", "mixing", lambda _: causal_ours)

    yield Part("projections", "eager", "layer", _attention(None))
    yield Part("feed-forward", "eager", "layer", feed_forward)
    yield Part("attention", "eager", "layer", _attention(materialised), kept=1)
    yield Part("attention", "fused", "layer", _attention(fused))
    yield Part("linear attention", "eager", "layer", _attention(linear))
    yield Part("linear attention", "ours", "layer", _attention(linear_ours))
    yield Part("Performer", "ours", "layer", lambda width: Attention(width, performer_ours()))
    yield Part("Nyström, m = 64", "eager", "layer", _attention(nystrom(64)), multiple=64)
    yield Part("Nyström, m = 64", "ours", "layer", _attention(nystrom_ours(64)))
    yield Part("GAU × 2", "eager", "layer", _twice(lambda width: Gated(width, gau)), gated=True, kept=2)
    yield Part("GAU × 2", "ours", "layer", _twice(kx.nn.GatedAttentionUnit), gated=True)
    yield Part("FLASH × 2", "eager", "layer", _twice(lambda width: Gated(width, mixed)), multiple=128)
    yield Part("FLASH × 2", "ours", "layer", _twice(lambda width: kx.nn.FLASH(width, chunk_size=CHUNK)))


def call(part: Part, width: int, length: int, what: str, device: str) -> Callable[[int], object]:
    """One pass; `what`: "forward" or "both"."""
    function = part.build(width)
    weights: list[Tensor] = []
    if isinstance(function, nn.Module):
        function = function.to(device)
        weights = list(function.parameters())
    inputs = part.inputs(width, length, device, what == "both")
    if what == "forward":

        def forward(_: int) -> object:
            with torch.no_grad():
                return function(*inputs)

        return forward
    with torch.no_grad():
        grad = torch.randn_like(function(*inputs))
    return lambda _: torch.autograd.grad(function(*inputs), [*inputs, *weights], grad)


def counted(part: Part, width: int, length: int) -> int:
    """Floating-point operations of the products of an eager forward pass, by torch's counter."""
    with torch.device("meta"):
        function = part.build(width)
        inputs = [x.detach() for x in part.inputs(width, length, "meta", False)]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            function(*inputs)
    return counter.get_total_flops()


def times(
    chosen: Sequence[Part], width: int, length: int, what: str, device: str, seconds: float
) -> list[dict[str, Any]]:
    """One row per part, in seconds per call, or why there is none; all take turns."""
    calls, found = {}, []
    for part in chosen:
        row = {"name": part.name, "by": part.by, "level": part.level, "width": width, "length": length, "what": what}
        why = part.missing(width, length, what)
        if why is None:
            try:
                calls[len(found)] = call(part, width, length, what, device)
            except (RuntimeError, MemoryError) as error:  # no room for it: the others go on
                why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        found.append(row | ({"reason": why} if why else {}))
    for at, rounds in measure.rounds({str(i): c for i, c in calls.items()}, device, seconds, least=5).items():
        found[int(at)] |= {"times": rounds, "seconds": asdict(measure.Spread.of(rounds))}
    return found


def memory(chosen: Sequence[Part], width: int, length: int, device: str) -> list[dict[str, Any]]:
    """Bytes beyond inputs and weights: at most during a forward pass, and kept for the backward pass."""
    found = []
    for part in chosen:
        row = {"name": part.name, "by": part.by, "level": part.level, "width": width, "length": length}
        why = part.missing(width, length, "both")
        if why is not None:
            found.append(row | {"reason": why})
            continue
        function = part.build(width)
        weights = list(function.parameters()) if isinstance(function, nn.Module) else []
        inputs = part.inputs(width, length, device, True)

        def forward(function: Any = function, inputs: Any = inputs) -> object:
            return function(*inputs)

        with torch.no_grad():
            peak = measure.peak_bytes(forward, device)
        found.append(row | {"peak": peak, "saved": measure.saved_bytes(forward, [*inputs, *weights])})
    return found


def decoding(length: int, device: str, seconds: float) -> list[dict[str, Any]]:
    """One token after `length` of them, 12 heads, batch 8 and 1: linear attention's state beside a cache."""
    return [*_decoding(8, "", length, device, seconds), *_decoding(1, ", batch 1", length, device, seconds)]


def _decoding(batch: int, suffix: str, length: int, device: str, seconds: float) -> list[dict[str, Any]]:
    heads = 12
    q, k, v = (torch.randn(batch, 1, heads, HEAD_DIM, device=device) for _ in range(3))
    keys, values = (torch.randn(batch, length, heads, HEAD_DIM, device=device) for _ in range(2))
    kv = torch.rand(batch, heads, HEAD_DIM, HEAD_DIM, device=device)
    z = length * torch.rand(batch, heads, HEAD_DIM, device=device)

    @torch.no_grad()
    def cached(_: int) -> object:
        keys[:, -1:], values[:, -1:] = k, v
        return fused(q, keys, values)

    @torch.no_grad()
    def recurrent(_: int) -> object:
        return kx.linear_attention_step(q, k, v, (kv, z))

    calls = {"attention, cache of keys and values": cached, "linear attention, state": recurrent}
    held = {"attention, cache of keys and values": keys.nbytes + values.nbytes}
    held["linear attention, state"] = kv.nbytes + z.nbytes
    return [
        {"name": name + suffix, "length": length, "bytes": held[name]}
        | {"times": t, "seconds": asdict(measure.Spread.of(t))}
        for name, t in measure.rounds(calls, device, seconds).items()
    ]


def rotary(device: str, seconds: float) -> list[dict[str, Any]]:
    """Positions for q and k of EleutherAI's measurement [2048, 16, 12, 64], a quarter of its batch."""
    shape = (4, 2048, 12, HEAD_DIM)
    q, k, added = torch.randn(shape, device=device), torch.randn(shape, device=device), torch.randn(2048, 1, HEAD_DIM)
    cos, sin = kx.rope_tables(2048, HEAD_DIM, device=device)
    added = added.to(device)
    wide_cos, wide_sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
    angle = torch.zeros(2048, HEAD_DIM, HEAD_DIM, device=device)  # R_m as matrices, in halves
    pairs = torch.arange(HEAD_DIM // 2, device=device)
    for at, other in ((pairs, pairs), (pairs + HEAD_DIM // 2, pairs + HEAD_DIM // 2)):
        angle[:, at, other] = cos
    angle[:, pairs, pairs + HEAD_DIM // 2], angle[:, pairs + HEAD_DIM // 2, pairs] = -sin, sin

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * wide_cos + torch.cat((-b, a), -1) * wide_sin

    def eager() -> object:
        return turned(q), turned(k)

    compiled = torch.compile(eager, dynamic=False)
    calls: dict[str, Callable[[int], object]] = {
        "a copy": lambda _: (q.clone(), k.clone()),
        "an embedding added": lambda _: (q + added, k + added),
        "RoPE, eager": lambda _: eager(),
        "RoPE, torch.compile": lambda _: compiled(),
        "RoPE, ours": lambda _: kx.rope(q, k, cos, sin, interleaved=False),
        "RoPE, as matrices": lambda _: [torch.einsum("nij,bnhj->bnhi", angle, x) for x in (q, k)],
    }
    moved = 2 * (q.nbytes + k.nbytes)  # read and written once
    return [
        {"name": name, "bytes": moved, "times": t, "seconds": asdict(measure.Spread.of(t))}
        for name, t in measure.rounds(calls, device, seconds).items()
    ]
