"""The results page of a sweep in a browser."""

import shutil

import pytest

from launch import report, results
from tests.launch.runs import HOSTILE, logged, write_run, write_sweep

pytestmark = pytest.mark.system

NONE = "\u2013"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RATES = {"a": 1e-3, "b": 1e-10, "c": 30, "d": 4, HOSTILE: "none"}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: requirements-system.txt")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs a Chromium")
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root cannot use the sandbox
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes five runs: four with losses 1, 2, 4 and 8 in some order, and one that failed without a loss."""
    root = write_sweep(
        tmp_path_factory.mktemp("sweep"), {name: {"lr": rate, "x": HOSTILE} for name, rate in RATES.items()}
    )
    for name, loss in zip("abcd", (4.0, 1.0, 8.0, 2.0), strict=True):
        write_run(
            root / name, events=("started", 0), previews=(200,),
            metrics=logged(range(50, 201, 50), lambda step, loss=loss: loss * 200 / step),
        )  # fmt: skip
    events = write_run(root / HOSTILE, events=("started", 1)) / "events.jsonl"
    events.write_text(events.read_text().replace("error: 1", HOSTILE))
    report.write_html(root, results.read(root), title=HOSTILE)
    return root


@pytest.fixture
def page(browser, folder):
    """Opens the page. Errors, dialogs and network requests fail the test."""
    errors = []
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.on("console", lambda message: errors.append(message.text))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda request: None if request.url[:5] in ("file:", "data:") else errors.append(request.url))
    opened.goto((folder / "results.html").as_uri())
    yield opened
    opened.close()
    assert not errors


def column(page, name):
    """Returns the cells of a column from top to bottom."""
    names = page.locator("thead th button").all_inner_texts()
    return [cell.strip() for cell in page.locator(f"tbody td:nth-child({names.index(name) + 1})").all_inner_texts()]


def sort(page, name, *, keys=False):
    """Sorts by a column, and returns the sort direction that the page indicates."""
    button = page.get_by_role("button", name=name, exact=True)
    if keys:
        button.focus()
        page.keyboard.press("Enter")
    else:
        button.click()
    return button.locator("xpath=..").get_attribute("aria-sort")


def test_table_has_one_row_per_run_and_text_stays_text(page):
    assert page.locator("tbody tr").count() == 5
    assert column(page, "run") == list(RATES)
    assert column(page, "state")[-1].split("\n") == ["failed", HOSTILE]
    assert page.title() == page.locator("h1").inner_text() == HOSTILE
    assert "5 runs: 4 done, 1 failed" in page.locator("header").inner_text()
    assert f"x={HOSTILE}" in page.locator("#shared").inner_text()
    links = page.locator("tbody a").evaluate_all("links => links.map(link => link.href)")
    assert links[0].endswith("/a/") and links[-1].endswith("/%3Cscript%3Ealert%281%29%3C/script%3E/")


@pytest.mark.parametrize("keys", [False, True])
def test_header_sorts_by_number_with_missing_values_last(page, keys):
    assert sort(page, "loss", keys=keys) == "ascending"
    assert column(page, "loss") == ["★ 1", "2", "4", "8", NONE]
    assert sort(page, "loss", keys=keys) == "descending"
    assert column(page, "loss") == ["8", "4", "2", "★ 1", NONE]
    assert sort(page, "lr", keys=keys) == "ascending"
    assert column(page, "lr") == ["1e-10", "0.001", "4", "30", "none"]
    assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


def test_only_the_best_values_are_marked(page):
    assert [cell.inner_text() for cell in page.locator("td.best").all()] == ["★ 1"]  # all runs are equally fast


def test_curves_are_drawn_and_highlighted_with_their_rows(page):
    curves = page.locator("#plot path.curve")
    assert curves.count() == 4 and page.locator("#legend li").count() == 4
    boxes = [curve.bounding_box() for curve in curves.all()]
    plot = page.locator("#plot").bounding_box()
    for box in boxes:
        assert box["width"] > 1000 and box["height"] > 20
        assert plot["x"] <= box["x"] and box["x"] + box["width"] <= plot["x"] + plot["width"]
        assert plot["y"] <= box["y"] and box["y"] + box["height"] <= plot["y"] + plot["height"]
    page.locator("tbody tr").nth(2).locator("td").nth(3).hover()
    assert page.locator("path.on").count() == 1 and "lr=30" in page.locator("#highlighted").inner_text()
    page.mouse.move(boxes[1]["x"] + boxes[1]["width"] - 1, max(box["y"] + box["height"] for box in boxes) - 1)
    assert page.locator("#highlighted").inner_text() == "lr=1e-10: loss 1 at step 200"
    assert page.locator("tbody tr.on td").first.inner_text().strip() == "b"


def test_scale_metric_and_colors_can_be_chosen(page):
    def lines():
        return page.locator("path.curve").evaluate_all("all => all.map(one => one.getAttribute('d'))")

    page.locator("#log").uncheck()
    linear = lines()
    page.locator("#log").check()
    assert len(linear) == 4 and not set(linear) & set(lines())
    page.locator("#metric").select_option("images_per_second")
    assert len(set(lines())) == 1  # all runs are equally fast
    assert page.locator("#plot svg").get_attribute("aria-label").startswith("images_per_second")
    page.locator("#key").select_option(label="lr")
    assert page.locator("#legend li").all_inner_texts()[:2] == ["lr=1e-10", "lr=0.001"]


def test_previews_are_shown_and_enlarged(page):
    shown = page.locator("#sheets img")
    assert shown.count() == 4
    shown.last.evaluate("image => image.decode()")
    assert shown.evaluate_all("all => all.map(one => one.naturalWidth)") == [24] * 4
    sort(page, "loss")
    assert page.locator("figcaption").all_inner_texts() == ["lr=1e-10", "lr=4", "lr=0.001", "lr=30"]
    shown.first.click()
    assert page.locator("dialog[open] img").bounding_box()["width"] > 500
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


@pytest.mark.parametrize("width", [360, 600, 1400])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_function("width => document.querySelector('#plot svg').viewBox.baseVal.width < width", arg=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("number", [0, 1, 500])
def test_page_works_with_any_number_of_runs(browser, tmp_path, number):
    rows = [
        results.ResultRow(
            f"r{n}", {"seed": n, "lr": n % 3}, "done", 100, metrics={"loss": 1.0 + n}, curve=logged(range(1, 101))
        )
        for n in range(number)
    ]
    path = report.write_html(write_sweep(tmp_path, {}), rows)
    page, errors = browser.new_page(), []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"file://{path}")
    assert page.locator("tbody tr").count() == page.locator("path.curve").count() == number
    if number == 500:  # so many runs are colored by an override with few values
        assert page.locator("#legend li").all_inner_texts() == ["lr=0", "lr=1", "lr=2"]
    page.close()
    assert not errors
