"""The live page in a browser: it follows the run without being opened again."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
from playwright.sync_api import sync_playwright  # noqa: E402

from align.report.watch import live_app  # noqa: E402
from align.runs.folder import RunFolder  # noqa: E402
from tests.align.report.runs import CHROMIUM, step, write_run  # noqa: E402

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: run `make browser`")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of the live page of the run `first`."""
    write_run(tmp_path / "first")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = live_app([RunFolder(tmp_path / "first")])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


def test_a_new_step_appears_and_what_is_open_stays_open(address: str, tmp_path: Path) -> None:
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(address) else complaints.append(request.url))
        page.goto(address)
        page.locator("#figure-score summary").click()
        page.evaluate("window.notReloaded = true")
        page.evaluate("window.kept = [...document.querySelectorAll('h1, #settings tbody, [data-stage=sft] svg')]")
        page.evaluate("window.replaced = document.querySelector('#figure-score svg')")
        with (tmp_path / "first" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step(41, reward__mean=7.5)) + "\n")
        page.locator("#figure-score .value", has_text="7.5").wait_for(timeout=60_000)
        assert page.locator("#figure-score tbody tr").last.inner_text().split() == ["41", "7.5"]
        assert page.evaluate("window.notReloaded")
        assert page.evaluate("window.kept.length > 2 && window.kept.every((node) => node.isConnected)")
        assert not page.evaluate("window.replaced.isConnected")
        main = "watched.served.querySelector('main')"
        assert page.evaluate(f"update(document.querySelector('main'), {main}, {main})") is False
        assert page.locator("#cursor input").get_attribute("max") == "41"
        assert page.locator(".lamp").count() == 10
        browser.close()
    assert [text for text in complaints if not text.startswith("data:")] == []


def test_the_page_says_what_is_wrong_until_it_is_mended(address: str, tmp_path: Path) -> None:
    metrics = tmp_path / "first" / "metrics.jsonl"
    whole = metrics.read_text()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        assert not page.locator("#trouble").is_visible()
        metrics.write_text("damaged\n" + whole)
        page.locator("#trouble", has_text="line 1").wait_for(timeout=60_000)
        metrics.write_text(whole)
        page.locator("#trouble").wait_for(state="hidden", timeout=60_000)
        browser.close()
