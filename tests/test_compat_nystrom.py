"""The drop-ins for Nyström attention: against the code of lucidrains and of Hugging Face, and xformers' formula."""

from __future__ import annotations

import importlib
import inspect
import math
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kx_kernels as kx
from kx_kernels.compat import nystrom_attention, transformers, xformers
from kx_kernels.testing.budget import assert_within_budget


@pytest.fixture(autouse=True)
def in_float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)


def iterated(a: Tensor, steps: int, norm: Tensor) -> Tensor:
    """Rows of a sum to 1."""
    z, identity = a.mT / norm, torch.eye(a.shape[-1])
    for _ in range(steps):
        x = a @ z
        z = z @ (13 * identity - x @ (15 * identity - x @ (7 * identity - x))) / 4
    return z


def results_and_gradients(module: nn.Module, x: Tensor, keep: Tensor | None = None, **how: Any) -> dict[str, Tensor]:
    """What is returned, and gradients by name of the sum of squares of outputs where `keep`."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    results = module(x, **how)
    first = results[0] if isinstance(results, tuple) else results
    first = first if keep is None else first * keep[..., None]
    first.square().sum().backward()
    found = {"o": first.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in module.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-8, atol=1e-8 * max(1, x.abs().max().item()), msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [5, 16, 24, 29])
@pytest.mark.parametrize("residual", [True, False])
def test_lucidrains_own_code(masked: bool, length: int, residual: bool) -> None:
    how: dict[str, Any] = {"num_landmarks": 8, "residual": residual, "residual_conv_kernel": 5}
    theirs = importlib.import_module("nystrom_attention").NystromAttention(12, 4, 3, **how)
    ours = nystrom_attention.NystromAttention(12, 4, 3, **how)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = 3 * torch.randn(2, length, 12)
    mask = torch.arange(length) < torch.tensor([[length], [max(length // 2, 2)]]) if masked else None
    assert_same(results_and_gradients(ours, x, mask, mask=mask), results_and_gradients(theirs, x, mask, mask=mask))
    seen = slice(None) if mask is None else slice(-length, 2 - length)  # rows that are no padding
    for which, rows in (("return_attn_matrices", (seen, slice(None), slice(None))), ("return_attn", (seen,))):
        (out, found), (_, wanted) = (module(x, mask, **{which: True}) for module in (ours, theirs))
        torch.testing.assert_close(out, ours(x, mask))
        found, wanted = (y if isinstance(y, tuple) else (y,) for y in (found, wanted))
        for a, b, row in zip(found, wanted, rows, strict=True):
            torch.testing.assert_close(a[:, :, row], b[:, :, row])


def test_lucidrains_interface() -> None:
    cls = nystrom_attention.NystromAttention
    assert signature(cls) == (
        "dim, dim_head=64, heads=8, num_landmarks=256, pinv_iterations=6, residual=True, residual_conv_kernel=33, "
        "eps=1e-08, dropout=0.0"
    )
    assert signature(cls.forward) == "self, x, mask=None, return_attn=False, return_attn_matrices=False"
    names = {name: tuple(x.shape) for name, x in cls(12, 4, 3).state_dict().items()}
    assert names == {
        "to_qkv.weight": (36, 12),
        "to_out.0.weight": (12, 12),
        "to_out.0.bias": (12,),
        "res_conv.weight": (3, 1, 33, 1),
    }
    with pytest.raises(ValueError, match="eps is 1e-06; expected 1e-8, which landmarks as lucidrains' have"):
        cls(12, eps=1e-6)


def config(**change: Any) -> SimpleNamespace:
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_landmarks": 6,
        "segment_means_seq_len": 30,
        "conv_kernel_size": 5,
        "inv_coeff_init_option": False,
        "attention_probs_dropout_prob": 0.1,
    }
    return SimpleNamespace(**settings | change)


@pytest.mark.parametrize("landmarks", [6, 15, 30])
@pytest.mark.parametrize("kernel", [5, None])
def test_transformers_own_code(landmarks: int, kernel: int | None) -> None:
    peer = importlib.import_module("transformers.models.nystromformer.modeling_nystromformer")
    theirs = peer.NystromformerSelfAttention(config(num_landmarks=landmarks, conv_kernel_size=kernel))
    ours = transformers.NystromformerSelfAttention(config(num_landmarks=landmarks, conv_kernel_size=kernel))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = 2 * torch.randn(2, 30, 24)
    assert_same(results_and_gradients(ours, x), results_and_gradients(theirs, x))
    assert len(ours(x)) == 1
    for a, b in zip(ours(x, output_attentions=True), theirs(x, output_attentions=True), strict=True):
        torch.testing.assert_close(a, b)
    if landmarks == 30:
        mask = torch.zeros(2, 1, 1, 30)
        mask[1, :, :, 20:] = torch.finfo(mask.dtype).min
        for one in (mask, mask.expand(2, 1, 30, 30)):
            for a, b in zip(ours(x, one, True), theirs(x, one, True), strict=True):
                torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours(x, (mask[:, 0, 0] == 0).int())[0], theirs(x, mask)[0])


def test_transformers_where_the_original_raises() -> None:
    """Other lengths, masks of every form, norms of each matrix."""
    ours = transformers.NystromformerSelfAttention(config(inv_coeff_init_option=True))
    x = torch.randn(2, 41, 24)
    mask = torch.zeros(2, 1, 1, 41)
    mask[1, :, :, 23:] = torch.finfo(mask.dtype).min
    whole, (short,) = ours(x, mask)[0], ours(x[1:, :23])
    torch.testing.assert_close(whole[:1], ours(x[:1])[0])
    torch.testing.assert_close(whole[1:, :23], short)
    assert not whole[1, 23:].any()
    padding = mask[:, 0, 0] == 0
    for other in (padding, padding.long(), mask == 0, mask.expand(2, 1, 41, 41)):
        torch.testing.assert_close(ours(x, other)[0], whole)
    assert ours(x, mask, output_attentions=True)[1].shape == (2, 3, 41, 6)
    for other in (padding.double(), (mask == 0).long()):  # added to scores, or not
        with pytest.raises(TypeError, match=r"argument 'attention_mask' is a .*; expected bool or integers"):
            ours(x, other)
    with pytest.raises(ValueError, match=r"hidden size \(25\) is not a multiple"):
        transformers.NystromformerSelfAttention(config(hidden_size=25))


def xformers_formula(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, m: int, init: str, conv: nn.Module | None, heads: int
) -> Tensor:
    n, hidden = q.shape[1], torch.zeros(q.shape[0], 1, q.shape[1])
    if keep is not None:
        kept = keep.repeat_interleave(heads, 0)
        q, k, hidden = q * kept[..., None], k * kept[..., None], torch.where(kept, 0.0, -math.inf)[:, None]
    q = q / math.sqrt(q.shape[-1])
    if m >= n:
        o = (q @ k.mT + hidden).softmax(-1) @ v
    else:
        sizes = [n // m + (i >= m - n % m) for i in range(m)]
        means = [torch.stack([x.mean(1) for x in y.split(sizes, 1)], 1) for y in (q, k)]
        f, a = (q @ means[1].mT).softmax(-1), (means[0] @ means[1].mT).softmax(-1)
        b = (means[0] @ k.mT + hidden).softmax(-1)
        sums = a.sum(-2)
        norm = sums.max() if init == "original" else sums.max(-1).values[:, None, None]
        z = torch.linalg.pinv(a) if init == "pinv" else iterated(a, 6, norm)
        o = f @ z @ (b @ v)
    if conv is not None:
        o = o + conv(v.unflatten(0, (-1, heads))).flatten(0, 1)
    return o


@pytest.mark.parametrize("init", ["per_matrix", "original", "pinv"])
@pytest.mark.parametrize(("n", "m"), [(24, 8), (29, 8), (8, 8), (7, 9)])
@pytest.mark.parametrize("masked", ["no", "bool", "additive", "finite", "by_head"])
def test_xformers(init: str, n: int, m: int, masked: str) -> None:
    heads, batch = 3, 2
    conv = 5 if masked == "no" else None  # with a mask theirs convolves padding as well
    ours = xformers.NystromAttention(
        0.0,
        heads,
        m,
        use_razavi_pinverse=init != "pinv",
        pinverse_original_init=init == "original",
        conv_kernel_size=conv,
    )
    leaves = [(2 * torch.randn(batch * heads, n, 4)).requires_grad_() for _ in range(3)]
    keep = torch.arange(n) < torch.tensor([[n], [n - 3]])
    additive = torch.where(keep, 0.0, -math.inf)
    mask = {
        "no": None,
        "bool": keep,
        "additive": additive,
        "finite": torch.where(keep, 0.0, -1e4),
        "by_head": additive.clamp(min=torch.finfo(additive.dtype).min).repeat_interleave(heads, 0)[:, None],
    }[masked]
    seen = keep.repeat_interleave(heads, 0)[..., None] if mask is not None else torch.ones(1, 1, 1)
    o = ours(*leaves, key_padding_mask=mask) * seen
    expected = seen * xformers_formula(*leaves, None if mask is None else keep, m, init, ours.skip_connection, heads)
    torch.testing.assert_close(o, expected, rtol=1e-7, atol=1e-8)
    grad = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad(o, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_xformers_interface() -> None:
    cls = xformers.NystromAttention
    assert signature(cls) == (
        "dropout, num_heads, num_landmarks=64, landmark_pooling=None, causal=False, use_razavi_pinverse=True, "
        "pinverse_original_init=False, inv_iterations=6, v_skip_connection=None, conv_kernel_size=None, args, kwargs"
    )
    assert list(cls(0.1, 3, conv_kernel_size=5).state_dict()) == ["skip_connection.weight"]
    with pytest.raises(ValueError, match="causal is True"):
        cls(0.1, 3, causal=True)
    with pytest.raises(ValueError, match="landmark_pooling"):
        cls(0.1, 3, landmark_pooling=nn.AvgPool1d(2))
    q = torch.randn(6, 20, 4)
    with pytest.raises(ValueError, match=r"shape \[2, 19\]; expected \[2, 20\] or \[6, 1, 20\]"):
        cls(0.0, 3)(q, q, q, key_padding_mask=torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(TypeError, match="argument 'key_padding_mask' is a int64 tensor"):
        cls(0.0, 3)(q, q, q, key_padding_mask=torch.ones(2, 20, dtype=torch.int64))
    skipping = cls(0.0, 3, 8, v_skip_connection=nn.Identity())
    torch.testing.assert_close(skipping(q, q, q, att_mask=None), cls(0.0, 3, 8)(q, q, q) + q)
    nothing = cls(0.0, 3, 8)(q, q, q, key_padding_mask=torch.zeros(2, 20, dtype=torch.bool))
    assert not nothing.any()


def test_layer_is_the_function_between_projections() -> None:
    layer = kx.nn.NystromAttention(24, 3, num_landmarks=6, conv_kernel_size=5, pinv_iterations=4, ridge=0.01, bias=True)
    x, lengths = torch.randn(2, 40, 24), torch.tensor([40, 17])
    q, k, v = (project(x).unflatten(-1, (3, 8)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    how: dict[str, Any] = {"num_landmarks": 6, "pinv_iterations": 4, "ridge": 0.01, "conv_weight": layer.conv_weight}
    o = kx.nystrom_attention(q, k, v, lengths=lengths, **how)
    assert isinstance(o, Tensor)
    torch.testing.assert_close(layer(x, lengths=lengths), layer.out_proj(o.flatten(-2)))
    mask = torch.arange(40) < lengths[:, None]
    torch.testing.assert_close(layer(x, key_padding_mask=mask), layer(x, lengths=lengths))
    ends = torch.tensor([0, 40, 57], dtype=torch.int32)
    packed = layer(torch.cat([x[0], x[1, :17]]), cu_seqlens=ends)
    torch.testing.assert_close(packed, torch.cat([layer(x[:1])[0], layer(x[1:, :17])[0]]))
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with pytest.raises(ValueError, match="num_heads is 5"):
        kx.nn.NystromAttention(24, 5)
    with pytest.raises(ValueError, match="conv_kernel_size is 0"):
        kx.nn.NystromAttention(24, 3, conv_kernel_size=0)


MODULES: dict[str, Any] = {
    "layer": lambda: kx.nn.NystromAttention(24, 3, num_landmarks=6, conv_kernel_size=5),
    "lucidrains": lambda: nystrom_attention.NystromAttention(24, 8, 3, num_landmarks=6, residual_conv_kernel=5),
    "transformers": lambda: transformers.NystromformerSelfAttention(config()),
    "transformers_exact": lambda: transformers.NystromformerSelfAttention(config(num_landmarks=30)),
    "xformers": lambda: xformers.NystromAttention(0.0, 3, 6, conv_kernel_size=5),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_half_precision(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """A module in half precision, and one in float32 under autocast: outputs, gradients of inputs and parameters."""
    if autocast and name == "xformers":
        pytest.skip("has no projections, which are what autocast sees")
    held = torch.float32 if autocast else dtype
    module = MODULES[name]().to(held)
    x = torch.randn(3, 40, 24).to(held)

    def results(at: torch.dtype, backend: str) -> list[Tensor]:
        copy, leaf = deepcopy(module).to(at), x.detach().to(at).requires_grad_()
        with kx.backend(backend), torch.autocast("cpu", dtype, enabled=autocast and at == held):
            out = copy(*(leaf,) * (3 if name == "xformers" else 1))
        out = out[0] if isinstance(out, tuple) else out
        leaves = [leaf, *copy.parameters()]
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    found, eager, exact = results(held, "cpu"), results(held, "reference"), results(torch.float64, "reference")
    assert found[0].dtype == dtype
    for i, (a, b, c) in enumerate(zip(found, exact, eager, strict=True)):
        assert a.isfinite().all()
        assert_within_budget(a, b, c, f"result {i}")
