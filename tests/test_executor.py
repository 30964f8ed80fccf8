"""Groups trained by an executor's workers: every run arrives once, and what arrived is kept."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from helpers import blobs
from torch import Tensor, nn

import kdlib
from kdlib import data, keys, models, runs, store

SMALL = kdlib.Recipe("mlp-8", dataset="mnist-5k", epochs=1)
RECIPES = [SMALL.replace(seed=seed) for seed in range(5)]
FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_registered", {})
    monkeypatch.setattr(data, "_registered", {})
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))


def die_at_seed_3(work: Callable[..., Any], job: Any) -> Any:
    if job.members[0].seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(job)


class BreakingPool(ProcessPoolExecutor):
    """A pool whose worker is killed when it comes to seed 3."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        return super().submit(die_at_seed_3, work, *args)


def die_while_sending_seed_3(work: Callable[..., Any], job: Any) -> Any:
    if job.members[0].seed == 3:
        frame: Any = sys._getframe()
        while "result_queue" not in frame.f_locals:
            frame = frame.f_back
        # The length of a result, and nothing of the result itself.
        queue = frame.f_locals["result_queue"]
        queue._wlock.acquire()
        os.write(queue._writer.fileno(), (1000).to_bytes(4))
        os.kill(os.getpid(), signal.SIGKILL)
    return work(job)


class ChokingPool(ProcessPoolExecutor):
    """A pool whose worker is killed in the middle of the result of seed 3."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        return super().submit(die_while_sending_seed_3, work, *args)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are others there")
def test_a_worker_killed_while_it_sends_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "LONGEST_SILENCE", 1.0)
    with (
        ChokingPool(2, SPAWN) as executor,
        pytest.raises(RuntimeError, match=r"after \d of 5 runs.*new executor"),
    ):
        kdlib.train_all(RECIPES, "cpu", executor=executor, stack=1)
    assert len(kdlib.train_all(RECIPES, "cpu")) == 5


def test_a_worker_trains_what_this_process_stores() -> None:
    distilled = SMALL.distil(SMALL.replace(seed=9), temperature=4, hard_weight=0.5)
    with ProcessPoolExecutor(1, SPAWN) as executor:
        (there,) = kdlib.train_all([distilled], "cpu", executor=executor)
    (here,) = kdlib.train_all([distilled], "cpu")
    assert (there.cached, here.cached) == (False, True)
    assert len(store.stored()) == 2  # the student and its teacher
    assert here.metrics == there.metrics


def test_a_broken_pool_says_so_and_keeps_what_had_arrived() -> None:
    with (
        BreakingPool(1, SPAWN) as executor,
        pytest.raises(RuntimeError, match=r"after \d of 5 runs.*new executor") as error,
    ):
        kdlib.train_all(RECIPES, "cpu", executor=executor)
    kept = sorted(entry.recipe["seed"] for entry in store.stored())
    assert f"after {len(kept)} of 5" in str(error.value)
    assert kept
    assert kept == [0, 1, 2][: len(kept)]  # the last of them may die on its way
    cached = [run.cached for run in kdlib.train_all(RECIPES, "cpu")]
    assert cached == [recipe.seed in kept for recipe in RECIPES]


class FailingPool(ThreadPoolExecutor):
    """A pool with no room for seed 0."""

    def submit(self, work: Callable[..., Any], /, job: Any, **_: Any) -> Future[Any]:
        def fail(job: Any) -> Any:
            raise MemoryError("no room")

        return super().submit(fail if job.members[0].seed == 0 else work, job)


def test_a_worker_that_fails_loses_only_its_own_run() -> None:
    with (
        FailingPool(1) as executor,
        pytest.raises(RuntimeError, match=r"MemoryError: no room\) after 4 of 5 runs.*stored"),
    ):
        kdlib.train_all(RECIPES, "cpu", executor=executor)
    assert sorted(entry.recipe["seed"] for entry in store.stored()) == [1, 2, 3, 4]


def test_a_pool_that_was_broken_or_shut_down_before_says_so() -> None:
    with ProcessPoolExecutor(1, SPAWN) as executor:
        with pytest.raises(BrokenExecutor):
            executor.submit(os._exit, 1).result()
        with pytest.raises(RuntimeError, match=r"BrokenProcessPool.* after 0 of 5 runs"):
            kdlib.train_all(RECIPES, "cpu", executor=executor)
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    with pytest.raises(RuntimeError, match=r"after shutdown.* after 0 of 5 runs"):
        kdlib.train_all(RECIPES, "cpu", executor=closed)


def test_threads_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipes = [SMALL.replace(seed=seed, dropout=(0.2, 0.5)) for seed in range(8)]
    with ThreadPoolExecutor(8) as executor:
        there = kdlib.train_all(recipes, "cpu", executor=executor)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "other"))
    here = kdlib.train_all(recipes, "cpu")
    for one, other in zip(here, there, strict=True):
        assert one.curves == other.curves
        assert all(weight.equal(other.weights[name]) for name, weight in one.weights.items())


def test_dask_brings_every_run_once_though_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = tmp_path / "deaths"

    def die_once(work: Callable[..., Any], job: Any) -> Any:
        if job.members[0].seed == 3 and not deaths.exists():
            deaths.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(job)

    written: list[str] = []
    write = store.write
    monkeypatch.setattr(store, "write", lambda key, *rest: written.append(key) or write(key, *rest))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        executor = client.get_executor()
        submit = executor.submit
        monkeypatch.setattr(executor, "submit", lambda *args: submit(die_once, *args))
        got = kdlib.train_all(RECIPES, "cpu", executor=executor)
    assert deaths.exists()
    assert [run.recipe for run in got] == RECIPES
    assert len(written) == len(set(written)) == len(RECIPES)


# --- workers that are forked after OpenMP has started

FORKED = """
import multiprocessing, sys
sys.path.insert(0, {path!r})
import torch, kdlib
from concurrent.futures import ProcessPoolExecutor
torch.set_num_threads(2)
(torch.rand(2000, 2000) @ torch.rand(2000, 2000)).sum()
recipe = kdlib.Recipe({model!r}, dataset="mnist-5k", steps=5)
recipes = [recipe.replace(seed=1), recipe.distil(recipe, temperature=4.0)]
with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
    made = kdlib.train_all(recipes, "cpu", executor=executor, threads={threads})
