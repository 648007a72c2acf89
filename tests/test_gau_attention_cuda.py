"""What is particular to gated attention's CUDA kernels: scores that stay on chip, shared by the blocks of a cluster."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kx_kernels as kx
from kx_kernels._core import native
from kx_kernels._core.spec import Call
from kx_kernels.ops.gau_attention import _native
from kx_kernels.ops.gau_attention._problem import whole_rounds
from kx_kernels.ops.gau_attention.spec import SPEC, GauCase, make
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.emulation import emulated_cuda
from kx_kernels.testing.poison import poisoned_allocation, same_bits

LENGTHS = {  # of keys: around tiles of rows, and up to what a block has room for
    torch.bfloat16: (1, 17, 127, 128, 129, 512, 513, 640),
    torch.float16: (1, 17, 127, 128, 129, 192),
    torch.float32: (1, 17, 127, 128, 129, 192),
}
COLUMNS = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}
CASE = GauCase(batch=1, key_dim=128)
FORMS = {
    "plain": CASE,
    "causal": replace(CASE, causal=True, gate=False, activation="silu"),
    "padding": replace(CASE, padding="holes", query_padding=True, bias="shared", batch=2, normalizer="sum"),
    "causal_padding": replace(CASE, causal=True, padding="left", bias="heads", normalizer="sum", key_dim=70),
    "heads": replace(CASE, heads=2, causal=True, bias="heads", bias_scale=0.5, by_row=True, key_dim=33),
}


@pytest.fixture(autouse=True)
def serves(lane: Any) -> None:
    if lane.backend != "cuda":
        pytest.skip("of CUDA kernels alone")


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the launches within the block."""
    names: list[str] = []

    def launch(name: str, *arguments: Any) -> None:
        names.append(name)
        real(name, *arguments)

    real = native.launch
    with mock.patch.object(native, "launch", launch):
        yield names


def shared_by(blocks: int) -> Any:
    """Scores stay, and so many blocks share them."""
    return mock.patch.object(_native, "_resident_blocks", return_value=blocks)


def stay(call: Call, blocks: int) -> Tensor:
    """The call's output where `blocks` blocks share scores that stay."""
    with shared_by(blocks), launches() as names, poisoned_allocation():
        out = kx.gau_attention(**call, backend="cuda")
    assert names == ["gau_attention_cuda_resident"]
    return out


def in_panels(call: Call, workspace: int) -> Tensor:
    """The call's output where scores leave the chip for so many bytes."""
    off_chip = mock.patch.object(_native, "_slices_on_chip", return_value=0)
    with shared_by(0), off_chip, launches() as names, poisoned_allocation():
        out = kx.gau_attention(**call, workspace=workspace, backend="cuda")
    assert names == ["gau_attention_cuda"]
    return out


def with_garbage(call: Call) -> Call:
    """NaN in what is padding."""
    call = dict(call)
    for mask, names in (("key_padding_mask", ("k", "v")), ("query_padding_mask", ("q", "gate"))):
        for name in names if mask in call else ():
            call[name] = call[name].masked_fill(~call[mask][..., None, None], torch.nan)
    return call


def assert_right(call: Call, dtype: torch.dtype, run: Callable[[Call], Tensor]) -> None:
    out = run(with_garbage(call))

    def compute(function: Any, c: Call) -> list[Tensor]:
        return [function(**c)]

    near = functools.partial(neighbours, SPEC, call, dtype, "cuda", compute, 0)
    assert_within_budget(out, *exact_and_eager(SPEC, call, dtype, "cuda", compute)[0], "output", near)


