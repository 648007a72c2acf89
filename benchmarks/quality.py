"""What the operators compute, where something is said about it: numbers without clocks, the same on every machine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx

from . import models

WIDE = torch.float64
LENGTHS = (16, 64, 128, 512, 2048, 8192)  # of keys, of which four matter
SEEDS, FEW = 8, 4  # of random inputs; where each takes longer


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def _sampled(samples: Mapping[str, Sequence[float]], **row: Any) -> dict[str, Any]:
    """A row of means, and what they are of: what each seed gave, or each sequence of text."""
    return row | {name: sum(x) / len(x) for name, x in samples.items()} | {"samples": samples}


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
    cos, sin = (table[::2] for table in kx.rope_tables(2 * n, d))
    twice = kx.rope(q[None, :, None], None, cos, sin)[0, :, 0]  # R_2m
    return {
        "shift": ((scores[0] - scores[1]).abs() / scale).max().item(),
        "norm": (_turned(q).norm(dim=1) / q.norm(dim=1) - 1).abs().max().item(),
        "inverse": ((_turned(_turned(q), inverse=True) - q).norm(dim=1) / q.norm(dim=1)).max().item(),
        "composition": ((_turned(_turned(q)) - twice).norm(dim=1) / q.norm(dim=1)).max().item(),
        "identity": ((_turned(q)[0] - q[0]).norm() / q[0].norm()).item(),
    }


def phases(distances: Sequence[int], d: int) -> Tensor:
    """RoPE's, [distances, d/2], as complex numbers."""
    angles = torch.tensor(distances)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=WIDE) / d)
    return torch.polar(torch.ones_like(angles), angles)


