"""What the operators compute, where something is said about it: numbers without clocks, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx

from . import models

WIDE = torch.float64
SWISH_MEAN, SWISH_SQUARE = 0.2066, 0.3557  # of normal inputs, K8990


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def _turned(x: Tensor, offset: int = 0, inverse: bool = False) -> Tensor:
    """x [n, d] at positions offset, offset + 1 and so on."""
    cos, sin = kx.rope_tables(offset + x.shape[0], x.shape[1], dtype=x.dtype)
    return kx.rope(x[None, :, None], None, cos, sin, offset=offset, inverse=inverse)[0, :, 0]


def rope_relativity() -> dict[str, float]:
    """float32, d = 128: the largest errors over |q| |k|, or over a norm."""
    n, d = 1024, 128
    q, k = _random(n, d).float(), _random(n, d, seed=1).float()
    scale = (q.norm(dim=1)[:, None] * k.norm(dim=1)).double()
    scores = [(_turned(q, t).double() @ _turned(k, t).double().mT) for t in (0, 3072)]
    return {
        "shift": ((scores[0] - scores[1]).abs() / scale).max().item(),
        "norm": (_turned(q).norm(dim=1) / q.norm(dim=1) - 1).abs().max().item(),
        "inverse": ((_turned(_turned(q), inverse=True) - q).norm(dim=1) / q.norm(dim=1)).max().item(),
    }


def decay() -> list[dict[str, float]]:
    """The bound of RoPE's scores at a distance, d = 128, and the root mean square of scores of random q and k."""
    d, found = 128, []
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=WIDE) / d)
    q, k = _random(4096, d), _random(4096, d, seed=1)
    for distance in (0, 1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        phase = torch.polar(torch.ones_like(frequencies), distance * frequencies)
        bound = 2 / d * phase.cumsum(0).abs().sum().item()
        cos, sin = kx.rope_tables(distance + 1, d, dtype=WIDE)
        far = kx.rope(k[None, :, None], None, cos[-1:].expand(4096, -1), sin[-1:].expand(4096, -1))[0, :, 0]
        scores = (q * far).sum(1)
        found.append({"distance": distance, "bound": bound, "scores": scores.square().mean().sqrt().item()})
    return found


def rotated_features() -> list[dict[str, float]]:
    """Linear attention whose numerator alone is rotated, d = 64: what its weights sum to, and how many are negative."""
    n, d, repeats = 512, 64, 16
    sums, negative = torch.zeros(n, dtype=WIDE), 0.0
    for seed in range(repeats):
        q, k = (F.elu(_random(n, d, seed=2 * seed + i)) + 1 for i in range(2))
        weights = (_turned(q) @ _turned(k).mT).tril() / (q * k.cumsum(0)).sum(1, keepdim=True)
        sums += weights.sum(1) / repeats
        negative += (weights < 0).double().sum().item() / repeats / (n * (n + 1) / 2)
    return [{"position": i, "sum": sums[i].item(), "negative": negative} for i in (0, 31, 127, 511)]


def _weights(name: str, q: Tensor, k: Tensor) -> Tensor:
    d = q.shape[1]
    if name == "softmax":
        return (q @ k.mT / d**0.5).softmax(-1)
    if name == "relu²":
        a = (q @ k.mT / d**0.5).relu().square()
        return a / a.sum(-1, keepdim=True)
    a = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    a = a.tril() if name == "causal linear" else a
    return a / a.sum(-1, keepdim=True)


def ranks() -> list[dict[str, Any]]:
    """Of attention matrices of random inputs, n = 256 and d = 16: rank, its entropy's exponential, entropy of rows."""
    q, k, found = _random(256, 16), _random(256, 16, seed=1), []
    for name in ("softmax", "relu²", "linear", "causal linear"):
        a = _weights(name, q, k)
        values = torch.linalg.svdvals(a)
        share = values / values.sum()
        effective = (-(share * share.clamp_min(1e-300).log()).sum()).exp().item()
        entropy = -(a * a.clamp_min(1e-300).log()).sum(1).mean().item()
        rank = int(torch.linalg.matrix_rank(a))
        found.append({"name": name, "rank": rank, "effective": effective, "entropy": entropy})
    return found


def lengths() -> list[dict[str, float]]:
    """Four keys of n that matter (cosine 0.9, value 1, the rest 0 ± 1): the mean output by normaliser, d = 128."""
    d, found = 128, []
    for n in (16, 64, 128, 512, 2048, 8192):
        sums: dict[str, float] = {}
        repeats = 8
        for seed in range(repeats):
            q = F.normalize(_random(d, seed=seed), dim=0) * d**0.5
            noise = F.normalize(_random(4, d, seed=100 + seed), dim=1) * d**0.5
            near = 0.9 * q + 0.19**0.5 * F.normalize(noise - (noise @ q)[:, None] * q / d, dim=1) * d**0.5
            far = F.normalize(_random(n - 4, d, seed=200 + seed), dim=1) * d**0.5
            s = torch.cat((near, far)) @ q / d**0.5
            a, value = s.relu().square(), torch.cat((torch.ones(4, dtype=WIDE), torch.zeros(n - 4, dtype=WIDE)))
            plus = math.log(max(n, 16)) / math.log(512)
            for name, weights in {
                "relu²/n": a / n, "relu²/512": a / 512, "relu²/sum": a / a.sum(), "softmax": s.softmax(0),
                "softmax_plus": (s * plus).softmax(0),
            }.items():  # fmt: skip
                sums[name] = sums.get(name, 0.0) + (weights @ value).item() / repeats
        found.append({"length": n, **sums})
    return found


def entropies() -> list[dict[str, float]]:
    """Mean entropy of rows of softmax attention over random unit vectors times √d, d = 128, by scale."""
    d, found = 128, []
    for n in (64, 512, 4096, 8192):
        q = F.normalize(_random(256, d), dim=1) * d**0.5
        k = F.normalize(_random(n, d, seed=1), dim=1) * d**0.5
        row: dict[str, float] = {"length": n}
        scales = {"1/√d": d**-0.5, "log n/log 512": math.log(n) / math.log(512) * d**-0.5}
        scales["log n/(0.24 d)"] = math.log(n) / (0.24 * d)
        for name, scale in scales.items():
            a = (q @ k.mT * scale).softmax(-1)
            row[name] = -(a * a.clamp_min(1e-300).log()).sum(1).mean().item()
        found.append(row)
    return found


def initial_size() -> dict[str, Any]:
    """A gated attention unit as it is initialised (d 768, e 1536, s 128, LeCun, γ = 1), without RoPE."""
    d, e, s = 768, 1536, 128
    sizes = []
    for n in (64, 512, 2048):
        x = _random(n, d).float()
        q = F.silu(x @ _random(d, s, seed=1).float() / d**0.5)
        v, gate = (F.silu(x @ _random(d, e, seed=seed).float() / d**0.5) for seed in (2, 3))
        out = kx.gau_attention(*(y[None, :, None] for y in (q, q, v, gate)))
        scores = (q @ q.mT / s**0.5).relu().square()
        own = scores.diagonal().mean()
        other = (scores.sum() - scores.diagonal().sum()) / (n * (n - 1))
        sizes.append({"length": n, "rms": out.square().mean().sqrt().item(), "ratio": (own / other).item()})
    z = torch.linspace(-12, 12, 200001, dtype=WIDE)
    density = torch.exp(-z * z / 2) / (2 * math.pi) ** 0.5
    mean, square = (torch.trapezoid(F.silu(z) ** p * density, z).item() for p in (1, 2))
    return {"mean": mean, "square": square, "sizes": sizes}


def same_tokens() -> list[dict[str, float]]:
    """n = 512 equal tokens with RoPE: the spread of what the weights of a row sum to."""
    n, s = 512, 128
    z = F.silu(_random(1, s, seed=3)).expand(n, s)
    turned = _turned(z)
    relu2 = (turned @ turned.mT / s**0.5).relu().square().mean(1)
    softmax = (turned @ turned.mT / s**0.5).softmax(-1).sum(1)
    return [
        {"name": name, "low": x.min().item(), "high": x.max().item()}
        for name, x in (("relu²", relu2), ("softmax", softmax))
    ]


def landmarks() -> list[dict[str, Any]]:
    """Relative error of Nyström attention against softmax attention on sequences of growing smoothness, n = 1024."""
    n, d, found = 1024, 64, []
    for smooth in (0.0, 0.95, 0.99):
        noise = _random(n, d)
        x = [noise[0]]
        for step in noise[1:]:
            x.append(smooth * x[-1] + (1 - smooth**2) ** 0.5 * step)
        q = torch.stack(x)
        k, v = q + 0.1 * _random(n, d, seed=1), _random(n, d, seed=2)
        v = torch.stack(x) @ _random(d, d, seed=4) / d**0.5 if smooth else v
        q, k, v = (y[None, :, None] for y in (q, k, v))
        exact = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
        for init, iterations in (("per_matrix", 6), ("pinv", 6)):
            for m in (8, 16, 32, 64, 128, 256):
                out = kx.nystrom_attention(q, k, v, num_landmarks=m, pinv_iterations=iterations, pinv_init=init)
                assert isinstance(out, Tensor)
                error = ((out - exact).norm() / exact.norm()).item()
                found.append({"smooth": smooth, "inverse": init, "landmarks": m, "error": error})
    return found


def repeated_tokens() -> float:
    """Every token l = 8 times, as many landmarks as tokens, the exact inverse: error against softmax attention."""
    q, k, v = (_random(1, 32, 2, 64, seed=i).repeat_interleave(8, 1) for i in range(3))
    out = kx.nystrom_attention(q, k, v, num_landmarks=32, pinv_init="pinv")
    assert isinstance(out, Tensor)
    exact = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
    return ((out - exact).norm() / exact.norm()).item()


def one_function() -> dict[str, float]:
    """Causal linear attention in float32 against its masked quadratic form in float64, whole and handed on by state."""
    q, k, v = (_random(1, 333, 2, 64, seed=i) for i in range(3))
    a, b = (F.elu(x).add(1).transpose(1, 2) for x in (q, k))
    scores = (a @ b.mT).tril()
    exact = (scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v.transpose(1, 2)).transpose(1, 2)

    def off(out: Any) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    q, k, v = q.float(), k.float(), v.float()
    head, state = kx.linear_attention(q[:, :200], k[:, :200], v[:, :200], return_state=True)
    tail, _ = kx.linear_attention(q[:, 200:], k[:, 200:], v[:, 200:], initial_state=state, return_state=True)
    return {"whole": off(kx.linear_attention(q, k, v)), "handed on": off(torch.cat((head, tail), 1))}


def chunks() -> dict[str, float]:
    """FLASH with one chunk against the quadratic unit, float64: its 1/c for visible keys, and the sum over all."""
    n = 96
    q, k = _random(1, n, 1, 64), _random(1, n, 1, 64, seed=1)
    v, gate = _random(1, n, 1, 128, seed=2), _random(1, n, 1, 128, seed=3)
    seen = torch.arange(1, n + 1, dtype=WIDE)[None, :, None, None]
    causal = kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=n, causal=True)
    unit = kx.gau_attention(q, k, v, gate, causal=True) * seen / n
    full = kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=n)
    term = gate * torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v) / n
    quadratic = kx.gau_attention(q, k, v, gate) + term
    return {
        "causal": ((causal - unit).norm() / unit.norm()).item(),
        "full": ((full - quadratic).norm() / quadratic.norm()).item(),
    }


