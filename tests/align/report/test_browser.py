"""The pages in a browser: no error, no request to the outside, accessible, and usable by keyboard.

`make browser` installs what these tests need.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.report.compare import write_comparison
from align.report.page import write_report
from align.report.run_record import read_run_record
from align.runs.folder import RunFolder
from tests.align.report.runs import CHROMIUM, step, write_lines, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from playwright.sync_api import Browser, Page, Playwright, sync_playwright  # noqa: E402

AXE = next(Path(__file__).parents[3].glob(".browser/*/axe.min.js"), None)
PAGES = ("report", "compare")
THEMES = ("light", "dark")

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: run `make browser`")


@pytest.fixture(scope="module")
def started() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(started: Playwright) -> Iterator[Browser]:
    launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield launched
    launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of a page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    write_run(folder / "first")
    write_run(folder / "second", steps=20, beta=0.2, gain=1.0)
    evaluation = json.loads((folder / "first" / "evaluation.json").read_text())
    report = write_report(read_run_record(folder / "first", evaluation))
    write_comparison([RunFolder(folder / "first"), RunFolder(folder / "second")], folder / "compare.html")
    return {"report": report.as_uri(), "compare": (folder / "compare.html").as_uri()}


@pytest.fixture
def complaints() -> list[str]:
    """What the page's console says, and the addresses that it asks for."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    # The page's own policy forbids other scripts, such as the checker of accessibility.
    context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
    opened = context.new_page()
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
    yield opened
    context.close()


def violations(page: Page) -> list[str]:
    """What axe-core finds, each with the first place."""
    assert AXE is not None
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found: dict[str, Any] = page.evaluate("axe.run()")
    return [f"{item['id']}: {item['nodes'][0]['html'][:200]}" for item in found["violations"]]


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_opens_without_an_error_or_a_request(
    page: Page, pages: dict[str, str], complaints: list[str], kind: str
) -> None:
    page.goto(pages[kind])
    page.locator("figure svg.chart").first.hover()
    page.locator("#theme").click()
    assert [text for text in complaints if not text.startswith("data:")] == []


def test_the_pages_policy_lets_its_script_run(browser: Browser, pages: dict[str, str]) -> None:
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(pages["report"])
    assert page.locator("#theme").is_visible()
    assert refused == []
    page.close()