def decay() -> list[dict[str, Any]]:
    """Of RoPE's scores at a distance, d = 128: bound, root mean square for random q and k, mean/d for equal ones."""
    d, found = 128, []
    q, k = _random(4096, d), _random(4096, d, seed=1)
    for distance in (0, 1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        bound = 2 / d * phases([distance], d).cumsum(1).abs().sum().item()
        cos, sin = kx.rope_tables(distance + 1, d, dtype=WIDE)
        cos, sin = (x[-1:].expand(4096, -1) for x in (cos, sin))
        far_k, far_q = (kx.rope(x[None, :, None], None, cos, sin)[0, :, 0] for x in (k, q))
        scores, same = ((q * far).sum(1).view(16, -1) for far in (far_k, far_q))
        samples = {"scores": scores.square().mean(1).sqrt().tolist(), "same": (same.mean(1) / d).tolist()}
        found.append(_sampled(samples, distance=distance, bound=bound))
    return found


def bounded(q: Tensor, k: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Sizes of the scores of tokens so far apart, and the bound on each, max |hᵢ₊₁ - hᵢ| Σ |Sᵢ|: hᵢ are the products of
    q and k [B, n, H, D], not turned, as complex numbers, and Sᵢ are sums of RoPE's phases.
    """
    turns, far = phases([distance], q.shape[-1])[0], q.shape[1] - distance
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (q, k))
    h = torch.cat((q[:, distance:] * k[:, :far].conj(), k[:, distance:] * q[:, :far].conj()), 1)  # either way
    steps = torch.cat((h, torch.zeros_like(h[..., :1])), -1).diff()
    return (h * turns).sum(-1).real.abs(), steps.abs().amax(-1) * turns.cumsum(0).abs().sum()


def real_decay() -> list[dict[str, Any]]:
    """Mean scores of a trained model's queries and keys at a distance, over their root mean square in a head; and the
    share of heads in which they are less than at distance 1. So their sizes and bounds, by head as well; and the
    largest share of its bound that a score has. Of each sequence.
    """
    distances, scores, sizes, most = (0, 1, 4, 16, 64, 256), [], [], []
    for q, k, _ in _activations("roformer-masked", models.CONTEXT):
        q, k = q.double(), k.double()
        s = torch.einsum("bihd,bjhd->bhij", q, k)
        rms = s.square().mean((2, 3)).sqrt()
        means = [torch.stack([s.diagonal(t, 2, 3).mean(2) for t in {m, -m}]).mean(0) for m in distances]
        scores.append(torch.stack(means) / rms)
        plain = kx.rope(q, k, *kx.rope_tables(q.shape[1], q.shape[3], dtype=WIDE), inverse=True)
        pairs = [bounded(*plain, m) for m in distances]
        sizes.append(torch.stack([torch.stack([x.mean(1) / rms for x in pair]) for pair in pairs]))
        most.append([(size / bound).max().item() for size, bound in pairs])
    heads = torch.cat(scores, 2)  # [distances, sequences, heads of all layers]
    less, beside = (heads < heads[1]).double(), torch.cat(sizes, 3)  # of these sizes and bounds
    found = []
    for i, m in enumerate(distances):
        size, bound = beside[i]
        each = {"score": heads[i], "less": less[i], "size": size, "bound": bound}
        by_head = {"sizes": size.mean(0).tolist(), "bounds": bound.mean(0).tolist()}
        samples = {name: x.mean(1).tolist() for name, x in each.items()}
        found.append(_sampled(samples, distance=m, most=max(x[i] for x in most), **by_head))
    return found


def rotated_features() -> list[dict[str, Any]]:
    """Linear attention whose numerator alone is rotated, d = 64: what its weights sum to, and how many are negative."""
    n, d = 512, 64
    sums, negative = [], []
    for seed in range(16):
        q, k = (F.elu(_random(n, d, seed=2 * seed + i)) + 1 for i in range(2))
        weights = (_turned(q) @ _turned(k).mT).tril() / (q * k.cumsum(0)).sum(1, keepdim=True)
        sums.append(weights.sum(1))
        negative.append((weights < 0).double().sum().item() / (n * (n + 1) / 2))
    found, least = torch.stack(sums, 1), min(x.min().item() for x in sums)
    return [
        _sampled({"sum": found[i].tolist(), "negative": negative}, position=i, least=least) for i in (0, 31, 127, 511)
    ]


def rotated_by_hand() -> dict[str, list[float]]:
    """Two features that turn by 60° a token: the weights of φ(q) = (1, 0) at position 2 on keys (1, 0) and (0.6, 0.8)
    at 0 and 1; and on one key (1, 0) three tokens before, whose weight is a rotated denominator over the unrotated.
    """
    angle = torch.arange(4, dtype=WIDE)[:, None] * math.pi / 3
    tables = (angle.cos(), angle.sin())

    def by(query: list[float], keys: list[list[float]], at: int) -> list[float]:
        n = len(keys)
        q, k = torch.zeros(2, 1, at + 1, 1, 2, dtype=WIDE)
        q[0, at, 0], k[0, :n, 0] = torch.tensor(query), torch.tensor(keys)
        v = torch.eye(at + 1, dtype=WIDE)[None, :, None]
        out = kx.linear_attention(q, k, v, feature_map="identity", rope=tables)
        assert isinstance(out, Tensor)
        return out[0, at, 0, :n].tolist()

    return {"weights": by([1, 0], [[1, 0], [0.6, 0.8]], 2), "opposite": by([1, 0], [[1, 0]], 3)}


def _weights(name: str, q: Tensor, k: Tensor) -> Tensor:
    d = q.shape[-1]
    if name == "softmax":
        return (q @ k.mT / d**0.5).softmax(-1)
    if "relu²" in name:
        a = (q @ k.mT / d**0.5).relu().square()
        a = a.tril() if name == "causal relu²" else a
        return a / a.sum(-1, keepdim=True).clamp_min(1e-300)
    a = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    a = a.tril() if name == "causal linear" else a
    return a / a.sum(-1, keepdim=True)


def _spectrum(a: Tensor) -> dict[str, Tensor]:
    """Of each matrix: rank, its entropy's exponential, and the entropy of rows."""
    values = torch.linalg.svdvals(a)
    share = values / values.sum(-1, keepdim=True)
    least = values.amax(-1, keepdim=True) * a.shape[-1] * torch.finfo(a.dtype).eps
    return {
        "rank": (values > least).double().sum(-1),
        "effective": (-(share * share.clamp_min(1e-300).log()).sum(-1)).exp(),
        "entropy": -(a * a.clamp_min(1e-300).log()).sum(-1).mean(-1),
    }


def ranks() -> list[dict[str, Any]]:
    """Of attention matrices of random inputs, n = 256 and d = 16."""
    q, k, found = _random(SEEDS, 256, 16), _random(SEEDS, 256, 16, seed=1), []
    for name in ("softmax", "relu²", "linear", "causal linear"):
        spectrum = _spectrum(_weights(name, q, k))
        found.append(_sampled({key: x.tolist() for key, x in spectrum.items()}, name=name))
    return found


def lengths() -> list[dict[str, Any]]:
    """Four keys of n that matter (cosine 0.9, value 1, the rest 0 ± 1): the mean output by normaliser, d = 128."""
    return [_sampled({name: [x for x, _ in pairs] for name, pairs in _outputs(n).items()}, length=n) for n in LENGTHS]


def noise() -> list[dict[str, Any]]:
    """What the other keys' values, ± 1, add to these outputs: its standard deviation."""
    return [_sampled({name: [x for _, x in pairs] for name, pairs in _outputs(n).items()}, length=n) for n in LENGTHS]


@functools.cache
def _outputs(n: int) -> dict[str, list[tuple[float, float]]]:
    """By normaliser and seed the output, and the standard deviation of what other keys add."""
    d = 128
    plus = math.log(max(n, 16)) / math.log(512)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(SEEDS):
        q = F.normalize(_random(d, seed=seed), dim=0) * d**0.5
        noise = F.normalize(_random(4, d, seed=100 + seed), dim=1) * d**0.5
        near = 0.9 * q + 0.19**0.5 * F.normalize(noise - (noise @ q)[:, None] * q / d, dim=1) * d**0.5
        far = F.normalize(_random(n - 4, d, seed=200 + seed), dim=1) * d**0.5
        s = torch.cat((near, far)) @ q / d**0.5
        a, others = s.relu().square(), _random(n - 4, seed=300 + seed).sign()
        for name, weights in {
            "relu²/n": a / n, "relu²/512": a / 512, "relu²/sum": a / a.sum(), "softmax": s.softmax(0),
            "softmax_plus": (s * plus).softmax(0),
        }.items():  # fmt: skip
            mean = weights[:4].sum() + weights[4:] @ others
            found.setdefault(name, []).append((mean.item(), weights[4:].norm().item()))
    return found


def scales(n: int, d: int) -> dict[str, float]:
    """What scores are multiplied by."""
    plain = d**-0.5
    named = {"1/√d": plain, "log n/log 512": math.log(n) / math.log(512) * plain}
    return named | {"log n/(0.24 d)": math.log(n) / (0.24 * d)}


def entropies() -> list[dict[str, Any]]:
    """Mean entropy of rows of softmax attention over random unit vectors times √d, d = 128, by scale."""
    d, found = 128, []
    for n in (64, 512, 4096, 8192):
        q, k = (F.normalize(_random(SEEDS, m, d, seed=i), dim=2) * d**0.5 for i, m in enumerate((64, n)))
        samples = {}
        for name, scale in scales(n, d).items():
            a = (q @ k.mT * scale).softmax(-1)
            samples[name] = (-(a * a.clamp_min(1e-300).log()).sum(2).mean(1)).tolist()
        found.append(_sampled(samples, length=n))
    return found


def _initial(n: int, seed: int, turn: bool = False, factor: float = 1.0) -> dict[str, float]:
    """A gated attention unit as it is initialised (d 768, e 1536, s 128, LeCun, γ = 1), its weights times a factor."""
    d, e, s = 768, 1536, 128
    x = _random(n, d, seed=4 * seed).float()
    z = F.silu(x @ _random(d, s, seed=4 * seed + 1).float() * factor / d**0.5)
    q = _turned(z) if turn else z
    v, gate = (F.silu(x @ _random(d, e, seed=4 * seed + i).float() * factor / d**0.5) for i in (2, 3))
    out = kx.gau_attention(*(y[None, :, None] for y in (q, q, v, gate)))
    scores = (q @ q.mT / s**0.5).relu().square()
    own = scores.diagonal().mean()
    other = (scores.sum() - scores.diagonal().sum()) / (n * (n - 1))
    return {"rms": out.square().mean().sqrt().item(), "ratio": (own / other).item()}


def _sizes(turn: bool) -> list[dict[str, Any]]:
    found = []
    for n in (64, 512, 2048):
        each = [_initial(n, seed, turn) for seed in range(FEW)]
        found.append(_sampled({key: [x[key] for x in each] for key in each[0]}, length=n))
    return found


@functools.cache
def swish_moments() -> tuple[float, float]:
    """The means of swish and of its square over a normal distribution."""
    z = torch.linspace(-12, 12, 200001, dtype=WIDE)
    density = torch.exp(-z * z / 2) / (2 * math.pi) ** 0.5
    mean, square = (torch.trapezoid(F.silu(z) ** p * density, z).item() for p in (1, 2))
    return mean, square


def initial_size() -> dict[str, Any]:
    """Moments of swish, and sizes without RoPE."""
    mean, square = swish_moments()
    return {"mean": mean, "square": square, "sizes": _sizes(turn=False)}


def initial_turned() -> list[dict[str, Any]]:
    """Sizes with RoPE."""
    return _sizes(turn=True)


def initial_factors() -> list[dict[str, Any]]:
    """What scaling all four weights does to a unit's output, n = 512: the last one is linear."""
    whole = [_initial(512, seed)["rms"] for seed in range(FEW)]
    return [
        _sampled({"output": [x * _initial(512, i, factor=x)["rms"] / rms for i, rms in enumerate(whole)]}, factor=x)
        for x in (0.5, 2.0)
    ]


def same_tokens() -> list[dict[str, float]]:
    """n = 512 equal tokens with RoPE, their values 1: the least and the largest output."""
    n, s = 512, 128
    turned = _turned(F.silu(_random(1, s, seed=3)).expand(n, s))[None, :, None]
    one = torch.ones(1, n, 1, 1, dtype=WIDE)
    scores = turned[0, :, 0] @ turned[0, :, 0].mT / s**0.5
    weights = (scores - scores.amax(1, keepdim=True)).exp()  # over the root of the sum of its squares: K9105
    outs = {
        "relu²": kx.gau_attention(turned, turned, one),
        "softmax": F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (turned, turned, one))),
        "softmax over l2 norms": weights.sum(1) / weights.norm(dim=1),
    }
    return [{"name": name, "low": x.min().item(), "high": x.max().item()} for name, x in outs.items()]


