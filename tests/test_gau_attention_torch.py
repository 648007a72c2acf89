"""Gated attention by torch's own products, in panels: what it serves, and when `auto` takes it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import kx_kernels as kx
from kx_kernels._core.spec import Call
from kx_kernels.ops.gau_attention import _torch, api
from kx_kernels.ops.gau_attention.spec import SPEC, GauCase, make
from kx_kernels.testing import comparison
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.poison import poisoned_allocation, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LONG = GauCase(batch=1, queries=70, key_dim=16, value_dim=40, heads=4, kv_heads=2)
PANELS = {
    "full": LONG,
    "causal": replace(LONG, causal=True),
    "cross": replace(LONG, keys=90, causal=True),
    "cross_longer": replace(LONG, keys=30, causal=True),
    "by_row": replace(LONG, by_row=True, activation="silu"),
}


values_and_gradients = functools.partial(comparison.values_and_gradients, SPEC)


def by_torch(call: Call, **how: Any) -> list[Tensor]:
    return values_and_gradients(lambda **c: kx.gau_attention(**c, backend="torch", **how), call)


def assert_call_within_budget(call: Call, dtype: torch.dtype, **how: Any) -> None:
    before = pytree.tree_map_only(Tensor, Tensor.clone, call)
    with poisoned_allocation():
        found = by_torch(call, **how)
    pairs = exact_and_eager(SPEC, call, dtype, "torch", values_and_gradients)
    for i, (x, (exact, eager)) in enumerate(zip(found, pairs, strict=True)):
        near = functools.partial(neighbours, SPEC, call, dtype, "torch", values_and_gradients, i)
        assert_within_budget(x, exact, eager, f"result {i}", near)
    for name, x in call.items():
        assert not isinstance(x, Tensor) or same_bits(x, before[name]), f"{name} was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPEC.cases)
def test_cases_are_within_budget_or_refused(case: str, dtype: torch.dtype) -> None:
    call = SPEC.call(case, dtype)
    if dict(api.survey(**call))["torch"] is None:
        return assert_call_within_budget(call, dtype)
    with pytest.raises(kx.UnsupportedError, match="torch: padding, packed sequences, biases and sums of rows are left"):
        kx.gau_attention(**call, backend="torch")


def test_cases_of_every_kind_are_served() -> None:
    served = {name for name in SPEC.cases if dict(api.survey(**SPEC.call(name, torch.float32)))["torch"] is None}
    assert {"su", "causal", "cross", "cross_longer", "one_query", "no_gate", "by_row", "rope", "fused", "B0"} <= served
    assert {SPEC.cases[name].activation for name in served} >= {"relu", "silu", "sigmoid", "laplace", "identity"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace", [0, 16 << 10, 1 << 28])
@pytest.mark.parametrize("case", PANELS.values(), ids=PANELS.keys())
def test_panels_are_within_budget(case: GauCase, workspace: int, dtype: torch.dtype) -> None:
    """Of one row, of some rows, and one of all."""
    assert_call_within_budget(make(case, dtype, torch.device("cpu"), 0), dtype, workspace=workspace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_mates_change_nothing(dtype: torch.dtype) -> None:
    call = make(replace(LONG, batch=3, causal=True), dtype, torch.device("cpu"), 0)

    def compute(samples: slice) -> list[Tensor]:
        leaves = [call[n][samples].detach().requires_grad_() for n in ("q", "k", "v", "gate")]
        out = kx.gau_attention(*leaves, causal=True, backend="torch")
        return [out.detach(), *torch.autograd.grad(out, leaves, out.detach().cos())]

    for a, b in zip(compute(slice(1, 2)), compute(slice(None)), strict=True):
        assert same_bits(a, b[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 1000])
@pytest.mark.parametrize("amx", [True, False])
def test_auto_takes_it_for_bfloat16_where_there_is_amx(
    dtype: torch.dtype, queries: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_torch, "has_amx", lambda: amx)
    call = make(replace(LONG, queries=queries, keys=1000), dtype, torch.device("cpu"), 0)
    first = next(name for name, why in api.survey(**call) if why is None)
    assert (first == "torch") == (amx and queries == 1000 and dtype == torch.bfloat16)
    table = kx.explain(kx.gau_attention, **call)
    assert f"{first:<9}  serves this call" in table
    if first == "torch":
        a, b = (kx.gau_attention(**call, backend=name) for name in (None, "torch"))
        assert same_bits(a, b)


@pytest.mark.parametrize("keys", [70, 90])
def test_a_block_that_asks_for_it_turns_queries_as_well(keys: int) -> None:
    call = make(replace(LONG, rope="half", keys=keys), torch.float32, torch.device("cpu"), 0)
    expected = kx.gau_attention(**call, backend="torch")
    with kx.backend("torch"):
        assert same_bits(kx.gau_attention(**call), expected)


def test_operators_without_it_say_so() -> None:
    cos, sin = kx.rope_tables(4, 8)
    with pytest.raises(kx.UnsupportedError, match=r"torch: this operator has none(.|\n)*cpu: can serve"):
        kx.rope(torch.randn(1, 4, 1, 8), None, cos, sin, backend="torch")
