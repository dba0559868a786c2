"""The page in a real Chromium: by keyboard alone, on a phone, in the dark, with titles that are scripts."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from cllm4rec_dist.serving.web import create_app
from tests.serving.browser import SHOP, add, running_browser, served
from tests.serving.fake import FakeItems, FakeRecommender, FakeRun, at_step, options

pytestmark = pytest.mark.slow

EVIL = {
    "s90": "<img src=x onerror=\"document.title='broken in'\"> soap",
    "x90": "<script>document.title='broken in'</script> soap",
    "b90": "\"><svg onload=document.title='broken in'> brush",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as made:
        yield made


@dataclass
class Shop:
    """A service over the fake shop."""

    url: str
    run: FakeRun
    model: FakeRecommender


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    model = FakeRecommender(items=FakeItems(SHOP | EVIL))
    run = FakeRun(model, at_step(20, items=model.items))
    with served(create_app(run.live(), options())) as url:
        yield Shop(url, run, model)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1100, "height": 800})
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, shop: Shop) -> Iterator[Page]:
    """The page, opened; fails where it logs an error or asks anything of another host."""
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(shop.url) else wrong.append(request.url))
    page.goto(shop.url)
    expect(page.locator("#list > li")).not_to_have_count(0)
    yield page
    assert wrong == []
    assert page.title() == "Recommendations"


def titles(page: Page) -> list[str]:
    settled(page)
    return page.locator("#list h3").all_text_contents()


def settled(page: Page) -> None:
    expect(page.locator("#list")).to_have_attribute("aria-busy", "false")


def test_popular_products_first_then_those_for_the_basket(page: Page) -> None:
    expect(page.get_by_role("heading", name="Most popular")).to_be_visible()
    add(page, "rose sham")
    expect(page.get_by_role("heading", name="Recommended for this basket")).to_be_visible()
    expect(page.locator("#basket li")).to_have_count(1)
    assert SHOP["s03"] not in titles(page)
    reasons = page.locator("#list > li").first.locator(".why li")
    expect(reasons.first).to_contain_text(SHOP["s03"])
    assert re.match(r"\+\d+\.\d\d", reasons.first.locator(".amount").text_content() or "")
    page.get_by_role("button", name=f"Remove {SHOP['s03']} from the basket").click()
    expect(page.get_by_role("heading", name="Most popular")).to_be_visible()


def test_a_product_that_the_shop_does_not_have_is_known_by_its_text(page: Page) -> None:
    page.get_by_role("combobox").fill("Rose candle <b>")
    expect(page.get_by_role("option")).to_have_count(1)
    expect(page.get_by_role("option")).to_contain_text("new product, known by this text alone")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Recommended for this basket")).to_be_visible()
    expect(page.locator("#basket li")).to_contain_text("Rose candle <b>")
    settled(page)
    assert SHOP["x02"] in titles(page)
    expect(page.locator("#list > li").first.locator(".why li").first).to_contain_text("Rose candle <b>")
    add(page, "rose sham")
    expect(page.locator("#basket li")).to_have_count(2)
    page.get_by_role("button", name="Remove Rose candle <b> from the basket").click()
    settled(page)
    assert "Rose candle <b>" not in titles(page), "nothing of it is kept"


def test_a_product_of_unknown_words_is_told(context: BrowserContext, shop: Shop) -> None:
    page = context.new_page()
    page.goto(shop.url)
    settled(page)
    page.get_by_role("combobox").fill("Zahnbürste")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("has no known word")
    page.get_by_role("button", name="Remove Zahnbürste from the basket").click()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_no_key_chooses_from_the_list_of_an_earlier_text(page: Page) -> None:
    """Else who types on and presses Enter has another product in the basket."""
    search = page.get_by_role("combobox")
    search.fill("soap")
    expect(page.get_by_role("option")).not_to_have_count(1)
    expect(search).to_have_attribute("aria-busy", "false")
    held: list[Route] = []
    page.route("**/items?*", lambda route: held.append(route))  # a method of a list cannot be one
    search.press("End")
    page.keyboard.type(" rose honey")
    expect(search).to_have_attribute("aria-busy", "true")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert search.input_value() == "soap rose honey"
    assert search.get_attribute("aria-activedescendant") is None
    while not held:
        page.wait_for_timeout(20)
    for route in held:
        route.continue_()
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("#basket li")).to_have_count(1)


def test_everything_works_by_keyboard_alone(page: Page) -> None:
    search = page.get_by_role("combobox")
    expect(search).to_be_focused()
    page.keyboard.type("soap")
    expect(page.get_by_role("option").first).to_be_visible()
    expect(search).to_have_attribute("aria-expanded", "true")
    expect(search).to_have_attribute("aria-busy", "false")
    num_options = page.get_by_role("option").count()
    assert num_options > 2

    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    active = search.get_attribute("aria-activedescendant")
    assert active == page.get_by_role("option").nth(1).get_attribute("id")
    expect(page.locator(f"#{active}")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("option").last).to_have_attribute("aria-selected", "true")  # from the first to the last

    page.keyboard.press("Escape")
    expect(page.get_by_role("listbox")).to_be_hidden()
    expect(search).to_have_attribute("aria-expanded", "false")
    assert search.input_value() == "soap"
    page.keyboard.press("Escape")
    assert search.input_value() == ""

    page.keyboard.type("rose soap honey")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.locator("#basket li")).to_have_count(1)
    expect(search).to_be_focused()
    settled(page)

    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Remove Rose soap with honey from the basket")).to_be_focused()
    page.keyboard.press("Tab")
    first = titles(page)[0]
    expect(page.get_by_role("button", name=f"Add {first} to the basket", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#basket li")).to_have_count(2)
    settled(page)
    assert first not in titles(page)
    assert page.evaluate("document.activeElement.closest('#list') !== null")  # nobody is thrown back to the top

    page.keyboard.press("Shift+Tab")  # the button that empties the basket
    page.keyboard.press("Enter")
    expect(page.locator("#basket li")).to_have_count(0)
    expect(search).to_be_focused()


def test_products_and_categories_are_left_out_and_come_back(page: Page) -> None:
    add(page, "rose soap")
    settled(page)
    first = titles(page)[0]
    page.get_by_role("button", name=f"{first} is sold out").click()
    expect(page.locator("#left-out li")).to_have_count(1)
    assert first not in titles(page)
    page.get_by_role("button", name="Leave out the category Soap & shampoo").first.click()
    expect(page.locator("#left-out li")).to_have_count(2)
    settled(page)
    assert "Soap & shampoo" not in page.locator("#list .chip").all_text_contents()
    page.get_by_role("button", name="List the category Soap & shampoo again").click()
    page.get_by_role("button", name=f"List {first} again").click()
    expect(page.get_by_role("heading", name="Left out")).to_be_hidden()
    assert first in titles(page)


def test_titles_are_text_and_never_markup(page: Page) -> None:
    page.get_by_role("combobox").fill("onerror soap")
    expect(page.get_by_role("option").first).to_contain_text(EVIL["s90"])
    page.get_by_role("option").first.click()
    expect(page.locator("#basket li")).to_have_count(1)
    assert EVIL["s90"] in (page.locator("#basket").text_content() or "")
    expect(page.locator("#list .why").first).to_contain_text(EVIL["s90"])
    assert EVIL["x90"] in titles(page)
    page.get_by_role("button", name=re.compile("<script>.* is sold out")).click()
    expect(page.locator("#left-out")).to_contain_text(EVIL["x90"])
    assert page.locator("main img, main svg, main script").count() == 0


def test_the_run_is_shown_and_a_new_checkpoint_too(page: Page, shop: Shop) -> None:
    line = page.locator("#run-line")
    expect(line).to_have_text("shop · 26 Nov 2026 · recall@20 0.310")
    page.locator("#run summary").click()
    expect(page.locator("#run-facts")).to_contain_text("best-00000010")
    shop.run.best = "/runs/shop/best-00000020"
    try:
        for word in ("rose", "lemon", "honey", "comb", "towel"):
            add(page, word)
            page.wait_for_timeout(100)
        expect(page.locator("#run-facts")).to_contain_text("best-00000020")
    finally:
        shop.run.best = "/runs/shop/best-00000010"


@pytest.mark.parametrize("width", [320, 360, 414])
def test_a_phone_needs_no_scrolling_to_the_side(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    add(page, "very long")
    add(page, "onerror")
    settled(page)
    page.locator("#run summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    too_wide = page.evaluate(
        "[...document.querySelectorAll('main *, header *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert too_wide == []


CONTRASTS = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const channel = (value) => { const v = value / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(".unseen, .skip")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) bad.push(`${contrast.toFixed(2)} ${element.outerHTML.slice(0, 100)}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_by_day_and_in_the_dark(browser: Browser, shop: Shop, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(shop.url)
    add(page, "rose soap")
    settled(page)
    page.get_by_role("button", name="is sold out").first.click()
    page.locator("#run summary").click()
    page.get_by_role("combobox").fill("soap")
    expect(page.get_by_role("option").first).to_be_visible()
    settled(page)
    page.wait_for_timeout(300)  # until the list has faded in
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)))
    assert (brightness < 150) == (scheme == "dark")
    assert page.evaluate(CONTRASTS) == []
    context.close()


def test_every_control_has_a_name(page: Page) -> None:
    add(page, "rose soap")
    settled(page)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button')]"
        ".filter(e => !(e.getAttribute('aria-label') || e.textContent.trim())).length"
    )
    assert nameless == 0
    names = page.locator("#list button").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(names) == len({*names}) + sum(name.startswith("Leave out") for name in names) - len(
        {name for name in names if name.startswith("Leave out")}
    )
    expect(page.get_by_role("status")).to_contain_text("Recommended for this basket")
    assert page.get_by_role("combobox", name="Add a product").count() == 1


def test_a_service_that_fails_is_told_and_asked_again(context: BrowserContext, shop: Shop) -> None:
    page = context.new_page()
    page.goto(shop.url)
    settled(page)
    page.route("**/recommend", lambda route: route.fulfill(status=500, body="oops"))
    add(page, "rose soap")
    expect(page.get_by_role("alert")).to_contain_text("500")
    page.unroute("**/recommend")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("heading", name="Recommended for this basket")).to_be_visible()


def test_an_overloaded_service_is_asked_again_by_itself(context: BrowserContext, shop: Shop) -> None:
    page = context.new_page()
    page.goto(shop.url)
    settled(page)
    times = threading.Semaphore(1)

    def once(route):
        if times.acquire(blocking=False):
            route.fulfill(status=503, headers={"Retry-After": "1"}, json={"detail": "busy", "errors": []})
        else:
            route.continue_()

    page.route("**/recommend", once)
    add(page, "rose soap")
    expect(page.get_by_role("heading", name="Recommended for this basket")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_openapi_page_works_without_a_network(context: BrowserContext, shop: Shop) -> None:
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith((shop.url, "data:")) else wrong.append(request.url)
    )
    page.goto(f"{shop.url}/docs")
    expect(page.get_by_text("/recommend", exact=True)).to_be_visible(timeout=20_000)
    page.get_by_text("/recommend", exact=True).click()
    expect(page.get_by_role("button", name="Try it out")).to_be_visible()
    assert wrong == []
