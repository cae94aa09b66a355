"""The page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture
def address(pipe: Any, tmp_path: Path) -> Iterator[str]:
    """The page of two models, served by the command."""
    pipe.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(tmp_path / "model")
    command = [sys.executable, "-m", "repagen", "app", "--model", model, "--beside", model, "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(tmp_path)})
        try:
            wait_for(lambda: "the page is at" in (tmp_path / "log").read_text(), 120, server)
            yield f"http://127.0.0.1:{port}"
            assert server.poll() is None
        finally:
            server.terminate()
            server.wait(30)
    assert not list(tmp_path.glob("repagen-app-*"))
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: the package chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def wait_for(condition: Any, seconds: float, server: Any = None) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (server is None or server.poll() is None)
        time.sleep(0.02)


def open_page(browser: Any, address: str, requests: list[str]) -> Any:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("#draw")
    return page


def state(page: Any) -> str:
    return page.input_value("#state textarea")


def draw(page: Any, steps: str) -> None:
    page.fill("#steps input", steps)
    page.click("#draw")


def wait_for_state(page: Any, pattern: str, seconds: float = 60) -> None:
    wait_for(lambda: re.search(pattern, state(page)), seconds)


def pictures(page: Any, name: str) -> list[str]:
    """Addresses of pictures that the browser really shows."""
    return page.eval_on_selector_all(
        f"#{name} img", "images => images.filter(i => i.complete && i.naturalWidth > 0).map(i => i.src)"
    )


def test_the_page_draws_and_survives_its_visitors(browser: Any, address: str, tmp_path: Path) -> None:
    requests: list[str] = []
    page = open_page(browser, address, requests)

    # It draws with both models, shows its steps and the states on the way.
    draw(page, "200")
    seen = set()
    wait_for(lambda: seen.add(state(page)) or state(page) == "done", 90)
    assert len([words for words in seen if "step" in words]) >= 5
    for side in (0, 1):
        wait_for(lambda side=side: len(pictures(page, f"images-{side}")) == 4, 10)
        wait_for(lambda side=side: len(pictures(page, f"trajectory-{side}")) == 8, 10)
    first = pictures(page, "images-0")

    # A drawing that is stopped ends early, and the next one is whole.
    draw(page, "1000")
    wait_for_state(page, "step [1-9]")
    page.click("#stop")
    wait_for_state(page, "^stopped$", 20)
    assert pictures(page, "images-0") == first

    # Wrong input is answered in words, the pictures stay.
    page.fill("#class input", "zebra")
    page.press("#class input", "Enter")
    draw(page, "5")
    wait_for_state(page, "not drawn: class_labels has 'zebra'")
    page.fill("#class input", "crane")
    page.press("#class input", "Enter")
    draw(page, "0")
    wait_for_state(page, "num_inference_steps is 0; give a whole number")
    page.fill("#seed input", "")
    draw(page, "5")
    wait_for_state(page, "(seed is empty|seed is)|done")
    assert pictures(page, "images-0") == first or state(page) == "done"

    # A visitor who leaves in the middle does not hold the next one up.
    page.fill("#seed input", "1")
    draw(page, "1000")
    wait_for_state(page, "step [1-9]")
    page.close()
    page = open_page(browser, address, requests)
    draw(page, "5")
    wait_for_state(page, "^done$")
    page.screenshot(path=tmp_path / "page.png")
    assert all(url.startswith(address) or url.startswith("data:") or url.startswith("blob:") for url in requests)
