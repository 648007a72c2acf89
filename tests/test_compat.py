"""The drop-ins keep the interfaces and conventions of what they stand in for: against plain torch in float64."""

from __future__ import annotations

import importlib
import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kx_kernels.compat import fast_transformers, fla, flash_pytorch, gau_alpha, performer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(batch: int, length: int, heads: int = 3, dim: int = 8, value_dim: int = 10) -> tuple[Tensor, ...]:
    """q and k positive, as after a feature map, and v."""
    q, k = (random(batch, length, heads, dim, seed=seed).abs() for seed in (1, 2))
    return q, k, random(batch, length, heads, value_dim, seed=3)


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)


def by_scores(q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Tensor | None, normalize: bool) -> Tensor:
    length = q.shape[1]
    apart = torch.arange(length)[:, None] - torch.arange(length)
    weight = (apart >= 0).double().expand(q.shape[2], length, length)
    if decay is not None:
        weight = weight * decay.double()[:, None, None] ** apart.clamp(min=0)
    scores = scale * torch.einsum("bihd,bjhd,hij->bhij", q, k, weight)
    o = torch.einsum("bhij,bjhe->bihe", scores, v)
    return o / (scores.sum(-1).transpose(1, 2)[..., None] + 1e-10) if normalize else o


def test_fla_signatures() -> None:
    common = "q, k, v, scale=None, initial_state=None, output_final_state=False, "
    assert signature(fla.chunk_linear_attn) == common + "normalize=True, cu_seqlens=None"
    assert signature(fla.fused_chunk_linear_attn) == common + "normalize=True, cu_seqlens=None"
    recurrent = common + "reverse=False, normalize=False, cu_seqlens=None"
    assert signature(fla.fused_recurrent_linear_attn) == recurrent
    assert signature(fla.chunk_retention) == common + "cu_seqlens=None, kwargs"
    lightning = "q, k, v, layer_idx, num_layers, " + common.removeprefix("q, k, v, ") + "cu_seqlens=None, kwargs"
    assert signature(fla.chunk_lightning_attn) == lightning


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_fla_linear_attention(normalize: bool, scale: float | None) -> None:
    q, k, v = features(2, 70)
    expected = by_scores(q, k, v, 8**-0.5 if scale is None else scale, None, normalize)
    for function in (fla.chunk_linear_attn, fla.fused_chunk_linear_attn, fla.fused_recurrent_linear_attn):
        o, state = function(q, k, v, scale, normalize=normalize)
        torch.testing.assert_close(o, expected)
        if normalize:
            torch.testing.assert_close(state[1], k.sum(1, keepdim=True))
            assert state[0] is None
        else:
            assert state is None
        o, state = function(q, k, v, scale, output_final_state=True, normalize=normalize)
        kv, z = state if normalize else (state, None)
        torch.testing.assert_close(kv, torch.einsum("bthd,bthe->bhde", k, v))
        assert z is None or z.shape == (2, 1, 3, 8)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_fla_goes_on_from_a_state(normalize: bool, reverse: bool) -> None:
    q, k, v = features(2, 70)
    how: dict[str, Any] = {"normalize": normalize, "reverse": reverse}
    whole, end = fla.fused_recurrent_linear_attn(q, k, v, output_final_state=True, **how)
    parts = [slice(30), slice(30, 70)]
    state, outs = None, {}
    for part in reversed(parts) if reverse else parts:
        values = (x[:, part] for x in (q, k, v))
        outs[part.stop], state = fla.fused_recurrent_linear_attn(
            *values, initial_state=state, output_final_state=True, **how
        )
    torch.testing.assert_close(torch.cat([outs[30], outs[70]], 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("reverse", [False, True])
def test_fla_packed_sequences(reverse: bool) -> None:
    q, k, v = features(1, 75)
    ends = torch.tensor([0, 5, 5, 75])
    before = (random(3, 3, 8, 10), random(3, 1, 3, 8).abs())
    how: dict[str, Any] = {"output_final_state": True, "reverse": reverse, "normalize": True}
    o, (kv, z) = fla.fused_recurrent_linear_attn(q, k, v, initial_state=before, cu_seqlens=ends, **how)
    for n, (a, b) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        state = tuple(x[n : n + 1] for x in before)
        alone, end = fla.fused_recurrent_linear_attn(q[:, a:b], k[:, a:b], v[:, a:b], initial_state=state, **how)
        torch.testing.assert_close(o[:, a:b], alone)
        torch.testing.assert_close((kv[n : n + 1], z[n : n + 1]), end)
    with pytest.raises(ValueError, match="batch size 2; expected 1"):
        fla.chunk_linear_attn(*features(2, 5), cu_seqlens=ends)
    with pytest.raises(ValueError, match="2 states; expected 3"):
        fla.chunk_linear_attn(q, k, v, initial_state=before[0][:2], normalize=False, cu_seqlens=ends)


def test_fla_states_are_wide() -> None:
    q, k, v = (x.bfloat16() for x in features(1, 3000))
    o, (kv, z) = fla.chunk_linear_attn(q, k, v, output_final_state=True)
    assert (o.dtype, kv.dtype, z.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(z, k.float().sum(1, keepdim=True))


def test_fla_retention() -> None:
    q, k, v = features(2, 70)
    decay = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])
    o, state = fla.chunk_retention(q, k, v, chunk_size=32)
    torch.testing.assert_close(o, by_scores(q, k, v, 8**-0.5, decay, False))
    assert state is None
    with pytest.raises(TypeError, match="head_first"):
        fla.chunk_retention(q, k, v, head_first=True)


def test_fla_lightning_attention() -> None:
    q, k, v = features(2, 70)
    decay = (-torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) * 8 / 3 * (1 - 5 / 20)).exp()
    o, state = fla.chunk_lightning_attn(q, k, v, 5, 20, output_final_state=True)
    torch.testing.assert_close(o, by_scores(q, k, v, 8**-0.5, decay, False))
    assert isinstance(state, Tensor)
    left = decay[:, None] ** torch.arange(69, -1, -1)
    torch.testing.assert_close(state, torch.einsum("ht,bthd,bthe->bhde", left, k, v))


