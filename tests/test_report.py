"""The report: counts that gate, known fits, runs that go on, answers without evidence. Its page has its own tests."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the report's libraries are in requirements.txt")
pytest.importorskip("scipy")

import jsonschema
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import kx_kernels as kx
from benchmarks import __main__ as command
from benchmarks import compare, contest, counts, environment, figures, fits, layers, measure, sections, suite, units
from benchmarks.claims import FAILS, HOLDS, OPEN, Claim, all_claims, cost
from benchmarks.claims.cost import flops
from benchmarks.claims.evidence import Evidence
from benchmarks.environment import ROOT
from benchmarks.goals import Goal
from kx_kernels._core import dispatch, triton
from kx_kernels._core.spec import all_specs
from kx_kernels.testing.metering import metered

CLAIMS = [f"C{i}" for i in (*range(1, 22), 24, 25)] + [f"D{i}" for i in (*range(1, 12), 13, 14)]


def test_every_claim_has_a_row() -> None:
    assert [claim.id for claim in all_claims()] == CLAIMS


def test_without_evidence_nothing_is_decided() -> None:
    for claim in all_claims():
        row = claim.row(Evidence({}))
        assert row["answers"], claim.id
        assert {answer["verdict"] for answer in row["answers"]} == {OPEN}, claim.id


def test_what_a_claim_needs_is_measured() -> None:
    """Every place that a claim is answered from is one that a run fills."""
    places = {name: {step.where for step in suite.steps(name, "cpu", quick=False)} for name in ("layers", "quality")}
    for claim in all_claims():
        assert claim.needs, claim.id
        assert set(claim.needs) <= places[suite.holder(claim.needs)], claim.id


def kept(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "amd-epyc-2-threads-avx2" / f"{name}.json").read_text())


@pytest.mark.parametrize("claim", all_claims(), ids=lambda claim: claim.id)
def test_a_claim_is_answered_from_what_it_asks_for(claim: Claim) -> None:
    """What `--only` measures gives the answers that everything gives, and every place that it needs has a step."""
    every = {"layers": kept("layers"), "quality": kept("quality")}
    asked = suite.Asked([claim.id], claim.needs, claim.asks())
    some = {name: {place: rows for place, rows in of.items() if place in claim.needs} for name, of in every.items()}
    for place, where in (("times", ("width", "what")), ("memory", ("length",))):
        keys = ("level", "name", "by", *where)
        rows = some["layers"].get(place, [])
        some["layers"][place] = [row for row in rows if tuple(row[key] for key in keys) in asked.parts]
    assert claim.row(Evidence(some)) == claim.row(Evidence(every))
    places = {step.where for step in suite.steps(suite.holder(claim.needs), "cpu", False, asked)}
    assert places == set(claim.needs)


def test_one_claim_takes_what_it_needs() -> None:
    (claim,) = (claim for claim in all_claims() if claim.id == "C5")
    steps = suite.steps("layers", "cpu", False, suite.Asked(["C5"], claim.needs, claim.asks()))
    lengths = (*layers.SHORT, *layers.LENGTHS["base"])
    assert [step.what for step in steps] == [f"H = 768, n = {n}, mixing" for n in lengths]
    names = {(part.name, part.by) for step in steps for part in step.find.args[0]}
    assert names == {
        (name, by)
        for name, by in (
            ("attention", "eager"),
            ("attention", "fused"),
            ("linear attention", "eager"),
            ("linear attention", "ours"),
        )
    }
    assert suite.START + suite.SLACK * sum(step.seconds for step in steps) < 130


def test_several_claims_are_measured_at_once_and_drawn(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only they are; a page that is drawn of whole runs is another."""
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "report", "--here", *("--only", "C2", "--only", "C1")])
    command.main()
    assert steps.calls == ["a", "b", "c"]
    told = capsys.readouterr().out
    assert told.index("C1: ") < told.index("C2: ") < told.index("written: report/C1-C2/index.html")
    summary = (tmp_path / "report" / "C1-C2" / "summary.md").read_text()
    assert "C2" in summary
    assert "C3" not in summary
    assert not (tmp_path / "report" / "index.html").exists()


H = layers.WIDTHS["base"]


@pytest.mark.parametrize(
    ("level", "name", "expected"),
    [
        ("mixing", "attention", lambda n: 4 * n * n * H),
        ("mixing", "linear attention", lambda n: 4 * n * H * layers.HEAD_DIM + 2 * n * H),
        ("mixing", "GAU", lambda n: 2 * n * n * (layers.KEY_DIM + 2 * H)),
        ("layer", "projections", lambda n: 8 * n * H * H),
        ("layer", "feed-forward", lambda n: 16 * n * H * H),
        ("layer", "attention", lambda n: 8 * n * H * H + 4 * n * n * H),
    ],
)
@pytest.mark.parametrize("n", [256, 1024])
def test_products_are_as_many_as_the_formulas_say(
    level: str, name: str, expected: Callable[[int], int], n: int
) -> None:
    assert flops(level, name, "eager", H, n) == expected(n)


