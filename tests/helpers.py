"""What test files share: small data, a tiny book, a full disk, processes of their own."""

import contextlib
import importlib.util
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import torch

from kdlib import data

ROOT = Path(__file__).resolve().parent.parent
KDLIB = [sys.executable, "-c", "import sys; from kdlib.book.cli import main; sys.exit(main())"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kdlib", "torchvision.datasets", "hypothesis.extra.numpy"])


def blobs(train: int = 240, test: int = 60, noise: float = 60) -> data.Arrays:
    """Ten classes of noisy images; a corner's 4 bytes number the samples, so rows are known."""
    generator = torch.Generator().manual_seed(7)
    prototypes = torch.rand(10, 28, 28, generator=generator) * 150
    labels = torch.arange(train + test) % 10
    spread = torch.randn(train + test, 28, 28, generator=generator) * noise
    images = (prototypes[labels] + spread).clamp(0, 255).to(torch.uint8)
    numbers = torch.arange(train + test)
    for byte in range(4):
        images[:, 0, byte] = ((numbers >> (8 * byte)) & 255).to(torch.uint8)
    return images[:train], labels[:train], images[train:], labels[train:]


def load_tool(name: str) -> ModuleType:
    """A program of tools/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(images: torch.Tensor) -> torch.Tensor:
    """Which samples of `blobs` these are."""
    corner = images[:, 0, :4].long()
    return (corner << torch.tensor([0, 8, 16, 24])).sum(1)


def process(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process, started, that does some work in this one's environment."""
    started = FORKS.Process(target=_there, args=(dict(os.environ), work, arguments))
    started.start()
    return started


def exit_codes(*processes: BaseProcess) -> list[int | None]:
    """How processes ended, once they have."""
    for one in processes:
        one.join()
    return [one.exitcode for one in processes]


def _there(environment: dict[str, str], work: Callable[..., Any], arguments: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@contextlib.contextmanager
def a_full_disk(size: int = 100) -> Iterator[None]:
    """No file grows beyond a few bytes: the kernel's own refusal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- a book of tiny chapters

PARAMETERS = """\
profile = "quick"  # the scale
dataset = "mnist-5k"  # where the digits come from
seed = 0  # of everything"""


def notebook(*cells: str, parameters: str = PARAMETERS) -> Any:
    """A chapter: a title, a parameters cell, some code."""
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {
        "name": "python3",
        "language": "python",
        "display_name": "Python",
    }
    made.cells = [nbformat.v4.new_markdown_cell("# A chapter", id="title")]
    made.cells.append(nbformat.v4.new_code_cell(parameters, id="parameters"))
    made.cells[1].metadata["tags"] = ["parameters"]
    made.cells += [nbformat.v4.new_code_cell(c, id=f"code-{i}") for i, c in enumerate(cells)]
    return made


def tiny_book(folder: Path, chapters: dict[str, Sequence[str]]) -> Path:
    """A clone of a book with chapters of some cells each, in this order."""
    (folder / "book" / "profiles").mkdir(parents=True)
    listed = "".join(f"      - file: book/{name}\n" for name in chapters)
    contents = f"format: jb-book\nroot: book/intro\nparts:\n  - chapters:\n{listed}"
    (folder / "_toc.yml").write_text(contents)
    (folder / "book" / "intro.md").write_text("# Intro\n")
    for name, cells in chapters.items():
        nbformat.write(notebook(*cells), folder / "book" / f"{name}.ipynb")
    return folder
