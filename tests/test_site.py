"""The rendered site in a real browser: offline, without errors, readable, operable."""

import functools
import html
import http.server
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from conftest import Clone, copy_of_the_book, give_up, offline
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from kdlib.book import chapters as book
from kdlib.book import site, sphinx_ext

pytestmark = pytest.mark.browser
SIZES = {"desktop": (1280, 900), "phone": (375, 812)}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


@pytest.fixture(scope="module")
def address(site: Clone) -> Iterator[str]:
    """The site on a plain file server of this machine."""
    handler = functools.partial(Quiet, directory=str(site.html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium of this system: KDLIB_CHROMIUM, else one on the PATH."""
    found = os.environ.get("KDLIB_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        give_up("needs a Chromium: install one, or name it with KDLIB_CHROMIUM")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = playwright.chromium.launch(executable_path=found, args=options)
        yield running
        running.close()


def pages(folder: Path) -> list[str]:
    """The pages' addresses within the site."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.html"))]
    return [name for name in names if not name.startswith("_static/")]


class Watched:
    """A page of the site, and all that went wrong while it was shown."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.page = context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("request", lambda r: self._request(r.url, address))
        self.page.on("response", lambda r: self._response(r.status, r.url))

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"console: {message.text}")

    def _request(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.wrong.append(f"another host: {url}")

    def _response(self, status: int, url: str) -> None:
        if status >= 400:
            self.wrong.append(f"{status}: {url}")

    def show(self, url: str) -> Page:
        self.page.goto(url)
        self.page.wait_for_load_state("networkidle")
        return self.page


def open_context(browser: Browser, size: str = "desktop", scheme: Any = "light") -> BrowserContext:
    width, height = SIZES[size]
    return browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)


def serious(page: Page) -> list[tuple[str, list[str]]]:
    """What axe-core finds that is serious or worse, and where."""
    quick = {"preload": False, "resultTypes": ["violations"]}
    found = Axe().run(page, options=quick).response["violations"]
    return [
        (fault["id"], [node["html"][:200] for node in fault["nodes"]][:5])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


# --- the pages that the chain has made ---------------------------------------------------


def test_the_index_leads_to_the_book(site: Clone, address: str, browser: Browser) -> None:
    with open_context(browser) as context:
        page = Watched(context, address).show(address)
        page.wait_for_url("**/book/intro.html")
        assert page.locator("article h1").count() == 1
        listed = page.locator(".bd-sidebar a").evaluate_all("all => all.map(a => a.href)")
        for chapter in site.chapters:
            assert f"{address}book/{chapter}.html" in listed


PICTURES = """() => {
    const all = [...document.images].filter(image => !image.closest("noscript"));
    all.forEach(image => { image.loading = "eager" });
    return Promise.all(all.map(image => image.decode().then(() => "", () => "is broken")
        .then(wrong => wrong || (image.alt ? "" : "has no text"))
        .then(wrong => wrong && image.getAttribute("src") + " " + wrong)))
}"""


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_every_page_is_whole_quiet_and_fits(
    size: str, scheme: str, site: Clone, address: str, browser: Browser
) -> None:
    """No error, no other host, all pictures, no sideways scrolling, nothing that axe finds."""
    wrong: dict[str, list[Any]] = {}
    with open_context(browser, size, scheme) as context:
        for name in pages(site.html):
            watched = Watched(context, address)
            page = watched.show(address + name)
            if page.locator("html").get_attribute("data-theme") != scheme:
                watched.wrong.append(f"not {scheme}")
            watched.wrong += filter(None, page.evaluate(PICTURES))
            width = page.evaluate("document.documentElement.scrollWidth")
            if width > SIZES[size][0]:
                watched.wrong.append(f"{width} pixels wide")
            found = [*watched.wrong, *serious(page)]  # axe asks for stylesheets on its own
            if found:
                wrong[name] = found
            page.close()
    assert wrong == {}


def test_formulas_are_set_without_a_network(site: Clone, address: str, browser: Browser) -> None:
    formulas = 0
    with open_context(browser) as context:
        for chapter in site.chapters:
            page = Watched(context, address).show(f"{address}book/{chapter}.html")
            written = page.locator(".math").count()
            if written:
                page.wait_for_function("MathJax.startup.promise.then(() => true)")
            assert page.locator(".math mjx-container").count() >= written, chapter
            assert page.locator("mjx-merror").count() == 0, chapter
            formulas += written
        assert formulas > 0


class Anchors(HTMLParser):
    """The links of a page, and the places in it that links can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.places |= {values[key] or "" for key in ("id", "name") if key in values}
        if tag in ("a", "link") and values.get("href"):
            self.links.append(values["href"] or "")


def test_no_link_is_broken(site: Clone) -> None:
    parsed = {
        name: Anchors((site.html / name).read_text(encoding="utf-8")) for name in pages(site.html)
    }
    broken = []
    for name, page in parsed.items():
        for link in page.links:
            target, place = urldefrag(urljoin(f"http:///{name}", link))
            if urlsplit(target).scheme != "http" or urlsplit(target).netloc:
                continue
            path, place = unquote(urlsplit(target).path).lstrip("/"), unquote(place)
            known = parsed[path].places if path in parsed else {place}
            if not (site.html / path).is_file() or place not in known:
                broken.append((name, link))
    assert broken == []


def test_the_slider_moves_the_bars_without_a_kernel(
    site: Clone, address: str, browser: Browser
) -> None:
    """With the mouse and with the keyboard; and the bars are those of a distribution."""
    with open_context(browser) as context:
        watched = Watched(context, address)
        page = watched.show(f"{address}book/03_temperature.html")
        widget = page.locator("figure.kd-widget").first
        slider = widget.locator("input[type=range]").first
        slider.scroll_into_view_if_needed()
        bars = widget.locator(".kd-bars i")

        def heights() -> list[float]:
            measured = bars.evaluate_all("all => all.map(e => e.getBoundingClientRect().height)")
            return list(measured)

        seen = [heights()]
        assert len(seen[0]) >= 10
        slider.focus()
        for key in ("ArrowRight", "End", "Home"):
            page.keyboard.press(key)
            assert heights() != seen[-1], f"{key} moved nothing"
            seen.append(heights())
        spread = [max(row[:10]) - min(row[:10]) for row in seen]
        assert spread[2] < spread[0] <= spread[3]  # flat at the hot end, sharp at the cold one
        box = slider.bounding_box()
        assert box
        page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2)
        assert heights() != seen[-1], "the mouse moved nothing"
        assert watched.wrong == []


def test_the_claims_are_filtered_by_keyboard(address: str, browser: Browser) -> None:
    with open_context(browser) as context:
        page = Watched(context, address).show(f"{address}book/claims.html")
        rows = page.locator("table.kd-claims tbody tr")
        every = rows.count()
        assert page.get_by_role("status").inner_text() == f"{every} of {every} claims"
        page.get_by_label("Source").focus()
        page.keyboard.type("folk")
        shown = rows.locator("visible=true")
        assert shown.locator("td:nth-child(2)").all_inner_texts() == ["folklore"] * shown.count()
        assert 0 < shown.count() < every
        assert page.get_by_role("status").inner_text() == f"{shown.count()} of {every} claims"


def test_the_search_finds_a_word(address: str, browser: Browser) -> None:
    with open_context(browser) as context:
        watched = Watched(context, address)
        page = watched.show(f"{address}search.html?q=temperature")
        page.locator("#search-results li a").first.wait_for()
        assert watched.wrong == []


def test_smoke_says_on_every_page_that_it_is_smoke(site: Clone) -> None:
    for name in pages(site.html):
        if name != "index.html":
            assert "smoke profile" in (site.html / name).read_text(encoding="utf-8"), name


def test_the_page_on_running_again_lists_every_parameter(site: Clone) -> None:
    text = (site.html / "book/rerun.html").read_text(encoding="utf-8")
    table = re.sub(r"<[^>]+>", " ", text)
    for chapter in site.chapters:
        cells = site.page(chapter).cells
        (cell,) = (c for c in cells if c.metadata.get("tags") == ["parameters"])
        for line in cell.source.splitlines():
            assert re.search(rf"\b{line.split(' = ')[0]}\b", table), f"{chapter}: {line}"


def test_every_chapter_ends_with_what_it_ran_on(site: Clone) -> None:
    for chapter in site.chapters:
        text = (site.html / f"book/{chapter}.html").read_text(encoding="utf-8")
        cells = re.findall(r"<t[dh][^>]*>\s*<p>(.*?)</p>", text, flags=re.DOTALL)
        for key in ("profile", "dataset", "device", "seeds", "versions", "date"):
            assert key in cells, f"{chapter} lacks {key}"


def test_the_site_is_not_needlessly_large(site: Clone) -> None:
    size = sum(path.stat().st_size for path in site.html.rglob("*") if path.is_file())
    assert size < 40 * 2**20


# --- pages that were not run, or on other data -------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, chain: Clone) -> Clone:
    """A book with one page, made on the sample for want of MNIST; in a repository with a home.

    Its path and its locale are such as users have had.
    """
    place = tmp_path_factory.mktemp("bare") / "a [clone] of {1} #2 %20 é"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    home = {"GITHUB_REPOSITORY": "someone/the-book"}
    clone = copy_of_the_book(place, **offline(place) | home | ascii_only)
    page = chain.page(chain.chapters[0])
    page.metadata["kdlib"] |= {"profile": "quick", "fallback": True}
    put(page, clone, chain.chapters[0])
    result = clone.kdlib("build")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not executed yet" in result.stdout
    return clone


def put(page: Any, clone: Clone, chapter: str) -> None:
    """Put an executed page into a clone."""
    executed = clone.root / "_build/executed/quick" / f"{chapter}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    page.metadata["kdlib"].pop("content", None)  # changed here, after it was put in place
    nbformat.write(page, executed)


def test_a_book_that_was_hardly_run_is_built_and_says_so(bare: Clone) -> None:
    first, *others = bare.chapters
    assert "Not executed here" not in words(bare, first)
    for chapter in others:
        text = words(bare, chapter)
        assert "has not been executed here" in text
        assert "check_parameters" in text


def words(clone: Clone, chapter: str) -> str:
    """A page's text."""
    page = (clone.html / f"book/{chapter}.html").read_text(encoding="utf-8")
    return html.unescape(re.sub("<[^>]+>", "", page))


def test_jupyter_book_alone_builds_an_empty_clone_then_what_has_been_executed(
    chain: Clone, tmp_path: Path
) -> None:
    clone = copy_of_the_book(tmp_path / "empty", **offline(tmp_path))

    def build() -> None:
        result = subprocess.run(
            [*site.COMMAND, ".", *site.STRICT],
            cwd=clone.root,
            env={**os.environ, **clone.environment},
            capture_output=True,
            encoding="utf-8",
        )
        assert result.returncode == 0, result.stderr

    build()
    captions = {}
    for chapter in clone.chapters:
        source = nbformat.read(clone.root / "book" / f"{chapter}.ipynb", as_version=4)
        figures = [cell.metadata.get("mystnb", {}).get("figure") for cell in source.cells]
        captions[chapter] = len(list(filter(None, figures)))
        how = f'Not executed here: make book CHAPTERS="{chapter}" draws this figure.'
        assert words(clone, chapter).count(how) == captions[chapter]
    assert sum(captions.values()) > len(captions)

    chapter = chain.chapters[1]
    put(chain.page(chapter), clone, chapter)
    build()
    assert "Not executed here" not in words(clone, chapter)
    assert "Not executed here" in words(clone, chain.chapters[2])


def test_every_page_says_that_the_sample_stands_for_mnist(bare: Clone) -> None:
    for name in pages(bare.html):
        if name != "index.html":
            assert "MNIST was not available" in (bare.html / name).read_text(encoding="utf-8"), name


def test_launch_buttons_lead_to_the_clean_source_of_a_real_home(bare: Clone, site: Clone) -> None:
    for chapter in bare.chapters:
        button = (
            "https://colab.research.google.com/github/someone/the-book/blob/main/"
            f"book/{chapter}.ipynb"
        )
        assert button in (bare.html / f"book/{chapter}.html").read_text(encoding="utf-8")
        assert "colab.research" not in (site.html / f"book/{chapter}.html").read_text(
            encoding="utf-8"
        )


# --- what is never published -------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: Clone) -> Clone:
    """A book of one executed chapter, as working directory."""
    clone = copy_of_the_book(tmp_path / "small")
    put(chain.page(chain.chapters[0]), clone, chain.chapters[0])
    old = clone.root / "_build/html"
    old.mkdir()
    (old / "index.html").write_text("the old site")
    monkeypatch.chdir(clone.root)
    return clone


def test_a_page_with_an_error_is_never_published(small: Clone) -> None:
    ((chapter, path),) = book.pages().items()
    page = nbformat.read(path, as_version=4)
    (cell, *_) = (cell for cell in page.cells if cell.cell_type == "code")
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    cell.outputs = [nbformat.from_dict(error)]
    nbformat.write(page, path)
    with pytest.raises(book.BookError, match=f"{chapter}: cell .* holds an error"):
        site.build()
    assert (small.html / "index.html").read_text(encoding="utf-8") == "the old site"


def test_a_warning_keeps_the_old_site_and_is_told(small: Clone) -> None:
    config = yaml.safe_load((small.root / "_config.yml").read_text(encoding="utf-8"))
    config["sphinx"]["config"]["no_such_setting"] = 1
    (small.root / "_config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(book.BookError, match="no_such_setting") as told:
        site.build()
    assert "\x1b" not in str(told.value)
    assert (small.root / "_build/build.log").is_file()
    assert (small.html / "index.html").read_text(encoding="utf-8") == "the old site"
    assert not list((small.root / "_build").glob(".run-*"))


def test_the_repositorys_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    project, address = tmp_path / "pyproject.toml", '[project.urls]\nRepository = "{}"\n'
    for home in ("https://example.org/book", "https://example.com/book"):
        project.write_text(address.format(home))
        assert sphinx_ext.repository(tmp_path) == ""
    project.write_text(address.format("https://github.com/someone/book"))
    assert sphinx_ext.repository(tmp_path) == "https://github.com/someone/book"
    monkeypatch.setenv("GITHUB_REPOSITORY", "a/b")
    assert sphinx_ext.repository(tmp_path) == "https://github.com/a/b"
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://code.test")
    assert sphinx_ext.repository(tmp_path) == "https://code.test/a/b"
