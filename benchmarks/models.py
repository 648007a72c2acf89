"""Small models of bytes, for real queries, keys and values: trained by `python -m benchmarks.train`, kept beside it.

Their text is the source of Python's own standard library, which every machine has.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kx_kernels as kx

WEIGHTS = Path(__file__).parent / "models"
WIDTH, HEADS, LAYERS, FORWARD = 96, 3, 3, 3  # forward: times the width
KEY_DIM, LANDMARKS, CONTEXT = 64, 64, 512
MASK = 256  # the byte that stands for a hidden one
HIDDEN = 0.15  # share of bytes that a masked model has to find

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """mixing: "softmax", "linear", "nystrom" or "gau". causal: predicts the next byte; else finds hidden ones. copies:
    reads symbols drawn at random and a separator, and predicts the same symbols again.
    """

    mixing: str
    causal: bool
    copies: bool = False
    width: int = WIDTH
    heads: int = HEADS
    layers: int = LAYERS


MODELS = {
    "roformer": Config("softmax", True),
    "linear": Config("linear", True),
    "gau": Config("gau", True),
    "roformer-masked": Config("softmax", False),
    "linear-masked": Config("linear", False),
    "nystrom-masked": Config("nystrom", False),
}
COPYING = {
    f"{name}-copy": Config(mixing, True, copies=True, width=32, heads=1, layers=2)
    for name, mixing in (("roformer", "softmax"), ("linear", "linear"))
}
SYMBOLS, COPIED = 10, 63  # of what is copied: kinds, and how many there are


class Attention(nn.Module):
    """Heads with RoPE; `mix` can be changed to look at or to replace what is between the projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inputs = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.rotary = kx.nn.RotaryEmbedding(config.width // config.heads, max_positions=CONTEXT)
        self.config = config
        self.mix: Mix = {"softmax": self.softmax, "linear": self.linear, "nystrom": self.nystrom}[config.mixing]

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return kx.rope(q, k, *self.rotary.tables(q.shape[1], q.device))

    def softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (*self.turned(q, k), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal).transpose(1, 2)

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = self.rotary.tables(q.shape[1], q.device)
        out = kx.linear_attention(q, k, v, causal=self.config.causal, rope=tables)
        assert isinstance(out, Tensor)
        return out

    def nystrom(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kx.nystrom_attention(*self.turned(q, k), v, num_landmarks=LANDMARKS)
        assert isinstance(out, Tensor)
        return out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.config.heads, -1)) for y in self.inputs(x).chunk(3, -1))
        return self.output(self.mix(q, k, v).flatten(-2))


class Model(nn.Module):
    """[B, n] bytes to [B, n, 256] logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(257, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        layers: list[nn.Module] = []
        for _ in range(config.layers):
            if config.mixing == "gau":
                rotary = kx.nn.RotaryEmbedding(KEY_DIM, max_positions=CONTEXT)
                layers += [
                    kx.nn.GatedAttentionUnit(width, key_dim=KEY_DIM, causal=config.causal, rotary=rotary)
                    for _ in range(2)
                ]
            else:
                inner = FORWARD * width
                layers += [
                    Attention(config), nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
                ]  # fmt: skip
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(len(layers) + 1))
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            h = h + layer(norm(h))
        return self.norms[-1](h) @ self.embedding.weight[:256].T


def nats(model: Model, text: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Of each row of [B, n] bytes: what the next ones take, those that are hidden, or those that are copied."""
    if model.config.causal:
        first = COPIED if model.config.copies else 0
        asked = torch.ones_like(text[:, first + 1 :], dtype=torch.bool)
        out, text = model(text[:, :-1])[:, first:], text[:, first + 1 :]
    else:
        asked = torch.rand(text.shape, generator=generator) < HIDDEN
        out = model(text.masked_fill(asked, MASK))
    return list(F.cross_entropy(out[asked], text[asked], reduction="none").split(asked.sum(1).tolist()))


def loss(model: Model, text: Tensor, generator: torch.Generator) -> Tensor:
    """Nats per byte."""
    return torch.cat(nats(model, text, generator)).mean()


def text(held_out: bool) -> Tensor:
    """All bytes of the standard library's modules in the order of their names; every tenth is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("*/*.py"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    chosen = [
        file.read_bytes()
        for file in files
        if file.parent.name not in skipped and (zlib.crc32(file.name.encode()) % 10 == 0) == held_out
    ]
    return torch.frombuffer(bytearray(b"".join(chosen)), dtype=torch.uint8)


def batch(source: Tensor, size: int, length: int, generator: torch.Generator) -> Tensor:
    """[size, length] bytes from places drawn at random."""
    begin = torch.randint(len(source) - length, (size, 1), generator=generator)
    return source[begin + torch.arange(length)].long()


def copies(size: int, generator: torch.Generator) -> Tensor:
    """[size, 2 · COPIED + 1]: symbols, a separator, and the symbols again."""
    symbols = torch.randint(SYMBOLS, (size, COPIED), generator=generator)
    return torch.cat((symbols, torch.full((size, 1), SYMBOLS), symbols), 1)


def load(name: str) -> Model:
    """A trained model, in float32."""
    file = WEIGHTS / f"{name}.safetensors"
    if not file.exists():
        raise LookupError(f"{file.name} is not there: `python -m benchmarks.train {name}` makes it")
    model = Model((MODELS | COPYING)[name])
    model.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(file).items()})
    return model.eval()


@contextmanager
def listening(model: Model) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collects q and k, rotated, and v of every attention layer, or gated attention unit, in order."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    attention = [layer for layer in model.layers if isinstance(layer, Attention)]

    def listen(layer: Attention, mix: Mix) -> Mix:
        def heard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found.append((*layer.turned(q, k), v))
            return mix(q, k, v)

        return heard

    def prepared(unit: kx.nn.GatedAttentionUnit, inputs: tuple[Tensor]) -> None:
        _, v, q, k = unit._prepare(inputs[0], 0)
        found.append((q[:, :, None], k[:, :, None], v[:, :, None]))

    units = [layer for layer in model.layers if isinstance(layer, kx.nn.GatedAttentionUnit)]
    hooks = [unit.register_forward_pre_hook(prepared) for unit in units]
    before = [layer.mix for layer in attention]
    for layer, mix in zip(attention, before, strict=True):
        layer.mix = listen(layer, mix)
    try:
        yield found
    finally:
        for layer, mix in zip(attention, before, strict=True):
            layer.mix = mix
        for hook in hooks:
            hook.remove()
