"""The report: counts that gate, known fits, runs that go on, answers without evidence. Its page has its own tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the report's libraries are in requirements.txt")
pytest.importorskip("scipy")

import jsonschema
import numpy as np
import torch

from benchmarks import compare, fits, layers, suite
from benchmarks.claims import OPEN, all_claims, cost
from benchmarks.claims.cost import flops
from benchmarks.claims.evidence import Evidence
from benchmarks.environment import ROOT
from kx_kernels._core.spec import all_specs

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
    places = {name: {step[0] for step in suite.steps(name, "cpu", quick=False)} for name in ("layers", "quality")}
    for claim in all_claims():
        assert claim.needs, claim.id
        assert set(claim.needs) <= places[suite.holder(claim.needs)], claim.id


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


def test_specifications_count_what_torch_counts() -> None:
    """An operator's own count, of the products of eager torch."""
    spec = {s.name: s for s in all_specs()}
    q, v = torch.empty(1, 512, 1, 128, device="meta"), torch.empty(1, 512, 1, 2 * H, device="meta")
    call = {"q": q, "k": q, "v": v, "gate": v, "causal": False}
    assert spec["gau_attention"].flops(call) == flops("mixing", "GAU", "eager", H, 512)


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
    assert cost.counted_feed_forward().endswith("832, 1,600, 2,112")  # the first multiple of 64 beyond 2H
    assert cost.counted_mixing().endswith("2,368, 4,672, 6,208")  # beyond 6H


def noisy(law: Callable[[int], float], sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)) -> fits.Times:
    random = np.random.default_rng(0)
    return {n: list(law(n) * np.exp(random.normal(0, 0.03, 9))) for n in sizes}


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("fixed", [0.0, 1e-4])
def test_a_power_law_is_found(exponent: float, fixed: float) -> None:
    law = fits.power_law(noisy(lambda n: fixed + 1e-7 * n**exponent))
    assert law is not None
    assert law.exponent.low - 0.05 <= exponent <= law.exponent.high + 0.05
    assert law.residual < 0.1
    assert fits.power_law(noisy(lambda n: 1.0, (1, 2, 4))) is None


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
    """Three steps, of which one may interrupt, fail, or end the process."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.trouble: dict[str, BaseException] = {}

    def __call__(self, name: str, device: str, quick: bool) -> list[suite.Step]:
        def step(what: str) -> Any:
            self.calls.append(what)
            if what in self.trouble:
                raise self.trouble[what]
            return [{"what": what}]

        return [("rows", what, lambda what=what: step(what)) for what in ("a", "b", "c")]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    found = Steps()
    monkeypatch.setattr(suite, "steps", found)
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite, "PARTIAL", tmp_path / "partial")
    return found


def test_an_interrupted_run_goes_on(steps: Steps) -> None:
    steps.trouble = {"b": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        suite.run("layers", "cpu", quick=True)
    steps.trouble = {}
    results = json.loads(suite.run("layers", "cpu", quick=True).read_text())
    assert steps.calls == ["a", "b", "b", "c"]
    assert results["rows"] == [{"what": "a"}, {"what": "b"}, {"what": "c"}]
    assert not list(suite.PARTIAL.rglob("*.json"))
    steps.calls = []
    suite.run("layers", "cpu", quick=True)
    assert steps.calls == ["a", "b", "c"]  # nothing is left of a run that ended


def test_fresh_forgets_an_interrupted_run(steps: Steps) -> None:
    steps.trouble = {"c": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        suite.run("layers", "cpu", quick=True)
    steps.trouble, steps.calls = {}, []
    suite.run("layers", "cpu", quick=True, fresh=True)
    assert steps.calls == ["a", "b", "c"]


def test_a_step_that_fails_says_so_and_the_run_goes_on(steps: Steps) -> None:
    steps.trouble = {"b": MemoryError("no room for 9 GB")}
    results = json.loads(suite.run("layers", "cpu", quick=True).read_text())
    assert results["rows"] == [{"what": "a"}, {"what": "c"}]
    assert results["failed"] == [{"step": "rows/b", "reason": "MemoryError: no room for 9 GB"}]


def test_a_step_that_ends_the_process_is_not_tried_again(steps: Steps) -> None:
    steps.trouble = {"b": SystemExit("killed")}  # nothing of the run is told
    with pytest.raises(SystemExit):
        suite.run("layers", "cpu", quick=True)
    results = json.loads(suite.run("layers", "cpu", quick=True).read_text())
    assert steps.calls == ["a", "b", "c"]
    assert results["failed"] == [{"step": "rows/b", "reason": "the process ended in it"}]


def test_a_disk_that_is_full_is_no_end(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> int:
        if "partial" in str(self):
            raise OSError(28, "No space left on device")
        return self.write_bytes(text.encode())

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="cannot be resumed"):
        results = json.loads(suite.run("layers", "cpu", quick=True).read_text())
    assert len(results["rows"]) == 3


KEPT = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_kept_results_are_as_their_schema_says(file: Path) -> None:
    schema = json.loads((ROOT / "benchmarks" / "results" / "schema.json").read_text())
    jsonschema.validate(json.loads(file.read_text()), schema)
    broken = json.loads(file.read_text())
    del broken["environment"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_comparing_two_runs() -> None:
    def run(*medians: float) -> dict[str, Any]:
        names = ("same", "slower", "faster")
        seconds = [{"median": m, "low": 0.9 * m, "high": 1.1 * m} for m in medians]
        rows = [{"case": "x", "contender": n, "seconds": s} for n, s in zip(names, seconds, strict=True)]
        return {"timings": [*rows, {"case": "x", "contender": "missing", "seconds": None}]}

    found = compare.rows(run(1.0, 1.0, 1.0), run(1.1, 2.0, 0.5))
    assert [r["change"] for r in found] == ["within noise", "slower", "faster"]
    assert found[1]["ratio"] == 2.0