SPECS = {spec.name: spec for spec in all_specs()}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def seen(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """What torch's counter sees of a call."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def landmarks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What Nyström attention's products are, with six steps of the inverse."""
    q, k, v, small = (x.transpose(1, 2) for x in (q, k, v, q[:, :64]))
    a = z = small @ small.mT
    for _ in range(6):
        x = a @ z
        z = z @ (x @ (x @ x))
    return (q @ small.mT) @ (z @ ((small @ k.mT) @ v))


def counted_calls() -> Iterator[Any]:
    """An operator, a call of it, and its products in eager torch."""
    q, v = meta(1, 512, 1, 128), meta(1, 512, 1, 2 * H)
    call = {"q": q, "k": q, "v": v, "gate": v, "causal": False}
    yield pytest.param("gau_attention", call, lambda: seen(layers.gau, q, q, v, v), id="gau_attention")
    reference = functools.partial(SPECS["gau_attention"].reference, causal=False)
    yield pytest.param("gau_attention", call, lambda: seen(reference, q, q, v, v), id="gau_attention-reference")
    mixed = {"quad_q": q, "quad_k": q, "lin_q": q, "lin_k": q, "v": v, "gate": v, "chunk_size": 256, "causal": False}
    yield pytest.param(
        "mixed_chunk_attention", mixed, lambda: seen(layers.mixed, q, q, v, v), id="mixed_chunk_attention"
    )
    x = meta(2, 512, 12, 64)
    heads = {"q": x, "k": x, "v": x}
    sums = 2 * x.numel()  # of the denominator's product, which the operator's count is without
    yield pytest.param("linear_attention", heads, lambda: seen(layers.linear, x, x, x) - sums, id="linear_attention")
    yield pytest.param(
        "nystrom_attention", heads | {"num_landmarks": 64}, lambda: seen(landmarks, x, x, x), id="nystrom_attention"
    )


@pytest.mark.parametrize(("name", "call", "count"), list(counted_calls()))
def test_specifications_count_what_torch_counts(name: str, call: dict[str, Any], count: Callable[[], int]) -> None:
    """rope and gau_inputs have no products, so that the counter sees nothing of them."""
    assert SPECS[name].flops(call) == count()


def spec_call(name: str, inputs: Any) -> dict[str, Any]:
    """The arguments of the specification's counts, of a benchmark's inputs."""
    case = inputs.case
    if name == "rope":
        return {"q": inputs.q, "k": inputs.k, "cos": inputs.cos, "sin": inputs.sin}
    call = dict(zip(("q", "k", "v", "gate"), inputs.leaves, strict=False))
    more = {"gau_attention": ("causal", getattr(case, "causal", None))}
    more["nystrom_attention"] = ("num_landmarks", getattr(case, "landmarks", None))
    return call | dict([more[name]] if name in more else [])


@pytest.mark.parametrize("name", suite.OPERATORS)
def test_a_case_counts_what_the_specification_counts(name: str) -> None:
    """A row's bound is drawn from the same flops and bytes; queries of Nyström attention have to be read twice."""
    op, spec = suite.OPERATORS[name], SPECS[name]
    case = replace(op.cases("cpu")[0], length=256)
    inputs = op.Inputs(case, "cpu")
    call = spec_call(name, inputs)
    assert case.flops == spec.flops(call)
    twice = inputs.leaves[0].nbytes if name == "nystrom_attention" else 0
    assert case.bytes_moved == spec.bytes(call) + twice


@pytest.mark.parametrize("how", [{"landmarks": 32}, {"convolution": True}, {"length": 64}, {"length": 1}], ids=str)
def test_nystrom_cases_count_what_the_specification_counts(how: dict[str, Any]) -> None:
    op, spec = suite.OPERATORS["nystrom_attention"], SPECS["nystrom_attention"]
    inputs = op.Inputs(replace(op.BASE, **{"length": 256, "heads": 2, **how}), "cpu")
    call = spec_call("nystrom_attention", inputs)
    call |= {} if inputs.weight is None else {"conv_weight": inputs.weight}
    assert inputs.case.flops == spec.flops(call)


def test_nystrom_products_are_those_of_the_formula() -> None:
    """Per head 4nmd + nm² + m²d + 24m³ multiplications, but Z with m rows of values in the place of nm²."""
    op = suite.OPERATORS["nystrom_attention"]
    for n, m, d in ((512, 64, 64), (4096, 256, 64)):
        case = replace(op.BASE, length=n, landmarks=m, heads=1)
        assert case.flops == 2 * (4 * n * m * d + m * m * d + m * m * d + 24 * m**3)


MOVED = {  # bytes that Triton's forward kernels move, at most, over those of the specification
    "rope": 1.11,  # q and k read the tables each for themselves
    "gau_inputs": 1.01,
    "linear_attention": 1.51,
    "gau_attention": 1.65,
    "mixed_chunk_attention": 3.13,  # states of chunks; and keys and values again for every block of queries
    "nystrom_attention": 4.68,  # queries twice, and values for each of the landmarks' products and the convolution
}


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is metered")


@interpreted
@pytest.mark.parametrize("name", SPECS)
def test_counts_agree(name: str) -> None:
    """Products of the specification, of torch's counter and of the meter, but for what is said of each; forward, bytes
    no fewer than the specification's, and at most so many times as many as the table says. Every pass with products is
    in the specification.
    """
    all_rows = [row for row in counts.rows(SPECS[name]) if row["backend"] == "triton"]
    found = [row for row in all_rows if "flops" in row]
    assert len(found) == len(SPECS[name].metered()) * len(SPECS[name].work)
    assert not any(row["dot_flops"] for row in all_rows if row not in found)
    for row, shown in zip(found, sections.products(found), strict=True):
        which = f"{row['case']}, {row['pass']}"
        assert row["torch"] == row["flops"] + sum(row["beside_torch"].values()), which
        assert row["dot_flops"] == row["flops"] + sum(row["beside_triton"].values()), which
        if row["pass"] == "forward":
            assert 1 <= (row["loaded"] + row["stored"]) / row["least"] <= MOVED[name], which
        assert shown["verdict"] == HOLDS


ODD = {  # sizes that no tile divides, and forms in which an operator's count is another
    "linear_attention": [
        {"batch": 2, "length": 100, "heads": 4, "kv_heads": 2, "key_dim": 24, "value_dim": 40},
        {"batch": 1, "length": 100, "heads": 2, "kv_heads": 1, "key_dim": 128, "value_dim": 200, "causal": False},
        {"batch": 1, "length": 70, "normalize": False},
        {"batch": 1, "length": 70, "heads": 2, "kv_heads": 1, "key_dim": 72, "value_dim": 130, "rope": "half"},
    ],
    "gau_attention": [
        {"batch": 1, "queries": 200, "key_dim": 24, "value_dim": 40, "causal": True},
        {"batch": 2, "queries": 140, "key_dim": 24, "value_dim": 40},
        {"batch": 1, "queries": 140, "keys": 300, "heads": 2, "kv_heads": 1, "value_dim": 150, "causal": True},
        {"batch": 1, "queries": 300, "keys": 140, "heads": 2, "causal": True},
    ],
    "mixed_chunk_attention": [
        {"batch": 2, "length": 100, "chunk": 40, "key_dim": 24, "value_dim": 40, "causal": True},
        {"batch": 1, "length": 100, "chunk": 40, "key_dim": 24, "value_dim": 40},
        {"batch": 1, "length": 300, "chunk": 150, "heads": 2, "kv_heads": 1, "value_dim": 150, "causal": True},
    ],
    "nystrom_attention": [
        {"queries": 100, "heads": 1, "dim": 24, "value_dim": 40, "landmarks": 12, "iterations": 2, "conv": 5},
        {"batch": 1, "queries": 300, "heads": 1, "dim": 72, "value_dim": 40, "landmarks": 48, "iterations": 1},
        {"batch": 1, "queries": 30, "keys": 70, "iterations": 3},
    ],
}


@interpreted
@pytest.mark.parametrize("tiles", ["interpreter", "GPU"])
@pytest.mark.parametrize(("name", "how"), [(name, how) for name, hows in ODD.items() for how in hows], ids=str)
def test_what_counts_differ_by_is_a_formula_of_all_sizes(
    name: str, how: dict[str, Any], tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of operands and of tiles: the interpreter takes those of a GPU as well."""
    if tiles == "GPU":
        monkeypatch.setattr(triton, "interpreted", lambda: False)
    spec = SPECS[name]
    case = type(spec.cases[spec.example])(**how)
    call = spec.make(case, torch.float32, torch.device("cpu"), 0)
    api = importlib.import_module(spec.function.__module__)
    problem, of_torch = api.problem(**call), counts.seen(spec, call)
    before = 0
    with metered() as meter:
        for which in spec.passes(next(b for b in api.backends() if b.name == "triton"), problem):
            work = spec.work[which]
            of_triton, before = meter.dot_flops - before, meter.dot_flops
            assert of_triton == work.flops(call) + sum(work.beside_triton(call, problem).values()), which
            assert of_torch[which] == work.flops(call) + sum(work.beside_torch(call).values()), which
            if which == "forward":
                assert meter.loaded + meter.stored >= spec.bytes(call)


def test_counts_that_differ_are_said_to() -> None:
    row = {"op": "rope", "case": "x", "pass": "forward", "loaded": 8, "stored": 4, "least": 10, "flops": 100}
    row |= {"torch": 150, "beside_torch": {"half of them twice": 50}, "dot_flops": 120, "beside_triton": {"tiles": 20}}
    assert sections.products([row])[0]["verdict"] == HOLDS
    for change in ({"torch": 151}, {"dot_flops": 119}, {"flops": 99}, {"loaded": 5}, {"beside_triton": {}}):
        assert sections.products([row | change])[0]["verdict"] == FAILS
    backward = row | {"pass": "backward", "least": None, "loaded": 5}
    assert [sections.products([x])[0]["verdict"] for x in (backward, backward | {"torch": 151})] == [HOLDS, FAILS]
    assert sections.products([{"case": "of an earlier run", "dot_flops": 120}]) == []


@pytest.mark.parametrize(
    ("level", "name", "exponent"),
    [
        ("mixing", "attention", 2), ("mixing", "GAU", 2), ("mixing", "linear attention", 1), ("mixing", "FLASH", 1),
        ("layer", "feed-forward", 1), ("layer", "FLASH × 2", 1),
    ],
)  # fmt: skip
def test_exponents_of_counts(level: str, name: str, exponent: int) -> None:
    assert math.log2(flops(level, name, "eager", H, 8192) / flops(level, name, "eager", H, 4096)) == exponent


def test_nystrom_grows_linearly_beside_its_inverse() -> None:
    count = [flops("mixing", "Nyström, m = 64", "eager", H, n) for n in (1024, 2048, 3072)]
    assert count[2] - count[1] == count[1] - count[0]


def test_counted_crossovers() -> None:
    """The lengths that the claims are about, from torch's own counter."""
    assert cost.counted_feed_forward().endswith("768, 1,536, 2,048")  # 2H
    assert "n = 2,304, 4,608, 6,144; " in cost.counted_mixing()  # 6H


def noisy(law: Callable[[int], float], sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)) -> fits.Times:
    random = np.random.default_rng(0)
    return {n: list(law(n) * np.exp(random.normal(0, 0.03, 9))) for n in sizes}


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("fixed", [0.0, 1e-4])
def test_a_power_law_is_found(exponent: float, fixed: float) -> None:
    law = fits.power_law(noisy(lambda n: fixed + 1e-7 * n**exponent))
    assert law is not None
    assert law.exponent.low - 0.05 <= exponent <= law.exponent.high + 0.05
    assert law.fixed.low <= 1.05 * fixed
    assert fixed <= 1.05 * law.fixed.high
    assert law.factor.low <= 1.05e-7
    assert law.factor.high >= 0.95e-7
    assert law.residual < 0.1
    assert fits.power_law(noisy(lambda n: 1.0, (1, 2, 4))) is None


def test_laws_are_told_with_all_their_numbers() -> None:
    times = {"ours": noisy(lambda n: 1e-3 + 2e-6 * n), "too few": noisy(lambda n: 1.0, (1, 2, 4))}
    (row,) = figures.laws(times)
    name, exponent, fixed, factor, residual, window, slopes = row
    law = fits.power_law(times["ours"])
    assert law is not None
    assert (name, window) == ("ours", "128 … 4,096")
    assert exponent == f"{law.exponent.value:.3g} ({law.exponent.low:.3g}–{law.exponent.high:.3g})"
    assert fixed.split() == law.fixed.told(units.time).split()
    assert law.fixed.low < 1e-3 < law.fixed.high
    assert residual == f"{law.residual:.0%}"
    assert float(factor.split()[0]) * 4096**law.exponent.value == pytest.approx(2e-6 * 4096, rel=0.2)
    expected = [fits.local_slope(times["ours"], n) for n in law.sizes[1:-1]]
    assert slopes == ", ".join(f"{slope.value:.2f}" for slope in expected if slope is not None)
    assert figures.lines({"ours": {1: 1.0}}, "", "n", "ms", times=times).laws == [row]


def test_laws_without_noise_are_found_exactly() -> None:
    sizes = np.asarray([128.0, 256, 512, 1024, 2048])
    found = fits._affine(sizes, np.stack([3 + 2 * sizes**1.5, 0.5 * sizes**2]))
    assert np.allclose(found, [[3, 0], [2, 0.5], [1.5, 2], [0, 0]], atol=1e-6)


@pytest.mark.parametrize(("device", "where"), [("cpu", "timings"), ("cuda", "growth")])
def test_landmarks_have_a_law_of_cases_that_differ_by_them_alone(device: str, where: str) -> None:
    op = suite.OPERATORS["nystrom_attention"]
    places, sizes = op.over_landmarks(device)
    assert places == where
    assert sorted(sizes.values()) == [32, 64, 128, 256]
    every = {"timings": op.cases(device), "growth": op.sweep(device)}[where]
    rows = [
        {"case": c.name, "contender": "kx cpu", "seconds": {"median": 1.0}, "times": [1e-6 * c.landmarks**2] * 3}
        for c in every
    ]
    results = {"op": "nystrom_attention", "limit": op.LIMIT, "environment": {"device_kind": device}, where: rows}
    figure = sections.landmarks(results)
    assert figure is not None
    assert figure.columns[1:] == ["32", "64", "128", "256"]
    assert [row[:2] for row in figure.laws] == [["kx cpu", "2"]]


def test_layers_and_decoding_are_told_by_what_was_measured() -> None:
    """A state that grew, and a cache that did not, are said to; each with its version, laws over n beside."""
    sizes = (256, 512, 1024, 2048)
    spread = {"median": 1e-3, "low": 1e-3, "high": 1e-3}
    timed = {"seconds": spread, "times": [1e-3] * 3, "version": "torch 0"}
    decoding = [
        {"name": name, "length": n, "bytes": size(n), **timed}
        for name, size in (("linear attention, state", lambda n: n), ("cache", lambda n: 5))
        for n in sizes
    ]
    part = {"name": "attention", "by": "fused", "level": "mixing", "width": 8, "what": "forward"}
    drawn = dict(sections.layers({"times": [{**part, "length": n, **timed} for n in sizes], "decoding": decoding}))
    assert "state, ours, 256 B at 256 and 2.05 kB at 2,048" in drawn["Decoding, memory"].see
    assert "cache, 5 B at 256 and 5 B at 2,048" in drawn["Decoding, memory"].see
    for title in ("Mixing tokens alone, width 8, forward", "Decoding, time per token"):
        assert drawn[title].columns[1] == "version"
        assert {row[1] for row in drawn[title].rows} == {"torch 0"}
        assert drawn[title].laws
    for row in decoding:
        del row["version"]  # as earlier runs have it
    assert sections.decoding({"decoding": decoding}).columns[1] == "256"


def test_how_well_medians_are_known_is_told() -> None:
    """By the rounds' own measure, beside growth, layers, decoding and rotary embeddings."""
    spread = {"median": 1.0, "low": 1.0, "high": 1.0}
    rounds = ([1.0] * 4, [1.0, 1.0, 1.2, 1.2], [1.0])
    told = f" 2 of 3 medians are known to 2 %, the worst to {100 * 0.2 / 1.1 / 2:.2g} %."
    assert sections.known([{"seconds": spread, "times": times} for times in rounds]) == told
    assert sections.known([{"seconds": None}, {"reason": "none"}, {"seconds": spread}]) == ""
    rows = [{"length": n, "seconds": spread, "times": t} for n, t in zip((1, 2, 4), rounds, strict=True)]
    part = {"name": "attention", "by": "fused", "level": "mixing", "width": 8, "what": "forward"}
    drawn = sections.layers({
        "times": [row | part for row in rows], "decoding": [row | {"name": "cache", "bytes": 1} for row in rows],
        "rotary": [row | {"name": "an embedding added"} for row in rows],
    })  # fmt: skip
    assert [figure.see.endswith(told) for _, figure in drawn] == [True, True, False, True]  # memory has no medians
    grown = [row | {"case": f"full, n = {row['length']}", "contender": "limit", "rate": 1.0} for row in rows]
    figure = sections.growth({"op": "rope", "limit": "limit", "unit": "B", "growth": grown}, of="full")
    assert figure is not None
    assert figure.see.endswith(told)


def test_times_beyond_their_roofline_are_counted() -> None:
    rows = [{"bound": bound, "seconds": {"median": 1.0}} for bound in (0.5, 1.05, 1.2)]
    assert sections.beyond({"times": rows[:2], "decoding": [{"seconds": {"median": 1.0}}]}) == ""
    assert sections.beyond({"times": rows, "growth": rows}).startswith("2 of 6 times are shorter than their roofline")


def test_crossovers() -> None:
    linear, square = noisy(lambda n: 1e-6 * n), noisy(lambda n: 1e-9 * n * n)
    found = fits.crossover(square, linear)
    assert found is not None
    assert found.low <= 1000 <= found.high
    assert found.high / found.low < 1.3
    never, always = (
        fits.crossover(noisy(lambda n: 1e-12 * n), linear),
        fits.crossover(linear, noisy(lambda n: 1e-12 * n)),
    )
    assert never is not None
    assert math.isinf(never.value)
    assert always is not None
    assert always.value == 0
    assert never.low == 4096  # nothing is known beyond
    assert always.high == 128
    assert fits.crossover({128: [1.0]}, linear) is None


class Steps:
    """Three steps of each name, of which one may interrupt, fail, or end the process."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.allowed: list[float] = []
        self.trouble: dict[str, BaseException] = {}

    def __call__(self, name: str, device: str, quick: bool, asked: suite.Asked | None = None) -> list[suite.Step]:
        def step(what: str, allowed: float) -> Any:
            self.calls.append(what)
            self.allowed.append(allowed)
            if what in self.trouble:
                raise self.trouble[what]
            return [{"what": what}]

        letters = "abc" if name == "layers" else "def"
        return [suite.Step("rows", what, functools.partial(step, what)) for what in letters]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    found = Steps()
    monkeypatch.setattr(suite, "steps", found)
    for place in ("RESULTS", "QUICK", "PARTS", "PARTIAL"):
        monkeypatch.setattr(suite, place, tmp_path / place.lower())
    return found


def run_layers(**how: Any) -> dict[str, Any]:
    return suite.run(["layers"], "cpu", **{"quick": True, **how})["layers"]


def test_an_interrupted_run_goes_on(steps: Steps) -> None:
    steps.trouble = {"b": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_layers()
    steps.trouble = {}
    results = run_layers()
    assert steps.calls == ["a", "b", "b", "c"]
    assert results["rows"] == [{"what": "a"}, {"what": "b"}, {"what": "c"}]
    assert results == json.loads(suite.kept_file("layers", "cpu", quick=True).read_text())
    assert {step["step"] for step in results["steps"]} == {"rows/a", "rows/b", "rows/c"}
    assert results["wall_seconds"] >= 0
    assert not list(suite.PARTIAL.rglob("*.json"))
    steps.calls = []
    run_layers()
    assert steps.calls == ["a", "b", "c"]  # nothing is left of a run that ended


def test_a_run_of_several_goes_on_in_the_one_that_was_interrupted(steps: Steps) -> None:
    steps.trouble = {"b": KeyboardInterrupt()}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            suite.run(["layers", "quality"], "cpu", quick=False)
    steps.trouble = {}
    suite.run(["layers", "quality"], "cpu", quick=False)
    assert steps.calls == ["d", "e", "f", "a", "b", "b", "b", "c"]  # quality first


def test_only_whole_runs_are_kept_with_the_code(steps: Steps) -> None:
    suite.run(["layers"], "cpu", quick=False)
    file = suite.kept_file("layers", "cpu")
    kept = file.read_text()
    run_layers()
    run_layers(quick=False, asked=suite.Asked(["C5"], ["rows"], []))
    assert file.read_text() == kept
    assert suite.kept_files() == [file]
    assert suite.kept_files(quick=True) == [suite.kept_file("layers", "cpu", quick=True)]


def test_a_quick_run_leaves_an_interrupted_whole_one_alone(steps: Steps) -> None:
    steps.trouble = {"c": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_layers(quick=False)
    steps.trouble = {}
    run_layers()
    steps.calls = []
    run_layers(quick=False)
    assert steps.calls == ["c"]


def test_fresh_forgets_an_interrupted_run(steps: Steps) -> None:
    steps.trouble = {"c": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_layers()
    steps.trouble, steps.calls = {}, []
    run_layers(fresh=True)
    assert steps.calls == ["a", "b", "c"]


def test_a_step_that_fails_says_so_and_the_run_goes_on(steps: Steps) -> None:
    steps.trouble = {"b": MemoryError("no room for 9 GB")}
    results = run_layers()
    assert results["rows"] == [{"what": "a"}, {"what": "c"}]
    assert results["failed"] == [{"step": "rows/b", "reason": "MemoryError: no room for 9 GB"}]


def test_a_step_that_ends_the_process_is_tried_once_more(steps: Steps) -> None:
    steps.trouble = {"b": SystemExit("killed")}  # nothing of the run is told
    for _ in range(2):
        with pytest.raises(SystemExit):
            run_layers()
    results = run_layers()
    assert steps.calls == ["a", "b", "b", "c"]
    assert results["failed"] == [{"step": "rows/b", "reason": "the process ended in it, twice"}]


CRASHES = """
import ctypes, functools, sys
from dataclasses import replace
from pathlib import Path
from benchmarks import contest, layers, suite

suite.QUICK, suite.PARTIAL = (Path(sys.argv[1]) / name for name in ("quick", "partial"))
op = suite.OPERATORS["nystrom_attention"]
crash = contest.Contender("crash", "peer", lambda x: lambda *_: ctypes.string_at(0))
op.contenders = lambda case: [crash, *(c for c in op.CONTENDERS if c.name == "torch eager")]
case = replace(op.BASE, length=128, heads=1)
part = layers.find("mixing", "attention", "eager")
parts = [part, replace(part, by="crash", build=lambda _: lambda *_: ctypes.string_at(0))]
find = layers.find
layers.find = lambda *which: parts[1] if which[2] == "crash" else find(*which)
found = {
    "timings": functools.partial(suite.timings, op, case, "cpu", 0.01, True),
    "times": functools.partial(layers.times, parts, 64, 128, "forward", "cpu", 0.01),
    "later": lambda s: [{}],
}
suite.steps = lambda *_: [suite.Step(where, "x", find) for where, find in found.items()]
suite.run(["nystrom_attention"], "cpu", True, seconds=600)
"""


def test_a_contender_that_crashes_has_a_row_that_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The others of its step have times, and later steps run."""
    command.survive(lambda first: [sys.executable, "-c", CRASHES, str(tmp_path)])
    assert capfd.readouterr().err.count("measuring ended by SIGSEGV: it goes on") == 2
    (file,) = (tmp_path / "quick").rglob("*.json")
    found = json.loads(file.read_text())
    ours = {"timings": "contender", "times": "by"}
    reasons = {place: {row[name]: row.get("reason") for row in found[place]} for place, name in ours.items()}
    ended = "the process ended in it"
    limit = suite.OPERATORS["nystrom_attention"].LIMIT
    assert reasons["timings"] == {limit: None, "torch eager": None, "crash": ended}
    assert reasons["times"] == {"eager": None, "crash": ended}
    assert found["later"] == [{}]
    assert found["failed"] == []
    assert not list((tmp_path / "partial").rglob("*.*"))


def test_an_interrupt_ends_what_measures_and_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though it was for this process alone; and nothing is begun again."""
    wait = "import pathlib, sys, time\np = pathlib.Path(sys.argv[1])\n"
    wait += "try: p.touch(), time.sleep(60)\nfinally: p.unlink()"
    ready, turns = tmp_path / "ready", []
    monkeypatch.setattr(command, "GRACE", 0.1)

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    def waiting(first: bool) -> list[str]:
        turns.append(first)
        threading.Thread(target=interrupt, daemon=True).start()
        return [sys.executable, "-c", wait, str(ready)]

    begin = time.perf_counter()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has not
    try:
        with pytest.raises(SystemExit) as stopped:
            command.survive(waiting)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 128 + signal.SIGINT
    assert turns == [True]
    assert not ready.exists()
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize("where", ["partial", "quick"])
def test_a_disk_that_is_full_is_no_end(steps: Steps, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = run_layers()
    write = Path.write_text

    def full(self: Path, text: str) -> int:
        if where in self.parent.parent.name or where in self.parent.parent.parent.name:
            write(self, text[: len(text) // 2])
            raise OSError(28, "No space left on device")
        return write(self, text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="cannot be written"):
        results = run_layers()
    assert len(results["rows"]) == 3
    assert json.loads(suite.kept_file("layers", "cpu", quick=True).read_text())["rows"] == before["rows"]
    assert not list(suite.QUICK.rglob("*.new"))


PLENTY = measure.Allowance(3600)


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("no room for 9 GB\nand more words")


def test_a_run_takes_no_longer_than_it_is_allowed(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps get their shares of what is left; what takes twice its share is ended, whatever it catches."""

    def endless(allowed: float) -> None:
        while True:
            try:
                time.sleep(60)
            except Exception:
                continue

    slow = {"a": endless, "b": lambda allowed: [allowed], "c": endless, "d": lambda allowed: [allowed]}
    found = [suite.Step("rows", what, find, 1 + (what == "d")) for what, find in slow.items()]
    monkeypatch.setattr(suite, "steps", lambda *_: found)
    monkeypatch.setattr(suite, "PATIENCE", 0.0)
    begin = time.perf_counter()
    results = run_layers(seconds=1.0)
    assert time.perf_counter() - begin < 5  # the environment is asked for as well
    assert 0.7 < results["wall_seconds"] < 1
    assert [row["step"] for row in results["failed"]] == ["rows/a", "rows/c"]
    assert "no time was left" in results["failed"][0]["reason"]
    b, d = results["rows"]  # a and c had twice a fifth, and a third of 0.6; what is written between counts as well
    assert 0.1 < b <= 0.6 / 4
    assert 0 < d <= 0.2
    assert results["allowed_seconds"] == 1
    late = run_layers(seconds=1e-9)
    assert {row["reason"] for row in late["failed"]} == {"no time was left for it"}
    assert late["wall_seconds"] == 0


def test_a_run_that_goes_on_has_what_time_is_left(steps: Steps) -> None:
    steps.trouble = {"b": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_layers(seconds=90)
    before = list(steps.allowed)
    assert before == pytest.approx([30, 45], rel=0.1)


def test_an_end_leaves_no_half_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.3)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)

    def imports_and_waits() -> None:
        importlib.import_module("slow_to_import")
        time.sleep(10)

    with pytest.raises(measure.OutOfTime), measure.ending(0.1):
        imports_and_waits()
    assert sys.modules["slow_to_import"].whole


