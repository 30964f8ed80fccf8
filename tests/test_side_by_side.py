"""Trainings side by side: all of them, once, with the bits of one thread, and no orphans."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from helpers import exit_codes, process

import kdlib
from kdlib import group, loop, models, runs, slots, store, workers
from kdlib.store import StoreError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="only where processes are forked"
)
CPU = torch.device("cpu")
SMALL = kdlib.Recipe("mlp-8", dataset="mnist-5k", steps=30, batch_size=64)
RECIPES = [SMALL.replace(seed=seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(slots, "cores", lambda: 2)


def same(first: kdlib.Run, second: kdlib.Run) -> bool:
    return all(torch.equal(w, second.weights[name]) for name, w in first.weights.items())


def test_runs_side_by_side_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = SMALL.replace(model="mlp-30", seed=9)
    students = [recipe.distil(teacher, temperature=4.0) for recipe in RECIPES]
    workers_seen, train = [], group.train
    monkeypatch.setattr(group, "train", lambda *given: workers_seen.append(given) or train(*given))
    made = kdlib.train_all(students, "cpu")
    assert len(workers_seen) == 1  # the teacher, here; the students elsewhere
    assert [run.recipe for run in made] == students
    assert not any(run.cached for run in made)
    assert {run.provenance["threads"] for run in made} == {1}
    assert len(store.stored()) == 5
    assert all(run.cached for run in kdlib.train_all(students, "cpu"))
    store.prune([entry.key for entry in store.stored() if entry.recipe["teacher"]])
    monkeypatch.setattr(slots, "cores", lambda: 1)
    runs._known_logits.cache_clear()  # the teacher's, which came from a worker
    assert all(map(same, made, kdlib.train_all(students, "cpu")))
    assert len(workers_seen) == 5
    assert not multiprocessing.active_children()


def test_teachers_give_their_logits_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_here, predict = [], loop.predict
    monkeypatch.setattr(loop, "predict", lambda *given: asked_here.append(1) or predict(*given))
    students = [recipe.distil(recipe, temperature=4.0) for recipe in RECIPES]
    kdlib.train_all(RECIPES, "cpu")
    kdlib.train_all(students, "cpu")
    assert not asked_here
    known = [[*kdlib.train(recipe, "cpu")._logits.values()] for recipe in RECIPES]
    runs._known_logits.cache_clear()
    for (found,), recipe in zip(known, RECIPES, strict=True):
        assert torch.equal(found, kdlib.train(recipe, "cpu").logits("full"))


def test_what_is_left_of_an_interrupted_call_gets_the_same_bits() -> None:
    made = kdlib.train_all(RECIPES, "cpu")
    store.prune([entry.key for entry in store.stored() if entry.recipe["seed"] == 2])
    again = kdlib.train_all(RECIPES, "cpu")
    assert [run.cached for run in again] == [True, True, False, True]
    assert all(map(same, made, again))


def test_a_network_of_ones_own_is_known_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_registered", {})
    models.register("own", lambda: models.build("mlp-5"))
    made = kdlib.train_all([recipe.replace(model="own") for recipe in RECIPES], "cpu")
    assert all(run.metrics["status"] == "ok" for run in made)


def where_done(task: int) -> tuple[int, int]:
    time.sleep(0.05)  # else one process could do them all
    return task, os.getpid()


def test_jobs_of_ones_own_go_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, processes = zip(*workers.for_each(where_done, [5, 3, 8, 1]), strict=True)
    assert tasks == (5, 3, 8, 1)
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    monkeypatch.setattr(slots, "cores", lambda: 1)
    assert workers.for_each(where_done, [2, 1]) == [(2, os.getpid()), (1, os.getpid())]


def test_one_group_is_trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "side_by_side", None)
    kdlib.train(SMALL, "cpu")
    kdlib.train_all([recipe.replace(steps=20) for recipe in RECIPES], "cpu", stack=4)
    made = kdlib.train_all([recipe.replace(steps=21) for recipe in RECIPES], "cpu", threads=2)
    assert {run.provenance["threads"] for run in made} == {2}


def test_only_a_processor_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.count(CPU, 1) == 2
    assert workers.count(CPU, 2) == 1
    assert workers.count(torch.device("meta"), 1) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert workers.count(CPU, 1) == 1  # such a process cannot be forked


def test_after_torch_export_runs_are_trained_here() -> None:
    """It pretends to have a GPU, and a backward pass then starts threads that forbid a fork."""
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import kdlib
from kdlib import slots, workers
slots.cores = lambda: 2
cpu = torch.device("cpu")
before = workers.count(cpu, 1)
with FakeTensorMode():
    torch.ones(1)
torch.ones(1, requires_grad=True).sum().backward()
recipe = kdlib.Recipe("mlp-8", dataset="mnist-5k", steps=30)
runs = kdlib.train_all([recipe, recipe.replace(seed=1)], "cpu")
print(before, workers.count(cpu, 1), [run.metrics["status"] for run in runs])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 1 ['ok', 'ok']\n", done.stderr


def test_one_bar_counts_the_trainings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train = group.train
    # Long enough for the bar to be drawn again: it is at most ten times per second.
    monkeypatch.setattr(group, "train", lambda *given: time.sleep(0.3) or train(*given))
    kdlib.train_all(RECIPES, "cpu")
    shown = capsys.readouterr().err
    assert "4 trainings, 2 at a time" in shown
    assert "errors=" in shown


# --- errors, deaths, interruptions


def on_seed_2(deed: Any, otherwise: Any) -> Any:
    """In place of `group.train`: seed 2 does one thing, the others another."""
    train = group.train

    def instead(members: Any, *rest: Any) -> Any:
        (deed if members[0].seed == 2 else otherwise)()
        return train(members, *rest)

    return instead


def fail() -> None:
    raise StoreError("the disk is full")


def die() -> None:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_is_raised_here_and_the_others_are_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "train", on_seed_2(fail, lambda: time.sleep(60)))
    started = time.monotonic()
    with pytest.raises(StoreError, match="the disk is full"):
        kdlib.train_all([RECIPES[2], RECIPES[3]], "cpu")
    assert time.monotonic() - started < 50  # the other would sleep for a minute
    assert not multiprocessing.active_children()


def test_a_killed_process_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(group, "train", on_seed_2(die, lambda: None))
        with pytest.raises(RuntimeError, match=r"a worker failed .*stored; the same call"):
            kdlib.train_all(RECIPES, "cpu")
    stored = {entry.recipe["seed"] for entry in store.stored()}
    assert 2 not in stored
    assert [run.cached for run in kdlib.train_all(RECIPES, "cpu")] == [
        recipe.seed in stored for recipe in RECIPES
    ]


def test_ctrl_c_stops_all_and_the_same_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    long = [SMALL.replace(steps=100_000, seed=seed) for seed in (1, 2)]

    def interrupt() -> None:
        while len(store.unfinished()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background jobs ignore Ctrl-C, and so do their children unless told otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        kdlib.train_all(long, "cpu")
    signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
    assert len(store.unfinished()) == 2
    assert store.stored() == []


def alive(number: int) -> bool:
    """Whether a process runs: neither gone nor waiting to be buried."""
    state = Path(f"/proc/{number}/stat")
    with contextlib.suppress(OSError):
        return state.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_no_worker_outlives_the_process_that_asked() -> None:
    script = (
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(Path(kdlib.__file__).parents[1])!r})\n"
        "import kdlib\nfrom kdlib import group, slots\n"
        "slots.cores = lambda: 2\n"
        "def train(*_):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    time.sleep(60)\n"
        "group.train = train\n"
        "recipe = kdlib.Recipe('mlp-8', dataset='mnist-5k', steps=3)\n"
        "kdlib.train_all([recipe, recipe.replace(seed=1)], 'cpu')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert parent.stdout is not None
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))


# --- cores that several processes share


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KDLIB_SLOTS", str(tmp_path / "slots"))
    return tmp_path / "slots"


def hold(threads: int, file: Path) -> None:
    """In a process of its own: note how many cores are in use while some are held."""
    slots.cores = lambda: 2  # type: ignore[assignment]
    for _ in range(5):
        with slots.taken(threads):
            with file.open("a", encoding="utf-8") as lines:
                print(threads, file=lines)
            time.sleep(0.02)
            with file.open("a", encoding="utf-8") as lines:
                print(-threads, file=lines)


def test_processes_hold_no_more_cores_than_there_are(shared: Path, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    assert exit_codes(*(process(hold, threads, file) for threads in (1, 2, 1, 2))) == [0] * 4
    changes = [int(line) for line in file.read_text(encoding="utf-8").split()]
    used = [sum(changes[: number + 1]) for number in range(len(changes))]
    assert len(changes) == 40
    assert max(used) == 2
    assert used[-1] == 0


def test_a_training_waits_for_a_core(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "cores", lambda: 1)
    held = filelock.FileLock(shared / "core-0.lock", thread_local=False)
    held.acquire()
    order: list[str] = []
    train = group.train
    monkeypatch.setattr(group, "train", lambda *given: order.append("train") or train(*given))

    def let_go() -> None:
        time.sleep(1)
        order.append("free")
        held.release()

    thread = threading.Thread(target=let_go)
    thread.start()
    kdlib.train(SMALL, "cpu")
    thread.join()
    assert order == ["free", "train"]


def test_without_a_shared_folder_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDLIB_SLOTS", raising=False)
    monkeypatch.setattr(filelock, "FileLock", None)
    with slots.taken(2):
        pass
