"""What the README shows of the report: its first screen, and the verdicts of the best-measured device."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import render
from .claims import FAILS, HOLDS, OPEN

BEGIN, END = "<!-- verdicts -->\n", "<!-- end of verdicts -->\n"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Debian's, or whichever is here; playwright's own download is not needed."""


@contextmanager
def opened(width: int, height: int, theme: str) -> Iterator[Any]:
    """A tab of a browser without network."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, offline=True, device_scale_factor=1
        )
        context.set_default_timeout(300_000)  # milliseconds: the machine may have other work
        yield context.new_page()
        browser.close()


def take(page: Path, file: Path) -> Path:
    if CHROMIUM is None:
        raise SystemExit("no Chromium is installed: `apt-get install chromium`, for one")
    with opened(1280, 800, "light") as tab:
        tab.goto(page.as_uri())
        tab.wait_for_selector(".js-plotly-plot .main-svg")
        tab.screenshot(path=file)
    return file


def verdicts(readme: Path) -> Path:
    """Puts the verdicts between the README's marks: of each claim, how many answers to its readings hold."""
    best = render.load()[0]
    claims = render.claims(best)
    if claims is None:
        raise SystemExit("neither layers nor quality were measured: run `python -m benchmarks measure` first")
    rows = []
    for row in claims["rows"]:
        count = Counter(answer["verdict"] for answer in row["answers"])
        rows.append([row["id"], f"{row['says']} ({row['source']})", *(count[v] or "" for v in (HOLDS, FAILS, OPEN))])
    name = next(iter(best.values()))["environment"]["device"]
    total = f"{claims['holds']} answers hold, {claims['fails']} fail, {claims['open']} cannot be decided there"
    table = tabulate(rows, ["", "what is said", "holds", "fails", "open"], tablefmt="github")
    text = f"<details>\n<summary>On {name}: {total}</summary>\n\n{table}\n\n</details>\n"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + text + END + rest.split(END)[1])
    return readme
