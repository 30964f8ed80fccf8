"""The book's Sphinx extension, which _config.yml names: executed pages in place of clean ones.

Jupyter Book reads the repository as it stands. What of a page depends on what has been run
here is put in while it is read, so that no second copy of the sources has to be made.
"""

import contextlib
import os
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

from kdlib.book import chapters, claims, demo
from kdlib.book.execute import clean

NOT_RUN = (
    "This chapter has not been executed here, so its code is shown without results. "
    '`make book CHAPTERS="{chapter}"` executes it.'
)
NO_FIGURE = '*Not executed here: `make book CHAPTERS="{chapter}"` draws this figure.*'
ON_SAMPLE = (
    f"MNIST was not available when this page was made: its own results are from "
    f"{chapters.FALLBACK}, a sample of 5,000 digits. The reference runs used all of MNIST."
)
SMOKE = (
    "This page was made with the smoke profile: few digits and very short training runs, which "
    "only check that the code works. Its own results mean little."
)
_MADE = re.compile(r"<!-- (parameters|claims) -->.*?<!-- /\1 -->", re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    # A value of Sphinx's own configuration: if what was executed changes, all pages are read
    # again, since a page may show another one's results.
    app.add_config_value("kdlib_book", {}, "env")
    app.connect("config-inited", _configure)
    app.connect("source-read", _read)
    app.connect("html-page-context", _mend)
    app.connect("build-finished", _write_networks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _configure(app: Sphinx, config: Config) -> None:
    """Look up what has been executed, and give the theme its buttons and banner."""
    top = Path(app.srcdir)
    # The press finds the clone from the working directory, which may be another one here.
    with contextlib.chdir(top):
        ran = chapters.pages(os.environ.get("KDLIB_PROFILE") or None)
        notes = {name: _notes(chapters.made(page)) for name, page in ran.items()}
        config.kdlib_book = {
            "chapters": chapters.chapters(),
            "pages": {name: [str(page), page.stat().st_mtime_ns] for name, page in ran.items()},
            "notes": notes,
            "made": {"parameters": _parameters(), "claims": claims.page()},
        }
    # Jupyter Book's only_build_toc_files takes the clone's path for a pattern, and finds
    # nothing to leave out where that has a "[".
    contents = (top / "_toc.yml").read_text(encoding="utf-8")
    config.include_patterns = [
        f"{file}.*" for file in re.findall(r"(?:file|root): (\S+)", contents)
    ]
    options = config.html_theme_options
    if everywhere := dict.fromkeys(note for page in notes.values() for note in page):
        options["announcement"] = " ".join(everywhere)
    if home := repository(top):
        options |= {"repository_url": home, "repository_branch": "main", "path_to_docs": ""}
        options |= {"use_repository_button": True, "use_issues_button": True}
        options["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}


def _read(app: Sphinx, document: str, source: list[str]) -> None:
    """Put in place of a document's text the one that the page is made from."""
    book, chapter = app.config.kdlib_book, document.removeprefix("book/")
    if chapter not in book["chapters"]:
        source[0] = _MADE.sub(lambda match: book["made"][match[1]], source[0])
        return
    try:
        notebook = _notebook(chapter, source[0], book)
    except chapters.BookError as error:
        raise ExtensionError(f"{chapter}: {error}") from error
    source[0] = nbformat.writes(notebook)  # type: ignore[no-untyped-call]


def _notebook(chapter: str, source: str, book: dict[str, Any]) -> Any:
    """The chapter as executed, or its clean source with a word at the place of each figure."""
    if chapter in book["pages"]:
        notebook = clean(chapters.read_notebook(Path(book["pages"][chapter][0])))
        notes = book["notes"][chapter]
    else:
        notebook = nbformat.reads(source, as_version=4)  # type: ignore[no-untyped-call]
        notes = [NOT_RUN]
        # An output, not a cell: so the figure keeps its number, its caption and its label,
        # and what refers to it finds it.
        empty = {"text/markdown": NO_FIGURE.format(chapter=chapter)}
        for cell in notebook.cells:
            if "figure" in cell.metadata.get("mystnb", {}):
                cell.outputs = [nbformat.v4.new_output("display_data", empty)]  # type: ignore[no-untyped-call]
    for note in notes:
        text = f":::{{warning}}\n{note.format(chapter=chapter)}\n:::"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(text))  # type: ignore[no-untyped-call]
    return notebook


def _notes(about: dict[str, Any]) -> list[str]:
    """What a reader must know of how a page was made, before reading its figures."""
    smoke, sample = about.get("profile") == "smoke", about.get("fallback")
    return [SMOKE] * smoke + [ON_SAMPLE] * bool(sample)


def _parameters() -> str:
    """One table per chapter of its parameters: name, default, and the comment beside it."""
    parts = []
    for chapter in chapters.chapters():
        parts += [f"{{doc}}`{chapter}`", "", "| parameter | default | |", "|---|---|---|"]
        for name, parameter in chapters.parameters(chapter).items():
            cells = (f"`{name}`", f"`{parameter.text}`", parameter.help)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("")
    return "\n".join(parts)


def _mend(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """docutils marks a bibliography as a list without items, which screen readers trip over."""
    if "body" in context:
        fault = '<div role="list" class="citation-list">'
        context["body"] = context["body"].replace(fault, '<div class="citation-list">')


def _write_networks(app: Sphinx, error: Exception | None) -> None:
    """Give the page on which a reader draws a digit its networks."""
    if error is None and app.builder.format == "html":
        place = Path(app.outdir) / "_static/draw-weights.js"
        place.write_text(demo.script(), encoding="utf-8")


def repository(top: Path) -> str:
    """The repository's address, from CI's variables or pyproject.toml; "" without a home."""
    if os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        return f"{server}/{os.environ['GITHUB_REPOSITORY']}"
    project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url: str = project["urls"]["Repository"]
    host = urlsplit(url).hostname or ""
    return "" if host.split(".")[-2:-1] == ["example"] else url