@pytest.mark.skipif(AXE is None, reason="there is no axe-core: run `make browser`")
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_is_accessible(page: Page, pages: dict[str, str], kind: str, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    page.goto(pages[kind])
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert violations(page) == []


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_a_page_is_no_wider_than_the_window(page: Page, pages: dict[str, str], kind: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(pages[kind])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    padding = page.evaluate("getComputedStyle(document.querySelector('header')).paddingLeft")
    assert (padding == "16px") == (width == 360)


def test_the_cursor_shows_the_values_of_a_step_in_every_figure(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["report"])
    figure = page.locator("#figure-score")
    last = figure.locator(".value").first.text_content()
    slider = page.locator("#cursor input")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#cursor output").text_content() == "1"
    shown = figure.locator("tbody tr").first.locator("td").first.text_content()
    assert shown != last
    assert figure.locator(".value").first.text_content() == shown
    assert page.locator("figure[data-stage] .cursor").count() == page.locator("figure[data-stage]").count()
    page.keyboard.press("ArrowRight")
    assert page.locator("#cursor output").text_content() == "2"


def test_the_pointer_moves_the_same_cursor(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["report"])
    chart = page.locator("#figure-score svg.chart")
    chart.scroll_into_view_if_needed()
    chart.hover(position={"x": 60, "y": 40})
    assert page.locator("#figure-kl .cursor").count() == 1
    page.mouse.move(1, 1)
    assert page.locator(".cursor").count() == 0


def test_the_cursor_says_where_a_value_is_not_finite(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["report"])
    page.locator("#cursor input").fill("5")
    assert page.locator("#figure-gradients .value").first.text_content() == "–"
    # Gradients are logged by a curve that has no value at this step.
    assert page.locator("#figure-gradients .spot").count() == 0


def test_every_control_is_reached_by_keyboard(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["compare"])
    wanted = page.evaluate("document.querySelectorAll('a[href], button, summary, [tabindex=\"0\"]').length")
    reached = set()
    for _ in range(2 * wanted):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
    for control in ('<a class="skip"', '<input type="radio"', '<input type="range"', '<button id="theme"', "<summary>"):
        assert any(element.startswith(control) for element in reached), control


def test_the_theme_is_chosen_by_keyboard(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["report"])
    page.locator("#theme").focus()
    colours = []
    for _ in range(2):
        page.keyboard.press("Enter")
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert page.locator("#theme").text_content() == "Theme: dark"
    assert colours == ["rgb(247, 246, 243)", "rgb(18, 20, 23)"]
    page.reload()
    assert page.locator("#theme").text_content() == "Theme: dark"


def test_samples_are_sorted_by_keyboard(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["report"])
    page.locator("table.sortable th button").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("table.sortable tbody tr td").first.text_content() == "40"
    assert page.locator('th[aria-sort="descending"]').count() == 1


@pytest.mark.parametrize(
    ("axis", "label"), [("kl", "KL, nats per sequence"), ("seconds", "seconds"), ("episodes", "episodes")]
)
def test_the_curves_of_a_comparison_stand_over_another_axis(
    page: Page, pages: dict[str, str], axis: str, label: str
) -> None:
    page.goto(pages["compare"])
    figure = page.locator("#figure-score")
    by_step = figure.locator("path.curve.s1").last.get_attribute("d")
    page.locator('#axes input[value="step"]').focus()
    for _ in range(("step", "kl", "seconds", "episodes").index(axis)):
        page.keyboard.press("ArrowRight")
    assert figure.locator(".axis .label").text_content() == label
    assert figure.locator("path.curve.s1").last.get_attribute("d") != by_step
    page.keyboard.press("ArrowLeft")
    page.locator('#axes input[value="step"]').check()
    assert figure.locator("path.curve.s1").last.get_attribute("d") == by_step


def test_the_points_between_those_of_a_thinned_axis_stand_at_their_seconds(page: Page, tmp_path: Path) -> None:
    """An axis of 998 steps has every third and the last; steps take 1 s and, after step 500, 9 s."""
    rows = [step(1, reward__mean=0.5)]  # before the first step of the axis
    for n in range(2, 1000):
        rows.append(step(n, reward__mean=math.sin(n), kl__per_sequence=1.0, time__step=1.0 if n <= 500 else 9.0))
    rows.append(step(1000, reward__mean=0.5))  # after its last
    for name in ("a", "b"):
        write_lines(tmp_path / name / "metrics.jsonl", rows)
    write_comparison([RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")], tmp_path / "compare.html")
    page.goto((tmp_path / "compare.html").as_uri())
    page.locator('#axes input[value="seconds"]').check()
    figure = page.locator("#figure-score")
    left, right = map(float, str(figure.locator("svg.chart").get_attribute("data-plot")).split()[:2])
    drawn = re.findall(r"[ML]([\d.]+) ", str(figure.locator("svg.chart path.curve").first.get_attribute("d")))
    expected = []
    for n in map(int, figure.locator("tbody th").all_text_contents()):
        known = min(max(n, 2), 999)
        seconds = known - 1 if known <= 500 else 499 + 9 * (known - 500)
        expected.append(left + (seconds - 1) / (4990 - 1) * (right - left))
    assert len(expected) > 100
    assert list(map(float, drawn)) == pytest.approx(expected, abs=0.051)


def test_without_scripts_the_page_is_complete(browser: Browser, pages: dict[str, str]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["compare"])
    assert page.locator("figure svg.chart").count() > 10
    assert not page.locator("#axes").is_visible()
    assert not page.locator("#theme").is_visible()
    context.close()


def test_print_is_light_and_shows_no_controls(page: Page, pages: dict[str, str]) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(pages["report"])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
