"""Gated attention: what is measured, against whom, and which goals that decides."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kx_kernels as kx
from kx_kernels.ops.gau_attention import api
from kx_kernels.ops.gau_attention.reference import gau_attention as reference
from kx_kernels.ops.mixed_chunk_attention.reference import mixed_chunk_attention as mixed_reference

from . import contest
from .contest import Contender, Function, Missing, imported, on, speedup
from .environment import multiplies_bfloat16
from .goals import Goal, Measured

KEY_DIM, VALUE_DIM = 128, 1536
WIDTH, CHUNK = VALUE_DIM // 2, 256  # of a layer's rows; of FLASH
QUADRATIC = 8192  # tokens of one sequence: beyond, an n × n form takes gigabytes
EXACT = 1024  # queries: beyond, errors are looked at in the first so many, the last of which see enough


@dataclass(frozen=True)
class Case:
    """One call of one head with gate: q and k [B, n, s], v and gate [B, n, e], relu² of Su. `what`: "forward" or
    "both"; with `past`, one query against so many keys; with `mixed`, our kernel and its form in chunks alone. With
    `module`, a whole layer of FLASH-pytorch, "GAU" or "FLASH", on rows [B, n, e / 2]."""

    name: str
    dtype: torch.dtype
    batch: int
    length: int
    causal: bool
    what: str = "forward"
    past: int = 0
    module: str = ""
    mixed: bool = False

    @property
    def bytes_moved(self) -> int:
        """Each input read once and each output written once; with their gradients, 13 tensors for 5."""
        if self.module:
            return 2 * self.batch * self.length * WIDTH * self.dtype.itemsize * (2 if self.what == "both" else 1)
        keys = self.past or self.length
        rows = self.batch * self.dtype.itemsize
        once = rows * (self.length * (KEY_DIM + 2 * VALUE_DIM) + keys * (KEY_DIM + VALUE_DIM))
        return once * (3 if self.what == "both" else 1)

    @property
    def work(self) -> int:
        """Floating-point operations of the products of pairs that see each other: two forward, five backward."""
        if self.module:
            rows = self.batch * self.length
            within = min(self.length, CHUNK) if self.module == "FLASH" else self.length
            between = 2 * KEY_DIM * VALUE_DIM if self.module == "FLASH" else 0
            pairs = within * (KEY_DIM + VALUE_DIM) // (2 if self.causal else 1)
            return 2 * rows * (WIDTH * (3 * VALUE_DIM + KEY_DIM) + pairs + between) * (3 if self.what == "both" else 1)
        deep, wide = (4, 3) if self.what == "both" else (1, 1)
        keys = self.past or self.length
        flops = 2 * self.batch * self.length * keys * (deep * KEY_DIM + wide * VALUE_DIM)
        return flops // 2 if self.causal and not self.past else flops

    @property
    def flops(self) -> int:
        return self.work


BASE = Case("float32, causal", torch.float32, 1, 4096, True)
LARGE = Case("bfloat16, causal, n = 8192", torch.bfloat16, 8, 8192, True)
LONGEST = "bfloat16, full, n = 32768"
MIXED_CASES = (replace(BASE, name="mixed chunks, causal"), replace(BASE, name="mixed chunks, full", causal=False))
PASSES = (("", "forward"), (", forward and backward", "both"))
TOKENS = 32768  # in all, of sequences that share them
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "full, ": {"causal": False},
    "forward and backward, ": {"what": "both"},
    "full, forward and backward, ": {"causal": False, "what": "both"},
}
"""Of calls at growing lengths."""


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return [
            *(
                replace(BASE, name=f"{name}, {how}{suffix}", dtype=dtype, causal=how == "causal", what=what)
                for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
                for suffix, what in PASSES
                for how in ("causal", "full")
            ),
            *(replace(case, name=f"{case.name}, n = 8192", length=8192, mixed=True) for case in MIXED_CASES),
            *(
                replace(BASE, name=f"layer {m}, causal, n = 2048{suffix}", length=2048, module=m, what=what)
                for m in ("GAU", "FLASH")
                for suffix, what in PASSES
            ),
            replace(BASE, name="decode: float32, one query, 4096 keys", batch=8, length=1, past=4096),
        ]
    found = []
    for n in (8192, 2048, 512, 32768):
        for causal in (True, False):
            name = f"bfloat16, {'causal' if causal else 'full'}, n = {n}"
            found.append(replace(LARGE, name=name, length=n, causal=causal))
    layer = replace(LARGE, dtype=torch.float32, batch=1)
    return [
        *found,
        *(replace(LARGE, name=f"{c.name}, n = 8192", causal=c.causal, mixed=True) for c in MIXED_CASES),
        *(
            replace(layer, name=f"layer {m}, causal, float32, n = 8192{suffix}", module=m, what=what)
            for m in ("GAU", "FLASH")
            for suffix, what in PASSES
        ),
        replace(LARGE, name="bfloat16, causal, n = 8192, forward and backward", what="both"),
        replace(LARGE, name="bfloat16, full, n = 8192, forward and backward", what="both", causal=False),
        replace(LARGE, name="decode: bfloat16, one query, 8192 keys", length=1, past=8192),
    ]


def sweep(device: str) -> list[Case]:
    """The same call at growing lengths; of the variants, at every other one."""
    base = replace(BASE if device == "cpu" else LARGE, batch=1)
    return [
        replace(base, name=f"{variant}n = {1 << n}", length=1 << n, **how)
        for variant, how in VARIANTS.items()
        for n in range(7, 16, 2 if variant else 1)
    ]


def shared(device: str) -> list[Case]:
    """The same number of tokens in longer and fewer sequences."""
    base = BASE if device == "cpu" else LARGE
    return [
        replace(base, name=f"{variant}n = {1 << n}", batch=TOKENS >> n, length=1 << n, **how)
        for variant, how in VARIANTS.items()
        for n in range(7, 16, 2)
    ]


class Inputs:
    """One set of buffers of a case."""

    leaves: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        if case.module:
            shape = (case.batch, case.length, WIDTH)
            x, grad = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(2))
            self.leaves, self.grads = (x,), (grad,)
            return

        def random(length: int, dim: int) -> Tensor:
            return torch.randn(case.batch, length, 1, dim, generator=generator).to(device, case.dtype)

        keys = case.past or case.length
        q, k, v = random(case.length, KEY_DIM), random(keys, KEY_DIM), random(keys, VALUE_DIM)
        self.leaves = (q, k, v, random(case.length, VALUE_DIM))
        self.grads = (random(case.length, VALUE_DIM),)

    @functools.cached_property
    def exact(self) -> Tensor:
        """In float64; of the first queries where there are many."""
        return self.define(*(y.double() for y in self.leaves))

    def define(self, *wide: Tensor) -> Tensor:
        if self.case.module:
            inputs = Inputs(replace(self.case, dtype=torch.float64), self.leaves[0].device.type)
            with kx.backend("reference"):
                return _modules(theirs=False)(inputs)(*wide)
        q, k, v, gate = wide
        causal = self.case.causal
        if causal and self.case.length > EXACT:
            k, v = k[:, :EXACT], v[:, :EXACT]
        return reference(q[:, :EXACT], k, v, gate[:, :EXACT], causal=causal)


def _ours(backend: str) -> Callable[[Inputs], Function]:
    def prepare(x: Inputs) -> Function:
        reasons = dict(api.survey(*x.leaves, causal=x.case.causal))
        if reasons[backend] is not None:
            raise Missing(str(reasons[backend]))
        if backend == "reference" and scores_of(x.case) > QUADRATIC**2:
            raise Missing("its n × n scores would take gigabytes")
        return lambda *leaves: kx.gau_attention(*leaves, causal=x.case.causal, backend=backend)

    return prepare


def scores_of(case: Case) -> int:
    return case.batch * case.length * (case.past or case.length)


def eager_scores(q: Tensor, k: Tensor) -> Tensor:
    """relu²(q kᵀ / √s)."""
    return (q @ k.mT * q.shape[-1] ** -0.5).relu().square()


def eager(case: Case) -> Function:
    """As one writes it: two products, with scores of n × n between them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        q, k, v, gate = (x[:, :, 0] for x in (q, k, v, gate))
        n_q, n_k = q.shape[1], k.shape[1]
        p = eager_scores(q, k)
        if case.causal and n_q > 1:
            seen = torch.arange(1, n_k + 1, dtype=p.dtype, device=p.device)[:, None]
            return (gate * (p.tril() @ v / seen))[:, :, None]
        return (gate * (p @ v / n_k))[:, :, None]

    return attend