def test_fla_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in features(2, 20))
    state = tuple(x.requires_grad_() for x in (random(2, 3, 8, 10), random(2, 1, 3, 8).abs()))

    def outputs(q: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        o, (kv, z) = fla.chunk_linear_attn(q, k, v, initial_state=state, output_final_state=True)
        return o, kv, z

    assert torch.autograd.gradcheck(outputs, (q, k, v, *state), fast_mode=True)


def test_fast_transformers_product() -> None:
    q, k, v = (x.transpose(1, 2) for x in features(2, 70))  # [N, H, L, E]
    q, k, v = (x.contiguous() for x in (q, k, v))
    o = fast_transformers.causal_dot_product(q, k, v)
    torch.testing.assert_close(o, (q @ k.mT).tril() @ v)
    assert o.is_contiguous()
    assert signature(fast_transformers.causal_dot_product) == "Q, K, V"


class Squares:
    """A feature map as fast-transformers has them."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def new_feature_map(self, device: torch.device) -> None:
        self.device = device

    def forward_queries(self, x: Tensor) -> Tensor:
        return x**2 + 1

    def forward_keys(self, x: Tensor) -> Tensor:
        return x**2 + 2


@pytest.mark.parametrize("feature_map", [None, Squares])
@pytest.mark.parametrize("keys_length", [12, 9, 15])
def test_fast_transformers_attention(feature_map: Any, keys_length: int) -> None:
    """Keys are padded or cut to the queries; a padded key counts for nothing, a padded query still has an output."""
    layer = fast_transformers.CausalLinearAttention(8, feature_map, eps=1e-3)
    q, k, v = random(2, 12, 3, 8), random(2, keys_length, 3, 8, seed=1), random(2, keys_length, 3, 5, seed=2)
    lengths = torch.tensor([keys_length, 7])
    keep = torch.arange(keys_length) < lengths[:, None]
    o = layer(q, k, v, SimpleNamespace(lower_triangular=True), None, SimpleNamespace(bool_matrix=keep))
    a = torch.nn.functional.elu(q) + 1 if feature_map is None else q**2 + 1
    b = torch.nn.functional.elu(k) + 1 if feature_map is None else k**2 + 2
    b = torch.nn.functional.pad((b * keep[..., None, None])[:, :12], (0, 0, 0, 0, 0, max(0, 12 - keys_length)))
    v = torch.nn.functional.pad(v[:, :12], (0, 0, 0, 0, 0, max(0, 12 - keys_length)))
    scores = torch.einsum("bihd,bjhd->bhij", a, b).tril()
    expected = torch.einsum("bhij,bjhe->bihe", scores / (scores.sum(-1, keepdim=True) + 1e-3), v)
    torch.testing.assert_close(o, expected)
    assert o.is_contiguous()
    with pytest.raises(RuntimeError, match="lower triangular"):
        layer(q, k, v, SimpleNamespace(lower_triangular=False), None, SimpleNamespace(bool_matrix=keep))


def test_performer() -> None:
    q, k, v = (x.transpose(1, 2).contiguous() for x in features(2, 70))
    o = performer.causal_linear_attention(q, k, v, eps=1e-2)
    weight = torch.einsum("...nd,...nd->...n", q, k.cumsum(-2) + 1e-2)
    torch.testing.assert_close(o, (q @ k.mT).tril() @ v / weight[..., None])
    assert signature(performer.causal_linear_attention) == "q, k, v, eps=1e-06"


def test_flash_pytorch_interface() -> None:
    assert signature(flash_pytorch.FLASH) == (
        "dim, group_size=256, query_key_dim=128, expansion_factor=2.0, causal=False, dropout=0.0, rotary_pos_emb=None, "
        "norm_klass=<class 'torch.nn.modules.normalization.LayerNorm'>, shift_tokens=False, laplace_attn_fn=False, "
        "reduce_group_non_causal_attn=True"
    )
    layer = flash_pytorch.FLASH(dim=6, query_key_dim=4, dropout=0.1)
    assert {name: list(x.shape) for name, x in layer.state_dict().items()} == {
        "rel_pos_bias.relative_attention_bias.weight": [32, 1],
        "norm.weight": [6],
        "norm.bias": [6],
        "to_hidden.0.weight": [24, 6],
        "to_hidden.0.bias": [24],
        "to_qk.0.weight": [4, 6],
        "to_qk.0.bias": [4],
        "qk_offset_scale.gamma": [4, 4],
        "qk_offset_scale.beta": [4, 4],
        "to_out.weight": [6, 12],
        "to_out.bias": [6],
    }


def test_buckets_of_t5() -> None:
    """Worked by hand: 8 + 8 · log(n / 8) / log 16 in each direction, or 16 + 16 · log(n / 16) / log 8 causally."""
    backwards = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 16: 10, 64: 14, 91: 15, 128: 15, 200: 15}
    for causal, buckets in (
        (False, backwards | {-n: 16 + b for n, b in backwards.items() if n > 0}),
        (True, {-200: 0, -1: 0, 0: 0, 15: 15, 16: 16, 32: 21, 64: 26, 127: 31, 200: 31}),
    ):
        bias = flash_pytorch.T5RelativePositionBias(2.0, causal=causal)
        with torch.no_grad():
            bias.relative_attention_bias.weight.copy_(torch.arange(32)[:, None])
        table = bias(201)
        assert {n: int(table[200 - n]) // 2 for n in buckets} == buckets


def flash_by_groups(layer: Any, x: Tensor, mask: Tensor, turn: Any, shift: bool, whole: bool) -> Tensor:
    """The original's layer for a number of tokens that groups divide."""
    n, g = x.shape[1], layer.group_size
    y = layer.norm(x)
    if shift:
        before = torch.cat((torch.zeros_like(y[:, :1]), y[:, :-1]), 1)
        y = torch.cat((before[..., : y.shape[2] // 2], y[..., y.shape[2] // 2 :]), -1)
    v, gate = F.silu(layer.to_hidden(y)).chunk(2, -1)
    z = F.silu(layer.to_qk(y))
    qq, lq, qk, lk = (
        turn(z * a + b) for a, b in zip(layer.qk_offset_scale.gamma, layer.qk_offset_scale.beta, strict=True)
    )
    lk = lk * mask[..., None]
    back = torch.arange(g)[:, None] - torch.arange(g)
    table = layer.rel_pos_bias(g)
    f = {
        "relu2": lambda s: s.relu() ** 2,
        "laplace": lambda s: (1 + torch.erf((s - 0.5**0.5) * (2 * torch.pi) ** 0.5)) / 2,
    }
    outs = []
    for i in range(0, n, g):
        rows = slice(i, i + g)
        weights = f[layer.activation](qq[:, rows] @ qk[:, rows].mT / g + table[g - 1 - back]) * mask[:, None, rows]
        if layer.causal:
            state = lk[:, :i].mT @ v[:, :i] / g
            weights = weights * (back >= 0)
        else:
            over = slice(0, n) if whole else rows
            state = lk[:, over].mT @ v[:, over] / n
        outs.append(weights @ v[:, rows] + lq[:, rows] @ state)
    return layer.to_out(gate * torch.cat(outs, 1)) + x


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"causal": True},
        {"causal": True, "shift_tokens": True, "laplace_attn_fn": True},
        {"reduce_group_non_causal_attn": False},
        {"norm_klass": torch.nn.RMSNorm, "expansion_factor": 1.5},
    ],
    ids=["full", "causal", "shift_laplace", "groups_alone", "norm"],
)
def test_flash_pytorch(how: dict[str, Any], masked: bool) -> None:
    """Outputs of all tokens, masked ones too, and gradients."""
    tables = [random(24, 2, seed=9).cos(), random(24, 2, seed=9).sin()]

    def turn(x: Tensor) -> Tensor:
        cos, sin = (table[: x.shape[1]] for table in tables)
        x0, x1 = x[..., 0:4:2], x[..., 1:4:2]
        turned = torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), -1).flatten(-2)
        return torch.cat((turned, x[..., 4:]), -1)

    rotary = SimpleNamespace(rotate_queries_or_keys=turn)
    layer = flash_pytorch.FLASH(dim=6, group_size=8, query_key_dim=6, rotary_pos_emb=rotary, **how).double()
    for p in layer.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    x = random(2, 24, 6).requires_grad_()
    mask = torch.arange(24) < torch.tensor([[24], [13]]) if masked else torch.ones(2, 24, dtype=torch.bool)
    leaves = [x, *layer.parameters()]
    shift, whole = how.get("shift_tokens", False), how.get("reduce_group_non_causal_attn", True)
    expected = flash_by_groups(layer, x, mask, turn, shift, whole)
    o = layer(x, mask=mask if masked else None)
    torch.testing.assert_close(o, expected)
    for a, b in zip(*(torch.autograd.grad(y, leaves, x.detach()) for y in (o, expected)), strict=True):
        torch.testing.assert_close(a, b)
    if layer.causal:  # a number that groups do not divide
        torch.testing.assert_close(layer(x[:1, :11]), expected[:1, :11])