def test_ends_within_ends() -> None:
    begin = time.perf_counter()

    def ends_within() -> None:
        with pytest.raises(measure.OutOfTime), measure.ending(0.1):
            time.sleep(10)
        assert time.perf_counter() - begin < 0.3
        with measure.ending(10):
            pass
        time.sleep(10)

    with pytest.raises(measure.OutOfTime), measure.ending(0.4):
        ends_within()
    assert 0.3 < time.perf_counter() - begin < 1


def test_slow_calls_are_left_out_where_time_is_short() -> None:
    calls = {"fast": lambda _: None, "slow": lambda _: time.sleep(0.15), "slower": lambda _: time.sleep(0.3)}
    times, failed = measure.rounds(calls, "cpu", 0.1, measure.Allowance(1.6), least=3)
    assert set(times) == {"fast", "slow"}
    assert len(times["slow"]) >= measure.ROUNDS
    assert list(failed) == ["slower"]
    assert "for which no time was left" in failed["slower"]
    assert measure.rounds(calls, "cpu", 0.1, measure.Allowance(0))[0] == {}
    calls["slow"] = lambda _: time.sleep(0.25)
    times, failed = measure.rounds(calls, "cpu", 0.1, measure.Allowance(2.5), least=3, needed=["slower"])
    assert set(times) == {"fast", "slower"}


