"""The page in a real browser: it renders, works by hand and keyboard, asks nobody for anything, and needs no script."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_up_runs import RATES, write_run, write_sweep

from secvec.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser in PATH ({', '.join(NAMES)}): apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two reports: a comparison with curves and answers, and a sweep that does not fit side by side."""
    few, many = tmp_path_factory.mktemp("few"), tmp_path_factory.mktemp("many")
    for defense in RATES:
        write_run(few, defense, 0)
        write_run(few, defense, 1)
    write_run(few / "broken", "none", 2, status="failed", error="OutOfMemoryError")
    others = ("leak_rate", "over_refusal_rate", "retained_accuracy", "coherence_rate", "kl_to_base", "perplexity",
              "answer_perplexity", "desired_rate", "behavior_loss")  # fmt: skip
    write_sweep(many, {"optimizer.lr": [1e-4, 1e-3, 1e-2], "vector.r": [1, 2, 4]}, seeds=2,
                **{name: lambda *_: 0.5 for name in others})  # fmt: skip
    return {"few": write_report([few]), "many": write_report([many])}


@pytest.fixture
def opened(browser: playwright.Browser) -> Iterator[Callable[..., playwright.Page]]:
    """`opened(path, width=..., ...)`: the page; ends the test when it complained or asked for anything else."""
    complaints: list[str] = []
    contexts = []

    def go(path: Path, width: int = 1280, **given: object) -> playwright.Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **given)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        asked = path.as_uri()

        def route(request: playwright.Route) -> None:
            if request.request.url == asked:
                request.continue_()
            else:
                complaints.append(f"asked for {request.request.url}")
                request.abort()

        page.route("**/*", route)
        page.goto(asked)
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def test_complaints_and_requests_are_seen(browser: playwright.Browser, tmp_path: Path) -> None:
    """The check itself, on a page with a broken script that asks for a picture."""
    page = browser.new_page()
    seen: list[str] = []
    page.on("pageerror", lambda error: seen.append("error"))
    page.route("**/*", lambda route: seen.append(route.request.url) or route.continue_())
    path = tmp_path / "bad.html"
    path.write_text("<script>nothing.here</script><img src='absent.png'>")
    page.goto(path.as_uri())
    assert "error" in seen and (tmp_path / "absent.png").as_uri() in seen
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["few", "many"])
def test_the_page_fits_its_window(pages: dict[str, Path], opened: Callable, name: str, width: int) -> None:
    page = opened(pages[name], width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.locator("figure svg")
    assert drawn.count() >= 4
    for index in range(drawn.count()):
        box = drawn.nth(index).bounding_box()
        assert box is not None and box["width"] > 200 and box["height"] > 80 and box["x"] + box["width"] <= width


def test_dark_is_dark_and_print_is_light(pages: dict[str, Path], opened: Callable) -> None:
    def brightness(page: playwright.Page, what: str, property: str) -> float:
        color = page.evaluate(f"getComputedStyle(document.querySelector('{what}')).{property}")
        return sum(map(int, color[color.index("(") + 1 : -1].split(",")[:3]))

    light, dark = (opened(pages["few"], color_scheme=scheme) for scheme in ("light", "dark"))
    for what in ("body", "figure", ".scroll"):
        assert brightness(dark, what, "backgroundColor") < 150 < 600 < brightness(light, what, "backgroundColor")
    for what in ("body", "caption", "figure svg text"):
        of = "fill" if "text" in what else "color"
        assert brightness(dark, what, of) > 450 > 320 > brightness(light, what, of), what
    dark.emulate_media(media="print", color_scheme="dark")
    assert brightness(dark, "body", "backgroundColor") > 700 and brightness(dark, "body", "color") < 250
    assert not dark.locator(".filter").first.is_visible() and dark.locator("table.runs").is_visible()


def test_tables_fit_on_printed_paper(pages: dict[str, Path], opened: Callable) -> None:
    for page in pages.values():
        shown = opened(page, width=1030)  # A4 landscape without its margins, 96 px to the inch
        shown.emulate_media(media="print")
        widths = shown.evaluate(
            "[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right)"
        )
        assert widths and max(widths) <= 1030


def test_the_runs_are_filtered_and_sorted(pages: dict[str, Path], opened: Callable) -> None:
    page = opened(pages["few"])
    rows = page.locator("table.runs tbody tr")
    assert rows.count() == 5
    filter_box = page.locator(".filter input").last
    filter_box.fill("SECURITY completed")
    assert rows.locator("visible=true").count() == 2 and "2 of 5 rows" in page.locator(".filter").last.inner_text()
    filter_box.fill("")

    def column(index: int) -> list[str]:
        return [
            row.split("\n")[0].strip() for row in page.locator(f"table.runs td:nth-of-type({index})").all_inner_texts()
        ]

    head = page.locator("table.runs thead th", has_text="Behavior rate")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rising = column(4)
    assert rising == sorted(rising, key=float) and len(set(rising)) > 3
    head.locator("button").press("Enter")  # by keyboard
    assert head.get_attribute("aria-sort") == "descending" and column(4) == rising[::-1]
    page.locator("table.runs thead th", has_text="Seed").locator("button").click()
    assert page.locator("table.runs [aria-sort]").count() == 1 and column(2) == ["0", "0", "1", "1", "2"]


def test_the_keyboard_reaches_tables_and_links_and_shows_where_it_is(pages: dict[str, Path], opened: Callable) -> None:
    page = opened(pages["few"], 390)
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert reached[0] == "skip" and "A" in reached and "scroll" in reached
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("name", ["few", "many"])
def test_nothing_is_missing_without_script(pages: dict[str, Path], opened: Callable, name: str) -> None:
    plain, full = opened(pages[name], java_script_enabled=False), opened(pages[name])
    assert plain.locator(".filter").count() == 0 and plain.locator("thead button").count() == 0  # no dead controls
    for what in ("table", "tbody tr", "figure svg"):
        assert plain.locator(what).count() == full.locator(what).count() > 2
        assert plain.locator(what).locator("visible=true").count() == plain.locator(what).count()


def test_points_have_titles_to_hover_over(pages: dict[str, Path], opened: Callable) -> None:
    page = opened(pages["many"])
    title = page.locator("figure svg g:has(> title)").first
    box = title.bounding_box()
    assert box is not None
    over = page.evaluate(
        "([x, y]) => { window.scrollTo(0, y - 300); const at = document.elementFromPoint(x, y - window.scrollY);"
        "return at.closest('g:has(> title)')?.querySelector('title').textContent }",
        [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2],
    )
    assert over is not None and "behavior rate" in over
