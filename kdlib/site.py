"""The site: a staging copy of the book with its executed pages, rendered by Jupyter Book."""

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

from kdlib.book import (
    FALLBACK,
    BookError,
    chapters,
    clean,
    made,
    pages,
    read_notebook,
    root,
    write_notebook,
)

NOT_RUN = """\
:::{{warning}}
This chapter has not been run yet: its code stands here without results.
`make book CHAPTERS="{chapter}"` executes it.
:::
"""
BANNER = (
    f"MNIST could not be had when this book was made: its figures are from {FALLBACK}, "
    "a sample of 5,000 digits, and are not those of the paper's data."
)
GLUED = re.compile(r"\{glue:[a-z:]*\}`([^`]+)`")


def build() -> Path:
    """Render the site into _build/html; its index page.

    The old site stays until the new one is whole. Raises BookError when a page holds an error
    or Jupyter Book complains of anything.
    """
    top = root()
    work = top / "_build"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="staging-") as folder:
        staging, output = Path(folder) / "source", Path(folder) / "output"
        _stage(top, staging)
        command = ["jupyter-book", "build", str(staging), "--path-output", str(output)]
        finished = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:], *_STRICT],
            capture_output=True,
            text=True,
        )
        fresh = output / "_build" / "html"
        if finished.returncode or not (fresh / "index.html").is_file():
            log = work / "build.log"
            log.write_text(finished.stdout + finished.stderr)
            wrong = [
                line.replace(str(staging) + "/", "")
                for line in finished.stderr.splitlines()
                if "WARNING" in line or "ERROR" in line
            ]
            raise BookError("\n".join(["the site could not be built:", *wrong[:20], f"see {log}"]))
        _swap(fresh, work / "html")
    return work / "html" / "index.html"


_STRICT = ["-W", "--keep-going", "-n"]


def summary() -> list[str]:
    """A line a chapter: what was executed, at which profile, on which data, how long."""
    ran = pages()
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


def _swap(fresh: Path, place: Path) -> None:
    """Put the new site where the old one is."""
    old = place.with_name(f".old-{place.name}")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(fresh, place)
    shutil.rmtree(old, ignore_errors=True)


def _stage(top: Path, staging: Path) -> None:
    """Copy what Jupyter Book reads, with the executed pages in place of the clean ones."""
    shutil.copytree(
        top / "book",
        staging / "book",
        ignore=shutil.ignore_patterns("profiles", ".*", "*.toml", "reference"),
    )
    shutil.copy(top / "_toc.yml", staging)
    ran = pages()
    for chapter in chapters():
        page = staging / "book" / f"{chapter}.ipynb"
        notebook = _page(ran.get(chapter, page))
        if chapter not in ran:
            notebook.cells.insert(1, _markdown(NOT_RUN.format(chapter=chapter)))
        write_notebook(notebook, page)
    _fill_in(staging / "book")
    config = yaml.safe_load((top / "_config.yml").read_text())
    home = repository(top)
    if home:
        config["repository"] = {"url": home, "path_to_book": "", "branch": "main"}
        config["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
        config["html"] |= {"use_repository_button": True, "use_issues_button": True}
    if any(made(page).get("fallback") for page in ran.values()):
        config["html"]["announcement"] = BANNER
    (staging / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))


def _page(path: Path) -> Any:
    return clean(read_notebook(path))


def _markdown(text: str) -> Any:
    return nbformat.v4.new_markdown_cell(text)  # type: ignore[no-untyped-call]


def repository(top: Path) -> str:
    """The repository's address, from CI's variables or pyproject.toml; "" without a home."""
    if os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        return f"{server}/{os.environ['GITHUB_REPOSITORY']}"
    project = tomllib.loads((top / "pyproject.toml").read_text())["project"]
    url: str = project["urls"]["Repository"]
    host = urlsplit(url).hostname or ""
    return "" if host.split(".")[-2:-1] == ["example"] else url


def _fill_in(book: Path) -> None:
    """Put a dash where the text names a figure of a page that has not been run."""
    glued: dict[str, set[str]] = {}
    notebooks = {page.name: _page(page) for page in book.glob("*.ipynb")}
    for name, notebook in notebooks.items():
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        found = {o.get("metadata", {}).get("scrapbook", {}).get("name") for o in outputs}
        glued[name] = {key.removeprefix("application/papermill.record/") for key in found if key}

    def fill(text: str, page: str) -> str:
        def one(match: re.Match[str]) -> str:
            source, _, key = match[1].rpartition("::")
            known = glued.get(source or page, set())
            return match[0] if key.split(":")[0] in known else "–"

        return GLUED.sub(one, text)

    for page in book.glob("*.md"):
        page.write_text(fill(page.read_text(), page.name))
    for name, notebook in notebooks.items():
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell["source"] = fill(cell.source, name)
        write_notebook(notebook, book / name)
