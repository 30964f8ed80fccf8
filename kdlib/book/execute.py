"""Execution: papermill over the chapters, several at a time, each page put in place when whole."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kdlib import files, slots
from kdlib.book import rehearsal
from kdlib.book.chapters import BookError, Job, digest_of, made, read_notebook, root, write_notebook

# A change in these needs no new run.
MAKERS = (
    "chapters.py", "cli.py", "execute.py", "numbers.py", "rehearsal.py", "site.py", "sphinx_ext.py"
)  # fmt: skip
# Bytes: a chapter's kernel takes one GiB at smoke, and its trainings share much of that.
MEMORY = 2 * 2**30
# papermill in a process of its own: it changes the working directory, which is a process's.
# The process watches its standard input, whose other end only the press holds: so it ends
# with the press, however that ends.
_PAPERMILL = """
import os, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
def watch():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=watch, daemon=True).start()
from papermill.cli import papermill
papermill()
"""


@dataclass
class Workplace:
    """A folder for one call of the press, and the pipe that its processes watch.

    many: how many chapters run at a time.
    """

    folder: Path
    watched: int
    many: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def papermill(self, job: Job, source: Path) -> subprocess.Popen[bytes]:
        """Start papermill on a notebook, into `output(job)`; alone, it may draw a bar."""
        import yaml

        own = self.output(job).parent
        own.mkdir()
        (own / "matplotlibrc").touch()
        (own / "parameters.yml").write_text(yaml.safe_dump(job.parameters), encoding="utf-8")
        # papermill fills in what stands in braces in a path.
        paths = [str(p).replace("{", "{{").replace("}", "}}") for p in (source, self.output(job))]
        options = ["-k", "python3", "-l", "python", "-f", str(own / "parameters.yml")]
        options += ["--cwd", str(job.source.parent), "--log-level", "CRITICAL"]
        bar = self.many == 1 and os.isatty(2)
        options += ["--progress-bar" if bar else "--no-progress-bar"]
        # Figures depend on the book's settings alone, not on a user's.
        settings = {
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MATPLOTLIBRC": str(own / "matplotlibrc"),
            "IPYTHONDIR": str(own / "ipython"),
            "KDLIB_SLOTS": str(self.folder),
            # What a chapter computes outside of kdlib's trainings has the cores that are its own:
            # the threads of one operation wait for each other, so a core with two owners costs
            # it a factor of four.
            "OMP_NUM_THREADS": str(max(1, slots.cores() // self.many)),
        }
        with (own / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _PAPERMILL, *paths, *options],
                stdin=self.watched,
                stdout=log,
                stderr=None if bar else log,
                env=os.environ | settings,
                # A terminal's Ctrl-C reaches the press alone, which then ends the others.
                process_group=0,
            )
        self.processes.append(process)
        return process

    def output(self, job: Job) -> Path:
        """What papermill writes."""
        return self.folder / job.chapter / "page.ipynb"


@contextlib.contextmanager
def workplace(many: int = 1) -> Iterator[Workplace]:
    """A folder in _build, for so many chapters at a time; those of killed calls are removed.

    On leaving it, the processes that were started in it end.
    """
    import psutil

    build = root() / "_build"
    build.mkdir(exist_ok=True)
    # The process that made a folder is in its name: others may run beside this one.
    for left in build.glob(".run-*"):
        if not psutil.pid_exists(int(left.name.split("-")[1])):
            shutil.rmtree(left, ignore_errors=True)
    watched, holding = os.pipe()
    with tempfile.TemporaryDirectory(dir=build, prefix=f".run-{os.getpid()}-") as folder:
        place = Workplace(Path(folder), watched, many)
        try:
            yield place
        finally:
            # What watches the pipe ends now; the folder goes when nobody writes into it.
            os.close(holding)
            for process in place.processes:
                process.wait()
            os.close(watched)


def at_once(count: int) -> int:
    """How many of `count` chapters this machine bears at a time: by its cores and its free
    memory; one where there is a GPU, since its trainings are stacked until they fill it."""
    import psutil

    if torch.cuda.is_available():
        return 1
    room: int = psutil.virtual_memory().available // MEMORY
    return max(1, min(count, slots.cores(), room))


def execute(jobs: list[Job], many: int, tell: Callable[[str], None], *, force: bool) -> None:
    """Execute chapters, `many` at a time, and tell of each as it ends.

    A page that is up to date stays. When a chapter fails, those that run may end, and no
    other starts. Raises BookError that names each that failed, its cell and the error.
    """
    waiting, failed = list(jobs), list[str]()
    running: dict[subprocess.Popen[bytes], tuple[Job, str]] = {}
    with workplace(many) as place:
        while running or (waiting and not failed):
            if waiting and not failed and len(running) < many:
                job = waiting.pop(0)
                if not force and is_up_to_date(job):
                    # The page asked for last is the one that is published.
                    os.utime(job.page)
                    tell(f"{job.chapter}: up to date")
                else:
                    # Taken first: who edits a chapter while it runs gets a page of the old text.
                    digest = digest_of_sources(job)
                    running[place.papermill(job, job.source)] = job, digest
                continue
            # Nothing waits for the first of several processes on every system: look now and then.
            time.sleep(0.05)
            for process in [process for process in running if process.poll() is not None]:
                job, digest = running.pop(process)
                try:
                    seconds = _publish(job, digest, place.output(job), process)
                    tell(f"{job.chapter}: {seconds:.0f} s")
                except BookError as error:
                    failed.append(str(error))
    if failed:
        raise BookError("\n".join(failed))


def _publish(job: Job, digest: str, output: Path, process: subprocess.Popen[bytes]) -> float:
    """Put a finished page in place of the chapter's last one; the seconds that it took.

    digest: of what the page was made from, taken before it ran.
    Raises BookError for a page that is not whole; the notebook as it failed is kept.
    """
    fault = _fault(job, output, process)
    if fault:
        kept = root() / "_build" / "failed" / f"{job.chapter}.ipynb"
        if output.is_file():
            kept.parent.mkdir(exist_ok=True)
            os.replace(output, kept)
            fault += f"\nthe notebook as it failed: {kept}"
        raise BookError(f"{job.chapter} failed {fault}")
    notebook = read_notebook(output)
    seconds: float = notebook.metadata.papermill["duration"]
    publish(notebook, job, digest, seconds, output)
    return seconds


def publish(notebook: Any, job: Job, digest: str, seconds: float, output: Path) -> None:
    """Put an executed notebook in place of the chapter's last page.

    digest: of what it was made from; output: a file to be moved.
    """
    notebook.metadata["kdlib"] = asdict(job) | {
        "dataset": job.dataset,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": digest,
    }
    # The last page stays until the new one is complete. As it will be read, so that a digest fits.
    write_notebook(clean(notebook), output)
    notebook = read_notebook(output)
    notebook.metadata["kdlib"]["content"] = digest_of(notebook)
    write_notebook(notebook, output)
    job.page.parent.mkdir(parents=True, exist_ok=True)
    os.replace(output, job.page)


def is_up_to_date(job: Job) -> bool:
    """Whether a chapter has a whole page of these sources and parameters."""
    with contextlib.suppress(BookError):
        return bool(made(job.page).get("digest") == digest_of_sources(job))
    return False


def _fault(job: Job, page: Path, process: subprocess.Popen[bytes]) -> str:
    """What is wrong with what papermill made, and in which cell; "" if it is whole."""
    code = process.wait()
    if not page.is_file():
        log = page.with_name("log").read_text(encoding="utf-8", errors="replace")
        return f"before its first cell: {log.strip().rpartition(chr(10))[2]}"
    cells = [cell for cell in read_notebook(page).cells if cell.cell_type == "code"]
    begun = [cell for cell in cells if cell.metadata.get("papermill", {}).get("start_time")]
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "error":
                return f"in {_name(job, cell)}: {output.ename}: {output.evalue}"
    # A dead kernel leaves no error in its last cell; papermill then ends with 138.
    if code:
        died = "the kernel died" if code == 138 else f"papermill ended with exit code {code}"
        return f"in {_name(job, begun[-1]) if begun else 'no cell'}: {died}"
    # A page without its figures looks whole to papermill and to Jupyter Book.
    for cell in cells:
        kinds = " ".join(kind for each in cell.outputs for kind in each.get("data", {}))
        if "figure" in cell.metadata.get("mystnb", {}) and "image/" not in kinds:
            return f"in {_name(job, cell)}: it made no figure"
    return ""


def _name(job: Job, cell: Any) -> str:
    """A cell in words: its number in the source, its id, its first line."""
    numbers = {cell.id: number for number, cell in enumerate(read_notebook(job.source).cells, 1)}
    number = numbers.get(cell.id, "of the parameters given")
    return f"cell {number} (id {cell.id}, {cell.source.strip().partition(chr(10))[0]!r})"


def rehearse(job: Job) -> str:
    """What a chapter would train, found by running it with untrained networks.

    These may fail a chapter's own checks: the rest is run all the same. Raises BookError
    for a chapter that fails before it asks for a run.
    """
    import nbformat

    with workplace() as place:
        ledger, source = place.folder / "ledger.json", place.folder / "source.ipynb"
        notebook = read_notebook(job.source)
        # papermill then goes on after an error.
        for cell in notebook.cells:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "raises-exception"]
        first = nbformat.v4.new_code_cell(rehearsal.first_cell(ledger))  # type: ignore[no-untyped-call]
        notebook.cells.insert(0, first)
        write_notebook(notebook, source)
        fault = _fault(job, place.output(job), place.papermill(job, source))
        noted = rehearsal.read(ledger)
    if fault and not noted:
        raise BookError(f"{job.chapter} failed {fault}")
    return rehearsal.report(job.chapter, noted, fault.partition("\n")[0])


def clean(notebook: Any) -> Any:
    """An executed notebook without paths and times, its injected cell hidden.

    Raises BookError when a cell holds an error.
    """
    notebook.metadata.pop("papermill", None)
    for number, cell in enumerate(notebook.cells):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            raise BookError(f"cell {number} holds an error: execute the chapter again")
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["injected-parameters", "hide-input"]
            prompts = ("code_prompt_show", "code_prompt_hide")
            cell.metadata["mystnb"] = dict.fromkeys(prompts, "The parameters of this run")
            cell["id"] = "injected-parameters"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    return notebook


def digest_of_sources(job: Job) -> str:
    """A digest of all that an executed page depends on."""
    notebook = json.loads(job.source.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], cell["source"], cell["metadata"]) for cell in notebook["cells"]]
    library = Path(__file__).parents[1]
    sources = [path for path in sorted(library.rglob("*.py")) if path.name not in MAKERS]
    book, code = root() / "book", json.dumps([cell for cell in cells if cell[0] == "code"])
    records = sorted((book / "reference").rglob("*.json"))
    # A page may show other chapters' records too.
    sources += [path for path in records if path.stem == job.chapter or path.stem in code]
    sources += (book / "claims").glob(f"{job.chapter}.yml")
    sources += sorted((library / "pretrained_weights").glob("*.json"))
    return files.digest([cells, job.parameters, *(p.read_text(encoding="utf-8") for p in sources)])