def same(ours: Any, theirs: Any, module: nn.Module, x: Tensor) -> None:
    """Two functions of x and of the module's parameters: values and all gradients."""
    results = []
    for function in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        leaves = [leaf, *module.parameters()]
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    assert all(g.any() for g in results[0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def drawn(module: nn.Module) -> Any:
    """In float64, every parameter a random number of order one."""
    module = module.double()
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            p.copy_(random(*p.shape, seed=i) / (p.shape[-1] ** 0.5 if name.endswith("weight") and p.dim() > 1 else 1))
    return module


def t5_bucket(distance: int, causal: bool) -> int:
    """Of key minus query, by the paper's rule for 32 buckets up to distance 128, one by one."""
    buckets = 32 if causal else 16
    upper = 16 if not causal and distance > 0 else 0
    apart = max(-distance, 0) if causal else abs(distance)
    if apart < buckets // 2:
        return upper + apart
    # Edges at (buckets / 2) · (256 / buckets) ** (i / (buckets / 2)): compared as whole powers, without a logarithm.
    half = buckets // 2
    i = sum(apart**half * half ** (i - half) >= 128**i for i in range(1, half))
    return upper + min(half + i, buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_t5_bias(causal: bool) -> None:
    bias = drawn(flash_pytorch.T5RelativePositionBias(3.0, causal))
    table = bias.relative_attention_bias.weight[:, 0]
    expected = [3.0 * table[t5_bucket(r, causal)] for r in range(-299, 300)]
    assert torch.equal(bias(300), torch.stack(expected))


def flash_gau(m: Any, x: Tensor, mask: Tensor | None, extra: Tensor | None, laplace: bool) -> Tensor:
    """The unit as its paper's appendix writes it, with a T5 bias, by scores."""
    n, e = x.shape[1], m.to_out[0].in_features
    h = m.norm(x)
    hidden, z = F.silu(m.to_hidden[0](h)), F.silu(m.to_qk[0](h))
    q, k = (z * m.offsetscale.gamma[i] + m.offsetscale.beta[i] for i in range(2))
    place = torch.arange(n)
    apart = place[None, :] - place[:, None]
    bucket = torch.tensor([[t5_bucket(int(r), m.causal) for r in row] for row in apart])
    scores = q @ k.mT + x.shape[-1] ** 0.5 * m.rel_pos_bias.relative_attention_bias.weight[bucket, 0]
    if extra is not None:
        scores = scores + extra[apart + n - 1]
    scores = scores / n
    laplace_cdf = torch.special.ndtr((scores - 0.5**0.5) * (4 * math.pi) ** 0.5)
    a = laplace_cdf if laplace else F.relu(scores) ** 2
    seen = torch.ones(len(x), n, n, dtype=torch.bool) if mask is None else mask[:, None, :].expand(-1, n, -1)
    if m.causal:
        seen = seen & (apart <= 0)
    return m.to_out((a * seen) @ hidden[..., :e] * hidden[..., e:]) + (x if m.add_residual else 0)


@pytest.mark.parametrize("laplace", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_flash_gau(causal: bool, laplace: bool, masked: bool) -> None:
    how: dict[str, Any] = {"causal": causal, "laplace_attn_fn": laplace, "add_residual": not masked}
    module = drawn(flash_pytorch.GAU(dim=12, query_key_dim=8, expansion_factor=1.5, **how))
    with torch.no_grad():  # scores are divided by n twice over
        module.rel_pos_bias.relative_attention_bias.weight.mul_(10)
    x = random(2, 40, 12)
    mask = torch.arange(40) < torch.tensor([[40], [29]]) if masked else None
    extra = None if masked else random(79, seed=9)
    same(lambda y: module(y, extra, mask), lambda y: flash_gau(module, y, mask, extra, laplace), module, x)


def test_flash_gau_interface() -> None:
    arguments = (
        "dim, query_key_dim=128, expansion_factor=2.0, add_residual=True, causal=False, dropout=0.0, "
        "laplace_attn_fn=False, rel_pos_bias=False, norm_klass=<class 'torch.nn.modules.normalization.LayerNorm'>"
    )
    assert signature(flash_pytorch.GAU) == arguments
    assert signature(flash_pytorch.GAU.forward) == "self, x, rel_pos_bias=None, mask=None"
    module = flash_pytorch.GAU(dim=12, query_key_dim=8, expansion_factor=1.5)
    assert {name: list(x.shape) for name, x in module.state_dict().items()} == {
        "norm.weight": [12],
        "norm.bias": [12],
        "rel_pos_bias.relative_attention_bias.weight": [32, 1],
        "to_hidden.0.weight": [36, 12],
        "to_hidden.0.bias": [36],
        "to_qk.0.weight": [8, 12],
        "to_qk.0.bias": [8],
        "offsetscale.gamma": [2, 8],
        "offsetscale.beta": [2, 8],
        "to_out.0.weight": [12, 18],
        "to_out.0.bias": [12],
    }


def flash_peers(name: str, n: int, masked: bool, **how: Any) -> list[list[Tensor]]:
    """Outputs and gradients of FLASH-pytorch's module and of ours, which has its parameters."""
    peer = drawn(getattr(importlib.import_module("flash_pytorch"), name)(dim=12, query_key_dim=8, **how))
    ours = getattr(flash_pytorch, name)(dim=12, query_key_dim=8, **how).double()
    with torch.no_grad():  # scores are divided by n, or by a group's size
        peer.rel_pos_bias.relative_attention_bias.weight.mul_(n if name == "GAU" else 1)
    ours.load_state_dict(peer.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in peer.named_parameters()]
    mask = torch.arange(n) < torch.tensor([[n], [n - 9]]) if masked else None
    results = []
    for module in (peer, ours):
        torch.manual_seed(1)
        leaves = [random(2, n, 12).requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
        extra = {} if name == "FLASH" else {"rel_pos_bias": random(n, n, seed=2).requires_grad_()}
        leaves += extra.values()
        out = module(leaves[0], mask=mask, **extra)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"causal": True},
        {"laplace_attn_fn": True, "add_residual": False},
        {"dropout": 0.3, "causal": True, "laplace_attn_fn": True},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_gau_is_flash_pytorchs(how: dict[str, Any], masked: bool) -> None:
    """With biases by query and key, and while it trains with dropout."""
    for a, b in zip(*flash_peers("GAU", 45, masked, **how), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [24, 45])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"causal": True, "shift_tokens": True},
        {"reduce_group_non_causal_attn": False, "laplace_attn_fn": True},
        {"dropout": 0.3},
        {"dropout": 0.3, "causal": True, "laplace_attn_fn": True},
        {"dropout": 0.3, "reduce_group_non_causal_attn": False},
    ],
    ids=str,
)
def test_flash_is_flash_pytorchs(how: dict[str, Any], rotary: bool, masked: bool, n: int) -> None:
    """Groups divide the tokens or do not; while it trains with dropout as well."""
    turns = importlib.import_module("rotary_embedding_torch").RotaryEmbedding(dim=4) if rotary else None
    for a, b in zip(*flash_peers("FLASH", n, masked, group_size=8, rotary_pos_emb=turns, **how), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["GAU", "FLASH"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_flash_pytorch_of_no_tokens(name: str, dropout: float) -> None:
    layer = getattr(flash_pytorch, name)(dim=12, query_key_dim=8, dropout=dropout)
    assert layer(torch.zeros(2, 0, 12)).shape == (2, 0, 12)


def test_flash_gau_drops_weights() -> None:
    """Every weight is 0 or 1/(1 − p) times what it is: seen in an average over many draws, and in single ones."""
    module = drawn(flash_pytorch.GAU(dim=12, query_key_dim=8, dropout=0.5, add_residual=False))
    module.to_out[1].p = 0.0
    x = random(1, 6, 12)
    with torch.no_grad():
        whole = module.eval()(x)
        draws = module.train()(x.expand(4000, -1, -1)).unsqueeze(1)
    assert not torch.equal(draws[0], draws[1])
    assert bool(((draws.mean(0) - whole).abs() < 6 * draws.std(0) / 4000**0.5).all())
    assert torch.equal(module.eval()(x), whole)


def alpha_unit(m: Any, x: Tensor, mask: Tensor | None, table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Su's unit by its scores: output and weights."""
    e, s = m.intermediate_size, m.attention_key_size
    u, v, z = (F.silu(m.i_dense(x)) if m.activation == "swish" else F.relu(m.i_dense(x))).split((e, e, s), -1)
    heads = []
    for affine in (m.q_scaleoffset, m.k_scaleoffset):
        h = z * affine.weight + (affine.bias if m.use_bias else 0)
        if table is not None:
            turn = torch.complex(table[1], table[0])
            h = torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (s // 2, 2))) * turn).flatten(-2)
        heads.append(h)
    scores = heads[0] @ heads[1].mT / (s**0.5 if m.attention_scale else 1)
    seen = torch.ones_like(scores) if mask is None else mask.expand_as(scores)
    count = seen.sum(-1, keepdim=True)
    if m.normalization == "squared_relu":
        a = F.relu(scores) ** 2 * seen / count
    else:
        factor = count.log() / math.log(512) if m.normalization == "softmax_plus" else 1
        a = (scores * factor).masked_fill(seen == 0, -math.inf).softmax(-1)
    return [m.o_dense(u * (a @ v)), a]


@pytest.mark.parametrize("normalization", gau_alpha.NORMALIZATIONS)
@pytest.mark.parametrize("mask", ["none", "keys", "pairs"])
@pytest.mark.parametrize("plain", [True, False])
def test_gau_alpha(normalization: str, mask: str, plain: bool) -> None:
    how: dict[str, Any] = {"use_bias": not plain, "attention_scale": plain, "activation": "swish" if plain else "relu"}
    module = drawn(gau_alpha.GatedAttentionUnit(12, 24, 8, normalization=normalization, **how)).eval()
    x, angles = random(2, 20, 12), random(1, 20, 4, seed=7)
    table = (angles.sin(), angles.cos()) if plain else None
    visible = {
        "none": None,
        "keys": (torch.arange(20) < torch.tensor([[20], [13]])).double()[:, None],
        "pairs": torch.ones(20, 20, dtype=torch.float64).tril().expand(2, -1, -1)[:, 1:, 1:],
    }[mask]
    if mask == "pairs":  # no query sees one key alone
        x, table = x[:, 1:], None
        visible = torch.maximum(visible, torch.eye(19, dtype=torch.float64).roll(1, 1))
    same(lambda y: module(y, visible, table)[0], lambda y: alpha_unit(module, y, visible, table)[0], module, x)
    assert len(module(x, visible, table)) == 1
    outputs = module(x, visible, table, output_attentions=True)
    for a, b in zip(outputs, alpha_unit(module, x, visible, table), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gau_alpha_interface() -> None:
    arguments = (
        "hidden_size=768, intermediate_size=1536, attention_key_size=128, activation=swish, use_bias=False, "
        "normalization=softmax_plus, attention_scale=True, attention_dropout=0.1"
    )
    assert signature(gau_alpha.GatedAttentionUnit) == arguments
    called = "self, hidden_states, attention_mask=None, sinusoidal_pos=None, output_attentions=False"
    assert signature(gau_alpha.GatedAttentionUnit.forward) == called
    names = {"i_dense", "o_dense", "q_scaleoffset", "k_scaleoffset"}
    for use_bias, kinds in ((False, ("weight",)), (True, ("weight", "bias"))):
        state = gau_alpha.GatedAttentionUnit(12, 24, 8, use_bias=use_bias).state_dict()
        assert set(state) == {f"{name}.{kind}" for name in names for kind in kinds}
        assert [list(state[f"{n}.weight"].shape) for n in ("i_dense", "o_dense", "q_scaleoffset")] == [
            [56, 12],
            [12, 24],
            [8],
        ]
    for wrong in ({"normalization": "sigmoid"}, {"activation": "gelu"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))!r}; expected"):
            gau_alpha.GatedAttentionUnit(12, **wrong)


@pytest.mark.parametrize("normalization", gau_alpha.NORMALIZATIONS)
@pytest.mark.parametrize("rows", [1, 9])
def test_gau_alpha_where_the_original_sees_padding(normalization: str, rows: int) -> None:
    """A query that sees nothing gives o_dense of 0; whatever padding holds, it changes nothing else."""
    module = drawn(gau_alpha.GatedAttentionUnit(12, 24, 8, normalization=normalization)).eval()
    x = random(2, 9, 12)
    mask = torch.ones(2, rows, 9)
    mask[0], mask[1, :, 1:] = 0, 0
    out = module(x, mask)[0]
    assert not out[0].any()
    x[1, 1:] = 1e6
    torch.testing.assert_close(module(x, mask)[0][1, 0], out[1, 0])


def test_gau_alpha_drops_weights() -> None:
    module = drawn(gau_alpha.GatedAttentionUnit(12, 24, 8, attention_dropout=0.5))
    x = random(1, 30, 12)
    _, weights = module(x, output_attentions=True)
    kept = weights != 0
    assert 0.4 < kept.double().mean() < 0.6
    whole = alpha_unit(module, x, None, None)[1]
    torch.testing.assert_close(weights, torch.where(kept, 2 * whole, 0))
    torch.manual_seed(1)
    out, weights = module(x, output_attentions=True)
    u, v, _ = F.silu(module.i_dense(x)).split((24, 24, 8), -1)
    torch.testing.assert_close(out, module.o_dense(u * (weights @ v)))
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], out)
