"""The report's page: what it is drawn from, and how it looks in a browser, at two widths and in both themes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the report's libraries are in requirements.txt")
pytest.importorskip("scipy")
pytest.importorskip("safetensors")

import torch

import kx_kernels as kx
from benchmarks import figures, models, picture, render, sections, suite, units
from benchmarks.claims import HOLDS, all_claims
from benchmarks.environment import ROOT

OF_DEVICES = [sorted(folder.glob("*.json")) for folder in (ROOT / "benchmarks" / "results").glob("*/")]
KEPT = max(OF_DEVICES, key=len, default=[])  # of the device with the most of them
NOT_KEPT = "no run of the layers is kept"
pytestmark = pytest.mark.xdist_group("the page of the report")  # drawn once
LIGHT, DARK = "#ffffff", "#111827"  # the page


def made_up(kept: dict[str, Any]) -> dict[str, Any]:
    """Results of an operator that has none: another's, with what later runs add to rows."""
    rows = [{**r, "bound": 1e-4, "precision": 0.02, "version": "torch 0"} for r in kept["growth"]]
    return {**kept, "op": "nystrom_attention", "growth": rows, "shared": rows, "failed": []}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kept results; nystrom_attention made up if it is not among them; and a newer, lesser device."""
    folder = tmp_path_factory.mktemp("results")
    kept = {file.stem: json.loads(file.read_text()) for file in KEPT}
    kept.setdefault("nystrom_attention", made_up(kept["gau_attention"]))
    other = {**kept["rope"]["environment"], "device": "Another, 64 threads", "date": "2999-01-01 00:00 UTC"}
    lesser = {"op": "rope", "quick": True, "environment": other, "limit": "dst.copy_(src)", "unit": "B", "versions": {}}
    lesser["failed"] = [{"step": "timings/float32", "reason": "MemoryError: no room for 9 GB"}]
    for place, found in [*(("best", r) for r in kept.values()), ("another", lesser)]:
        (folder / place).mkdir(exist_ok=True)
        (folder / place / f"{found['op']}.json").write_text(json.dumps(found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "RESULTS", folder)
        yield folder


@pytest.fixture(scope="module")
def page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render.render(tmp_path_factory.mktemp("report"))[0]


kept_only = pytest.mark.skipif({"layers", "rope", "gau_attention"} - {f.stem for f in KEPT} != set(), reason=NOT_KEPT)


@kept_only
def test_the_summary_answers_every_claim(page: Path) -> None:
    text = page.with_name("summary.md").read_text()
    for claim in all_claims():
        assert f"**{claim.id}**" in text


@kept_only
def test_the_summary_has_limits_versions_layers_and_decoding(page: Path, results: Path) -> None:
    text = page.with_name("summary.md").read_text()
    best = render.load()[0]
    assert text.count("Roofline, reached in this run:") == sum("roofline" in r for r in best.values())
    for name, version in best["linear_attention"]["versions"].items():
        assert f"{name} {version or 'not installed'}" in text
    for title, figure in sections.layers(best["layers"]):
        assert f"### {title}\n\n{figure.see}\n\n| {' | '.join(figure.columns)} |\n|---|" in text
        assert f"| {' | '.join(figure.rows[-1])} |\n" in text


@kept_only
def test_the_best_measured_device_comes_first(results: Path) -> None:
    """Not the newest; and a device whose steps failed is drawn as well."""
    best, lesser = render.load()
    assert set(best) == {f.stem for f in KEPT} | {"nystrom_attention"}
    assert set(lesser) == {"rope"}
    shown = render.device(lesser)
    assert shown["operators"][0]["speed"] is None
    assert shown["failed"][0][1]["reason"] == "MemoryError: no room for 9 GB"
    told = render.facts(best)
    assert told["names"] == list(best)
    assert {"commit", "date", "uncommitted_changes"} <= set(told["differ"])


@kept_only
def test_whole_layers_are_drawn(results: Path) -> None:
    best = render.load()[0]
    drawn = dict(sections.layers(best["layers"]))
    for title in (
        "Layers, width 384, forward", "Layers, width 1024, forward", "Layers, width 768, forward and backward",
        "Memory of layers", "Decoding, time per token", "Decoding, memory", "Rotary embedding",
    ):  # fmt: skip
        if title == "Memory of layers" and title not in drawn:  # where no time was left for it
            assert not any("peak" in r for r in best["layers"]["memory"] if r["level"] == "layer")
            continue
        assert drawn[title].see
        assert drawn[title].rows
    times = {(r["name"], r["by"]): r["seconds"]["median"] for r in best["layers"]["times"]
             if (r["level"], r["width"], r["length"], r["what"]) == ("layer", 768, 2048, "forward")
             and "seconds" in r}  # fmt: skip
    table = drawn["Layers, width 768, forward"]
    row = next(r for r in table.rows if r[0] == "attention and feed-forward, fused")
    together = times["attention", "fused"] + times["feed-forward", "eager"]
    assert row[table.columns.index("2,048")].split(" (")[0] == units.time(together)


def test_losses_are_the_same_by_our_operators_and_by_the_references() -> None:
    assert {row["verdict"] for row in sections.losses(None)} == {HOLDS}
    text = models.batch(models.text(held_out=True), 2, 128, torch.Generator().manual_seed(0))
    for name in models.MODELS:
        model = models.load(name)
        with torch.no_grad():
            ours = models.loss(model, text, torch.Generator().manual_seed(0)).item()
            with kx.backend("reference"):
                reference = models.loss(model, text, torch.Generator().manual_seed(0)).item()
        assert abs(ours - reference) <= sections.SAME_LOSS, name


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("an earlier page")

    def full(self: Path, text: str) -> int:
        self.write_bytes(text[:1].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=r"index.html cannot be written: No space left on device"):
        render.write(tmp_path / "index.html", "a page")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("index.html", "an earlier page")]


def _luminance(colour: str) -> float:
    """Of #rrggbb or rgb(r, g, b), as WCAG has it."""
    if colour.startswith("#"):
        channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        channels = [int(x) for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in channels)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_lines_are_seen_on_both_themes(background: str) -> None:
    for colour in (*figures.OURS, *figures.OTHERS):
        assert contrast(colour, background) >= 3, colour  # what WCAG asks of graphics