def _sentences(length: int, count: int = 4) -> Tensor:
    """[count, length] held-out bytes, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    return models.batch(models.text(held_out=True), count, length, generator)


def _activations(name: str, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q and k, rotated, and v of each layer of a trained model, [B, n, H, D]."""
    model = models.load(name)
    with torch.no_grad(), models.listening(model) as found:
        model(_sentences(length))
    return found


def _performer(q: Tensor, k: Tensor, v: Tensor, features: int) -> Tensor:
    mapped = kx.nn.FavorFeatures(q.shape[-1], features)
    out = kx.linear_attention(q, k, v, causal=False, feature_map=mapped)
    assert isinstance(out, Tensor)
    return out


def approximations() -> list[dict[str, Any]]:
    """Relative error against softmax attention on real activations: of landmarks and of random features."""
    found = []
    for n in (256, 512, 1024):
        layers = _activations("roformer-masked", n)
        exact = [F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2) for qkv in layers]

        def error(outs: list[Any], exact: list[Tensor] = exact) -> float:
            off = sum((o - e).square().sum().item() for o, e in zip(outs, exact, strict=True))
            return (off / sum(e.square().sum().item() for e in exact)) ** 0.5

        for size in (16, 32, 64, 128, 256):
            nystrom = [kx.nystrom_attention(*qkv, num_landmarks=size) for qkv in layers]
            found.append({"length": n, "by": "Nyström", "size": size, "error": error(nystrom)})
            performer = [_performer(*qkv, size) for qkv in layers]
            found.append({"length": n, "by": "Performer", "size": size, "error": error(performer)})
    return found