def _eager(x: Inputs) -> Function:
    if scores_of(x.case) * x.case.dtype.itemsize > (20e9 if x.leaves[0].is_cuda else 1e9):
        raise Missing("its n × n scores would take gigabytes")
    return eager(x.case)


def _compiled(x: Inputs) -> Function:
    return torch.compile(_eager(x), dynamic=False)


def _softmax(x: Inputs) -> Function:
    """Softmax attention of as many operations: the same q, k and v, and the gate after it."""
    if x.case.length > QUADRATIC and not x.leaves[0].is_cuda:
        raise Missing("it would take many seconds")

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=x.case.causal and not x.case.past)
        return gate * o.transpose(1, 2)

    return attend


def _mixed(x: Inputs) -> Function:
    """FLASH's form, linear in n: the same queries and keys within chunks of 256 tokens and between them."""
    if x.case.past:
        raise Missing("it has no cache")
    return lambda q, k, v, gate: kx.mixed_chunk_attention(q, k, q, k, v, gate, causal=x.case.causal)


def _softmax_exact(x: Inputs) -> Tensor:
    q, k, v, gate = x.leaves
    o = contest.softmax(q, k, v, x.case.causal and not x.case.past)
    return gate[:, : o.shape[1]].double() * o


def _mixed_exact(x: Inputs) -> Tensor:
    """Of the first sequence alone, whose last chunks see as much as any."""
    q, k, v, gate = (y[:1].double() for y in x.leaves)
    return mixed_reference(q, k, q, k, v, gate, causal=x.case.causal)


