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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from repagen.pipelines.png import read_png_facts

pytestmark = pytest.mark.slow
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@contextmanager
def served(pipe: Any, folder: Path) -> Iterator[str]:
    """The page of two models, served by the command; => its address."""
    pipe.save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(folder / "model")
    command = [sys.executable, "-m", "repagen", "app", "--model", model, "--beside", model, "--port", str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)})
        try:
            wait_for(lambda: "the page is at" in (folder / "log").read_text(), 120, server)
            yield f"http://127.0.0.1:{port}"
            assert server.poll() is None
        finally:
            server.terminate()
            server.wait(30)
    assert not list(folder.glob("repagen-app-*"))
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def address(pipe: Any, tmp_path: Path) -> Iterator[str]:
    with served(pipe, tmp_path) as address:
        yield address


@pytest.fixture
def text_address(tmp_path: Path) -> Iterator[str]:
    from tiny_pipelines import tiny_text_pipeline

    with served(tiny_text_pipeline(sampling_defaults={"guidance_scale": 3.0}), tmp_path) as address:
        yield address


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


def test_a_visitor_sees_the_place_in_the_queue(browser: Any, address: str) -> None:
    first, second = (open_page(browser, address, []) for _ in range(2))
    draw(first, "1000")
    wait_for_state(first, "step [1-9]")
    draw(second, "5")
    wait_for(lambda: re.search(r"queue: 1/1", second.inner_text("#state")), 20)
    first.click("#stop")
    wait_for_state(second, "^done$")


def test_a_program_gets_the_files(address: str, tmp_path: Path) -> None:
    from gradio_client import Client

    client = Client(address, download_files=tmp_path / "files", verbose=False)
    words, files, *_ = client.predict("tabby", 2, 5, 1.5, 0, 1, 3, 0, api_name="/draw")
    facts = [read_png_facts(Path(file)) for file in files]
    assert words == "done" and [(fact["index"], fact["seed"]) for fact in facts] == [(0, 3), (1, 3)] * 2


def pixels(page: Any, name: str) -> list[str]:
    """Contents of the pictures that the browser shows."""
    return page.eval_on_selector_all(
        f"#{name} img",
        """images => images.map(image => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
        })""",
    )


def test_a_prompt_is_drawn_in_the_browser(browser: Any, text_address: str) -> None:
    requests: list[str] = []
    page = open_page(browser, text_address, requests)
    assert page.query_selector("#class") is None
    shown = []
    for prompt, negative in (("a red cube", ""), ("a red cube", ""), ("two <b>dogs</b>", ""), ("a red cube", "dull")):
        page.fill("#prompt textarea", prompt)
        page.fill("#negative-prompt textarea, #negative-prompt input", negative)
        before = pictures(page, "images-1")
        draw(page, "5")
        wait_for(lambda before=before: len(now := pictures(page, "images-1")) == 4 and now != before, 60)
        wait_for_state(page, "^done$")
        shown.append(pixels(page, "images-0"))
    assert shown[0] == shown[1] and len({images[0] for images in shown}) == 3
    title = page.get_attribute("#images-0 img", "title")
    assert "prompt 'a red cube'" in title and "guidance 3" in title
    assert all(url.startswith(text_address) or url.startswith(("data:", "blob:")) for url in requests)
