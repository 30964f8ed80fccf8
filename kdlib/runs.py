"""Run, train and train_all: a recipe's run is made once and kept."""

import contextlib
import functools
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import (
    check,
    data,
    fast,
    group,
    keys,
    loop,
    memory,
    models,
    progress,
    slots,
    store,
    tensorboard,
    workers,
)  # fmt: skip
from kdlib.precision import settings
from kdlib.recipe import Recipe

CHECKPOINT_SECONDS = 30.0
LONGEST_SILENCE = 10.0  # seconds without a result, after which a pool's workers are looked at
ROUNDS = 10  # of training runs again that another process prunes as they are made


@dataclass(frozen=True, eq=False)
class Run:
    """A trained network with its recipe, its metrics and where it comes from.

    metrics: "status" ("ok" or "diverged"), "test_errors", "test_accuracy" (0 to 1), and with
    recipe.validation "validation_errors", "validation_accuracy". curves: lists over reports:
    "step", "train_loss" (nats), "train_accuracy" and "test_errors" or, with validation,
    "validation_errors". seconds: its share of the training time. cached: it was stored.
    threads: how many its logits are computed with.
    """

    recipe: Recipe
    metrics: dict[str, Any]
    curves: dict[str, list[Any]]
    seconds: float
    provenance: dict[str, Any]
    weights: dict[str, Tensor]
    cached: bool
    device: torch.device
    threads: int = 1
    _logits: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def model(self) -> nn.Module:
        """The network, in eval mode, on the device that `train` was given."""
        network = group.build(self.recipe)
        network.load_state_dict(self.weights)
        return network.to(self.device).eval()

    def logits(self, split: str = "test", dataset: str | None = None) -> Tensor:
        """The logits (N, classes), float32, on a split: train, validation, full or test.

        dataset: its name, by default that of the recipe. Computed once per process.
        """
        splits = ("train", "validation", "full", "test")
        if split not in splits:
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(splits)}")
        digits = data.load(dataset or self.recipe.dataset, self.device)
        if (digits.digest, split) not in self._logits:
            part: data.Split = getattr(digits, split)
            with settings("fp32", self.device), fast.threads(self.threads):
                self._logits[digits.digest, split] = loop.predict(self.model(), part.images).float()
        return self._logits[digits.digest, split]


def train(
    recipe: Recipe,
    device: str | torch.device = "auto",
    log_dir: str | Path | None = None,
    *,
    threads: int = 1,
) -> Run:
    """The run of a recipe: from the store if it is there, else trained and stored.

    Teachers are trained first. log_dir: a folder for TensorBoard's scalars. threads: how many
    this training has, on a CPU; another number changes a run by rounding alone.
    Raises what `data.load`, `data.resolve_device` and the store raise.
    """
    return train_all([recipe], device, log_dir, threads=threads)[0]


def train_all(
    recipes: Sequence[Recipe],
    device: str | torch.device = "auto",
    log_dir: str | Path | None = None,
    *,
    stack: int | None = None,
    executor: Executor | None = None,
    threads: int = 1,
) -> list[Run]:
    """The runs of many recipes, in their order; those of equal shape are trained as a stack.

    stack: the most runs trained as one (default: see `memory.cut`). threads: of each training.
    On a CPU, trainings of one thread run side by side, one per core, where processes can be
    forked (Linux without CUDA). executor: a `concurrent.futures.Executor` whose workers train
    instead; they return runs, which this process stores as they arrive. Without one, an
    interrupted call goes on from its last checkpoint when it is made again.
    Raises what `train` raises; RuntimeError when a worker breaks, with the runs kept
    that had arrived.
    """
    where = data.resolve_device(device)
    threads = check.value("threads", threads, check.COUNT)
    # Where it is missing, nothing should be trained.
    if log_dir is not None:
        tensorboard.writer()
    made: dict[Recipe, Run] = {}
    for level in levels(recipes):
        _Level(level, where, threads, made).make(stack, executor)
    runs = [made[recipe] for recipe in recipes]
    if log_dir is not None:
        tensorboard.log(runs, Path(log_dir))
    return runs