def _flex(x: Inputs) -> Function:
    """FlexAttention with log(f + 1) for a score, undone by its sums: exact on paper."""
    if x.case.what == "both" or x.case.length > EXACT or x.case.past:
        raise Missing("it is here for its error, which 1024 tokens show")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def score(s: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (s.relu().square() + 1).log()

    n, device = x.case.length, x.leaves[0].device
    seen = torch.arange(1, n + 1, device=device)[:, None]
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, n, n, device=device) if x.case.causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        q, k, v, gate = (y.transpose(1, 2) for y in (q, k, v, gate))
        o, lse = flex_attention(q, k, v, score_mod=score, block_mask=mask, return_lse=True)
        ones = v.cumsum(2) if x.case.causal else v.sum(2, keepdim=True)
        return (gate * (o * lse.exp()[..., None] - ones) / (seen if x.case.causal else n)).transpose(1, 2).to(v.dtype)

    return attend


def _modules(theirs: bool) -> Callable[[Inputs], Function]:
    """FLASH-pytorch's layer, or what stands in for it, with the same weights, scales as large as trained ones."""

    def prepare(x: Inputs) -> Function:
        ours = importlib.import_module("kx_kernels.compat.flash_pytorch")
        module = imported("flash_pytorch", "FLASH-pytorch") if theirs else ours
        how: dict[str, Any] = {"dim": WIDTH, "query_key_dim": KEY_DIM, "causal": x.case.causal}
        how |= {"group_size": CHUNK} if x.case.module == "FLASH" else {}
        torch.manual_seed(0)
        weights = {
            name: 50 * w if name.endswith("gamma") else w
            for name, w in getattr(ours, x.case.module)(**how).state_dict().items()
        }
        layer = getattr(module, x.case.module)(**how)
        layer.load_state_dict(weights, strict=False)  # theirs keeps a table of angles beside
        return layer.to(x.leaves[0]).eval()

    return prepare


def _compiled_module(x: Inputs) -> Function:
    return torch.compile(_modules(theirs=True)(x), dynamic=False)


def _mixed_work(case: Case) -> dict[str, int]:
    """Products within chunks, causal half of them, and with the sums of all before or of all."""
    within = min(case.length, CHUNK) * (KEY_DIM + VALUE_DIM) // (2 if case.causal else 1)
    forward = 2 * case.batch * case.length * (within + 2 * KEY_DIM * VALUE_DIM)
    return {"flops": forward * (3 if case.what == "both" else 1)}


