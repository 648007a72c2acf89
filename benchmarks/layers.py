"""Whole layers and their parts: attention, what is said to replace it, and the feed-forward layer beside it.

Su's counts are about encoders: nothing here is causal but decoding. Head dimension 64, as in BERT.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kx_kernels as kx

from . import contest, measure
from .calling import calling
from .environment import cache_bytes, free_bytes, own_version
from .gau_attention import eager_scores

HEAD_DIM = 64
WIDTHS = {"small": 384, "base": 768, "large": 1024}
KEY_DIM = 128  # of a gated attention unit
CHUNK = 256  # of FLASH
LANDMARKS = (32, 64, 128, 256)
FEATURES = 256  # of Performer: four times the head dimension
LENGTHS = {"small": (256, 512, 1024, 2048, 4096), "base": (128, 256, 512, 1024, 2048, 4096, 8192)}
LENGTHS["large"] = (512, 1024, 2048, 4096, 8192)
BOTH = {"small": (2048,), "base": (512, 1024, 2048, 4096), "large": (2048,)}  # forward and backward
QUICK = {"small": (256, 1024, 4096), "base": (128, 512, 2048)}
COMPARED = (2048,)  # where every part is timed, whatever the width; at base torch.compile and peers as well
SETS = 4  # of inputs, taken in turn
OURS = ("linear attention, state", "linear attention, state, batch 1", "RoPE, ours")  # of what is not a part
CHECKED = 512  # tokens of which results are compared with the definition's
SHORT = (32, 64)  # of mixing alone, where linear attention should begin to win
COMPAT = "kx_kernels.compat."
ROOM = 0.5  # of free memory, that scores which are kept may take: beyond, a row says that there is none


def dtype_of(device: str) -> torch.dtype:
    """What layers compute in: on a GPU what fused attention takes there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


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


class Performer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = kx.nn.FavorFeatures(HEAD_DIM, FEATURES)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.features(x.float()).transpose(1, 2) for x in (q, k))  # exponents, in float32
        q, k = (q - q.amax(-1, keepdim=True)).exp().to(v), (k - k.amax((-2, -1), keepdim=True)).exp().to(v)
        return (q @ (k.mT @ v.transpose(1, 2)) / (q @ k.sum(2)[..., None])).transpose(1, 2)


class PerformerOurs(Performer):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kx.linear_attention(q, k, v, causal=False, feature_map=self.features)
        assert isinstance(out, Tensor)
        return out


def nystrom(landmarks: int) -> Mix:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        small_q, small_k = (x.unflatten(2, (landmarks, -1)).mean(3) for x in (q, k))
        a = (small_q @ small_k.mT).softmax(-1, torch.float32)  # and so its inverse
        z, eye = a.mT / a.sum(-2).amax(-1)[..., None, None], torch.eye(landmarks, device=q.device)
        for _ in range(6):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        return ((q @ small_k.mT).softmax(-1) @ (z.to(v) @ ((small_q @ k.mT).softmax(-1) @ v))).transpose(1, 2)

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


def mixed(*rows: Tensor) -> Tensor:
    """FLASH's sum within chunks and over all; of two heads, or four, and values and gate."""
    *heads, v, gate = (x[:, :, 0] for x in rows)
    q, k, lin_q, lin_k, n = *heads[:2], *heads[-2:], v.shape[1]
    chunks = [x.unflatten(1, (-1, min(CHUNK, n))) for x in (q, k, v)]
    near = eager_scores(chunks[0], chunks[1]) @ chunks[2] / chunks[1].shape[2]
    return (gate * (near.flatten(1, 2) + lin_q @ (lin_k.mT @ v) / n))[:, :, None]


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
    """The projections and what is between them, with heads of `dims`."""

    def __init__(self, width: int, mix: Mix | None, dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM)) -> None:
        super().__init__()
        self.dims, heads = dims, width // HEAD_DIM
        self.widths = (heads * dims[0], heads * dims[0], heads * dims[1])
        self.inputs = nn.Linear(width, sum(self.widths))
        self.output = nn.Linear(heads * dims[1], width)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).split(self.widths, -1)
        q, k, v = (y.unflatten(-1, (-1, d)) for y, d in ((q, self.dims[0]), (k, self.dims[0]), (v, self.dims[1])))
        return self.output((v if self.mix is None else self.mix(q, k, v)).flatten(-2))


