"""A short torture: each kind of it, with a fixed seed. `make torture` is the long one."""

import functools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from torture import damage, disks, inputs, kills, networks
from torture.ordeal import Tally

from benchmarks import report
from kdlib import data, models
from kdlib.book import chapters

SHORT = [
    (kills.in_one_process, 1),
    (damage.in_datasets, 4),
    (damage.in_runs, 2),
    (damage.in_checkpoints, 2),
    (damage.in_pages, 10),
    (damage.in_records, 5),
    (damage.in_shipped_weights, 2),
    (disks.full, 1),
    (disks.read_only, 1),
    (disks.shared_by_two, 1),
    (inputs.of_commands, 60),
    (inputs.of_chapters, 60),
    (inputs.of_functions, 60),
    (networks.that_change, 15),
]
FULL = {
    kills.in_one_process: 28, damage.in_datasets: 40, damage.in_runs: 50,
    damage.in_checkpoints: 40, damage.in_pages: 30, damage.in_records: 20,
    damage.in_shipped_weights: 20, disks.full: 30, disks.read_only: 10, disks.shared_by_two: 12,
    inputs.of_commands: 650, inputs.of_chapters: 350, inputs.of_functions: 200,
    networks.that_change: 300,
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ordeals register data and networks, and set where kdlib looks for its files."""
    monkeypatch.setattr(data, "_registered", {})
    monkeypatch.setattr(models, "_registered", {})
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    for name in ("KDLIB_HOME", "KDLIB_DATA"):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setenv("PYTHONPATH", path)
    yield
    data._load.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="kills and disks are those of Linux")
@pytest.mark.parametrize(
    ("ordeal", "times"), SHORT, ids=lambda given: getattr(given, "__name__", "")
)
def test_nothing_is_lost_and_nothing_is_wrong(
    ordeal: Callable[..., Tally], times: int, tmp_path: Path
) -> None:
    tally = ordeal(random.Random(19), tmp_path / "own", times / FULL[ordeal])
    assert tally.tried >= times
    assert (tally.lost, tally.wrong) == (0, 0)
    assert tally.survived == tally.tried


def test_a_chapter_names_each_bad_parameter(tmp_path: Path) -> None:
    with inputs.in_the_book(tmp_path):
        for chapter in chapters.chapters():
            for name in chapters.defaults(chapter):
                for bad in (None, -1.5, "x"):
                    given = {name: bad}
                    begin = functools.partial(inputs.begin, chapter, given)
                    inputs.refuses(begin, name, f"{chapter}: {given}")


def test_the_table_adds_up() -> None:
    rows = [{"ordeal": name, "tried": 3, "survived": 2, "lost": 1, "wrong": 0} for name in "ab"]
    facts = {"date": "2026-01-01T00", "seconds": 600, "seed": 7, "machine": "m", "disks": "tmpfs"}
    page = report.torture({"rows": rows, **facts})
    assert "TORTURE_SEED=7" in page
    assert page.splitlines()[-1] == "| in all | 6 | 4 | 2 | 0 |"