def levels(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """All recipes and their teachers, teachers before their students."""
    family = dict.fromkeys(member for recipe in recipes for member in keys.family(recipe))
    depths = sorted({_depth(member) for member in family})
    return [[member for member in family if _depth(member) == depth] for depth in depths]


def stored(recipe: Recipe, device: torch.device, threads: int = 1) -> Run | None:
    """The run of a recipe, if the store has it."""
    found = store.read(keys.key(recipe, device))
    return _run(recipe, found, True, device, threads) if found else None


@dataclass
class _Level:
    """Recipes whose teachers are made, and the runs that are made so far."""

    recipes: list[Recipe]
    device: torch.device
    threads: int
    made: dict[Recipe, Run]

    def __post_init__(self) -> None:
        self.names = {recipe: keys.key(recipe, self.device) for recipe in self.recipes}
        for recipe in self.recipes:
            self._read(recipe, cached=True)
        self.missing = [recipe for recipe in self.recipes if recipe not in self.made]

    def make(self, stack: int | None, executor: Executor | None) -> None:
        """Make the runs that are not stored."""
        for _ in range(ROUNDS):
            self._make(stack, executor)
            self.missing = [recipe for recipe in self.recipes if recipe not in self.made]
            if not self.missing:
                return
        raise store.StoreError(
            f"runs vanish from {store.folder()} as soon as they are stored: another process "
            "prunes them, or the disk is faulty; make the call again"
        )

    def _make(self, stack: int | None, executor: Executor | None) -> None:
        """Make them in this process, in several, or in an executor's."""
        groups = _cut(self.missing, self.names, self.device, stack)
        if executor is not None:
            return self._train(groups, executor, _train_elsewhere)
        processes = min(workers.count(self.device, self.threads), len(groups))
        if processes < 2:
            return self._train(groups, workers.InTurn(), _train_here)
        self._answer(processes)
        with workers.side_by_side(processes) as pool:
            self._train(groups, pool, _train_here, processes)
        return None

    def _answer(self, processes: int) -> None:
        """Compute the teachers' logits, once, before there are processes that need them."""
        wanted: dict[tuple[Recipe, str, str], tuple[str, str]] = {}
        for recipe in self.missing:
            split = "train" if recipe.validation else "full"
            name = data.load(recipe.dataset, self.device).digest, split
            # With jitter the teacher sees each batch.
            for teacher in () if recipe.jitter else recipe.teacher:
                if name not in self.made[teacher]._logits:
                    wanted[teacher, split, recipe.dataset] = name
        if not wanted:
            return
        # Logits that a worker fails to give are computed where they are needed. In files, since
        # Python would wait forever for a worker that dies while it sends so much.
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.suppress(BrokenExecutor, OSError),
            workers.side_by_side(min(processes, len(wanted))) as pool,
        ):
            found = {
                asked: pool.submit(_logits, *asked, self.device, self.threads, f"{folder}/{at}.npy")
                for at, asked in enumerate(wanted)
            }
            for asked, future in found.items():
                logits = torch.from_numpy(np.load(future.result()))
                self.made[asked[0]]._logits[wanted[asked]] = logits

    def _train(
        self, groups: list[list[Recipe]], pool: Executor, work: Callable[..., Any], count: int = 1
    ) -> None:
        """Have a pool train groups; its runs are stored, by its workers or as they arrive here."""
        waiting: dict[Future[list[Any]], list[Recipe]] = {}
        failure: Exception | None = None
        arrived, is_here = 0, work is _train_here
        try:
            for members in groups:
                waiting[pool.submit(work, self._job(members, work))] = members
        except RuntimeError as error:
            if is_here and not isinstance(error, BrokenExecutor):
                raise
            # The pool is broken or shut down, and takes no further work.
            failure = error
        with progress.of_groups(sum(map(len, groups)), count) as show:
            for future in _as_completed(set(waiting), pool):
                try:
                    results = future.result()
                except Exception as error:
                    # A worker that dies, or fails elsewhere, loses no other worker's runs.
                    if is_here and not isinstance(error, BrokenExecutor):
                        raise
                    failure = failure or error
                    continue
                for recipe, result in zip(waiting[future], results, strict=True):
                    # A worker elsewhere cannot write into this store; one here has done so.
                    if isinstance(result, group.Trained):
                        with store.locked([self.names[recipe]]):
                            _keep(recipe, self.names[recipe], result)
                    self._read(recipe, cached=result is True)
                    # Not there if another process has pruned it already: see `make`.
                    if recipe in self.made:
                        show(self.made[recipe].metrics["test_errors"])
                        arrived += 1
        if failure is not None:
            raise RuntimeError(
                f"a worker failed ({type(failure).__name__}: {failure}) after {arrived} of "
                f"{len(self.missing)} runs: these are stored; the same call, with a new executor "
                "if it had one, trains the others"
            ) from failure

    def _job(self, members: list[Recipe], work: Callable[..., Any]) -> "_Job":
        names = [self.names[recipe] for recipe in members]
        job = _Job(members, names, str(self.device), self.threads)
        if work is _train_here:
            return job
        # The logits that are known here would be too much to send.
        taught = {t: replace(self.made[t], _logits={}) for r in members for t in r.teacher}
        return replace(job, teachers=taught, registered=_registered(members))

    def _read(self, recipe: Recipe, cached: bool) -> None:
        found = store.read(self.names[recipe])
        if found:
            self.made[recipe] = _run(recipe, found, cached, self.device, self.threads)