def landmarks() -> list[dict[str, Any]]:
    """Relative error of Nyström attention against softmax attention on sequences of growing smoothness, n = 1024. Each
    head is a sequence of its own.
    """
    n, d, found = 1024, 64, []
    for smooth in (0.0, 0.95, 0.99):
        noise = _random(n, FEW, d)
        x = [noise[0]]
        for step in noise[1:]:
            x.append(smooth * x[-1] + (1 - smooth**2) ** 0.5 * step)
        q = torch.stack(x)
        k, v = q + 0.1 * _random(n, FEW, d, seed=1), _random(n, FEW, d, seed=2)
        v = q @ _random(d, d, seed=4) / d**0.5 if smooth else v
        q, k, v = (y[None] for y in (q, k, v))
        exact = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
        for init, counts in (("per_matrix", (8, 16, 32)), ("pinv", (32,))):
            for m in (*counts, 64, 128, 256, 512, n):
                how: dict[str, Any] = {"num_landmarks": m, "pinv_iterations": 6, "pinv_init": init}
                how["landmarks"] = "lucidrains"  # by landmarks where all tokens are, as well
                how["backend"] = "reference" if m > 256 else None  # our own would take minutes
                out = kx.nystrom_attention(q, k, v, **how)
                assert isinstance(out, Tensor)
                error = ((out - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3)))[0].tolist()
                found.append(_sampled({"error": error}, smooth=smooth, inverse=init, landmarks=m))
    return found


