"""The site: a staging copy of the book with its executed pages, rendered by Jupyter Book."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import yaml

from kdlib.book.chapters import (
    FALLBACK,
    BookError,
    chapters,
    defaults,
    made,
    pages,
    read_notebook,
    root,
    write_notebook,
)
from kdlib.book.execute import clean

NOT_RUN = (
    "This chapter has not been run yet: its code stands here without results. "
    '`make book CHAPTERS="{chapter}"` executes it.'
)
ON_SAMPLE = (
    f"MNIST could not be had when this was made: its figures are from {FALLBACK}, "
    "a sample of 5,000 digits, and are not those of the paper's data."
)
SMOKE = (
    "This was made at the smoke profile: few digits and very short trainings, to see that the "
    "code runs. Its figures mean little."
)
GLUED = re.compile(r"\{glue:[a-z:]*\}`([^`]+)`")
TO_COME = re.compile(r"\{doc\}`(\d\d)(_\w+)`")
REFERRED = re.compile(r"\{(?:num)?ref\}`(?:([^`<]*?)\s*<)?([^`<>]+)>?`")


def build(profile: str | None = None) -> Path:
    """Render the site into _build/html; its index page.

    The old site stays until the new one is whole. Raises BookError when a page holds an error
    or Jupyter Book complains of anything.
    """
    top = root()
    work = top / "_build"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="staging-") as folder:
        staging, output = Path(folder) / "source", Path(folder) / "output"
        _stage(top, staging, profile)
        finished = subprocess.run(
            [*_JUPYTER_BOOK, "build", str(staging), "--path-output", str(output), *_STRICT],
            capture_output=True,
            text=True,
        )
        fresh = output / "_build" / "html"
        if finished.returncode or not (fresh / "index.html").is_file():
            log = work / "build.log"
            log.write_text(finished.stdout + finished.stderr, encoding="utf-8")
            said = re.sub(r"\x1b\[[\d;]*m", "", finished.stderr).replace(f"{staging}/", "")
            wrong = [x for x in said.splitlines() if re.search("WARNING|ERROR|Error", x)]
            raise BookError("\n".join(["the site could not be built:", *wrong[:20], f"see {log}"]))
        _mend(fresh)
        _swap(fresh, work / "html")
    return work / "html" / "index.html"


_JUPYTER_BOOK = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
_STRICT = ["-W", "--keep-going", "-n"]


def summary(profile: str | None = None) -> list[str]:
    """A line a chapter: what was executed, at which profile, on which data, how long."""
    ran = pages(profile)
    lines = []
    for chapter in chapters():
        if chapter not in ran:
            lines.append(f"  {chapter:28} not run yet")
            continue
        about = made(ran[chapter])
        lines.append(
            f"  {chapter:28} {about['profile']:6} {about['dataset']:14} "
            f"{about['seconds']:6.0f} s  {about['date']}"
        )
    return lines


def _mend(html: Path) -> None:
    """Take out what browsers and screen readers trip over, page by page.

    Bibliographies are lists without items, and the first page has no icon.
    """
    icon = '<!doctype html><title>Book</title><link rel="icon" href="_static/favicon.svg" />'
    mends = {
        '<div role="list" class="citation-list">': "<div>",
        '<meta http-equiv="Refresh"': f'{icon}\n<meta http-equiv="Refresh"',
    }
    for page in html.rglob("*.html"):
        text = mended = page.read_text(encoding="utf-8")
        for fault, mend in mends.items():
            mended = mended.replace(fault, mend)
        if mended != text:
            page.write_text(mended, encoding="utf-8")


def _swap(fresh: Path, place: Path) -> None:
    """Put the new site where the old one is."""
    old = place.with_name(f".old-{place.name}")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(fresh, place)
    shutil.rmtree(old, ignore_errors=True)


def _stage(top: Path, staging: Path, profile: str | None) -> None:
    """Copy what Jupyter Book reads, with the executed pages in place of the clean ones."""
    left_out = shutil.ignore_patterns("profiles", ".*", "*.toml", "reference")
    shutil.copytree(top / "book", staging / "book", ignore=left_out)
    _copy_mathjax(staging / "book" / "_static" / "mathjax")
    shutil.copy(top / "_toc.yml", staging)
    ran = pages(profile)
    for chapter in chapters():
        page = staging / "book" / f"{chapter}.ipynb"
        notebook = clean(read_notebook(ran.get(chapter, page)))
        notes = _notes(made(ran[chapter])) if chapter in ran else [NOT_RUN]
        for note in notes:
            text = f":::{{warning}}\n{note.format(chapter=chapter)}\n:::"
            notebook.cells.insert(1, _markdown(text))
        write_notebook(notebook, page)
    _fill_in(staging / "book", set(ran))
    rerun = staging / "book" / "rerun.md"
    if rerun.is_file():
        rerun.write_text(
            rerun.read_text(encoding="utf-8").replace("<!-- parameters -->", _parameters())
        )
    config = yaml.safe_load((top / "_config.yml").read_text(encoding="utf-8"))
    home = repository(top)
    if home:
        config["repository"] = {"url": home, "path_to_book": "", "branch": "main"}
        config["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
        config["html"] |= {"use_repository_button": True, "use_issues_button": True}
    everywhere = dict.fromkeys(note for page in ran.values() for note in _notes(made(page)))
    if everywhere:
        config["html"]["announcement"] = " ".join(everywhere)
    (staging / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _notes(about: dict[str, Any]) -> list[str]:
    """What a reader must know of how a page was made, before reading its figures."""
    smoke, sample = about.get("profile") == "smoke", about.get("fallback")
    return [SMOKE] * smoke + [ON_SAMPLE] * bool(sample)


def _copy_mathjax(place: Path) -> None:
    """Put the part of MathJax that the pages load beside them, so that they need no network."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no MathJax", name="sphinx-mathjax-offline")
    source = Path(package.origin).parent / "static" / "mathjax"
    for part in ("output/chtml/fonts", "input/tex/extensions"):
        shutil.copytree(source / part, place / part)
    shutil.copy(source / "tex-chtml.js", place)