def test_no_two_series_look_alike() -> None:
    names = [f"{name}{suffix}" for name in "abcdefghijklmno" for suffix in ("", ", ours")]
    looks = [(s["marker"]["symbol"], s["marker"]["color"]) for _, s in figures.styles(names)]
    assert len(set(looks)) == len(looks)


def test_ticks_of_a_logarithmic_axis() -> None:
    assert figures._powers([0.3, 30], 8)["ticktext"] == ["0.5", "1", "2", "5", "10", "20"]
    assert figures._powers([0.003, 3000], 8)["ticktext"] == ["0.01", "0.1", "1", "10", "100", "1,000"]


in_browser = pytest.mark.skipif(picture.CHROMIUM is None, reason="no Chromium is installed (CONTRIBUTING.md)")
PLOTS = """() => [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.querySelector('.main-svg')).map(p => ({
    name: p.closest('[role=img]')?.ariaLabel,
    labels: [...p.querySelectorAll('.xtick text')].map(t => t.getBoundingClientRect()).map(b => [b.left, b.right]),
}))"""
TEXTS = ("body", ".soft", ".verdicts .holds", ".verdicts .fails", "a", "summary", "th", ".js-plotly-plot .xtick text")


@kept_only
@in_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(page: Path, width: int, theme: str) -> None:
    """No network, no error, no sideways scrolling; every plot drawn and named; readable; a full first screen."""
    pytest.importorskip("playwright.sync_api")
    with picture.opened(width, 800, theme) as tab:
        errors: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_selector(".js-plotly-plot .main-svg")
        assert errors == []
        assert requests == [page.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        plots = tab.evaluate(PLOTS)
        assert len(plots) == page.read_text().count("Plotly.newPlot(") > 0
        for plot in plots:
            assert plot["name"]
            for (_, right), (left, _) in itertools.pairwise(sorted(plot["labels"])):
                assert right <= left, f"labels collide: {plot['name']}"
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert contrast(background, LIGHT if theme == "light" else DARK) == 1
        for text in TEXTS:
            style = tab.locator(text).first.evaluate("e => [getComputedStyle(e).color, getComputedStyle(e).fill]")
            assert contrast(style["xtick" in text], background) >= 4.5, text
        small, verdicts = (tab.locator(name).bounding_box() for name in (".small", ".verdicts"))
        if width == 1280:
            assert max(small["y"] + small["height"], verdicts["y"] + verdicts["height"]) <= 800
        else:
            assert small["y"] + small["height"] <= verdicts["y"]
        assert tab.locator(".small .js-plotly-plot").count() == 4


@kept_only
@in_browser
def test_hovering_shows_values(page: Path, results: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    rope = render.load()[0]["rope"]
    ours = next(r for r in rope["growth"] if r["contender"] == "kx cpu" and r["length"] == 128)
    with picture.opened(1280, 800, "light") as tab:
        tab.goto(page.as_uri())
        point = tab.locator(".small .js-plotly-plot").first.locator(".trace").first.locator(".point")
        at = sorted(r["length"] for r in rope["growth"] if r["contender"] == "kx cpu" and r["seconds"]).index(128)
        box = point.nth(at).bounding_box()
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        text = tab.locator(".hoverlayer .hovertext").first.text_content()
    assert "kx cpu" in text
    assert "tokens n 128" in text
    assert f"{ours['seconds']['median'] * 1e3:.4g}" in text