def real_maps() -> list[dict[str, Any]]:
    """Attention matrices of trained models, n = 256 and d = 32: mean rank, effective rank and entropy of rows."""
    found = []
    for name, kind in (("roformer-masked", "softmax"), ("linear-masked", "linear")):
        ranks, effective, entropy = [], [], []
        for q, k, _ in _activations(name, 256):
            for head in range(q.shape[2]):
                a = _weights(kind, q[0, :, head].double(), k[0, :, head].double())
                share = (values := torch.linalg.svdvals(a)) / values.sum()
                ranks.append(int(torch.linalg.matrix_rank(a)))
                effective.append((-(share * share.clamp_min(1e-300).log()).sum()).exp().item())
                entropy.append(-(a * a.clamp_min(1e-300).log()).sum(1).mean().item())
        mean = {key: sum(x) / len(x) for key, x in (("rank", ranks), ("effective", effective), ("entropy", entropy))}
        found.append({"name": kind, **mean})
    return found


def _loss(model: models.Model, length: int) -> float:
    with torch.no_grad():
        return models.loss(model, _sentences(length, 8), torch.Generator().manual_seed(3)).item()


def trained() -> list[dict[str, Any]]:
    """Every trained model's nats per byte of held-out text, by our operators and by the references."""
    found = []
    for name in models.MODELS:
        model = models.load(name)
        ours = _loss(model, models.CONTEXT)
        with kx.backend("reference"):
            reference = _loss(model, models.CONTEXT)
        found.append({"name": name, "loss": ours, "reference": reference})
    return found


def beyond() -> list[dict[str, Any]]:
    """Nats per byte at and beyond the trained length, on the same bytes each time."""
    found = []
    for length in (256, models.CONTEXT, 2 * models.CONTEXT, 4 * models.CONTEXT):
        row: dict[str, Any] = {"length": length}
        for name in ("roformer", "gau", "linear"):
            model = models.load(name)
            with torch.no_grad():
                text = _sentences(4 * models.CONTEXT, 4).view(-1, length)
                row[name] = models.loss(model, text, torch.Generator()).item()
        found.append(row)
    return found


EXPERIMENTS: dict[str, Callable[[], Any]] = {
    "rope_relativity": rope_relativity,
    "decay": decay,
    "rotated_features": rotated_features,
    "ranks": ranks,
    "lengths": lengths,
    "entropies": entropies,
    "initial_size": initial_size,
    "same_tokens": same_tokens,
    "landmarks": landmarks,
    "repeated_tokens": repeated_tokens,
    "one_function": one_function,
    "chunks": chunks,
    "approximations": approximations,
    "real_maps": real_maps,
    "trained": trained,
    "beyond": beyond,
}
