"""The report page in a real browser: what it loads, how wide it is, how its search works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cllm4rec_dist.evaluation.report import Background, write_report
from cllm4rec_dist.evaluation.results import ExampleRecommendation, RecommendedItem
from tests.evaluation.samples import make_items, make_values, results_of, write_values

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    users, baselines = make_values(num_users=60, num_new=20)
    write_values(folder, users, baselines)
    titles = ["Café crème cups", HOSTILE, "W" * 300, *(f"Plain title {n}" for n in range(33))]
    examples = [
        ExampleRecommendation(f"user-{n}", [title], [RecommendedItem(f"For {title}", hit=n % 2 == 0)], 1)
        for n, title in enumerate(titles)
    ]
    log = folder / "metrics.jsonl"
    log.write_text('{"step": 1, "valid/recall@20": 0.1}\n{"step": 2, "valid/recall@20": 0.2}\n')
    background = Background(run="runs/a", items=make_items(), examples=examples, metrics_files=[log])
    return write_report(folder, results_of(users, baselines), background)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200, 1280])
def test_the_page_loads_nothing_complains_of_nothing_and_fits(browser, report, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overflows = (
        "(box) => box.scrollHeight > box.clientHeight || (innerWidth > 900 && box.scrollWidth > box.clientWidth)"
    )
    assert not page.evaluate(f"[...document.querySelectorAll('.scroll')].some({overflows})"), "a scrollbar of its own"
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert messages == []
    assert requests == [report.as_uri()]
    assert page.title() == "demo (test): how good are the recommendations?"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 246, 249)", "dark": "rgb(17, 18, 23)"}[scheme]
    page.close()


def test_examples_are_searched_by_user_and_title(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    shown = page.locator(".example:visible")
    assert shown.count() == 36
    page.keyboard.press("Tab")  # the box can be reached without a mouse
    page.get_by_label("Search the examples").fill("cafe CUPS")
    assert shown.count() == 1
    assert page.get_by_text("For Café crème cups").is_visible()
    assert page.locator("#search-count").inner_text() == "1 of 36 examples"
    page.get_by_label("Search the examples").fill("user-3")
    assert shown.count() == 7  # user-3, user-30 to user-35
    page.get_by_label("Search the examples").fill("nothing like it")
    assert shown.count() == 0
    page.get_by_label("Search the examples").fill("")
    assert shown.count() == 36
    page.close()


def test_the_page_works_without_its_script(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".example:visible").count() == 36
    assert not page.get_by_label("Search the examples").is_visible()
    page.get_by_text("user-7", exact=False).first.click()
    assert page.get_by_text("For Plain title 4", exact=True).is_visible()
    context.close()


def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser, report, tmp_path):
    broken = tmp_path / "report.html"
    broken.write_text(report.read_text(encoding="utf-8").replace("<main>", f"<main>{HOSTILE}"), encoding="utf-8")
    page = browser.new_page()
    page.goto(broken.as_uri())
    assert page.title() == "demo (test): how good are the recommendations?"
    page.close()