def test_what_cannot_be_fast_enough_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's limits say how long a call takes at least."""
    op = suite.OPERATORS["gau_attention"]
    monkeypatch.setattr(
        measure, "limits", lambda device: {"bytes_per_second": 1e9, "flops_per_second": {"float32": 1e9}}
    )
    monkeypatch.setattr(op, "Inputs", None)  # which would take gigabytes
    rows = suite.timings(op, replace(op.BASE, length=32768), "cpu", 1.0, quick=False, allowed=60)
    assert {row["contender"] for row in rows} == {op.LIMIT, *(c.name for c in op.CONTENDERS)}
    assert all("a call takes" in row["reason"] for row in rows)
    check_schema(timings=rows)


@pytest.mark.parametrize(
    ("value", "time", "size"),
    [
        (202665e-6, "203 ms", "0.203 B"),
        (1.5, "1.5 s", "1.5 B"),
        (2e-7, "0.2 µs", "2e-07 B"),
        (9.997e8, "999,700,000 s", "1 GB"),
    ],
)
def test_units(value: float, time: str, size: str) -> None:
    assert units.time(value) == time
    assert units.size(value) == size


def test_every_size_that_is_asked_for_is_a_case() -> None:
    """Of gated attention and Nyström attention: lengths, variants and landmarks."""
    gau, nystrom = (suite.OPERATORS[name] for name in ("gau_attention", "nystrom_attention"))
    for device in ("cpu", "cuda"):
        for cases in (gau.sweep(device), gau.shared(device)):
            ends = {(c.causal, c.what, c.length) for c in cases}
            assert ends >= {(c, w, n) for c in (True, False) for w in ("forward", "both") for n in (128, 32768)}
        assert len({c.batch * c.length for c in gau.shared(device)}) == len({c.batch for c in gau.sweep(device)}) == 1
        found = {(c.landmarks, c.length) for c in nystrom.sweep(device)}
        assert found >= {(m, n) for m in (32, 64, 128, 256) for n in (256, 65536)}
    parts = [step.what for step in suite.steps("layers", "cpu", quick=False) if step.where == "times"]
    for width in layers.WIDTHS.values():
        assert any(f"H = {width}, n = 2048, forward and backward, layer" in what for what in parts)


