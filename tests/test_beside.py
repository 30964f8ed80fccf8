"""Trainings side by side: all of them, once, with the bits of one thread, and no orphans."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdlib
from kdlib import beside, models, store
from kdlib.store import StoreError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="only where processes are forked"
)
CPU = torch.device("cpu")
SMALL = kdlib.Recipe("mlp-8", dataset="mnist-5k", steps=30, batch_size=64)
RECIPES = [SMALL.replace(seed=seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def whereabouts(number: int) -> tuple[int, int, int]:
    return number * number, os.getpid(), torch.get_num_threads()


def test_all_calls_come_back_from_processes_of_one_thread() -> None:
    got = dict(beside.call(whereabouts, 5, 2))
    assert {number: square for number, (square, _, _) in got.items()} == {
        number: number**2 for number in range(5)
    }
    assert len({process for _, process, _ in got.values()} - {os.getpid()}) == 2
    assert {threads for _, _, threads in got.values()} == {1}
    assert not multiprocessing.active_children()


def fail_at_1(number: int) -> int:
    if number == 1:
        raise StoreError("the disk is full")
    time.sleep(60)
    return number


def test_an_error_is_raised_here_and_the_others_are_stopped() -> None:
    started = time.monotonic()
    with pytest.raises(StoreError, match="the disk is full"):
        list(beside.call(fail_at_1, 2, 2))
    assert time.monotonic() - started < 50  # the other would sleep for a minute
    assert not multiprocessing.active_children()


def die_at_1(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"ended with -9.*the same call goes on"):
        list(beside.call(die_at_1, 4, 2))


def alive(process: int) -> bool:
    """Whether a process runs: neither gone nor waiting to be buried."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_no_process_outlives_the_one_that_asked() -> None:
    script = (
        "import os, time\nfrom kdlib import beside\n"
        "def work(number):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "list(beside.call(work, 2, 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))


def same(first: kdlib.Run, second: kdlib.Run) -> bool:
    return all(torch.equal(w, second.weights[name]) for name, w in first.weights.items())


def test_runs_side_by_side_are_those_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = SMALL.replace(model="mlp-30", seed=9)
    students = [recipe.distil(teacher, temperature=4.0) for recipe in RECIPES]
    runs = kdlib.train_all(students, "cpu")
    assert [run.recipe for run in runs] == students
    assert not any(run.cached for run in runs)
    assert {run.provenance["threads"] for run in runs} == {1}
    assert len(store.stored()) == 5
    assert all(run.cached for run in kdlib.train_all(students, "cpu"))
    store.prune([entry.key for entry in store.stored() if entry.recipe["teacher"]])
    torch.set_num_threads(1)
    assert all(map(same, runs, kdlib.train_all(students, "cpu")))


def test_what_is_left_of_an_interrupted_call_gets_the_same_bits() -> None:
    runs = kdlib.train_all(RECIPES, "cpu")
    store.prune([entry.key for entry in store.stored() if entry.recipe["seed"] == 2])
    again = kdlib.train_all(RECIPES, "cpu")
    assert [run.cached for run in again] == [True, True, False, True]
    assert again[2].provenance["threads"] == 1
    assert all(map(same, runs, again))


def test_a_network_of_ones_own_is_known_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_registered", {})
    models.register("own", lambda: models.build("mlp-5"))
    runs = kdlib.train_all([recipe.replace(model="own") for recipe in RECIPES], "cpu")
    assert all(run.metrics["status"] == "ok" for run in runs)


def test_one_group_has_all_threads() -> None:
    assert kdlib.train(SMALL, "cpu").provenance["threads"] == 2
    together = kdlib.train_all([recipe.replace(steps=20) for recipe in RECIPES], "cpu", stack=4)
    assert {run.provenance["threads"] for run in together} == {2}


def test_only_a_processor_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert beside.processes(CPU) == 2
    assert beside.processes(torch.device("meta")) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert beside.processes(CPU) == 1  # such a process cannot be forked


def test_one_bar_counts_the_trainings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    kdlib.train_all(RECIPES, "cpu")
    shown = capsys.readouterr().err
    assert "4 trainings, 2 at a time" in shown
    assert "errors=" in shown
