"""What several test files share: a store of their own, the real data, the book made once."""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import nbformat
import pytest
from helpers import KDLIB

from kdlib import data, files

ROOT = Path(__file__).resolve().parent.parent


def give_up(reason: str) -> None:
    """Skip, in words; under CI fail, since there what is needed has to be there."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


REAL = data.folder()  # before the tests are given an empty one


def offline(place: Path) -> dict[str, str]:
    """An environment without data at hand and without a network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    return {
        **nowhere,
        **{name.upper(): value for name, value in nowhere.items()},
        "NO_PROXY": "127.0.0.1,localhost",
        "KDLIB_DATA": str(place / "data"),
        "KDLIB_HOME": str(place / "home"),
        "GITHUB_REPOSITORY": "",
    }


@pytest.fixture(scope="session", autouse=True)
def _as_a_new_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees the developer's store, nor any data that it has not asked for."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline(tmp_path_factory.mktemp("user")).items():
            patch.setenv(name, value)
        yield


@functools.cache
def _state_of_mnist() -> files.Status:
    return next(status for status in data.available(REAL) if status.name == "mnist")


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the real MNIST files; a skip without, a failure under CI."""
    if _state_of_mnist().state != "verified":
        give_up(f"needs MNIST in KDLIB_DATA: {_state_of_mnist().detail}")
    monkeypatch.setenv("KDLIB_DATA", str(REAL))
    return REAL


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m real` selects the tests that take the fixture; trainings side by side come first."""
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real")
    # Once a process has used torch.export, it is not forked any more (`workers.count`).
    items.sort(key=lambda item: item.path.name != "test_side_by_side.py")


@dataclass(frozen=True)
class Clone:
    """A clone of the book in a folder of its own, and kdlib's commands in it."""

    root: Path
    environment: dict[str, str]

    def kdlib(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the clone, in a process of its own."""
        return subprocess.run(
            [*KDLIB, *arguments],
            cwd=self.root,
            env={**os.environ, **self.environment},
            capture_output=True,
            encoding="utf-8",
        )

    def page(self, chapter: str, profile: str = "smoke") -> Any:
        """An executed notebook."""
        path = self.root / "_build" / "executed" / profile / f"{chapter}.ipynb"
        return nbformat.read(path, as_version=4)

    @property
    def html(self) -> Path:
        """The rendered site."""
        return self.root / "_build" / "html"

    @property
    def chapters(self) -> list[str]:
        """The chapters in the order of the table of contents."""
        listed = re.findall(r"book/(\d\d\w*)", (self.root / "_toc.yml").read_text(encoding="utf-8"))
        return [name for name in listed if (self.root / "book" / f"{name}.ipynb").is_file()]


def copy_of_the_book(place: Path, **environment: str) -> Clone:
    """The book's own sources, without kdlib: that is the one installed here."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ("_config.yml", "_toc.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    left_out = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(ROOT / "book", place / "book", ignore=left_out)
    return Clone(place, environment)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Clone]) -> Clone:
    """Make something once for all of pytest-xdist's workers; its failure is everyone's."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place, told = shared / name, shared / f"{name}.json"
    with filelock.FileLock(shared / f"{name}.lock"):
        if not told.exists():
            clone = make(place)
            told.write_text(json.dumps([str(clone.root), clone.environment]), encoding="utf-8")
        root, environment = json.loads(told.read_text(encoding="utf-8"))
    if "failed" in environment:
        pytest.fail(environment["failed"])
    return Clone(Path(root), environment)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The whole book executed at the smoke profile, with no network and an empty store."""

    def make(place: Path) -> Clone:
        clone = copy_of_the_book(place, **offline(place.with_name("smoke-store")))
        result = clone.kdlib("run", "--profile", "smoke")
        (place / "run.log").write_text(result.stdout + result.stderr, encoding="utf-8")
        if result.returncode:
            clone.environment["failed"] = result.stdout + result.stderr
        return clone

    return once(tmp_path_factory, "smoke", make)


@pytest.fixture(scope="session")
def site(chain: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The site rendered from the smoke chain."""

    def make(place: Path) -> Clone:
        result = chain.kdlib("build")
        if result.returncode:
            return Clone(chain.root, {"failed": result.stdout + result.stderr})
        return chain

    return once(tmp_path_factory, "site", make)