def sizes() -> list[Any]:
    """A form and a number of blocks to each dtype, length and width, all in turn."""
    every = [(dtype, n, e) for dtype, lengths in LENGTHS.items() for n in lengths for e in (512, 768, 1536, 1537)]
    forms = itertools.cycle(FORMS)
    cases = []
    for i, (dtype, n, e) in enumerate(every):
        blocks = 1 + i % min(8, -(-e // COLUMNS[dtype]))
        cases.append(pytest.param(dtype, n, e, next(forms), blocks, id=f"{dtype}-n{n}-e{e}-{blocks}"))
    return cases


@pytest.mark.parametrize(("dtype", "n", "e", "form", "blocks"), sizes())
def test_scores_stay(lane: Any, dtype: torch.dtype, n: int, e: int, form: str, blocks: int) -> None:
    case = replace(FORMS[form], queries=n, value_dim=e)
    assert_right(make(case, dtype, torch.device(lane.device), n), dtype, functools.partial(stay, blocks=blocks))


def test_panels_come_out_even() -> None:
    """On 132 processors, six slices of values to a tile: 22 tiles are a round."""
    assert [whole_rounds(tiles, 6, 132) for tiles in (8, 21, 22, 32, 43, 44, 128)] == [8, 21, 22, 22, 22, 44, 110]


@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (129, 300)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LENGTHS, ids=str)
def test_scores_in_panels(lane: Any, dtype: torch.dtype, form: str, queries: int, keys: int) -> None:
    """Of values wide and narrow; in as many passes as there are tiles, or in one: the same bits."""
    for value_dim, key_dim in ((300, CASE.key_dim), (65, 33)):
        case = replace(FORMS[form], queries=queries, keys=keys, value_dim=value_dim, key_dim=key_dim)
        call = make(case, dtype, torch.device(lane.device), keys)
        if case.by_row:  # outputs that float16 holds
            call["normalizer"] = call["normalizer"] / keys
        assert_right(call, dtype, functools.partial(in_panels, workspace=64 << 20))
        call = with_garbage(call)
        assert same_bits(in_panels(call, 0), in_panels(call, 64 << 20))


@pytest.mark.parametrize(("queries", "keys"), [(1, 190), (130, 70), (70, 190), (190, 1), (200, 65)])
@pytest.mark.parametrize("dtype", LENGTHS, ids=str)
def test_other_keys_than_queries(lane: Any, dtype: torch.dtype, queries: int, keys: int) -> None:
    """Among them rows that see nothing, and a sequence of padding alone."""
    for causal in (False, True):
        case = replace(FORMS["padding"], queries=queries, keys=keys, value_dim=600, heads=2, causal=causal)
        call = make(case, dtype, torch.device(lane.device), keys)
        assert_right(call, dtype, functools.partial(stay, blocks=3))
        out = stay(with_garbage(call), 2)
        assert not out[-1].any()
        assert not out[:, : max(0, queries - keys) if causal else 0].any()


@pytest.mark.parametrize("dtype", LENGTHS, ids=str)
def test_how_many_blocks_share_scores_changes_no_bit(lane: Any, dtype: torch.dtype) -> None:
    case = replace(FORMS["causal_padding"], queries=150, value_dim=8 * COLUMNS[dtype] - 3)
    call = make(case, dtype, torch.device(lane.device), 0)
    first = stay(call, 1)
    for blocks in range(2, 9):
        with lane.ready(seed=blocks):  # another schedule, where the lane has one
            assert same_bits(stay(call, blocks), first)


@pytest.mark.parametrize("n", [1, 129, 512])
def test_clusters_without_wgmma(lane: Any, n: int) -> None:
    if not lane.slow:
        pytest.skip("a GPU is what it is")
    for form, e in (("plain", 600), ("causal_padding", 1537)):
        call = make(replace(FORMS[form], queries=n, value_dim=e), torch.bfloat16, torch.device("cpu"), n)
        with emulated_cuda(wgmma=False, clusters=True):
            assert_right(call, torch.bfloat16, functools.partial(stay, blocks=2))


@pytest.mark.parametrize(
    ("change", "machine", "stays"),
    [
        ({}, {}, True),
        ({"queries": 640}, {}, True),
        ({"queries": 641}, {}, False),
        ({"value_dim": 256}, {}, False),  # nothing is made twice
        ({"key_dim": 129}, {}, False),
        ({"lengths": (100, 30)}, {}, False),
        ({"queries": 512}, {"wgmma": False, "clusters": True}, True),
        ({"queries": 513}, {"wgmma": False, "clusters": True}, False),
        ({}, {"wgmma": False}, False),
    ],
)
def test_where_scores_stay(lane: Any, change: dict[str, Any], machine: dict[str, bool], stays: bool) -> None:
    """`auto`'s choice on an emulated GPU of eight multiprocessors, and that it is obeyed."""
    if not lane.slow:
        pytest.skip("a GPU is what it is")
    case = replace(CASE, **{"queries": 100, "value_dim": 512} | change)
    call = make(case, torch.bfloat16, torch.device("cpu"), 0)
    with emulated_cuda(**machine), launches() as names:
        kx.gau_attention(**call, backend="cuda")
    assert (names == ["gau_attention_cuda_resident"]) == stays


H200 = _native.ResidentForm(most_keys=640, tile=64, columns=256, at_once=(132, 66, 42, 32, 24, 18, 16, 16))


@pytest.mark.parametrize(
    ("rows", "n", "e", "blocks"),
    [
        (1, 512, 1536, 6),  # as many as there are slices
        (16, 512, 4096, 8),  # as a cluster can have
        (32, 512, 1536, 4),  # one round, of two slices at most: six would be two rounds
        (256, 512, 1536, 1),  # two rounds, which two blocks would make four of half as much
        (22, 512, 1536, 0),  # one round of 132 blocks, each with its own scores, is shorter
        (256, 640, 512, 1),
        (256, 641, 1536, 0),
        (256, 512, 256, 0),
        (0, 512, 1536, 0),
        (32, 0, 1536, 0),
    ],
)
def test_how_many_blocks_share_scores(rows: int, n: int, e: int, blocks: int) -> None:
    assert H200.blocks(rows, n, 128, e, 132) == blocks


def out_of_step(call: Call) -> Call:
    """The same numbers where rows begin between two multiples of 16 bytes, which the copy engine does not read."""
    call = dict(call)
    for name in ("q", "k", "v"):
        apart = torch.full((*call[name].shape[:-1], call[name].shape[-1] + 3), torch.nan).to(call[name])
        apart[..., 1:-2] = call[name]
        call[name] = apart[..., 1:-2]
    return call


@pytest.mark.parametrize("form", FORMS)
def test_copy_engine_and_threads_bring_the_same(lane: Any, form: str) -> None:
    """Forward and backward, in one panel and in several."""
    case = replace(FORMS[form], queries=200, keys=330, value_dim=320, key_dim=72)
    call = with_garbage(make(case, torch.bfloat16, torch.device(lane.device), 0))
    for workspace in (0, 64 << 20):
        results = []
        for c in (call, out_of_step(call)):
            inputs = [c[name].detach().requires_grad_() for name in ("q", "k", "v")]
            o = in_panels({**c, **dict(zip("qkv", inputs, strict=True))}, workspace)
            results.append([o, *torch.autograd.grad(o, inputs, torch.ones_like(o))])
        for a, b in zip(*results, strict=True):
            assert a.any()
            assert same_bits(a, b)
