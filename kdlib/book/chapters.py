"""The chapters: which there are, what parameters they take, which pages have been made."""

import ast
import contextlib
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib import data

Parameters = dict[str, Any]
FALLBACK = "mnist-5k"


class BookError(RuntimeError):
    """A chapter, a parameter or a page is not as it must be; the message says how."""


@dataclass(frozen=True)
class Job:
    """One chapter to execute: its name, its profile and the parameters that are injected."""

    chapter: str
    profile: str
    parameters: Parameters
    fallback: bool = False

    @property
    def source(self) -> Path:
        """The clean notebook."""
        return root() / "book" / f"{self.chapter}.ipynb"

    @property
    def page(self) -> Path:
        """The executed notebook."""
        return root() / "_build" / "executed" / self.profile / f"{self.chapter}.ipynb"


def root() -> Path:
    """The clone that the working directory is in. Raises BookError outside of one."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").is_file() and (folder / "book").is_dir():
            return folder
    raise BookError(f"{here} is not in a clone of the book: change into one (_toc.yml, book/)")


def chapters() -> list[str]:
    """The chapters that are notebooks, in the order of _toc.yml."""
    import yaml

    found: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if str(node.get("file", "")).startswith("book/"):
                found.append(node["file"].removeprefix("book/"))
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(yaml.safe_load((root() / "_toc.yml").read_text(encoding="utf-8")))
    return [name for name in found if (root() / "book" / f"{name}.ipynb").is_file()]


def read_notebook(path: Path) -> Any:
    """A notebook as nbformat has it."""
    import nbformat

    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def write_notebook(notebook: Any, path: Path) -> None:
    """Write a notebook in nbformat's form."""
    import nbformat

    path.write_text(nbformat.writes(notebook), encoding="utf-8")  # type: ignore[no-untyped-call]


def choose(names: Sequence[str]) -> list[str]:
    """Chapters by name or number, in the book's order; all of them where none is named."""
    known = chapters()
    numbers = {name.split("_")[0].lstrip("0"): name for name in known}
    stems = [Path(name).stem for name in names]
    wanted = {numbers.get(stem.lstrip("0"), stem) for stem in stems}
    for name in sorted(wanted - set(known)):
        raise BookError(f"unknown chapter {name!r}{_nearest(name, known)}")
    return [name for name in known if name in wanted or not wanted]


def defaults(chapter: str) -> Parameters:
    """A chapter's parameters and their defaults, as its parameters cell assigns them."""
    notebook = read_notebook(root() / "book" / f"{chapter}.ipynb")
    values: Parameters = {}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for line in ast.parse(cell.source).body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    values[line.targets[0].id] = ast.literal_eval(line.value)
    return values


def jobs(chosen: list[str], profile: str, given: dict[str, str]) -> tuple[list[Job], str]:
    """The jobs for some chapters, every parameter checked, and a note for the reader.

    given: name -> text, for each chapter that has the parameter. Where MNIST cannot be had
    and no dataset was asked for, the chapters get mnist-5k, and the note says so.
    Raises BookError for an unknown name or a wrong type, DataError for damaged data.
    """
    import yaml

    known = {chapter: defaults(chapter) for chapter in chosen}
    path = root() / "book" / "profiles" / f"{profile}.yml"
    scales = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}
    for name in sorted(set(scales) - set(chapters())):
        raise BookError(f"{path} has an unknown chapter {name!r}{_nearest(name, chapters())}")
    if "profile" in given:
        raise BookError(f"a profile is chosen with --profile {given['profile']}, not with -p")
    everywhere = sorted({name for values in known.values() for name in values})
    for name in given:
        if name not in everywhere:
            raise BookError(
                f"no chosen chapter has a parameter {name!r}{_nearest(name, everywhere)}"
            )
    listed = []
    for chapter, values in known.items():
        parameters: Parameters = {"profile": profile} if "profile" in values else {}
        for name, value in (scales.get(chapter) or {}).items():
            parameters[name] = _typed(chapter, name, value, values)
        for name, text in given.items():
            if name in values:
                parameters[name] = _typed(chapter, name, _parsed(text, values[name]), values)
        new = {name: value for name, value in parameters.items() if value != values[name]}
        listed.append(Job(chapter, profile, new))
    if "dataset" in given or not any(_dataset(job, known) == "mnist" for job in listed):
        return listed, ""
    try:
        data.load("mnist", "cpu")
    except data.DataError as error:
        if "damaged" in str(error):
            raise
        swapped = [
            Job(job.chapter, profile, {**job.parameters, "dataset": FALLBACK}, fallback=True)
            if _dataset(job, known) == "mnist"
            else job
            for job in listed
        ]
        return swapped, f"{error}\nkdlib: going on with {FALLBACK}; every page will say so"
    return listed, ""


def _dataset(job: Job, known: dict[str, Parameters]) -> Any:
    return job.parameters.get("dataset", known[job.chapter].get("dataset"))


def _parsed(text: str, default: Any) -> Any:
    """A value as papermill's -p takes it; besides, a list may be written out."""
    from papermill.cli import _resolve_type

    if isinstance(default, str):
        return text
    if isinstance(default, list):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    return _resolve_type(text)


def _typed(chapter: str, name: str, value: Any, values: Parameters) -> Any:
    """The value, if the parameter is known and the value is of its default's type."""
    if name not in values:
        raise BookError(f"{chapter} has no parameter {name!r}{_nearest(name, list(values))}")
    if not _like(value, values[name]):
        raise BookError(
            f"{chapter}: parameter {name} is {value!r} ({type(value).__name__}): expected "
            f"{type(values[name]).__name__}, such as {values[name]!r}"
        )
    return value


def _like(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(_like(item, default[0]) for item in value)
    return type(value) is type(default)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.3)
    return f": did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"


def made(page: Path) -> dict[str, Any]:
    """What an executed page says of itself: profile, dataset, seconds… Empty without one."""
    if not page.is_file():
        return {}
    return dict(read_notebook(page).metadata.get("kdlib", {}))


def pages(profile: str | None = None) -> dict[str, Path]:
    """The executed page of each chapter that has one: that of a profile, else the latest."""
    found: dict[str, Path] = {}
    for chapter in chapters():
        candidates = (root() / "_build" / "executed").glob(f"{profile or '*'}/{chapter}.ipynb")
        latest = max(candidates, key=lambda path: path.stat().st_mtime_ns, default=None)
        if latest:
            found[chapter] = latest
    return found