def repeated_tokens() -> float:
    """Every token l = 8 times, as many landmarks as tokens, the exact inverse: error against softmax attention."""
    q, k, v = (_random(1, 32, 2, 64, seed=i).repeat_interleave(8, 1) for i in range(3))
    out = kx.nystrom_attention(q, k, v, num_landmarks=32, pinv_init="pinv")
    assert isinstance(out, Tensor)
    exact = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
    return ((out - exact).norm() / exact.norm()).item()


def one_function() -> dict[str, float]:
    """Causal linear attention in float32, n = 333, against its masked quadratic form in float64: whole, handed on by
    state, and token by token.
    """
    q, k, v = (_random(1, 333, 2, 64, seed=i) for i in range(3))
    a, b = (F.elu(x).add(1).transpose(1, 2) for x in (q, k))
    scores = (a @ b.mT).tril()
    exact = (scores / (scores.sum(-1, keepdim=True) + 1e-6) @ v.transpose(1, 2)).transpose(1, 2)

    def off(out: Any) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    q, k, v = q.float(), k.float(), v.float()

    def pieces(size: int) -> Any:
        """Each goes on from the state of the one before."""
        outs, state = [], None
        for piece in zip(*(x.split(size, 1) for x in (q, k, v)), strict=True):
            out, state = kx.linear_attention(*piece, initial_state=state, return_state=True)
            outs.append(out)
        return torch.cat(outs, 1)

    state = (torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64))
    steps = [kx.linear_attention_step(*token, state) for token in zip(*(x.split(1, 1) for x in (q, k, v)), strict=True)]
    return {
        "whole": off(kx.linear_attention(q, k, v)),
        "handed on": off(pieces(200)),
        "pieces of 7": off(pieces(7)),
        "recurrent": off(torch.cat(steps, 1)),
    }


