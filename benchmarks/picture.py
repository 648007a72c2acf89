"""The first screen of the rendered report, for the README."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