MIXED = "mixed chunks (FLASH)"
CONTENDERS = [
    *(
        Contender(f"kx {backend}", "ours", _ours(backend))
        for backend in ("cuda", "triton", "cpu", "torch", "reference")
    ),
    Contender("torch eager", "torch", _eager),
    Contender("torch.compile", "torch", _compiled),
    Contender("softmax attention (SDPA)", "other", _softmax, exact=_softmax_exact),
    Contender("FlexAttention, not compiled, log(f + 1)", "torch", _flex),
    Contender(MIXED, "other", _mixed, exact=_mixed_exact, work=_mixed_work),
]
LAYERS = [
    Contender("kx compat.flash_pytorch", "ours", _modules(theirs=False)),
    Contender("FLASH-pytorch", "peer", _modules(theirs=True), "FLASH-pytorch"),
    Contender("FLASH-pytorch, torch.compile", "peer", _compiled_module, "FLASH-pytorch"),
]
OURS = ("kx cuda", "kx triton")  # on a GPU
LIMIT = "torch's matrix products"
UNIT = "FLOP"  # of a case's work
HOST_GRADIENTS = False
# What the call that host times are of has otherwise than the last case.
HOST: dict[str, object] = {"name": "float32, one query, 16 keys", "batch": 1, "past": 16}
PACKAGES = ("FLASH-pytorch",)


def contenders(case: Case) -> list[Contender]:
    if case.mixed:
        return [c for c in CONTENDERS if c.name in ("kx cuda", "kx cpu", MIXED)]
    if case.module:
        return LAYERS
    swept = case.name.endswith(f"n = {case.length}")  # where time is short
    return [c for c in CONTENDERS if not (swept and c.name == "kx torch")]


def versions() -> dict[str, str | None]:
    return contest.versions(PACKAGES)


def error(function: Function, x: Inputs) -> float:
    """The largest difference from what is exact, over the largest value."""
    return contest.off(function(*x.leaves), x.exact)