def chunks() -> dict[str, float]:
    """FLASH with one chunk against the quadratic unit, float64: its 1/c for visible keys, and the sum over all. With
    chunks of one token, against causal linear attention and a diagonal.
    """
    n = 96
    q, k = _random(1, n, 1, 64), _random(1, n, 1, 64, seed=1)
    v, gate = _random(1, n, 1, 128, seed=2), _random(1, n, 1, 128, seed=3)
    seen = torch.arange(1, n + 1, dtype=WIDE)[None, :, None, None]
    causal = kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=n, causal=True)
    unit = kx.gau_attention(q, k, v, gate, causal=True) * seen / n
    full = kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=n)
    term = gate * torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v) / n
    quadratic = kx.gau_attention(q, k, v, gate) + term
    single = kx.mixed_chunk_attention(q, k, q, k, v, gate, chunk_size=1, causal=True)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).tril(-1) / (seen[0, :, 0] - 1).clamp_min(1)  # of earlier tokens
    own = ((q * k).sum(-1, keepdim=True) / 64**0.5).relu().square()
    linear = gate * (torch.einsum("bhij,bjhe->bihe", weights, v) + own * v)
    return {
        "causal": ((causal - unit).norm() / unit.norm()).item(),
        "full": ((full - quadratic).norm() / quadratic.norm()).item(),
        "one token each": ((single - linear).norm() / linear.norm()).item(),
    }


def _sentences(length: int, count: int = 8) -> Tensor:
    """[count, length] held-out bytes, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    return models.batch(models.text(held_out=True), count, length, generator)


def _activations(name: str, length: int, count: int = 8) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q and k, rotated, and v of each layer of a trained model, [B, n, H, D]."""
    model = models.load(name)
    with torch.no_grad(), models.listening(model) as found:
        model(_sentences(length, count))
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

        def error(outs: list[Any], exact: list[Tensor] = exact) -> dict[str, list[float]]:
            """Of each sequence, over all layers."""
            off, whole = (
                torch.stack([x.square().sum((1, 2, 3)) for x in layers]).sum(0)
                for layers in ([o - e for o, e in zip(outs, exact, strict=True)], exact)
            )
            return {"error": (off / whole).sqrt().tolist()}

        for size in (16, 32, 64, 128, 256):
            nystrom = [kx.nystrom_attention(*qkv, num_landmarks=size) for qkv in layers]
            found.append(_sampled(error(nystrom), length=n, by="Nyström", size=size))
            performer = [_performer(*qkv, size) for qkv in layers]
            found.append(_sampled(error(performer), length=n, by="Performer", size=size))
    return found


def real_maps() -> list[dict[str, Any]]:
    """Attention matrices of trained models, n = 256: mean rank, effective rank and entropy of rows. d = 32, and 64 of
    gated attention, which is causal and whose rows are divided by their sums.
    """
    found = []
    for name, kind in (("roformer-masked", "softmax"), ("linear-masked", "linear"), ("gau", "causal relu²")):
        layers = [
            _spectrum(_weights(kind, *(x.transpose(1, 2).double() for x in (q, k))))
            for q, k, _ in _activations(name, 256, FEW)
        ]
        samples = {key: torch.cat([layer[key] for layer in layers], 1).mean(1).tolist() for key in layers[0]}
        found.append(_sampled(samples, name=kind))
    return found