def test_goals_of_both_devices_are_listed() -> None:
    for op in suite.OPERATORS.values():
        verdicts = [goal.verdict([]) for goal in op.goals()]
        assert {"a CPU", "an H200"} <= {row["on"] for row in verdicts}
        assert {row["verdict"] for row in verdicts} == {"not measured here"}
        empty = {"environment": {"device": "H200", "device_kind": "cpu"}}  # all steps failed
        assert {goal.verdict([empty])["verdict"] for goal in op.goals()} == {"not measured here"}


@pytest.mark.parametrize(
    ("measured", "at_least", "at_most"),
    [
        ((3.0, 2.5, 3.5), "holds", "fails"),
        ((3.0, 1.9, 3.5), "at its edge", "at its edge"),
        ((1.9, 1.5, 2.1), "at its edge", "at its edge"),
        ((1.9, 1.5, 1.95), "fails", "holds"),
        ((2.0, 2.0, 2.0), "holds", "holds"),
    ],
)
def test_quartiles_decide_a_goal(measured: tuple[float, float, float], at_least: str, at_most: str) -> None:
    here = {"environment": {"device": "", "device_kind": "cpu"}}
    for most, verdict in ((False, at_least), (True, at_most)):
        goal = Goal("", contest.on("cpu"), "x", 2.0, "×", lambda _: measured, at_most=most)
        assert goal.verdict([here])["verdict"] == verdict