print([run.cached for run in made], {{run.provenance["threads"] for run in made}})
"""


def forked(threads: int, model: str = "lenet-half") -> subprocess.CompletedProcess[str]:
    path = str(Path(kdlib.__file__).parents[1])
    script = FORKED.format(path=path, threads=threads, model=model)
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


# Large weights are copied in parallel when a worker sends them.
@pytest.mark.parametrize("model", ["lenet-half", "mlp-100"])
def test_forked_workers_train_though_openmp_has_started_here(model: str) -> None:
    result = forked(1, model)
    assert result.stdout.strip() == "[False, False] {1}", result.stderr


def test_more_threads_in_a_forked_worker_are_refused_with_what_to_pass() -> None:
    result = forked(2)
    last = result.stderr.strip().splitlines()[-1]
    assert "threads is 2, which a forked worker cannot start" in last
    assert "mp_context=multiprocessing.get_context('spawn')" in last


def test_spawned_workers_have_the_threads_that_are_asked_for() -> None:
    with ProcessPoolExecutor(1, SPAWN) as executor:
        (run,) = kdlib.train_all([SMALL], "cpu", executor=executor, threads=2)
    assert run.provenance["threads"] == 2


# --- networks and data of the caller's own


class Own(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(-3)) * self.gain


def own_recipe() -> kdlib.Recipe:
    models.register("own", Own)
    data.register("blobs", blobs)
    return kdlib.Recipe("own", dataset="blobs", steps=3, batch_size=20)


@pytest.mark.parametrize("context", [FORK, SPAWN])
def test_a_network_and_data_from_a_file_reach_the_workers(context: Any) -> None:
    recipe = own_recipe()
    with ProcessPoolExecutor(1, context) as executor:
        (run,) = kdlib.train_all([recipe], "cpu", executor=executor)
    assert run.metrics["status"] == "ok"
    assert len(store.stored()) == 1


def test_what_cannot_be_sent_is_refused_in_one_line() -> None:
    recipe = own_recipe()
    models.register("own", lambda: Own())
    with (
        ProcessPoolExecutor(1, SPAWN) as executor,
        pytest.raises(RuntimeError, match=r"unknown model 'own'.*file that both can import"),
    ):
        kdlib.train_all([recipe], "cpu", executor=executor)
    with ProcessPoolExecutor(1, FORK) as executor:
        (run,) = kdlib.train_all([recipe], "cpu", executor=executor)
    assert not run.cached


def test_a_worker_that_would_train_another_network_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool that lives longer than a notebook's class: its workers still have the old one."""
    recipe = own_recipe()
    models.register("own", lambda: Own())
    with ProcessPoolExecutor(1, FORK) as executor:
        kdlib.train_all([recipe], "cpu", executor=executor)
        monkeypatch.setattr(Own, "gain", 0.5)
        with pytest.raises(RuntimeError, match=r"their keys differ\): start new workers"):
            kdlib.train_all([recipe], "cpu", executor=executor)
    assert len(store.stored()) == 1


def test_a_worker_with_other_code_or_data_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with ProcessPoolExecutor(1, FORK) as executor:
        executor.submit(os.getpid).result()
        monkeypatch.setattr(keys, "code_digest", lambda: "other code")
        with pytest.raises(RuntimeError, match="their keys differ"):
            kdlib.train_all([SMALL], "cpu", executor=executor)
    assert store.stored() == []


def test_a_job_is_small() -> None:
    """The logits that a teacher's run remembers stay here."""
    teacher = kdlib.train(SMALL, "cpu")
    before = len(pickle.dumps(teacher))
    teacher.logits("full")
    assert len(pickle.dumps(teacher)) > before + 4000 * 10 * 4
    sizes: list[int] = []

    class Weighing(ThreadPoolExecutor):
        def submit(self, work: Callable[..., Any], /, job: Any, **_: Any) -> Future[Any]:
            sizes.append(len(pickle.dumps((work, job))))
            return super().submit(work, job)

    with Weighing(1) as executor:
        kdlib.train_all([SMALL.distil(SMALL, temperature=2)], "cpu", executor=executor)
    assert sizes[-1] < before + 20_000
