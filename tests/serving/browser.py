"""A real Chromium on a service in this process, for tests of the page and for its pictures.

python -m tests.serving.browser docs/pictures      takes the pictures of the page anew
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from cllm4rec_dist.serving.web import create_app
from tests.serving.fake import FakeItems, FakeRecommender, FakeRun, options

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SHOP = {
    "s01": "Rose soap with honey",
    "s02": "Lemon soap with oats",
    "s03": "Rose shampoo for dry hair",
    "s04": "Lemon shampoo for oily hair",
    "s05": "Honey soap bar for dry skin",
    "b01": "Hair brush of pear wood",
    "b02": "Tooth brush of bamboo",
    "b03": "Comb of pear wood for dry hair",
    "x01": "Towel of cotton with honey stripes",
    "x02": "Candle with rose and lemon",
    "x03": "Bath salt with rose petals",
    "x04": "A very long title of a gift set with rose soap, lemon shampoo, a hair brush and a towel in a bamboo box",
}
"""What the pictures show."""


def chromium() -> str:
    """Path of Chromium; skips the test where there is none, unless CLLM4REC_REQUIRE_BROWSER forbids that."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        reason = "no Chromium on this machine (apt-get install chromium)"
        if os.environ.get("CLLM4REC_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    return executable


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL of an application that a thread serves."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def add(page: Page, text: str) -> None:
    """Put the first product that a search finds into the basket, by the keyboard."""
    page.get_by_role("combobox").fill(text)
    page.get_by_role("option").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")


def _take_pictures(folder: Path) -> None:
    run = FakeRun(FakeRecommender(items=FakeItems(SHOP)))
    sizes = {"light": (1180, 900), "dark": (1180, 900), "phone": (360, 1240)}
    with served(create_app(run.live(), options())) as url, running_browser() as browser:
        for name, (width, height) in sizes.items():
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if name == "dark" else "light",
                device_scale_factor=1,
            )
            page = context.new_page()
            page.goto(url)
            add(page, "rose soap")
            add(page, "lemon shampoo")
            page.get_by_role("button", name="is sold out").last.click()
            page.get_by_role("heading", name="Recommended for this basket").wait_for()
            page.locator("#list[aria-busy=false]").wait_for()
            if name == "dark":
                page.locator("#run summary").click()
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            page.mouse.move(0, 0)
            picture = Image.open(BytesIO(page.screenshot()))
            picture.quantize(128, dither=Image.Dither.NONE).save(folder / f"serve-{name}.png", optimize=True)
            context.close()


if __name__ == "__main__":
    _take_pictures(Path(sys.argv[1]))