def limit(sets: list[Inputs]) -> Callable[[int], object]:
    """The products alone, as torch takes them, in float32 where a CPU has no instructions for less; causal, of half as
    many queries.
    """
    case = sets[0].case
    if case.module:
        return _layer_limit(sets[0])
    rows = max(1, case.length // 2) if case.causal else case.length
    q, k, v, gate = (x[:, :, 0] for x in sets[0].leaves)
    if not multiplies_bfloat16(q.device.type):
        q, k, v, gate = q.float(), k.float(), v.float(), gate.float()
    q, out = q[:, :rows], torch.empty_like(gate[:, :rows])
    block = min(rows, 1024)  # of scores at a time: no memory is spent on them
    scores = q.new_ones(case.batch, block, k.shape[1])
    deep, wide = (4, 3) if case.what == "both" else (1, 1)

    def call(turn: int) -> None:
        for first in range(0, rows, block):
            part = q[:, first : first + block]
            for _ in range(deep):
                torch.matmul(part, k.mT, out=scores[:, : part.shape[1]])
            for _ in range(wide):
                torch.matmul(scores[:, : part.shape[1]], v, out=out[:, first : first + block])

    return call


def _layer_limit(x: Inputs) -> Callable[[int], object]:
    """A layer's products: those of its projections, and of a unit whose scores see half of the keys, or a chunk."""
    rows = x.leaves[0][0]
    inward, outward = rows.new_ones(WIDTH, 2 * VALUE_DIM + KEY_DIM), rows.new_ones(VALUE_DIM, WIDTH)
    within = min(len(rows), CHUNK) if x.case.module == "FLASH" else len(rows)
    seen = within // 2 if x.case.causal else within
    q, v = rows.new_ones(len(rows), KEY_DIM), rows.new_ones(len(rows), VALUE_DIM)

    def call(turn: int) -> None:
        for _ in range(x.case.batch * (3 if x.case.what == "both" else 1)):
            torch.matmul(rows, inward)
            torch.matmul(torch.matmul(q, q[:seen].mT), v[:seen])
            if x.case.module == "FLASH":
                torch.matmul(q, torch.matmul(q.mT, v))
            torch.matmul(v, outward)

    return call


def extras() -> dict[str, Any]:
    """The largest error over the largest value where scores are of order 1, and where they are as small as those of a
    layer whose scales begin at N(0, 0.02)."""
    found = []
    for size, dtype, causal in itertools.product((1.0, 0.02), (torch.float32, torch.bfloat16), (True, False)):
        x = Inputs(replace(BASE, length=512, dtype=dtype, causal=causal), "cpu")
        q, k, v, gate = x.leaves
        x.leaves = (size * q, size * k, v, gate)
        ours = functools.partial(kx.gau_attention, causal=causal)
        case = f"{str(dtype).removeprefix('torch.')}, {'causal' if causal else 'full'}"
        found.append({"case": case, "size": size, "flex": error(_flex(x), x), "ours": error(ours, x)})
    return {"tiny_scores": found}


def _held(results: dict[str, Any], case: Case, ours: tuple[str, ...]) -> Measured | None:
    """Megabytes that our kernel holds at most beside its inputs and its result."""
    for row in results["memory"]:
        if row["case"] == case.name and row["contender"] in ours and "peak" in row:
            out = case.batch * case.length * VALUE_DIM * case.dtype.itemsize
            return ((row["peak"] - out) / 1e6,) * 3
    return None


def _megabytes(results: dict[str, Any]) -> Measured | None:
    return _held(results, BASE, ("kx cpu",))


def _most_megabytes(results: dict[str, Any]) -> Measured | None:
    return _held(results, next(case for case in cases("cuda") if case.name == LONGEST), OURS)


def _useful(results: dict[str, Any]) -> Measured | None:
    name = "bfloat16, full, n = 8192"
    found = contest.milliseconds(name, OURS)(results)
    work = next(case.work for case in cases("cuda") if case.name == name)
    return (work / found[0] / 1e9, work / found[2] / 1e9, work / found[1] / 1e9) if found else None


def goals() -> list[Goal]:
    cpu, gpu = on("cpu"), on("cuda")
    found = []
    for where, quadratic in ((cpu, "kx cpu"), (gpu, "kx cuda")):
        for case in MIXED_CASES:
            name = f"{case.name}, n = 8192"
            value = speedup(name, quadratic, (MIXED,))
            found.append(Goal("as fast in mixed chunks as quadratic", where, name, 6, "×", value))
    for case, target in (
        ("float32, causal", 2.2),
        ("float32, full", 1.1),
        ("float32, causal, forward and backward", 1.9),
        ("float32, full, forward and backward", 1.05),
    ):
        shape = f"{case}, [1, 4096], s 128, e 1536"
        found.append(Goal("as fast as torch eager", cpu, shape, target, "×", speedup(case, "torch eager")))
    for dtype, how, (suffix, _) in itertools.product(("float32", "bfloat16"), ("causal", "full"), PASSES):
        case = f"{dtype}, {how}{suffix}"
        shape = f"{case}, [1, 4096], s 128, e 1536"
        found.append(Goal("as fast as torch.compile", cpu, shape, 1.0, "×", speedup(case, "torch.compile")))
    for layer in cases("cpu"):
        if layer.module:
            value = speedup(layer.name, LAYERS[-1].name, (LAYERS[0].name,))
            found.append(Goal("as fast as FLASH-pytorch compiled", cpu, layer.name, 1.0, "×", value))
    found.append(Goal("beside inputs and result", cpu, "float32, causal, n 4096", 64, "MB", _megabytes, at_most=True))
    for case, target in (
        ("bfloat16, full, n = 512", 0.02),
        ("bfloat16, full, n = 2048", 0.22),
        ("bfloat16, causal, n = 2048", 0.13),
        ("bfloat16, full, n = 8192", 2.9),
        ("bfloat16, causal, n = 8192", 1.6),
        ("bfloat16, full, n = 8192, forward and backward", 9.5),
        ("bfloat16, full, n = 32768", 46),
        ("bfloat16, causal, n = 32768", 24),
    ):
        found.append(Goal("", gpu, f"{case}, B 8", target, "ms", contest.milliseconds(case, OURS), at_most=True))
    for n in (512, 2048, 8192, 32768):
        for how, target in (("full", 1.0), ("causal", 1.8)):
            name = f"bfloat16, {how}, n = {n}"
            value = speedup(name, "torch.compile", OURS)
            found.append(Goal("as fast as torch.compile", gpu, f"{name}, B 8", target, "×", value))
    found.append(Goal("useful", gpu, "bfloat16, full, n = 8192, B 8", 615, "TFLOP/s", _useful))
    found.append(Goal("beside inputs and result", gpu, f"{LONGEST}, B 8", 500, "MB", _most_megabytes, at_most=True))
    return found