def test_who_is_missing_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of host times and of memory as well; and the page lists it."""
    op = suite.OPERATORS["nystrom_attention"]

    def absent(_: Any) -> Any:
        raise contest.Missing("it does not import here")

    right = next(c for c in op.CONTENDERS if c.name == "torch eager")
    small = replace(op.BASE, length=128, heads=1)
    monkeypatch.setattr(op, "cases", lambda device: [small])
    for broken, why in ((absent, "it does not import here"), (no_room, "OutOfMemoryError: no room for 9 GB")):
        mine = [right, contest.Contender("broken", "torch", broken)]
        monkeypatch.setattr(op, "contenders", lambda case, mine=mine: mine)
        host, memory = suite.host_times(op, "cpu", quick=True), suite.memory(op, small, "cpu", False, 60)
        for rows in (host, memory):
            assert [row["contender"] for row in rows] == ["torch eager", "broken"]
            assert "reason" not in rows[0]
            assert rows[1]["reason"].endswith(why)
            assert rows[0]["version"] == f"torch {torch.__version__}"
        check_schema(host=host, memory=memory)
        listed = sections.missing({"nystrom_attention": {"op": "nystrom_attention", "host": host, "memory": memory}})
        assert [(row[0], row[2]) for row in listed] == [
            ("nystrom_attention, host", "broken"), ("nystrom_attention, memory", "broken"),
        ]  # fmt: skip


def test_every_time_has_its_roofline() -> None:
    roofline = {"bytes_per_second": 1e9, "flops_per_second": {"float32": 1e9}}
    rows = [*layers.decoding(64, "cpu", 0.01, 60), *layers.rotary("cpu", 0.01, True, 60)]
    some = {(p.level, p.name): p for p in layers.parts() if p.by == "ours" and "causal" not in p.name}
    rows += [layers.work(p, 128, 128, "forward", "cpu") | {"seconds": {"median": 1.0}} for p in some.values()]
    assert all(suite._bounded(row, roofline)["of_bound"] > 0 for row in rows)
    check_schema(decoding=rows[:4], rotary=rows[4:9])


def test_memory_is_what_a_call_holds() -> None:
    """At most at any moment, its result included; and of what it saves only what was not there before."""

    def call() -> torch.Tensor:
        large, small = torch.empty(2 << 20), torch.empty(1 << 20)  # 12 MiB at once
        del large
        return small[: 1 << 19].clone()

    assert measure.peak_bytes(call, "cpu") == 12 << 20
    x = torch.randn(1000, requires_grad=True)
    assert measure.saved_bytes(lambda: x.exp(), [x]) == x.nbytes  # its result
    assert measure.saved_bytes(lambda: x.square(), [x]) == 0  # x itself
    assert measure.saved_bytes(lambda: x.exp().sin(), [x]) == x.nbytes  # the exponential, kept twice
    assert measure.saved_bytes(lambda: x.exp().exp(), [x]) == 2 * x.nbytes


def test_a_call_that_fails_leaves_the_others_to_go_on() -> None:
    turns: list[int] = []

    def late(turn: int) -> None:
        turns.append(turn)
        if len(turns) > 5:
            no_room()

    calls = {"good": lambda _: None, "none": no_room, "late": late}
    times, failed = measure.rounds(calls, "cpu", 0.1, PLENTY, least=3, most=5)
    assert list(times) == ["good"]
    assert 3 <= len(times["good"]) <= 5
    assert failed == dict.fromkeys(("none", "late"), "OutOfMemoryError: no room for 9 GB")


def test_rounds_end_when_medians_are_known() -> None:
    assert measure.precision([1.0] * 9) == 0
    assert measure.precision([1.0, 2.0, 3.0, 4.0]) == pytest.approx(1.5 / 2.5 / 2)


def test_contenders_without_room_or_with_wrong_results_have_rows_without_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = suite.OPERATORS["nystrom_attention"]
    right = next(c for c in op.CONTENDERS if c.name == "torch eager")
    contenders = [
        right,
        contest.Contender("no room", "ours", lambda x: no_room),
        contest.Contender("wrong", "peer", lambda x: lambda q, k, v: 2 * v),
        contest.Contender("not a number", "peer", lambda x: lambda q, k, v: v * math.nan),
        contest.Contender("other, right", "other", lambda x: lambda q, k, v: 2 * v, exact=lambda x: 2 * x.leaves[2]),
        contest.Contender("other, wrong", "other", lambda x: lambda q, k, v: v, exact=lambda x: 2 * x.leaves[2]),
    ]
    monkeypatch.setattr(op, "contenders", lambda case: contenders)
    case = replace(op.BASE, length=128, heads=1)
    rows = {row["contender"]: row for row in suite.timings(op, case, "cpu", 0.01, quick=True, allowed=60)}
    assert {name for name, row in rows.items() if row["seconds"]} == {op.LIMIT, "torch eager", "other, right"}
    assert rows["no room"]["reason"] == "fails: OutOfMemoryError: no room for 9 GB"
    for name in ("wrong", "not a number", "other, wrong"):
        assert rows[name]["reason"].startswith("wrong: off by")
    check_schema(timings=list(rows.values()))
    assert rows["torch eager"]["version"] == f"torch {torch.__version__}"


def test_the_limit_has_products_where_it_is_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is no faster than its roofline for products that it has not."""
    for name, copies in (("nystrom_attention", True), ("gau_attention", False)):
        op = suite.OPERATORS[name]
        monkeypatch.setattr(op, "contenders", lambda case, first=op.CONTENDERS[0]: [first])
        limit, other = suite.timings(op, replace(op.BASE, length=128), "cpu", 0.01, quick=True, allowed=60)
        assert (limit["contender"], limit["kind"]) == (op.LIMIT, "limit")
        assert other["flops"] > 0
        assert limit["flops"] == (0 if copies else other["flops"])


def test_every_version_has_its_commit_or_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "commit", lambda: "abcdef0")
    ours = contest.Contender("", "ours", no_room).version
    assert ours == layers.version("ours") == f"kx_kernels {kx.__version__} (abcdef0)"
    assert contest.Contender("", "peer", no_room, "no-such-package").version == "no-such-package not installed"
    assert layers.version("fused") == f"torch {torch.__version__}"