def _as_completed(waiting: set[Future[Any]], pool: Executor) -> Iterator[Future[Any]]:
    """Futures as they are done; those of a pool that has lost a worker fail, sooner or later."""
    while waiting:
        done, waiting = wait(waiting, LONGEST_SILENCE, FIRST_COMPLETED)
        if not done:
            workers.end_if_broken(pool)
        yield from done


def _cut(
    missing: list[Recipe], names: dict[Recipe, str], device: torch.device, stack: int | None
) -> list[list[Recipe]]:
    """Groups of recipes; those of an interrupted call first, cut as it had cut them."""
    known = {name: recipe for recipe, name in names.items()}
    groups, rest = [], list(missing)
    for unfinished in store.unfinished():
        # Whole or not at all: a checkpoint of three runs is of no use to two of them.
        members = [known[name] for name in unfinished if name in known]
        if len(members) == len(unfinished):
            if any(recipe in missing for recipe in members):
                groups.append(members)
                rest = [recipe for recipe in rest if recipe not in members]
            else:
                # The process was killed after it had stored the last of them.
                with contextlib.suppress(OSError):
                    store.drop_checkpoint(unfinished)
            continue
        state = store.load_checkpoint(unfinished) or {} if rest else {}
        if rest and {recipe.key for recipe in rest}.issuperset(state.get("recipes", [""])):
            warnings.warn(
                "an interrupted training of these recipes has left a checkpoint of other "
                "training code, data or device: it is not used, and the training starts over; "
                "`kdlib runs --prune` removes it",
                stacklevel=2,
            )
    return groups + memory.cut(rest, device, stack)


@dataclass(frozen=True)
class _Job:
    """A group to train, as a worker gets it, and what a worker elsewhere cannot know."""

    members: list[Recipe]
    names: list[str]
    device: str
    threads: int
    teachers: dict[Recipe, Run] = field(default_factory=dict)
    registered: list[tuple[Callable[..., None], str, bytes]] = field(default_factory=list)


def _train_here(job: _Job) -> list[bool]:
    """Train a group with checkpoints and store its runs; whether they were stored already."""
    device = torch.device(job.device)
    with store.locked(job.names):
        # Another process may have made them while this one waited.
        if all(store.read(name) for name in job.names):
            return [True] * len(job.names)
        # From the store, since the weights of teachers would be much to send for each student.
        teachers = (teacher for recipe in job.members for teacher in recipe.teacher)
        taught = {teacher: train(teacher, device, threads=job.threads) for teacher in teachers}
        saved = time.monotonic()

        def on_state(state: dict[str, Any]) -> None:
            nonlocal saved
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                recipes = [recipe.key for recipe in job.members]
                store.save_checkpoint(job.names, state | {"recipes": recipes})
                saved = time.monotonic()

        with slots.taken(job.threads), fast.threads(job.threads):
            resume = store.load_checkpoint(job.names)
            results = group.train(job.members, device, taught, resume, on_state)
        for each in zip(job.members, job.names, results, strict=True):
            # To write a run again is to lose it, should this process be killed at that moment.
            if store.read(each[1]) is None:
                _keep(*each)
        store.drop_checkpoint(job.names)
    return [False] * len(job.names)


