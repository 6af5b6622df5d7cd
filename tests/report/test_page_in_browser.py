"""The page in a real browser: no errors or requests, correct numbers, legends that hide curves, sortable tables."""

import json
import re
import shutil
import time
import zlib

import pytest
from playwright.sync_api import sync_playwright

from stages.report import figures
from tests.conftest import invoke
from tests.report.grid import write_grid

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")

METHODS = ["fedavg", "fedprox", "moon", "scaffold", "feddifrc"]
PARTITIONS = ["dir005", "dir02", "dir05", "nid2"]
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = write_grid(tmp_path_factory.mktemp("grid"), METHODS, PARTITIONS, SEEDS, num_rounds=50)
    assert invoke(root, "report").exit_code == 0
    return root


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(project, browser):
    page = browser.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url) if "index.html" not in request.url else None)
    started = time.perf_counter()
    page.goto((project / "report" / "index.html").as_uri(), wait_until="load")
    page.seconds = time.perf_counter() - started
    yield page
    assert page.complaints == ["data:,"] or page.complaints == []
    page.close()


def test_page_opens_fast_and_is_small(project, page):
    assert page.seconds < 2
    assert (project / "report" / "index.html").stat().st_size < 5e6


def test_page_shows_the_numbers_of_the_runs(project, page):
    cells = page.locator("#table-accuracy tbody tr")
    for row, method in enumerate(METHODS):
        for column, partition in enumerate(PARTITIONS, start=1):
            accuracies = [
                json.loads((project / "results" / f"{method}-{partition}" / f"s{s}" / "metrics.json").read_text())
                for s in SEEDS
            ]
            values = [100 * metrics["mean_last5_accuracy"] for metrics in accuracies]
            mean = sum(values) / 3
            std = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
            shown = cells.nth(row).locator("td").nth(column).inner_text()
            assert re.match(rf"{mean:.2f} ± {std:.2f}", shown)
    for row in range(3):
        name, shown, best = page.locator("#table-provenance tbody tr").nth(row).locator("td").all_inner_texts()[:3]
        folder = project / "results" / "/".join(name.rsplit("-", 1))
        metrics, details = (json.loads((folder / f"{file}.json").read_text()) for file in ("metrics", "details"))
        assert (shown, best) == (f"{100 * metrics['mean_last5_accuracy']:.2f}", f"{100 * details['best_accuracy']:.2f}")


def test_clicking_the_legend_hides_and_shows_a_curve(page):
    curve = page.locator('[id$="-curve.accuracy-dir02.moon"]')
    other = page.locator('[id$="-curve.accuracy-dir02.fedavg"]')
    button = page.locator('.legend button[data-method="moon"]').first
    assert curve.is_visible() and other.is_visible()
    button.click()
    assert not curve.is_visible() and other.is_visible()
    assert not page.locator('[id$="-bandcurve.accuracy-nid2.moon"]').is_visible()
    button.click()
    assert curve.is_visible()


def test_clicking_a_heading_sorts_the_table(page):
    def column() -> list[float]:
        texts = page.locator("#table-accuracy tbody tr td:nth-child(3)").all_inner_texts()
        return [float(text.split()[0]) for text in texts]

    heading = page.locator("#table-accuracy th:nth-child(3) button")
    heading.click()
    assert column() == sorted(column(), reverse=True)
    heading.click()
    assert column() == sorted(column())
    page.locator("#table-communication th:nth-child(2) button").click()  # fewer bytes are better
    first = page.locator("#table-communication th:nth-child(2)")
    assert first.get_attribute("aria-sort") == "ascending"


def test_no_two_elements_share_an_id(page):
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) > 100 and len(set(ids)) == len(ids)


def test_methods_have_distinct_line_styles_which_a_printed_legend_shows(page):
    methods = [f"method {number}" for number in range(30)]
    assert len(set(figures.pens(methods).values())) == 30
    page.evaluate("document.body.replaceChildren(document.querySelector('.legend'))")
    streams = re.findall(rb"stream\r?\n(.*?)endstream", page.pdf(), re.S)
    drawn = b"".join(zlib.decompressobj().decompress(stream) for stream in streams if stream[:1] == b"x")
    used = {tuple(round(255 * float(part)) for part in rgb.split()) for rgb in re.findall(rb"([\d. ]+) RG", drawn)}
    wanted = {tuple(bytes.fromhex(pen.colour[1:])) for pen in figures.pens(METHODS).values()}
    assert wanted <= used


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_in_light_and_dark_mode(project, browser, scheme):
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.goto((project / "report" / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    labels = page.evaluate("[...document.querySelectorAll('figure svg text')].map((t) => getComputedStyle(t).fill)")
    assert set(labels) == {ink}
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (scheme == "light")
    page.close()