class Gated(nn.Module):
    """Su's gated attention unit, or FLASH's of four heads, in eager torch, with the parameters of ours."""

    def __init__(self, width: int, mix: Mix, heads: int = 2) -> None:
        super().__init__()
        self.widths = (2 * width, 2 * width, KEY_DIM)
        self.in_proj = nn.Linear(width, sum(self.widths))
        self.out_proj = nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.ones(heads, KEY_DIM))
        self.beta = nn.Parameter(torch.zeros(heads, KEY_DIM))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        gate, v, z = F.silu(self.in_proj(x)).split(self.widths, -1)
        heads = (z[..., None, :] * self.gamma + self.beta).unbind(-2)
        return self.out_proj(self.mix(*(y[:, :, None] for y in (*heads, v, gate)))[:, :, 0])


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


Compute = Callable[..., Tensor]


@dataclass(frozen=True)
class Part:
    """Something to time. `level`: "mixing" alone, on heads of `dims`; or "layer", on rows as wide as the model."""

    name: str
    by: str  # "eager", "fused", "torch.compile", "every state", "ours", or a peer's package
    level: str
    build: Callable[[int], Compute]  # given the width of the model
    dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM)  # of queries and keys, of values; mixing
    gated: bool = False
    kept: int = 0  # numbers per pair of tokens, or of a token and a dimension, that the forward pass holds
    multiple: int = 1  # of which a length has to be
    exact: Callable[[Any, int], Compute] | None = None  # a peer's definition, given what was built

    @property
    def usual(self) -> bool:
        """Of the sizes that come first, not compiled, and no peer."""
        first = self.level == "mixing" or not re.search(r"4d|m = (32|128|256)", self.name)
        return first and self.exact is None and self.by != "torch.compile"

    def about(self, width: int, length: int) -> float:
        """Floating-point operations of a forward pass, roughly."""
        linear = 8 * width if self.level == "layer" else 4 * FEATURES
        quadratic = self.kept or self.by == "fused" or self.name.startswith(("attention", "GAU"))
        return length * width * (linear + (4 * length * max(1, self.kept) if quadratic else 0))

    def made(self, width: int, device: str) -> tuple[Compute, list[Tensor]]:
        """The function and its weights."""
        with torch.device("meta" if device == "meta" else "cpu"):
            function = self.build(width)
        if not isinstance(function, nn.Module):
            return function, []
        return function.to(device, dtype_of(device)).eval(), list(function.parameters())

    def shapes(self, width: int, length: int) -> list[tuple[int, ...]]:
        """Of its inputs, the last of which is as large as its output."""
        if self.level == "layer":
            return [(1, length, width)]
        if self.gated:
            return [(1, length, 1, d) for d in (KEY_DIM, KEY_DIM, 2 * width, 2 * width)]
        return [(1, length, width // HEAD_DIM, d) for d in (self.dims[0], self.dims[0], self.dims[1])]

    def inputs(self, width: int, length: int, device: str, gradient: bool = False, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(SETS * length + seed)
        shapes, dtype = self.shapes(width, length), dtype_of(device)
        made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        return [x.requires_grad_(gradient) for x in made]

    def missing(self, width: int, length: int, what: str, device: str) -> str | None:
        copies = 3 if what == "both" else 2
        heads = 1 if self.gated else width // HEAD_DIM
        wide = HEAD_DIM if self.by == "every state" else length
        if self.kept * copies * heads * length * wide * dtype_of(device).itemsize > ROOM * free_bytes(device):
            return "what it keeps has no room"
        return f"its eager form takes multiples of {self.multiple} tokens" if length % self.multiple else None


def _attention(mix: Mix | None, dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM)) -> Callable[[int], nn.Module]:
    return lambda width: Attention(width, mix, dims)


def _twice(build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: nn.Sequential(build(width), build(width))


def _compiled(build: Callable[[int], nn.Module]) -> Callable[[int], Any]:
    return lambda width: torch.compile(build(width), dynamic=False)


class Projected(nn.Module):
    """Hugging Face's attention, and the projection of its output."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.attention: Any = attention
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        self.attention.seq_len = x.shape[1]  # which Nystromformer's has to know
        return self.output(self.attention(x)[0])


def _projected(mix: Mix) -> Callable[[Any, int], nn.Module]:
    """Its definition, with the same parameters."""

    def exact(peer: Any, width: int) -> nn.Module:
        layer = Attention(width, mix)
        for name in ("weight", "bias"):
            three = [getattr(getattr(peer.attention, of), name) for of in ("query", "key", "value")]
            setattr(layer.inputs, name, nn.Parameter(torch.cat(three)))
        layer.output = peer.output
        return layer

    return exact


def _hugging_face(name: str, **how: Any) -> Callable[[int], Projected]:
    """The attention of a model of transformers."""

    def build(width: int) -> Projected:
        module = contest.imported(f"transformers.models.{name.lower()}.modeling_{name.lower()}", "transformers")
        config = getattr(contest.imported("transformers", "transformers"), f"{name}Config")
        made = config(hidden_size=width, num_attention_heads=width // HEAD_DIM, **how)
        return Projected(getattr(module, f"{name}SelfAttention")(made), width)

    return build


def _nystromformer(landmarks: int) -> Callable[[int], nn.Module]:
    """Without its convolution."""

    def build(width: int) -> nn.Module:
        made = _hugging_face("Nystromformer", num_landmarks=landmarks)(width)
        del made.attention.conv
        made.attention.conv_kernel_size = None
        return made

    return build


def _original(landmarks: int) -> Mix:
    """The inverse begins with the norms of all heads together, as peers have it."""
    return lambda q, k, v: kx.nystrom_attention(q, k, v, num_landmarks=landmarks, pinv_init="original")


def _of(module: str, name: str, **how: Any) -> Callable[[int], Any]:
    def build(width: int) -> Any:
        wide = {"heads": width // HEAD_DIM, "dim_head": HEAD_DIM} if name == "NystromAttention" else {}
        made = getattr(contest.imported(module, module.replace("_", "-")), name)(dim=width, **wide, **how)
        for key, weight in made.state_dict().items():
            if key.endswith("gamma"):
                weight.mul_(200)  # so that scores count beside the residual
        return made

    return build


def _standing_in(build: Callable[[int], Any]) -> Callable[[Any, int], Any]:
    """The drop-in for what a peer made, with the same parameters."""

    def exact(peer: Any, width: int) -> Any:
        made = build(width)
        made.load_state_dict(peer.state_dict(), strict=False)
        return made.eval()

    return exact


def _their_performer(width: int) -> nn.Module:
    module = contest.imported("performer_pytorch.performer_pytorch", "performer-pytorch")
    mix = module.FastAttention(HEAD_DIM, FEATURES)

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = mix

        def forward(self, *heads: Tensor) -> Tensor:
            return self.mix(*(x.transpose(1, 2) for x in heads)).transpose(1, 2)

    return Attention(width, Transposed())


def _exact_performer(peer: Any, width: int) -> nn.Module:
    """Theirs adds 1e-4 to features that the largest projection has scaled, which changes what attention gives, and
    takes that projection for a constant where it differentiates."""
    projection = peer.mix.mix.projection_matrix

    def features(x: Tensor, *scaled: int) -> Tensor:
        y = x.transpose(1, 2) * HEAD_DIM**-0.25
        logs = y @ projection.T
        return (logs - y.square().sum(-1, keepdim=True) / 2 - logs.amax(scaled, keepdim=True).detach()).exp() + 1e-4

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = features(q, -1), features(k, -2, -1)
        return (q @ (k.mT @ v.transpose(1, 2)) / (q @ k.sum(2)[..., None])).transpose(1, 2)

    layer = Attention(width, mix)
    layer.inputs, layer.output = peer.inputs, peer.output
    return layer


def peers() -> Iterator[Part]:
    """Layers of other packages. FLASH-pytorch's have their norm, residual and biases by distance."""
    bert = _hugging_face("Bert", attn_implementation="sdpa")
    yield Part("attention", "transformers", "layer", bert, exact=_projected(materialised))
    for m in LANDMARKS:
        name, how = f"Nyström, m = {m}", {"num_landmarks": m, "residual": False}
        exact = _projected(_original(m))
        yield Part(name, "transformers", "layer", _nystromformer(m), multiple=m, exact=exact)
        theirs, ours = (_of(f"{where}nystrom_attention", "NystromAttention", **how) for where in ("", COMPAT))
        yield Part(name, "nystrom-attention", "layer", theirs, multiple=m, exact=_standing_in(ours))
    for name, how in (("GAU", {}), ("FLASH", {"group_size": CHUNK})):
        how = {"query_key_dim": KEY_DIM, "causal": False} | how
        theirs, ours = (_twice(_of(f"{where}flash_pytorch", name, **how)) for where in ("", COMPAT))
        kept = 2 if name == "GAU" else 0
        yield Part(f"{name} × 2", "FLASH-pytorch", "layer", theirs, gated=True, kept=kept, exact=_standing_in(ours))
    yield Part("Performer", "performer-pytorch", "layer", _their_performer, exact=_exact_performer)


def parts() -> Iterator[Part]:
    wider = {"keys and values 4d": (4 * HEAD_DIM, 4 * HEAD_DIM), "keys 4d": (4 * HEAD_DIM, HEAD_DIM)}
    by_dims = {"linear attention": (HEAD_DIM, HEAD_DIM)} | {f"linear attention, {n}": d for n, d in wider.items()}
    two_units = _twice(lambda width: Gated(width, gau))

    yield Part("attention", "eager", "mixing", lambda _: materialised, kept=1)
    yield Part("attention", "fused", "mixing", lambda _: fused)
    for name, dims in by_dims.items():
        yield Part(name, "eager", "mixing", lambda _: linear, dims)
        yield Part(name, "ours", "mixing", lambda _: linear_ours, dims)
    yield Part("Performer", "eager", "mixing", lambda _: Performer())
    yield Part("Performer", "ours", "mixing", lambda _: PerformerOurs())
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
    yield Part("feed-forward", "torch.compile", "layer", _compiled(feed_forward))
    yield Part("attention", "eager", "layer", _attention(materialised), kept=1)
    yield Part("attention", "torch.compile", "layer", _compiled(_attention(materialised)), kept=1)
    yield Part("attention", "fused", "layer", _attention(fused))
    for name, dims in by_dims.items():
        yield Part(name, "eager", "layer", _attention(linear, dims))
        yield Part(name, "ours", "layer", _attention(linear_ours, dims))
    yield Part("Performer", "eager", "layer", lambda width: Attention(width, Performer()))
    yield Part("Performer", "torch.compile", "layer", _compiled(lambda width: Attention(width, Performer())))
    yield Part("Performer", "ours", "layer", lambda width: Attention(width, PerformerOurs()))
    for m in LANDMARKS:
        yield Part(f"Nyström, m = {m}", "eager", "layer", _attention(nystrom(m)), multiple=m)
        yield Part(f"Nyström, m = {m}", "ours", "layer", _attention(nystrom_ours(m)))
    yield Part("linear attention", "torch.compile", "layer", _compiled(_attention(linear)))
    yield Part("Nyström, m = 64", "torch.compile", "layer", _compiled(_attention(nystrom(64))), multiple=64)
    yield Part("GAU × 2", "eager", "layer", two_units, gated=True, kept=2)
    yield Part("GAU × 2", "torch.compile", "layer", _compiled(two_units), gated=True, kept=2)
    yield Part("GAU × 2", "ours", "layer", _twice(kx.nn.GatedAttentionUnit), gated=True)
    two_mixed = _twice(lambda width: Gated(width, mixed, 4))
    yield Part("FLASH × 2", "eager", "layer", two_mixed, multiple=128)
    yield Part("FLASH × 2", "torch.compile", "layer", _compiled(two_mixed), multiple=128)
    yield Part("FLASH × 2", "ours", "layer", _twice(lambda width: kx.nn.FLASH(width, chunk_size=CHUNK)))
    yield from peers()


def timed(level: str, width: int, length: int, what: str, quick: bool) -> list[Part]:
    """The parts that are timed there: all at base forward and where they are compared, else the usual ones. What is
    causal is here for its memory.
    """
    base = width == WIDTHS["base"]
    found = [p for p in parts() if p.level == level and "causal" not in p.name]
    if length in SHORT:
        return [p for p in found if re.match("attention|linear", p.name)]
    if not base and (quick or length not in COMPARED):
        found = [p for p in found if p.name in ("attention", "feed-forward", "projections")]
    if quick or (what == "both" and not (base and length in COMPARED)):
        found = [p for p in found if p.usual]
    against = base and length in COMPARED
    return [p for p in found if against or (p.exact is None and p.by != "torch.compile")]


def find(level: str, name: str, by: str) -> Part | None:
    return next((p for p in parts() if (p.level, p.name, p.by) == (level, name, by)), None)


def results(
    function: Compute, inputs: Sequence[Tensor], gradient: bool, weights: Sequence[Tensor] = ()
) -> list[Tensor]:
    """What a function gives, or the gradients of inputs and weights for one and the same of that: [1, numbers]."""
    if gradient:
        grad = torch.randn(inputs[-1].shape, generator=torch.Generator().manual_seed(1)).to(inputs[-1])
        found = torch.autograd.grad(function(*inputs), [*inputs, *weights], grad)
    else:
        with torch.no_grad():
            found = (function(*inputs),)
    return [x.reshape(1, -1) for x in found]


def furthest(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference, each over the largest value."""
    return max(contest.off(x, y.double()) for x, y in zip(found, exact, strict=True))


def _off(level: str, name: str, by: str, width: int, device: str, gradient: bool) -> float:
    """How far a part is from its definition, which is the reference, with the same weights; of attention, the formula.
    What torch alone defines is not wrong.
    """
    part, definition = find(level, name, by), find(level, name, "eager" if name == "attention" else "ours")
    if part is None or definition is None:
        return 0.0
    function, weights = part.made(width, device)
    exact, its_weights = definition.made(width, device) if part.exact is None else (part.exact(function, width), [])
    if part.exact is None and isinstance(function, nn.Module) and isinstance(exact, nn.Module):
        exact.load_state_dict(function.state_dict())
    if by != "ours":  # others may have theirs in another order
        weights = its_weights = []
    inputs = part.inputs(width, CHECKED, device, gradient)
    found = results(function, inputs, gradient, weights)
    with kx.backend("reference"):
        return furthest(found, results(exact, inputs, gradient, its_weights))


@functools.cache
def outputs_off(level: str, name: str, by: str, width: int, device: str) -> float:
    """How far the result of a part is from its definition's, over the largest value."""
    return _off(level, name, by, width, device, gradient=False)


@functools.cache
def gradients_off(level: str, name: str, by: str, width: int, device: str) -> float:
    """How far gradients of inputs are from the definition's, and in ours those of weights, over the largest value."""
    return _off(level, name, by, width, device, gradient=True)


def compiled_off(function: Any, inputs: Sequence[Tensor], gradient: bool) -> float:
    """How far what is compiled is from what it was compiled of: its result, or gradients of inputs."""
    return furthest(results(function, inputs, gradient), results(contest.original(function), inputs, gradient))


def call(part: Part, width: int, length: int, what: str, device: str) -> Callable[[int], object]:
    """One pass; `what`: "forward" or "both". Missing, if its result is wrong."""
    function, weights = part.made(width, device)
    size = dtype_of(device).itemsize * sum(map(math.prod, part.shapes(width, length)))
    count = max(1, min(SETS, math.ceil(4 * cache_bytes(device) / size)))
    sets = [part.inputs(width, length, device, what == "both", seed) for seed in range(count)]
    which = (part.level, part.name, part.by, width, device)
    for gradient in (False, True)[: 1 + (what == "both")]:
        if part.by == "torch.compile":
            off = compiled_off(function, sets[0], gradient)
        else:
            off = gradients_off(*which) if gradient else outputs_off(*which)
        if why := contest.wrong(off, contest.most_off(part.by == "ours", dtype_of(device), gradient)):
            raise contest.Missing(why)
    if what == "forward":

        def forward(turn: int) -> object:
            with torch.no_grad():
                return function(*sets[turn % count])

        return forward
    with torch.no_grad():
        grad = torch.randn_like(function(*sets[0]))

    def both(turn: int) -> object:
        inputs = sets[turn % count]
        return torch.autograd.grad(function(*inputs), [*inputs, *weights], grad)

    return both


def counted(part: Part, width: int, length: int) -> int:
    """Floating-point operations of the products of an eager forward pass, by torch's counter."""
    function, _ = part.made(width, "meta")
    inputs = [torch.empty(shape, device="meta") for shape in part.shapes(width, length)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*inputs)
    return counter.get_total_flops()


def kept(part: Part, width: int, length: int) -> list[int]:
    """Numbers of each tensor that an eager forward pass keeps for the backward pass, beyond inputs and weights."""
    function, weights = part.made(width, "meta")
    inputs = [torch.empty(shape, device="meta", requires_grad=True) for shape in part.shapes(width, length)]
    sizes = measure.saved(lambda: function(*inputs), [*inputs, *weights])
    return [size // inputs[0].itemsize for size in sizes]


def work(part: Part, width: int, length: int, what: str, device: str) -> dict[str, Any]:
    """The products of the eager form, and bytes of inputs, weights and output once each; thrice with gradients.

    Nothing where there is no eager form. With landmarks as many as tokens, ours is exact attention.
    """
    eager = find(part.level, part.name, "eager")
    if eager is not None and "Nyström" in part.name and length <= eager.multiple and part.by == "ours":
        eager = find(part.level, "attention", "eager")
    if eager is None or length % eager.multiple:
        return {}
    shapes, weights = part.shapes(width, length), eager.made(width, "meta")[1]
    values = sum(math.prod(s) for s in (*shapes, shapes[-1], *(w.shape for w in weights)))
    passes, dtype = 3 if what == "both" else 1, dtype_of(device)
    moved = passes * dtype.itemsize * values
    return {"flops": passes * counted(eager, width, length), "bytes": moved, "dtype": str(dtype).removeprefix("torch.")}


def version(by: str) -> str:
    if by == "ours":
        return own_version()
    return contest.told(by if by in {part.by for part in peers()} else "torch")


def _row(part: Part, width: int, length: int) -> dict[str, Any]:
    row = {"name": part.name, "by": part.by, "level": part.level, "width": width, "length": length}
    return row | {"version": version(part.by)}


def times(
    chosen: Sequence[Part],
    width: int,
    length: int,
    what: str,
    device: str,
    seconds: float,
    allowed: float,
    least: int = 5,
) -> list[dict[str, Any]]:
    """One row per part, in seconds per call, or why there is none; all take turns. allowed: seconds for everything."""
    allowance, ready = measure.Allowance(allowed), measure.Allowance(allowed * measure.READY)
    calls: dict[str, Callable[[int], object]] = {}
    found: list[dict[str, Any]] = []
    for part in chosen:
        counts = work(part, width, length, what, device)
        least_seconds = measure.bound(measure.limits(device), counts) if counts else 0.0
        why = part.missing(width, length, what, device) or ready.refused() or allowance.refused(least_seconds)
        if why is None:
            try:
                with measure.ending(ready.left), calling(str(len(found))):
                    calls[str(len(found))] = call(part, width, length, what, device)
            except contest.Missing as missing:
                why = str(missing)
            except measure.OutOfTime:
                why = measure.LATE
            except Exception as failure:  # no room for it: the others go on
                why = measure.reason(failure)
        row = _row(part, width, length) | {"what": what} | counts
        found.append(row | ({"reason": why} if why else {}))
    rounds, failed = measure.rounds(calls, device, seconds, allowance.once_ready(), least)
    for at, mine in rounds.items():
        found[int(at)] |= measure.numbers(mine)
    for at, why in failed.items():
        found[int(at)]["reason"] = why
    return found


def memory(chosen: Sequence[Part], width: int, length: int, device: str, allowed: float) -> list[dict[str, Any]]:
    """Bytes beyond inputs and weights: at most during a forward pass, and kept for the backward pass."""
    allowance, found = measure.Allowance(allowed), []
    for part in chosen:
        row, why = _row(part, width, length), part.missing(width, length, "both", device) or allowance.refused()
        try:
            with calling(f"{part.level}, {part.name}, {part.by}"):
                found.append(row | ({"reason": why} if why else _held(part, width, length, device)))
        except Exception as failure:
            found.append(row | {"reason": measure.reason(failure)})
    return found


def _held(part: Part, width: int, length: int, device: str) -> dict[str, int]:
    function, weights = part.made(width, device)
    inputs = part.inputs(width, length, device, gradient=True)
    with torch.no_grad():
        peak = measure.peak_bytes(lambda: function(*inputs), device)
    return {"peak": peak, "saved": measure.saved_bytes(lambda: function(*inputs), [*inputs, *weights])}


def training(width: int, length: int, device: str, allowed: float) -> list[dict[str, Any]]:
    """Bytes that mixing tokens, forward and backward, holds at most beyond its inputs."""
    chosen = [p for p in parts() if p.level == "mixing" and p.name in ("attention", "linear attention")]
    rows = []
    for part in chosen:
        function, inputs = part.made(width, device)[0], part.inputs(width, length, device, gradient=True)

        def both(function: Any = function, inputs: list[Tensor] = inputs) -> object:
            out = function(*inputs)
            return torch.autograd.grad(out, inputs, torch.ones_like(out))

        try:
            with calling(f"{part.name}, {part.by}"):
                rows.append(_row(part, width, length) | {"peak": measure.peak_bytes(both, device)})
        except Exception as failure:
            rows.append(_row(part, width, length) | {"reason": measure.reason(failure)})
    return rows


def _named(
    calls: Mapping[str, Callable[[int], object]],
    errors: Mapping[str, float],
    device: str,
    dtype: torch.dtype,
    seconds: float,
    allowed: float,
) -> list[dict[str, Any]]:
    """A row for each call, of those whose result is right with times."""
    most = {name: contest.most_off(name in OURS, dtype) for name in calls}
    reasons = {name: why for name in calls if (why := contest.wrong(errors[name], most[name]))}
    right = {name: call for name, call in calls.items() if name not in reasons}
    rounds, failed = measure.rounds(right, device, seconds, measure.Allowance(allowed))
    reasons |= failed
    return [
        {"name": name, "version": version("ours" if name in OURS else "")}
        | ({"reason": reasons[name]} if name in reasons else measure.numbers(rounds[name]))
        for name in calls
    ]


def decoding(length: int, device: str, seconds: float, allowed: float) -> list[dict[str, Any]]:
    """One token after `length` of them, 12 heads, batch 8 and 1: linear attention's state beside a cache."""
    allowance = measure.Allowance(allowed)
    large = _decoding(8, "", length, device, seconds, allowed / 2)
    return [*large, *_decoding(1, ", batch 1", length, device, seconds, allowance.left)]


def _decoding(
    batch: int, suffix: str, length: int, device: str, seconds: float, allowed: float
) -> list[dict[str, Any]]:
    heads, dtype = 12, dtype_of(device)
    q, k, v = (torch.randn(batch, 1, heads, HEAD_DIM, device=device, dtype=dtype) for _ in range(3))
    keys, values = (torch.randn(batch, length, heads, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    kv = torch.rand(batch, heads, HEAD_DIM, HEAD_DIM, device=device)
    z = length * torch.rand(batch, heads, HEAD_DIM, device=device)

    @torch.no_grad()
    def cached(_: int) -> Tensor:
        keys[:, -1:], values[:, -1:] = k, v
        return fused(q, keys, values)

    @torch.no_grad()
    def recurrent(_: int) -> Tensor:
        return kx.linear_attention_step(q, k, v, (kv, z))

    expected = kx.linear_attention_step(q, k, v, (kv.clone(), z.clone()), backend="reference").double()
    attention, state = f"attention, cache of keys and values{suffix}", f"linear attention, state{suffix}"
    errors = {state: contest.off(recurrent(0), expected)}
    errors[attention] = contest.off(cached(0), contest.softmax(q[:1], keys[:1], values[:1]))
    cache, kept = keys.nbytes + values.nbytes, kv.nbytes + z.nbytes
    numbers = {  # a cache is read, a state read and written
        attention: {"bytes": cache, "moved": cache, "flops": 4 * keys.numel()},
        state: {"bytes": kept, "moved": 2 * kept, "flops": 4 * kv.numel()},
    }
    rows = _named({attention: cached, state: recurrent}, errors, device, dtype, seconds, allowed)
    name = str(dtype).removeprefix("torch.")
    return [row | {"length": length, "dtype": name} | numbers[row["name"]] for row in rows]


def rotary(device: str, seconds: float, quick: bool, allowed: float) -> list[dict[str, Any]]:
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

    def eager() -> tuple[Tensor, Tensor]:
        return turned(q), turned(k)

    compiled = torch.compile(eager, dynamic=False)
    allowance = measure.Allowance(allowed)
    calls: dict[str, Callable[[int], Any]] = {
        "a copy": lambda _: (q.clone(), k.clone()),
        "an embedding added": lambda _: (q + added, k + added),
        "RoPE, eager": lambda _: eager(),
        **({} if quick else {"RoPE, torch.compile": lambda _: compiled()}),
        "RoPE, ours": lambda _: kx.rope(q, k, cos, sin, interleaved=False),
        "RoPE, as matrices": lambda _: [torch.einsum("nij,bnhj->bnhi", angle, x) for x in (q, k)],
    }
    expected = kx.rope(q.double(), k.double(), cos, sin, interleaved=False, backend="reference")

    def error(call: Callable[[int], Any]) -> float:
        try:
            return max(map(contest.off, call(0), expected))
        except Exception:  # its rounds will tell
            return 0.0

    errors = {name: error(call) for name, call in calls.items() if "RoPE" in name}
    moved = 2 * (q.nbytes + k.nbytes)  # read and written once
    errors |= {"a copy": 0.0, "an embedding added": 0.0}
    rows = _named(calls, errors, device, torch.float32, seconds, allowance.left)
    return [row | {"bytes": moved, "flops": 0, "dtype": "float32"} for row in rows]
