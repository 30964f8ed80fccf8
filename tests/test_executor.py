"""Groups trained by other processes: every run arrives once, and what arrived is kept."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

import kdlib
from kdlib import runs, store

SMALL = kdlib.Recipe("mlp-8", dataset="mnist-5k", epochs=1)
RECIPES = [SMALL.replace(seed=seed) for seed in range(5)]


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))


def pool() -> dict[str, Any]:
    return {"max_workers": 1, "mp_context": multiprocessing.get_context("spawn")}


def die_at_seed_3(work: Callable[..., Any], members: list[kdlib.Recipe], *rest: Any) -> Any:
    if members[0].seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(members, *rest)


class BreakingPool(ProcessPoolExecutor):
    """A pool whose worker is killed when it comes to seed 3."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        return super().submit(die_at_seed_3, work, *args)


def test_a_worker_trains_what_this_process_stores() -> None:
    distilled = SMALL.distil(SMALL.replace(seed=9), temperature=4, hard_weight=0.5)
    with ProcessPoolExecutor(**pool()) as executor:
        (there,) = kdlib.train_all([distilled], "cpu", executor=executor)
    (here,) = kdlib.train_all([distilled], "cpu")
    assert (there.cached, here.cached) == (False, True)
    assert len(store.stored()) == 2  # the student and its teacher
    assert here.metrics == there.metrics


def test_a_broken_pool_says_so_and_keeps_what_had_arrived() -> None:
    with (
        BreakingPool(**pool()) as executor,
        pytest.raises(RuntimeError, match=r"after \d of 5 runs.*new executor") as error,
    ):
        kdlib.train_all(RECIPES, "cpu", executor=executor)
    kept = sorted(entry.recipe["seed"] for entry in store.stored())
    assert f"after {len(kept)} of 5" in str(error.value)
    assert kept
    assert kept == [0, 1, 2][: len(kept)]  # the last of them may die on its way
    cached = [run.cached for run in kdlib.train_all(RECIPES, "cpu")]
    assert cached == [recipe.seed in kept for recipe in RECIPES]


def fail_at_seed_0(members: list[kdlib.Recipe], *rest: Any) -> Any:
    if members[0].seed == 0:
        raise MemoryError("no room")
    return train_there(members, *rest)


train_there = runs._train_there


def test_a_worker_that_fails_loses_only_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_train_there", fail_at_seed_0)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(RuntimeError, match=r"MemoryError: no room\) after 4 of 5 runs.*stored"),
    ):
        kdlib.train_all(RECIPES, "cpu", executor=executor)
    assert sorted(entry.recipe["seed"] for entry in store.stored()) == [1, 2, 3, 4]


def test_a_pool_that_was_broken_or_shut_down_before_says_so() -> None:
    with ProcessPoolExecutor(**pool()) as executor:
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
    for mine, theirs in zip(here, there, strict=True):
        assert mine.curves == theirs.curves
        assert all(weight.equal(theirs.weights[name]) for name, weight in mine.weights.items())


def test_dask_brings_every_run_once_though_a_worker_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = tmp_path / "deaths"

    def die_once(work: Callable[..., Any], members: list[kdlib.Recipe], *rest: Any) -> Any:
        if members[0].seed == 3 and not deaths.exists():
            deaths.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(members, *rest)

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
