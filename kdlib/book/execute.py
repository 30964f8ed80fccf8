"""The chain: papermill over the chapters, each page put in place when it is whole."""

import hashlib
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kdlib.book import rehearsal as plan
from kdlib.book.chapters import BookError, Job, defaults, made, read_notebook, root, write_notebook

# A change in these needs no new run.
MAKERS = ("chapters.py", "cli.py", "execute.py", "rehearsal.py", "site.py")


def execute(job: Job, *, force: bool = False) -> str:
    """Execute a chapter unless its page is up to date; a line on what was done.

    The page is replaced only by a finished one. Raises BookError that names the chapter, the
    cell and the error when a cell fails; the notebook as it failed is kept beside the pages.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    digest = _digest(job)
    if not force and made(job.page).get("digest") == digest:
        os.utime(job.page)  # the latest of its chapter: the one that is published
        return "up to date"
    job.page.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=job.page.parent, prefix=".new-") as beside:
        output = Path(beside) / job.page.name
        try:
            _papermill(papermill, job, output)
        except PapermillExecutionError as error:
            raise _failed(job, output, f"{error.ename}: {error.evalue}") from error
        except DeadKernelError as error:
            raise _failed(job, output, "the kernel died") from error
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


def _failed(job: Job, output: Path, reason: str) -> BookError:
    """The error that names chapter, cell and reason; the notebook is kept as it failed."""
    failed = root() / "_build" / "failed" / job.page.name
    failed.parent.mkdir(parents=True, exist_ok=True)
    os.replace(output, failed)
    return BookError(
        f"{job.chapter} failed in {_failed_cell(job, failed)}: {reason}\n"
        f"the notebook as it failed: {failed}"
    )


def _failed_cell(job: Job, output: Path) -> str:
    """The cell that ended a notebook, in words: its number in the source, id, first line."""
    numbers = {cell.id: number for number, cell in enumerate(read_notebook(job.source).cells, 1)}
    cells = [cell for cell in read_notebook(output).cells if cell.cell_type == "code"]
    broken = [c for c in cells if any(output.output_type == "error" for output in c.outputs)]
    begun = [c for c in cells if c.metadata.get("papermill", {}).get("start_time")]
    if not (broken or begun):
        return "no cell"
    cell = broken[0] if broken else begun[-1]  # a dead kernel leaves no error in its last cell
    number = numbers.get(cell.id, "of the parameters given")
    return f"cell {number} (id {cell.id}, {cell.source.strip().splitlines()[0]!r})"


def _papermill(papermill: Any, job: Job, output: Path, source: Path | None = None) -> None:
    import logging

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    papermill.execute_notebook(
        source or job.source,
        output,
        parameters=job.parameters,
        kernel_name="python3",
        progress_bar=os.isatty(2),
        cwd=job.source.parent,
        extra_arguments=["--log-level=CRITICAL"],  # the kernel's own talk, not the chapter's
    )


def rehearse(job: Job) -> list[str]:
    """What a chapter would train, told by running it with untrained networks.

    These may fail a chapter's own checks: the rest is run all the same. Raises BookError
    for a chapter that fails before it asks for a run.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    with tempfile.TemporaryDirectory() as folder:
        ledger, source = Path(folder) / "ledger.jsonl", Path(folder) / "source.ipynb"
        ledger.touch()
        notebook = read_notebook(job.source)
        for cell in notebook.cells:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "raises-exception"]
        write_notebook(notebook, source)
        os.environ["KDLIB_PLAN"] = str(ledger)
        stopped = ""
        try:
            _papermill(papermill, job, Path(folder) / "page.ipynb", source)
        except (PapermillExecutionError, DeadKernelError) as error:
            name = getattr(error, "ename", "the kernel died")
            where = _failed_cell(job, Path(folder) / "page.ipynb")
            stopped = f"{where}: {name}: {getattr(error, 'evalue', '')}".splitlines()[0]
        finally:
            del os.environ["KDLIB_PLAN"]
        lines = plan.read(ledger)
    if stopped and not lines:
        raise BookError(f"{job.chapter} failed in {stopped}")
    new = [line for line in lines if not line["stored"]]
    head = (
        f"{job.chapter}: {len(lines)} runs, {len(lines) - len(new)} of them in the store, "
        f"about {sum(line['seconds'] for line in new):.0f} s for the others"
    )
    if stopped:
        head += f"\n  a guess from here on, since untrained networks fail in {stopped}"
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
            cell.metadata["tags"] = ["injected-parameters", "hide-input"]
            cell.metadata["mystnb"] = {
                "code_prompt_show": "The parameters of this run",
                "code_prompt_hide": "The parameters of this run",
            }
            cell["id"] = "injected-parameters"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    return notebook


def _digest(job: Job) -> str:
    """A digest of all that an executed page depends on."""
    notebook = json.loads(job.source.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], cell["source"], cell["metadata"]) for cell in notebook["cells"]]
    parts = [json.dumps([cells, job.parameters], sort_keys=True)]
    library = Path(__file__).parents[1]
    parts += [
        p.read_text(encoding="utf-8") for p in sorted(library.rglob("*.py")) if p.name not in MAKERS
    ]
    recorded = root() / "book" / "reference" / f"{job.chapter}.json"
    parts += [recorded.read_text(encoding="utf-8")] if recorded.is_file() else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