def check_schema(**places: Any) -> None:
    facts = dict.fromkeys(("commit", "uncommitted_changes", "date", "torch", "kx_kernels"), "")
    run = {"op": "layers", "quick": True, "environment": {"device": "", "device_kind": "cpu", **facts}, **places}
    jsonschema.validate(run, json.loads((ROOT / "benchmarks" / "results" / "schema.json").read_text()))


def test_a_row_is_held_against_what_the_device_allows() -> None:
    roofline = {"bytes_per_second": 1e9, "flops_per_second": {"float32": 1e12}}
    assert measure.bound(roofline, {"bytes": 1e9, "flops": 1e9, "dtype": "float32"}) == 1
    narrow = {"bytes": 1e3, "flops": 3e12, "dtype": "bfloat16"}
    assert measure.bound(roofline, narrow) == 3
    roofline["flops_per_second"]["bfloat16"] = 1e10  # no instructions for it: kernels convert, torch does not
    assert measure.bound(roofline, narrow) == 3
    assert measure.bound(roofline, narrow, by_torch=True) == 300


def test_limits_are_the_best_of_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sizes of products as well; measured again, they are never less."""
    slower = iter((2.0, 1.0, 4.0))

    def rounds(calls: Any, *_: Any, **__: Any) -> Any:
        factor = next(slower)
        return {name: [3 * factor, factor, 2 * factor] for name in calls}, {}

    monkeypatch.setattr(measure, "_REACHED", {})
    monkeypatch.setattr(measure, "rounds", rounds)
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: False)
    assert measure.limits("cpu")["flops_per_second"] == {"float32": 2048**3, "bfloat16": 256**3}
    best = {"bytes_per_second": 2**28, "flops_per_second": {"float32": 2 * 2048**3, "bfloat16": 2 * 256**3}}
    assert measure.reach("cpu") == best
    assert measure.reach("cpu") == measure.limits("cpu") == best


def test_a_run_has_the_better_of_its_first_and_its_last_limits(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [{"bytes_per_second": b, "flops_per_second": {"float32": f}} for b, f in ((1.0, 4.0), (2.0, 3.0))]
    row = {"bytes": 8, "flops": 4, "dtype": "float32", "seconds": {"median": 8.0}}
    order = [("roofline", "1", limits[0]), ("times", "", [row]), ("roofline", "2", limits[1])]
    found = [suite.Step(where, what, lambda _, value=value: value) for where, what, value in order]
    monkeypatch.setattr(suite, "steps", lambda *_: found)
    results = run_layers()
    assert results["roofline"] == {"bytes_per_second": 2, "flops_per_second": {"float32": 4}}
    assert [r["of_bound"] for r in results["times"]] == [0.5]


@pytest.mark.parametrize("quick", [True, False])
def test_limits_are_measured_first_and_last(quick: bool) -> None:
    for name in {*suite.NAMES} - {"quality"}:
        first, *_, last = suite.steps(name, "cpu", quick)
        assert (first.where, last.where) == ("roofline", "roofline")
        assert first.key != last.key


@pytest.mark.parametrize("name", list(suite.OPERATORS))
def test_no_contender_is_wrong(name: str) -> None:
    """On the first tokens of every case of a CPU: where a report says so, it is about the contender, not its call."""
    op = suite.OPERATORS[name]
    for case in op.cases("cpu"):
        short = replace(case, length=min(case.length, 512), **({"past": 40} if getattr(case, "past", 0) else {}))
        entered = [c for c in suite.entered(op.contenders(case), False) if c.name != "kx triton"]  # interpreted here
        for contender, call in contest.calls(op, [op.Inputs(short, "cpu")], entered):
            if isinstance(call, str):
                found = f"{case.name}, {contender.name}: {call}"
                assert not call.startswith("wrong"), found
                assert not call.startswith("fails") or contender.package != "torch", found


def doubled(out: torch.Tensor) -> torch.Tensor:
    """The same numbers, with gradients twice as large."""
    return out.detach() + 2 * (out - out.detach())


class Compiled:
    """Something that is called, and what torch.compile would keep of where it came from."""

    def __init__(self, of: Any, called: Any) -> None:
        self._orig_mod, self.called = of, called

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.called(*inputs)


@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("kind", ["ours", "torch", "peer", "compiled", "other"])
def test_wrong_gradients_have_no_speed(what: str, kind: str) -> None:
    """Those of what computes something else on purpose included."""
    op: Any = importlib.import_module("benchmarks.gau_attention")
    inputs = [op.Inputs(replace(op.BASE, length=64, what=what), "cpu")]
    name = "softmax attention (SDPA)" if kind == "other" else "kx reference"
    ours = next(c for c in op.CONTENDERS if c.name == name)

    def prepare(x: Any) -> Any:
        right = ours.prepare(x)

        def function(*leaves: torch.Tensor) -> torch.Tensor:
            return doubled(right(*leaves))

        return Compiled(right, function) if kind == "compiled" else function

    wrong = replace(ours, prepare=prepare, kind="torch" if kind == "compiled" else kind)
    (_, right), (_, found) = contest.calls(op, inputs, [ours, wrong])
    assert not isinstance(right, str)
    assert isinstance(found, str) == (what == "both")
    assert not isinstance(found, str) or found.startswith("wrong: off by")


@pytest.mark.parametrize("by", ["ours", "eager"])
def test_parts_with_wrong_gradients_have_no_speed(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = layers.find("mixing", "linear attention", "ours")
    assert part is not None

    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = layers.linear_ours(q, k, v)
        return out if dispatch.requested(None) == "reference" else doubled(out)

    mine = replace(part, by=by, build=lambda _: broken)
    monkeypatch.setattr(layers, "parts", lambda: [mine] if by == "ours" else [mine, part])
    for cache in (layers.outputs_off, layers.gradients_off):
        cache.cache_clear()
    assert layers.outputs_off("mixing", "linear attention", by, 64, "cpu") < 1e-4
    assert layers.gradients_off("mixing", "linear attention", by, 64, "cpu") > 0.4
    for cache in (layers.outputs_off, layers.gradients_off):
        cache.cache_clear()


def test_compiled_parts_with_wrong_results_have_no_speed() -> None:
    inputs = [torch.randn(3, 4, requires_grad=True)]
    compiled = Compiled(torch.exp, lambda x: doubled(x.exp()))
    assert layers.compiled_off(compiled, inputs, False) == 0
    assert layers.compiled_off(compiled, inputs, True) > 0.4


def test_parts_without_room_or_with_wrong_results_have_rows_without_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [layers.find("mixing", "attention", by) for by in ("eager", "fused")]
    bad = [replace(parts[0], build=lambda _: no_room), replace(parts[0], by="fused", build=lambda _: lambda q, k, v: q)]
    monkeypatch.setattr(layers, "parts", lambda: [parts[0], bad[1]])
    layers.outputs_off.cache_clear()
    rows = layers.times([bad[0], bad[1], parts[0]], 64, 128, "forward", "cpu", 0.01, 60)
    layers.outputs_off.cache_clear()
    assert ["seconds" in row for row in rows] == [False, False, True]
    assert rows[0]["reason"] == "OutOfMemoryError: no room for 9 GB"
    assert rows[1]["reason"].startswith("wrong: off by")
    memory = layers.memory(bad[:1], 64, 128, "cpu", 60)
    check_schema(times=rows, memory=memory)
    assert memory[0]["reason"] == "OutOfMemoryError: no room for 9 GB"


def test_ours_in_float32_may_be_less_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers and of what is not a part as well; others have 5 %."""
    monkeypatch.setattr(layers, "outputs_off", lambda *_: 0.01)
    parts = [layers.find("mixing", "linear attention", by) for by in ("eager", "ours")]
    rows = layers.times(parts, 64, 128, "forward", "cpu", 0.01, 60)
    assert [row.get("reason") for row in rows] == [None, "wrong: off by 0.01 of the largest value"]
    for dtype, most in ((torch.float32, 0.005), (torch.bfloat16, 0.05)):
        for off in (0.9 * most, 1.1 * most):
            calls = dict.fromkeys(("RoPE, ours", "RoPE, eager"), lambda _: None)
            ours, other = layers._named(calls, dict.fromkeys(calls, off), "cpu", dtype, 0.01, 60)
            assert ("reason" in ours) == (off > most)
            assert ("reason" in other) == (off > 0.05)


