"""The drop-ins keep the interfaces and conventions of what they stand in for: against plain torch in float64."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kx_kernels.compat import fast_transformers, fla, flash_pytorch, performer


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
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1; expected 0 in training"):
        layer(torch.randn(1, 3, 6))
    assert layer.eval()(torch.randn(1, 3, 6)).shape == (1, 3, 6)


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
    v, gate = layer.to_hidden(y).chunk(2, -1)
    z = layer.to_qk(y)
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
