"""The page in Debian's Chromium: python -m pytest -m slow tests/report/test_in_browser.py (needs playwright)."""

import pytest

from grain_jax.report import page
from tests import browser
from tests.report import workdirs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Of the page of one run, and of two."""
    root = tmp_path_factory.mktemp("report")
    (first, second), predictor = workdirs.two(root)
    page.write(second, predictor)
    (second / "checkpoints" / "40").mkdir(parents=True)
    one = page.write(first, predictor)
    two = page.write(first, predictor, others=[second], output=root / "two.html")
    return one.as_uri(), two.as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("which", [0, 1])
def test_it_is_in_order(urls, which, width, dark):
    with browser.opened(urls[which], width=width, dark=dark) as opened:
        assert opened.page.locator("#regions .card").count() == workdirs.ANNOTATED * (which + 1)
        assert opened.page.locator("main section > div:empty").count() == 0
        assert opened.page.locator("img").count() > 20
        opened.page.wait_for_function("[...document.images].every(i => i.complete)")
        assert opened.broken_pictures() == [] and opened.complaints() == []
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert opened.page.title().endswith("grain_jax.report")  # no text of the run has run
        # No part of a page was put in as text where an element was meant.
        assert "[object" not in opened.page.inner_text("body")


def test_a_run_of_which_little_is_known(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    with browser.opened(page.write(tmp_path).as_uri()) as opened:
        assert opened.complaints() == []
        assert "config.json is missing" in opened.page.inner_text("#config")
        for section in ("classes", "confusions", "regions", "queries", "attention"):
            assert "config.json is missing" in opened.page.inner_text(f"#{section} .none")
        assert opened.page.locator("#curves circle").count() == 1
        opened.page.keyboard.press("8")
        assert opened.page.evaluate("document.activeElement.id") == "config-title"


@pytest.mark.parametrize("dark", [False, True])
def test_theme(urls, dark):
    colour = "getComputedStyle(document.body).backgroundColor"
    colours = ["rgb(255, 255, 255)", "rgb(21, 24, 28)"]
    with browser.opened(urls[0], dark=dark) as opened:
        assert opened.page.evaluate(colour) == colours[dark]
        assert opened.page.inner_text("#theme") == ("Light" if dark else "Dark")
        opened.page.keyboard.press("t")
        assert opened.page.evaluate(colour) == colours[not dark]
        opened.page.click("#theme")
        assert opened.page.evaluate(colour) == colours[dark]
        assert opened.complaints() == []


def test_filters_and_toggles(urls):
    with browser.opened(urls[1]) as opened:
        page = opened.page
        rows = page.locator("#config-table tbody tr:visible")
        assert rows.count() == 1  # what differs
        page.get_by_label("only what differs").uncheck()
        assert rows.count() > 90
        page.fill("#config input[type=search]", "optim.warmup")
        assert rows.count() == 3
        page.fill("#classes input[type=search]", "CA")  # the suite's set comes first
        assert page.locator("#classes .name").all_inner_texts() == ["cat"]
        page.fill("#classes input[type=search]", "")
        assert page.locator("#classes .name").all_inner_texts() == ["cat", "ship"]
        page.locator("#classes").get_by_text("best first").click()
        assert page.locator("#classes .name").all_inner_texts() == ["ship", "cat"]
        page.locator("#classes").get_by_text("birds", exact=True).click()
        assert page.locator("#classes .name").count() == 3
        alphas = page.locator("#classes fieldset").nth(1).locator("label")
        assert alphas.all_inner_texts() == ["1", "0.5", "0"]
        alphas.nth(1).click()
        assert "of 4" in page.locator("#classes .number").first.inner_text()
        page.fill("#confusions input[type=search]", "no such class")
        assert page.locator("#confusions .card").count() == 0
        page.fill("#regions input[type=search]", "classes/wren/2")
        assert page.locator("#regions .card:visible").count() == 2
        shown = page.locator("#regions .card:visible").first
        assert shown.locator("g.predicted:visible").count() == 5
        assert shown.locator("g.true:visible").count() == 2
        page.get_by_label("predicted boxes (solid)").uncheck()
        assert shown.locator("g.predicted:visible").count() == 0
        page.get_by_label("annotated boxes (dashed)").uncheck()
        assert shown.locator("g.true:visible").count() == 0
        losses = page.locator("#curves figure").first
        assert losses.locator("path").count() == 4  # two series of two runs
        losses.get_by_role("button", name="boxes").click()
        assert losses.locator("path").count() == 2
        page.locator("#curves .tools").get_by_text("second").click()
        assert losses.locator("path").count() == 1
        straight = losses.locator("path").get_attribute("d")
        losses.get_by_label("log").check()
        assert losses.locator("path").get_attribute("d") != straight
        page.locator("#curves input[type=range]").fill("0.9")
        assert losses.locator("path").count() == 2  # and the one that is not smoothed
        assert opened.complaints() == []


def test_keyboard(urls):
    with browser.opened(urls[0]) as opened:
        page = opened.page
        press = page.keyboard.press
        press("?")
        assert page.locator("dialog").is_visible()
        press("Escape")
        assert page.locator("dialog").is_hidden()
        press("2")
        assert page.evaluate("document.activeElement.id") == "curves-title"
        press("/")
        assert page.evaluate("document.activeElement.closest('section').id") == "classes"
        page.keyboard.type("cat2")  # a number and a letter that are keys elsewhere
        assert page.input_value("#classes input[type=search]") == "cat2"
        press("Escape")
        assert page.evaluate("document.activeElement.tagName") == "BODY"
        plot = page.locator("#curves svg.plot").first
        plot.focus()
        press("Home")
        assert page.locator("#curves .at").first.inner_text() == "step 2"
        assert plot.get_attribute("aria-label").startswith("Losses, step 2: total 4.5; boxes 0.5")
        press("ArrowRight")
        assert page.locator("#curves .at").first.inner_text() == "step 4"
        press("Tab")
        press("Tab")
        assert page.evaluate("document.activeElement.closest('.series') !== null")
        card = page.locator("#regions .card").first
        card.focus()
        press("ArrowDown")
        assert card.locator("li.one").count() == 1 and card.locator("g.one").count() >= 1
        press("Escape")
        assert card.locator(".one").count() == 0
        # The arrow keys go through the choices, and the image follows.
        page.locator("#attention-query input").first.focus()
        before = page.locator("#attention [role=status]").inner_text()
        press("ArrowRight")
        after = page.locator("#attention [role=status]").inner_text()
        assert "query 1" in before and "query 2" in after
        page.locator("#attention .all button").last.click()
        assert "image query" in page.locator("#attention [role=status]").inner_text()
        assert opened.complaints() == []


def test_the_cursor_shows_values(urls):
    with browser.opened(urls[0]) as opened:
        plot = opened.page.locator("#curves svg.plot").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        opened.page.mouse.move(box["x"] + box["width"] - 17, box["y"] + 60)
        assert opened.page.locator("#curves .at").first.inner_text() == "step 40"
        values = opened.page.locator("#curves figure").first.locator(".series b").all_inner_texts()
        assert values == ["0.225", "0.025"]
        opened.page.mouse.move(box["x"] + 53, box["y"] + 60)
        assert opened.page.locator("#curves .at").first.inner_text() == "step 2"


def test_attention_adds_up(urls):
    """The weights that the page has decoded, to a whole, up to the 8 bits that they are kept in."""
    with browser.opened(urls[0]) as opened:
        sums = opened.page.evaluate(
            "[0, 1].map(head => attended(RUNS[0], 0, 1, head, 3).reduce((a, b) => a + b, 0))"
        )
        mean = opened.page.evaluate("attended(RUNS[0], 0, 1, null, 3).reduce((a, b) => a + b, 0)")
    assert sums == pytest.approx([1, 1], abs=0.01) and mean == pytest.approx(sum(sums) / 2)
