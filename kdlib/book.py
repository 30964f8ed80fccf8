"""The chain of chapters: which there are, with what parameters, executed by papermill."""

import ast
import difflib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import yaml

from kdlib import data, plan

Parameters = dict[str, Any]
FALLBACK = "mnist-5k"
NOT_TRAINING = ("cli.py", "site.py", "book.py")  # a change in these needs no new run


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

    visit(yaml.safe_load((root() / "_toc.yml").read_text()))
    return [name for name in found if (root() / "book" / f"{name}.ipynb").is_file()]


def read_notebook(path: Path) -> Any:
    """A notebook as nbformat has it."""
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def write_notebook(notebook: Any, path: Path) -> None:
    """Write a notebook in nbformat's form."""
    path.write_text(nbformat.writes(notebook), encoding="utf-8")  # type: ignore[no-untyped-call]


def choose(names: Sequence[str]) -> list[str]:
    """Chapters by name, in the book's order; all of them where none is named."""
    known = chapters()
    wanted = {Path(name).stem for name in names}
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
    known = {chapter: defaults(chapter) for chapter in chosen}
    path = root() / "book" / "profiles" / f"{profile}.yml"
    scales = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
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
        listed.append(Job(chapter, profile, parameters))
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
    return text if isinstance(default, str) else yaml.safe_load(text)


def _typed(chapter: str, name: str, value: Any, values: Parameters) -> Any:
    """The value, if the parameter is known and the value is of its default's type."""
    if name not in values:
        raise BookError(f"{chapter} has no parameter {name!r}{_nearest(name, list(values))}")
    if not _like(value, values[name]):
        raise BookError(
            f"{chapter}: parameter {name} is {value!r}, a {type(value).__name__}: expected "
            f"a {type(values[name]).__name__} such as {values[name]!r}"
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


def execute(job: Job, *, force: bool = False) -> str:
    """Execute a chapter unless its page is up to date; a line on what was done.

    The page is replaced only by a finished one. Raises BookError that names the chapter, the
    cell and the error when a cell fails; the notebook as it failed is kept beside the pages.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    digest = _digest(job)
    if not force and made(job.page).get("digest") == digest:
        return "up to date"
    job.page.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=job.page.parent, prefix=".new-") as beside:
        output = Path(beside) / job.page.name
        try:
            _papermill(papermill, job, output)
        except PapermillExecutionError as error:
            failed = root() / "_build" / "failed" / job.page.name
            failed.parent.mkdir(parents=True, exist_ok=True)
            os.replace(output, failed)
            raise BookError(
                f"{job.chapter} failed in cell {error.cell_index}, "
                f"{error.source.strip().splitlines()[0]!r}: {error.ename}: {error.evalue}\n"
                f"the notebook as it failed: {failed}"
            ) from error
        seconds = time.monotonic() - started
        notebook = clean(read_notebook(output))
        notebook.metadata["kdlib"] = {
            "profile": job.profile,
            "dataset": job.parameters.get("dataset", defaults(job.chapter).get("dataset")),
            "fallback": job.fallback,
            "parameters": job.parameters,
            "seconds": round(seconds, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": digest,
        }
        write_notebook(notebook, output)
        os.replace(output, job.page)
    return f"{seconds:.0f} s"


def _papermill(papermill: Any, job: Job, output: Path) -> None:
    import logging

    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill.execute_notebook(
        job.source,
        output,
        parameters=job.parameters,
        kernel_name="python3",
        progress_bar=os.isatty(2),
        cwd=job.source.parent,
    )


def rehearse(job: Job) -> list[str]:
    """What a chapter would train, told by running it with untrained networks."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.jsonl"
        ledger.touch()
        os.environ["KDLIB_PLAN"] = str(ledger)
        stopped = ""
        try:
            _papermill(papermill, job, Path(folder) / "page.ipynb")
        except PapermillExecutionError as error:  # untrained networks may fail a chapter's checks
            stopped = f"; from cell {error.cell_index} on unknown"
        finally:
            del os.environ["KDLIB_PLAN"]
        lines = plan.read(ledger)
    new = [line for line in lines if not line["stored"]]
    head = (
        f"{job.chapter}: {len(lines)} runs, {len(lines) - len(new)} of them in the store, "
        f"about {sum(line['seconds'] for line in new):.0f} s for the others{stopped}"
    )
    return [head] + [
        f"  {line['key']}  {line['model']:16} {line['steps']:7} steps  "
        + ("stored" if line["stored"] else f"{line['seconds']:6.1f} s")
        for line in lines
    ]


def clean(notebook: Any) -> Any:
    """An executed notebook without paths and times, its injected cell hidden.

    Raises BookError when a cell holds an error.
    """
    notebook.metadata.pop("papermill", None)
    for number, cell in enumerate(notebook.cells):
        outputs = cell.get("outputs", [])
        tags = cell.metadata.get("tags", [])
        failed = any(output.output_type == "error" for output in outputs)
        if failed or "papermill-error-cell-tag" in tags:
            raise BookError(f"cell {number} holds an error: execute the chapter again")
        if "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "hide-input"]
            cell["id"] = "injected-parameters"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    return notebook


def made(page: Path) -> dict[str, Any]:
    """What an executed page says of itself: profile, dataset, seconds… Empty without one."""
    if not page.is_file():
        return {}
    return dict(read_notebook(page).metadata.get("kdlib", {}))


def pages() -> dict[str, Path]:
    """The newest executed page of each chapter that has one."""
    found: dict[str, Path] = {}
    for chapter in chapters():
        candidates = list((root() / "_build" / "executed").glob(f"*/{chapter}.ipynb"))
        if candidates:
            found[chapter] = max(candidates, key=lambda path: made(path).get("date", ""))
    return found


def _digest(job: Job) -> str:
    """A digest of all that an executed page depends on."""
    notebook = json.loads(job.source.read_text())
    cells = [(cell["cell_type"], cell["source"], cell["metadata"]) for cell in notebook["cells"]]
    parts = [json.dumps([cells, job.parameters], sort_keys=True)]
    library = Path(__file__).parent
    parts += [p.read_text() for p in sorted(library.glob("*.py")) if p.name not in NOT_TRAINING]
    recorded = root() / "book" / "reference" / f"{job.chapter}.json"
    parts += [recorded.read_text()] if recorded.is_file() else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