def _parameters() -> str:
    """A table a chapter of its parameters: name, default, and the comment beside it."""
    parts = []
    for chapter in chapters():
        parts += [f"{{doc}}`{chapter}`", "", "| parameter | default | |", "|---|---|---|"]
        comments = _comments(chapter)
        for name, value in defaults(chapter).items():
            parts.append(f"| `{name}` | `{value!r}` | {comments.get(name, '')} |")
        parts.append("")
    return "\n".join(parts)


def _comments(chapter: str) -> dict[str, str]:
    """What the parameters cell says of each parameter."""
    notebook = read_notebook(root() / "book" / f"{chapter}.ipynb")
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    lines = [line for cell in cells for line in cell.source.splitlines() if "=" in line]
    found = {line.split("=")[0].strip(): line.partition("#")[2].strip() for line in lines}
    return {name: comment.replace("|", "\\|") for name, comment in found.items()}


def _markdown(text: str) -> Any:
    return nbformat.v4.new_markdown_cell(text)  # type: ignore[no-untyped-call]


def repository(top: Path) -> str:
    """The repository's address, from CI's variables or pyproject.toml; "" without a home."""
    if os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        return f"{server}/{os.environ['GITHUB_REPOSITORY']}"
    project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url: str = project["urls"]["Repository"]
    host = urlsplit(url).hostname or ""
    return "" if host.split(".")[-2:-1] == ["example"] else url


def _fill_in(book: Path, ran: set[str]) -> None:
    """Put a dash where the text names a figure that a page has not, for want of a run.

    A chapter that is not written yet is named by its number.
    """
    glued: dict[str, set[str]] = {}
    pictures: set[str] = set()  # of pages that have not been run
    notebooks = {page.name: read_notebook(page) for page in book.glob("*.ipynb")}
    for name, notebook in notebooks.items():
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        found = {o.get("metadata", {}).get("scrapbook", {}).get("name") for o in outputs}
        glued[name] = {key.removeprefix("application/papermill.record/") for key in found if key}
        if Path(name).stem not in ran:
            figures = (cell.metadata.get("mystnb", {}).get("figure", {}) for cell in notebook.cells)
            pictures |= {figure["name"] for figure in figures if "name" in figure}

    def fill(text: str, page: str) -> str:
        def figure(match: re.Match[str]) -> str:
            source, _, key = match[1].rpartition("::")
            return match[0] if key.split(":")[0] in glued.get(source or page, set()) else "–"

        def picture(match: re.Match[str]) -> str:
            return match[1] or "the figure" if match[2].strip() in pictures else match[0]

        def document(match: re.Match[str]) -> str:
            there = f"{match[1]}{match[2]}.ipynb" in notebooks
            return match[0] if there else f"chapter {int(match[1])} (still to come)"

        return TO_COME.sub(document, REFERRED.sub(picture, GLUED.sub(figure, text)))

    for page in book.glob("*.md"):
        page.write_text(fill(page.read_text(encoding="utf-8"), page.name), encoding="utf-8")
    for name, notebook in notebooks.items():
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell["source"] = fill(cell.source, name)
        write_notebook(notebook, book / name)