def _logits(
    recipe: Recipe, split: str, dataset: str, device: torch.device, threads: int, path: str
) -> str:
    """In a worker: compute a stored run's logits into a file; its path."""
    # Before a core is taken: a run that has vanished is trained again, and takes one itself.
    run = train(recipe, device, threads=threads)
    with slots.taken(threads):
        np.save(path, run.logits(split, dataset).numpy())
    return path


def _train_elsewhere(job: _Job) -> list[group.Trained]:
    """In an executor's worker: train a group and return what it gives; nothing is written."""
    if job.threads > 1 and workers.is_forked:
        raise ValueError(
            f"threads is {job.threads}, which a forked worker cannot start: use threads=1, or "
            "ProcessPoolExecutor(…, mp_context=multiprocessing.get_context('spawn'))"
        )
    if workers.is_forked:
        # It has lost OpenMP's threads, and would wait for them. For good: PyTorch copies a large
        # weight in parallel when a result is sent.
        torch.set_num_threads(1)
    with workers.one_at_a_time, fast.threads(job.threads):
        device = data.resolve_device(job.device)
        _agree(job, device)
        return group.train(job.members, device, job.teachers)


def _registered(members: list[Recipe]) -> list[tuple[Callable[..., None], str, bytes]]:
    """The networks and datasets that only this process may know, if they can be sent."""
    found = []
    for recipe in (used for member in members for used in keys.family(member)):
        for module, name in ((models, recipe.model), (data, recipe.dataset)):
            made_by = module.registered(name)
            # What a notebook or a closure defines cannot be pickled. A forked worker has it.
            with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
                if made_by is not None:
                    found.append((module.register, name, pickle.dumps(made_by)))
    return found


def _agree(job: _Job, device: torch.device) -> None:
    """RuntimeError unless this worker would train the runs of the caller's keys."""
    # Most workers need no telling, and a pickled network may be one that they have already.
    for is_told in (False, True):
        reason: object = "their keys differ"
        try:
            for register, name, made_by in job.registered if is_told else []:
                register(name, pickle.loads(made_by))
            # ValueError for a network that is unknown here.
            for recipe in job.members:
                group.build(recipe)
            if [keys.key(recipe, device) for recipe in job.members] == job.names:
                return
        except (ValueError, AttributeError, ImportError, pickle.PickleError) as error:
            reason = error
    raise RuntimeError(
        f"the worker does not have this process's kdlib, data and networks ({reason}): start new "
        "workers, and define networks and data in a file that both can import"
    )


def _keep(recipe: Recipe, name: str, result: group.Trained) -> None:
    """Store what a training gave."""
    record = {part: value for part, value in vars(result).items() if part != "weights"}
    store.write(name, {"recipe": recipe.as_dict()} | record, result.weights)


def _run(recipe: Recipe, found: Any, cached: bool, device: torch.device, threads: int) -> Run:
    """A run as the store has it."""
    record, weights = found
    own = {name: record[name] for name in ("metrics", "curves", "seconds", "provenance")}
    # Shared by all `Run`s of the same weights, so that a teacher is evaluated once per process.
    own["_logits"] = _known_logits(record["weights"], device, threads)
    return Run(recipe, weights=weights, cached=cached, device=device, threads=threads, **own)


@functools.lru_cache(maxsize=32)
def _known_logits(
    weights: str, device: torch.device, threads: int
) -> dict[tuple[str, str], Tensor]:
    """The logits that a network has given in this process, by the digest of its weights."""
    return {}


def _depth(recipe: Recipe) -> int:
    return 1 + max(map(_depth, recipe.teacher), default=-1)
