"""The report in a real browser: nothing leaves the file, nothing runs, every section shows, narrow, wide and printed.

Needs the driver (playwright, in the dev extra) and a Chromium: RLHF_CHROMIUM names one, or it is on the PATH.
"""

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import write_report

from .made_run import ATTACK, TASK, make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed (pip install -e '.[dev]')")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECTIONS = (
    "outcome", "chain", "corpus", "curves", "evaluation", "gains", "fewshot", "contamination", "wins", "reward",
    "optimisation", "answers", "lineage",
)  # fmt: skip
# what of a section can be seen, its heading apart: characters of text, and charts of some size
SEEN = """section => ({
    heading: section.querySelector('h2').innerText.trim(),
    text: section.innerText.replace(section.querySelector('h2').innerText, '').trim().length,
    charts: [...section.querySelectorAll('svg, img')].map(one => one.getBoundingClientRect()).filter(
        box => box.width > 50 && box.height > 50).length,
})"""


def find_chromium() -> str | None:
    return os.environ.get("RLHF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium: set RLHF_CHROMIUM, or have one of {', '.join(NAMES)} on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run full of attacks, and of two runs beside each other."""
    folder = tmp_path_factory.mktemp("browser")
    first = make_run(folder / "first", description=f"a run. {ATTACK}")
    second = make_run(folder / "second", tasks=(TASK, "another"), description=ATTACK)
    return {"one": write_report(first), "two": write_report(first, second)}


class Visit:
    """A page that was opened, and everything that it did."""

    def __init__(
        self, browser: Any, path: Path, *, width: int, height: int, scheme: str = "light", media: str = "screen"
    ):
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('violates ' + e.violatedDirective))"
        )
        self.page.emulate_media(media=media)
        self.page.goto(path.as_uri())
        self.page.wait_for_load_state("networkidle")


SIZES = [
    {"width": 320, "height": 640},
    {"width": 360, "height": 800},
    {"width": 1280, "height": 900, "scheme": "dark"},
    {"width": 1280, "height": 900},
    {"width": 794, "height": 1123, "media": "print"},
]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['width']}-{size.get('media', size.get('scheme', ''))}")
@pytest.mark.parametrize("which", ["one", "two"])
def test_it_shows_and_asks_for_nothing(browser: Any, pages: dict[str, Path], which: str, size: dict[str, Any]) -> None:
    visit = Visit(browser, pages[which], **size)
    page = visit.page
    others = [url for url in visit.requests if url != pages[which].as_uri() and not url.startswith("data:")]
    assert not others
    assert not visit.said
    assert page.evaluate("window.hacked") is None
    for name in SECTIONS if which == "one" else ("outcome", "differs", "chain", "evaluation", "curves"):
        seen = page.eval_on_selector(f"section#{name}", SEEN)
        assert seen["heading"]
        assert seen["text"] > 50 or seen["charts"] > 0, (name, seen)
    assert page.eval_on_selector_all("svg", "all => all.every(one => one.getBoundingClientRect().width > 50)")
    if size.get("media") != "print":
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    page.close()


def test_charts_have_text_large_enough_on_a_phone(browser: Any, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["one"], width=360, height=800).page
    smallest = page.eval_on_selector_all(
        "svg text",
        "all => Math.min(...all.map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * t.ownerSVGElement.getScreenCTM().a))",
    )
    assert smallest >= 7.0  # CSS pixels, of which a phone has two or three for each
    page.close()


def test_markup_shows_as_text(browser: Any, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["one"], width=1280, height=900).page
    said = page.locator("#answers .said").first.inner_text()
    assert said.startswith('<script>window.hacked=1</script><img src=x onerror="window.hacked=1"> $\\frac{a}{b}$ 你好')
    assert "<script>window.hacked=1</script>" in page.locator("#outcome .lead").inner_text()
    titles = page.eval_on_selector_all("#fewshot svg text", "all => all.map(one => one.textContent)")
    assert any(title.startswith("rules_<b>bold</b>_$x^2$") for title in titles)
    assert page.locator("main script, main img[src=x], main b").count() == 0
    assert page.evaluate("window.hacked") is None
    page.close()


def test_contents_lead_to_the_sections(browser: Any, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["one"], width=1280, height=900).page
    assert page.locator("nav a").count() == len(SECTIONS)
    page.locator("nav a", has_text="Lineage").click()
    assert page.eval_on_selector("#lineage", "one => one.getBoundingClientRect().top < innerHeight")
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(one => Number(one.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.close()


def test_it_prints(browser: Any, pages: dict[str, Path]) -> None:
    page = Visit(browser, pages["one"], width=1280, height=900).page
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
    page.close()