def _losses(model: models.Model, text: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return models.nats(model, text, torch.Generator().manual_seed(3))


def _loss(model: models.Model) -> tuple[float, list[float]]:
    """Nats per byte of held-out text, and of each sequence."""
    found = _losses(model, _sentences(models.CONTEXT))
    return torch.cat(found).mean().item(), [x.mean().item() for x in found]


def trained() -> list[dict[str, Any]]:
    """Every trained model's nats per byte of held-out text, by our operators and by the references."""
    found = []
    for name in models.MODELS:
        model = models.load(name)
        ours, each = _loss(model)
        with kx.backend("reference"):
            reference, _ = _loss(model)
        found.append({"name": name, "loss": ours, "reference": reference, "samples": {"loss": each}})
    return found


def copied() -> list[dict[str, Any]]:
    """Nats per symbol of the models that copy, on symbols they have not seen; who guesses has log 10."""
    found = []
    for name, config in models.COPYING.items():
        losses = _losses(models.load(name), models.copies(64, torch.Generator().manual_seed(4)))
        found.append(_sampled({"loss": [x.mean().item() for x in losses]}, name=name, mixing=config.mixing))
    return found


def _band(layer: models.Attention, width: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The layer's linear attention, of keys less than `width` away."""
    n = q.shape[1]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    near = torch.ones(n, n).tril(width - 1).triu(1 - width)
    near = near.tril() if layer.config.causal else near
    weights, sums = (torch.einsum("bihd,bjhd->bhij", *x) * near for x in (layer.turned(q, k), (q, k)))
    return torch.einsum("bhij,bjhe->bihe", weights / sums.sum(-1, keepdim=True), v)


def bands() -> list[dict[str, Any]]:
    """Nats per byte of models of linear attention, trained with all keys, where only those in a band are left."""
    found = []
    for name in ("linear", "linear-masked"):
        for width in (16, 64, models.CONTEXT):
            model = models.load(name)
            for layer in model.layers:
                if isinstance(layer, models.Attention):
                    layer.mix = functools.partial(_band, layer, width)
            loss, each = _loss(model)
            found.append({"name": name, "band": width, "loss": loss, "samples": {"loss": each}})
    return found


def _scaled(layer: models.Attention, least: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention whose scores grow with log n, of keys that are seen, from so many on."""
    n = torch.arange(1, q.shape[1] + 1).clamp_min(least)
    return layer.softmax(q * (n.log() / math.log(models.CONTEXT))[:, None, None], k, v)


LEAST = {"roformer, log n": models.CONTEXT, "roformer, softmax_plus": 16}  # keys, that a scale of log n begins with


def beyond() -> list[dict[str, Any]]:
    """Nats per byte at and beyond the trained length, on the same bytes each time. As trained; with scores that grow by
    log n, or a divisor n that stays, beyond that length; and with softmax_plus, which is log n from 16 keys on.
    """
    found = []
    for length in (models.CONTEXT, 2 * models.CONTEXT, 4 * models.CONTEXT):
        samples = {}
        text = _sentences(4 * models.CONTEXT, 6).view(-1, length)
        for name in ("roformer", "gau", "linear", "roformer, log n", "roformer, softmax_plus", "gau, n fixed"):
            model = models.load(name.split(", ")[0])
            for layer in model.layers:
                if name in LEAST and isinstance(layer, models.Attention):
                    layer.mix = functools.partial(_scaled, layer, LEAST[name])
                if name == "gau, n fixed" and isinstance(layer, kx.nn.GatedAttentionUnit):
                    seen = torch.arange(1, length).clamp_max(models.CONTEXT)
                    layer.normalizer = (1 / seen).expand(len(text), -1)
            losses = torch.stack([x.mean() for x in _losses(model, text)])
            samples[name] = losses.view(6, -1).mean(1).tolist()
        found.append(_sampled(samples, length=length))
    return found


EXPERIMENTS: dict[str, Callable[[], Any]] = {
    "rope_relativity": rope_relativity,
    "decay": decay,
    "real_decay": real_decay,
    "rotated_features": rotated_features,
    "rotated_by_hand": rotated_by_hand,
    "ranks": ranks,
    "lengths": lengths,
    "noise": noise,
    "entropies": entropies,
    "initial_size": initial_size,
    "initial_turned": initial_turned,
    "initial_factors": initial_factors,
    "same_tokens": same_tokens,
    "landmarks": landmarks,
    "repeated_tokens": repeated_tokens,
    "one_function": one_function,
    "chunks": chunks,
    "approximations": approximations,
    "real_maps": real_maps,
    "trained": trained,
    "copied": copied,
    "bands": bands,
    "beyond": beyond,
}