@pytest.mark.parametrize(
    "part", [p for p in layers.parts() if p.by != "torch.compile"], ids=lambda p: f"{p.level}-{p.name}-{p.by}"
)
def test_parts_compute_what_they_are_named(part: layers.Part) -> None:
    try:
        error = layers.outputs_off(part.level, part.name, part.by, 128, "cpu")
    except contest.Missing as missing:  # a peer
        pytest.skip(str(missing))
    assert error < 1e-4


@pytest.mark.parametrize(
    "part",
    [p for p in layers.parts() if p.by in ("eager", "fused", "ours")],
    ids=lambda p: f"{p.level}-{p.name}-{p.by}",
)
def test_parts_compute_so_in_bfloat16(part: layers.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on a GPU."""
    monkeypatch.setattr(layers, "dtype_of", lambda device: torch.bfloat16)
    which = (part.level, part.name, part.by, 128, "cpu")
    torch.manual_seed(0)
    assert layers.outputs_off.__wrapped__(*which) < contest.WRONG
    assert layers.gradients_off.__wrapped__(*which) < contest.most_off(part.by == "ours", torch.bfloat16, gradient=True)


@pytest.mark.parametrize(
    "part",
    [p for p in layers.parts() if p.by != "torch.compile" and p.exact is None],
    ids=lambda p: f"{p.level}-{p.name}-{p.by}",
)
def test_parts_are_where_their_inputs_are(part: layers.Part) -> None:
    function, weights = part.made(128, "meta")
    out = function(*(meta(*shape) for shape in part.shapes(128, 256)))
    assert {x.device.type for x in (out, *weights)} == {"meta"}


KEPT = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_kept_results_are_as_their_schema_says(file: Path) -> None:
    schema = json.loads((ROOT / "benchmarks" / "results" / "schema.json").read_text())
    jsonschema.validate(json.loads(file.read_text()), schema)
    broken = json.loads(file.read_text())
    del broken["environment"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_place_that_a_run_writes_is_in_the_schema(device: str) -> None:
    schema = json.loads((ROOT / "benchmarks" / "results" / "schema.json").read_text())
    known = {place for place, told in schema["properties"].items() if told.get("description")}
    for name in suite.NAMES:
        places = {step.where for step in suite.steps(name, device, quick=False)} - {""}  # of extras, which say it
        assert places <= known, name
    with pytest.raises(jsonschema.ValidationError, match="elsewhere"):
        check_schema(elsewhere=[])


def test_what_a_whole_run_and_extras_write_is_in_the_schema(steps: Steps) -> None:
    found = suite.run(["rope"], "cpu", quick=True)["rope"]
    assert found.pop("rows")
    check_schema(**found)
    for name in ("rope", "gau_attention"):
        check_schema(**suite.OPERATORS[name].extras())
    with pytest.raises(jsonschema.ValidationError):
        check_schema(trained=[{"name": "gau", "loss": 1.0}])
    with pytest.raises(jsonschema.ValidationError):
        check_schema(counts=[{"backend": "triton", "case": "x", "pass": "forward", "launches": 1, "flops": 3}])


def test_the_kept_run_is_read_before_it_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rope.json"

    def write(median: float) -> None:
        seconds = {"median": median, "low": 0.9 * median, "high": 1.1 * median}
        rows = [{"case": "x", "contender": "kx cpu", "seconds": seconds}]
        environment = {"device": "a device", "commit": None}
        file.write_text(json.dumps({"op": "rope", "environment": environment, "timings": rows}))

    def run(*_: Any) -> dict[str, Any]:
        write(2.0)
        return {}

    write(1.0)
    monkeypatch.setattr(suite, "kept_file", lambda *_: file)
    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "measure", "--here", "--compare", str(file)])
    command.main()
    assert capsys.readouterr().out.split()[-3:] == ["2.00", "(1.64–2.44)", "slower"]


def test_comparing_two_runs() -> None:
    def run(*medians: float) -> dict[str, Any]:
        names = ("same", "slower", "faster")
        seconds = [{"median": m, "low": 0.9 * m, "high": 1.1 * m} for m in medians]
        rows = [{"case": "x", "contender": n, "seconds": s} for n, s in zip(names, seconds, strict=True)]
        return {"timings": [*rows, {"case": "x", "contender": "missing", "seconds": None}]}

    found = compare.rows(run(1.0, 1.0, 1.0), run(1.1, 2.0, 0.5))
    assert [r["change"] for r in found] == ["within noise", "slower", "faster"]
    assert found[1]["ratio"] == 2.0


def test_comparing_sizes() -> None:
    """They have no noise: every byte is a change."""
    part = {"level": "mixing", "name": "x", "by": "ours", "width": 8, "length": 16}

    def run(peak: int, saved: int) -> dict[str, Any]:
        case = {"case": "x", "contender": "kx cpu", "peak": peak, "saved": None}
        return {
            "memory": [case, part | {"peak": peak, "saved": saved}, part | {"by": "y", "reason": ""}],
            "training": [part | {"peak": peak}],
        }

    found = compare.bytes_rows(run(100, 0), run(101, 5))
    assert [r["key"][0] for r in found] == ["memory, peak", "memory, peak", "memory, saved", "training, peak"]
    assert [(r["ratio"], r["change"]) for r in found] == [(x, "more") for x in (1.01, 1.01, math.inf, 1.01)]
    assert [r["change"] for r in compare.bytes_rows(run(3, 4), run(3, 2))] == ["same", "same", "less", "same"]


def test_comparing_what_has_neither_times_nor_sizes_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quality = {"op": "quality", "environment": {"device": "x", "commit": None}, "decay": []}
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(quality))
    monkeypatch.setattr(suite, "kept_file", lambda *_: file)
    assert compare.table(quality, "cpu", False).endswith("there are no times or sizes that both have")


def test_the_time_of_a_command_is_kept_and_told(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def survive(_: Any) -> None:
        time.sleep(0.2)
        run_layers()

    monkeypatch.setattr(command, "survive", survive)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "measure", "--quick", "--only", "layers"])
    command.main()
    assert capsys.readouterr().out.endswith(" s, start to end\n")
    found = json.loads(suite.kept_file("layers", "cpu", quick=True).read_text())
    assert found["environment"]["command_seconds"] >= 0.2
    del found["rows"]
    check_schema(**found)
    found["environment"]["command_seconds"] = "long"
    with pytest.raises(jsonschema.ValidationError):
        check_schema(**found)


def test_the_readme_has_the_verdicts_of_what_is_kept(tmp_path: Path) -> None:
    """`python -m benchmarks picture` writes them."""
    from benchmarks import picture

    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    assert picture.verdicts(readme).read_text() == (ROOT / "README.md").read_text()
