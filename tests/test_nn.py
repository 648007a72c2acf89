"""Modules of linear attention: what they add to the function they call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kx_kernels as kx
from kx_kernels.testing.budget import assert_within_budget

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "head_dim": 6, "value_dim": 10, "bias": True},
    "rotary": {"rotary": kx.nn.RotaryEmbedding(8)},
    "decay": {"decay": torch.tensor([0.5, 0.75, 0.875, 1.0]), "normalize": False, "feature_map": "identity"},
    "favor": {"feature_map": kx.nn.FavorFeatures(8, 24)},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_goes_on_token_by_token(name: str) -> None:
    """Prefill and steps give what one call on all tokens gives, and a new state is the one before the first."""
    layer = kx.nn.LinearAttention(32, 4, **LAYERS[name]).double()
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    whole = layer(x)
    first, state = layer.prefill(x[:, :5])
    rest = [layer.step(x[:, t : t + 1], state) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole)
    state = layer.new_state(2)
    torch.testing.assert_close(torch.cat([layer.step(x[:, :3], state), layer.step(x[:, 3:], state)], 1), whole)
    assert state.length == 12


def test_layer_is_the_function_between_projections() -> None:
    layer = kx.nn.LinearAttention(32, 4, num_kv_heads=2, causal=False)
    x = torch.randn(2, 12, 32)
    keep = torch.arange(12) < torch.tensor([[12], [7]])
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = kx.linear_attention(q, k, v, causal=False, key_padding_mask=keep)
    torch.testing.assert_close(layer(x, key_padding_mask=keep), layer.out_proj(out.flatten(-2)))
    packed = layer(x.flatten(0, 1), cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32))
    torch.testing.assert_close(packed.unflatten(0, (2, 12)), layer(x))
    with pytest.raises(ValueError, match="causal is False"):
        layer.step(x, layer.new_state(2))


def test_layer_keeps_its_decay_exact_and_trains() -> None:
    decay = torch.tensor([1 - 2.0**-20, 0.5])
    layer = kx.nn.LinearAttention(16, 2, decay=decay, feature_map="elu1").bfloat16()
    x = torch.randn(1, 9, 16, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert layer.decay is decay
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *layer.parameters()))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"embed_dim": 30, "num_heads": 4}, "num_heads is 4; expected a divisor of embed_dim = 30"),
        ({"embed_dim": 32, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of"),
        ({"embed_dim": 32, "num_heads": 4, "rotary": kx.nn.RotaryEmbedding(4, start=2)}, "dimension 2; expected 0"),
    ],
)
def test_wrong_layers_are_named(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kx.nn.LinearAttention(**how)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)


def test_favor_estimates_softmax_attention() -> None:
    """The more features, the nearer: the error falls as one over the root of their number."""
    q, k, v = (0.5 * torch.randn(1, 64, 2, 16, dtype=torch.float64) for _ in range(3))
    exact = softmax_attention(q, k, v)

    def error(features: int) -> float:
        found = []
        for seed in range(8):
            favor = kx.nn.FavorFeatures(16, features, seed=seed)
            found.append((kx.linear_attention(q, k, v, feature_map=favor, backend="reference") - exact).norm())
        return float(torch.stack(found).mean())

    few, many = error(16), error(1024)
    assert many < few / 4
    assert many < 0.1 * exact.norm()


def test_favor_draws() -> None:
    a, b, c = (kx.nn.FavorFeatures(16, seed=seed) for seed in (0, 0, 1))
    assert a.num_features == 44  # 16 · ln 16
    assert torch.equal(a.projection, b.projection)
    assert not torch.equal(a.projection, c.projection)
    rows = a.projection[:16] / a.projection[:16].norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16))
    before = a.projection.clone()
    a.redraw(seed=5)
    assert not torch.equal(a.projection, before)
    assert set(a.state_dict()) == {"projection"}


def test_a_layer_that_sees_the_future_does_not_decode() -> None:
    layer = kx.nn.LinearAttention(16, 2, causal=False)
    for call in (
        lambda: layer.prefill(torch.randn(1, 3, 16)),
        lambda: layer.step(torch.randn(1, 1, 16), layer.new_state(1)),
    ):
        with pytest.raises(ValueError, match="causal is False; expected a causal layer"):
            call()


def test_a_layer_names_its_feature_maps() -> None:
    with pytest.raises(ValueError, match="feature_map is 'gelu'; expected a function, or one of identity, elu1"):
        kx.nn.LinearAttention(16, 2, feature_map="gelu")


def test_a_layer_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="rotary turns 16 dimensions; expected at most 8"):
        kx.nn.LinearAttention(16, 2, rotary=kx.nn.RotaryEmbedding(16))
    with pytest.raises(TypeError, match=r"decay is 0.9; expected a tensor of shape \[2\]"):
        kx.nn.LinearAttention(16, 2, decay=0.9)
    with pytest.raises(ValueError, match=r"x has shape \[3, 8\]; expected head_dim = 16"):
        kx.nn.FavorFeatures(16)(torch.randn(3, 8))


def flash(**how: Any) -> kx.nn.FLASH:
    torch.manual_seed(0)
    return kx.nn.FLASH(12, key_dim=8, chunk_size=8, dtype=torch.float64, **how)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_is_its_formula(causal: bool) -> None:
    """By n × n matrices, with queries and keys that differ and turn."""
    layer = flash(causal=causal, rotary=kx.nn.RotaryEmbedding(4))
    with torch.no_grad():
        layer.gamma.normal_()
        layer.beta.normal_()
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    u, v, z = torch.nn.functional.silu(x @ layer.in_proj.weight.T + layer.in_proj.bias).split((24, 24, 8), -1)
    qq, qk, lq, lk = (z * layer.gamma[i] + layer.beta[i] for i in range(4))
    tables = kx.rope_tables(20, 4)
    qq, qk, lq, lk = (kx.rope(t[:, :, None], None, *tables)[:, :, 0] for t in (qq, qk, lq, lk))
    chunk = torch.arange(20) // 8
    near, far = chunk[:, None] == chunk, torch.ones(20, 20, dtype=torch.bool)
    if causal:
        near, far = near.tril(), chunk[:, None] > chunk
    quad = (qq @ qk.mT / 8**0.5).relu() ** 2 * near / 8
    linear = lq @ lk.mT * far / far.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(layer(x), layer.out_proj(u * ((quad + linear) @ v)))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_pads_and_packs(causal: bool) -> None:
    layer = flash(causal=causal, rotary=kx.nn.RotaryEmbedding(8))
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    lengths = (20, 13)
    alone = [layer(x[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    garbage = torch.where(mask[..., None], x, torch.nan)
    padded = layer(garbage, key_padding_mask=mask)
    assert torch.equal(layer(garbage, lengths=torch.tensor(lengths)), padded)
    packed = layer(torch.cat([x[0], x[1, :13]]), cu_seqlens=torch.tensor([0, 20, 33], dtype=torch.int32))
    for i, n in enumerate(lengths):
        torch.testing.assert_close(padded[i, :n], alone[i])
    torch.testing.assert_close(packed, torch.cat(alone))


def test_flash_under_autocast() -> None:
    layer = kx.nn.FLASH(12, key_dim=8, chunk_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(2, 20, 12))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_flash_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="rotary turns 16 dimensions; expected at most key_dim = 8"):
        flash(rotary=kx.nn.RotaryEmbedding(16))
    with pytest.raises(ValueError, match="rotary starts at dimension 2; expected 0"):
        flash(rotary=kx.nn.RotaryEmbedding(4, start=2))


UNITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": kx.nn.RotaryEmbedding(8), "beta": False, "bias": False, "gamma_std": 0.5},
    "softmax_plus": {"preset": "gau_alpha", "rotary": kx.nn.RotaryEmbedding(4, interleaved=False)},
    "fixed_length": {"normalizer": 512.0, "activation": "relu", "expand_dim": 20},
}


@pytest.mark.parametrize("name", UNITS)
def test_unit_is_its_formula(name: str) -> None:
    """Su's definition by its scores, one sequence at a time, with gradients, padding in front and packed."""
    unit = kx.nn.GatedAttentionUnit(16, key_dim=8, **UNITS[name]).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)

    def formula(x: Tensor) -> Tensor:
        """Of one sequence [n, 16]."""
        e, n = unit.expand_dim, len(x)
        phi = torch.relu if unit.activation == "relu" else torch.nn.functional.silu
        u, v, z = phi(unit.in_proj(x)).split((e, e, 8), -1)
        q, k = (z * g + (0 if unit.beta is None else unit.beta[i]) for i, g in enumerate(unit.gamma))
        if unit.rotary is not None:
            q, k = (y[0, :, 0] for y in unit.rotary(q[None, :, None], k[None, :, None]))
        scores = q @ k.mT / 8**0.5
        if unit.preset == "gau_alpha":
            a = (scores * torch.tensor(max(n, 16.0)).log() / torch.tensor(512.0).log()).softmax(-1)
        else:
            a = torch.relu(scores) ** 2 / (unit.normalizer or n)
        return unit.out_proj(u * (a @ v))

    def both(out: Tensor) -> list[Tensor]:
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        return [out, *torch.autograd.grad((out * weights).sum(), list(unit.parameters()))]

    for a, b in zip(both(unit(x)), both(torch.stack([formula(y) for y in x])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # the tables of angles are in float32
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, 13:] = False
    out = unit(x, key_padding_mask=keep)
    assert torch.equal(unit(x, lengths=keep.sum(1)), out)
    torch.testing.assert_close(out[0, :13], formula(x[0, :13]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out[0, 13:], unit.out_proj(torch.zeros(7, unit.expand_dim, dtype=x.dtype)))
    ends = torch.tensor([0, 20, 33], dtype=torch.int32)
    packed = unit(x.flatten(0, 1)[:33], cu_seqlens=ends)
    torch.testing.assert_close(packed[20:], formula(x[1, :13]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", UNITS)
def test_unit_goes_on_token_by_token(name: str) -> None:
    """Prefill and steps give what one call on all tokens gives, padding in front included, and so does a new cache."""
    unit = kx.nn.GatedAttentionUnit(16, key_dim=8, causal=True, **UNITS[name]).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, :3] = False
    whole = unit(x, key_padding_mask=keep)
    first, cache = unit.prefill(x[:, :5], key_padding_mask=keep[:, :5])
    rest = [unit.step(x[:, t : t + 1], cache) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole)
    cache = unit.new_cache(2)
    torch.testing.assert_close(torch.cat([unit.step(x[:, :3], cache), unit.step(x[:, 3:], cache)], 1), unit(x))
    assert cache.length == 12


def test_unit_trains_in_bfloat16_and_under_autocast() -> None:
    for autocast in (False, True):
        unit = kx.nn.GatedAttentionUnit(16, key_dim=8, rotary=kx.nn.RotaryEmbedding(8))
        unit = unit if autocast else unit.bfloat16()
        x = torch.randn(1, 9, 16, dtype=unit.gamma.dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = unit(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in (x, *unit.parameters()))


def test_unit_goes_on_under_autocast() -> None:
    """A cache made before a dtype is known takes that of the first tokens."""
    unit = kx.nn.GatedAttentionUnit(16, key_dim=8, causal=True)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cache = unit.new_cache(2, 3)
        out = torch.cat([unit.step(x[:, t : t + 1], cache) for t in range(5)], 1)
        whole = unit(x)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert_within_budget(out, unit.double()(x.double()), whole, "outputs")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; expected one of silu, relu, identity, swish"),
        ({"preset": "bert"}, "preset is 'bert'; expected one of su"),
        ({"rotary": kx.nn.RotaryEmbedding(16)}, "dimensions 0 to 16; expected to start at 0 and end by key_dim = 8"),
        ({"rotary": kx.nn.RotaryEmbedding(4, start=2)}, "dimensions 2 to 6; expected to start at 0"),
    ],
)
def test_wrong_units_are_named(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kx.nn.GatedAttentionUnit(16, key_dim=8, **how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "causal is False"),
        ({"causal": True, "preset": "flash"}, "scale is 'length', which later tokens change"),
        ({"causal": True, "normalizer": "valid"}, "normalizer is 'valid', which later tokens change"),
    ],
)
def test_units_that_see_the_future_do_not_go_on(how: dict[str, Any], says: str) -> None:
    unit = kx.nn.GatedAttentionUnit(16, key_dim=8, **how)
    with pytest.raises(ValueError, match=says):
        unit.prefill(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match=says):
        unit.step(torch.randn(1, 1, 16), unit.new_cache(1))
