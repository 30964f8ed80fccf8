"""Run, train and train_all: a recipe's run is made once and kept."""

import functools
import pickle
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    if log_dir is not None:
        tensorboard.writer()  # where it is missing, nothing is trained
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
    return _run(recipe, *found, True, device, threads) if found else None


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
        """Make the runs that are not stored: in this process, in several, or in an executor's."""
        groups = _cut(self.missing, self.names, self.device, stack)
        # What is stored already does not count here: a call that goes on after an interruption
        # works as the interrupted one did.
        several = groups and len(memory.cut(self.recipes, self.device, stack)) > 1
        processes = workers.count(self.device, self.threads) if several else 1
        if executor is not None:
            self._train_elsewhere(executor, groups)
        elif processes == 1:
            self._train_here(workers.InTurn(), groups)
        else:
            self._compute_logits()
            with workers.side_by_side(processes) as pool:
                self._train_here(pool, groups, processes)

    def _compute_logits(self) -> None:
        """The teachers' logits, once, before there are several processes that need them."""
        with fast.threads(self.threads):
            for recipe in self.missing:
                if recipe.teacher and not recipe.jitter:
                    group.answers(recipe, self.made)

    def _train_here(self, pool: Executor, groups: list[list[Recipe]], processes: int = 1) -> None:
        """Train groups on this machine, in processes that store the runs themselves."""
        waiting = {
            pool.submit(
                _train_and_store, members, self._names_of(members), self.device, self.threads
            ): members
            for members in groups
        }
        with progress.of_groups(len(groups), processes) as show:
            for future in as_completed(waiting):
                try:
                    were_stored = future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        "a process ended in the middle of a training: what was trained before is "
                        "stored, and the same call goes on from there"
                    ) from error
                for recipe in waiting[future]:
                    self._read(recipe, cached=were_stored)
                    show(self.made[recipe].metrics["test_errors"])

    def _train_elsewhere(self, executor: Executor, groups: list[list[Recipe]]) -> None:
        """Train groups in an executor's workers, and store their runs as they arrive."""
        failure: BaseException | None = None
        waiting: dict[Future[list[group.Trained]], list[Recipe]] = {}
        for members in groups:
            try:
                waiting[executor.submit(_train_only, self._parcel(members))] = members
            except RuntimeError as error:  # broken or shut down: no further work
                failure = error
                break
        arrived = 0
        for future in as_completed(waiting):
            # One group's failure loses no other group's runs.
            failure = failure or future.exception()
            if future.exception() is None:
                for recipe, result in zip(waiting[future], future.result(), strict=True):
                    with store.locked([self.names[recipe]]):
                        _keep(recipe, self.names[recipe], result)
                    self._read(recipe, cached=False)
                    arrived += 1
        if failure is not None:
            raise RuntimeError(
                f"the executor failed ({type(failure).__name__}: {failure}) after {arrived} of "
                f"{len(self.missing)} runs: these are stored; the same call with a new executor "
                "trains the others"
            ) from failure

    def _parcel(self, members: list[Recipe]) -> "_Parcel":
        teachers = {
            teacher: replace(self.made[teacher], _logits={})  # too much to send
            for recipe in members
            for teacher in recipe.teacher
        }
        names, device = self._names_of(members), str(self.device)
        return _Parcel(members, names, device, self.threads, teachers, _registered(members))

    def _names_of(self, members: list[Recipe]) -> list[str]:
        return [self.names[recipe] for recipe in members]

    def _read(self, recipe: Recipe, cached: bool) -> None:
        found = store.read(self.names[recipe])
        if found:
            self.made[recipe] = _run(recipe, *found, cached, self.device, self.threads)


def _cut(
    missing: list[Recipe], names: dict[Recipe, str], device: torch.device, stack: int | None
) -> list[list[Recipe]]:
    """Groups of recipes; those of an interrupted call first, cut as it had cut them."""
    known = {name: recipe for recipe, name in names.items()}
    groups, rest = [], list(missing)
    for unfinished in store.unfinished() if missing else []:
        members = [known[name] for name in unfinished if name in known]
        if len(members) == len(unfinished) and any(recipe in rest for recipe in members):
            groups.append(members)
            rest = [recipe for recipe in rest if recipe not in members]
        elif {recipe.key for recipe in rest}.issuperset(_recipes_of(unfinished)):
            warnings.warn(
                "an interrupted training of these recipes has left a checkpoint of other "
                "training code, data or device: it is not used, and the training starts over; "
                "`kdlib runs --prune` removes it",
                stacklevel=2,
            )
    return groups + memory.cut(rest, device, stack)


def _recipes_of(names: list[str]) -> list[str]:
    """The keys of the recipes whose training a checkpoint has kept."""
    found: list[str] = (store.load_checkpoint(names) or {}).get("recipes", [""])
    return found


def _train_and_store(
    members: list[Recipe], names: list[str], device: torch.device, threads: int
) -> bool:
    """Train a group with checkpoints and store its runs; whether they were stored already."""
    with store.locked(names):
        if all(store.read(name) for name in names):
            return True  # another process has made them while this one waited
        taught = {t: train(t, device, threads=threads) for r in members for t in r.teacher}
        saved = time.monotonic()

        def on_state(state: dict[str, Any]) -> None:
            nonlocal saved
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                store.save_checkpoint(names, state | {"recipes": [r.key for r in members]})
                saved = time.monotonic()

        with slots.taken(threads), fast.threads(threads):
            resume = store.load_checkpoint(names)
            results = group.train(members, device, taught, resume, on_state)
        for recipe, name, result in zip(members, names, results, strict=True):
            _keep(recipe, name, result)
        store.drop_checkpoint(names)
    return False


@dataclass(frozen=True)
class _Parcel:
    """All that an executor's worker needs, wherever it runs; nothing is written there."""

    members: list[Recipe]
    names: list[str]
    device: str
    threads: int
    teachers: dict[Recipe, Run]
    registered: dict[tuple[str, str], bytes | Exception]


def _train_only(parcel: _Parcel) -> list[group.Trained]:
    """In a worker: train a group, and return what it gives."""
    if parcel.threads > 1 and workers.is_forked:
        raise ValueError(
            f"threads is {parcel.threads}, which a forked worker cannot start: use threads=1, or "
            "ProcessPoolExecutor(…, mp_context=multiprocessing.get_context('spawn'))"
        )
    device = data.resolve_device(parcel.device)
    # A forked worker has lost OpenMP's threads, and would wait for them: one thread, first of all.
    with workers.one_at_a_time, fast.threads(parcel.threads):
        for recipe, name in zip(parcel.members, parcel.names, strict=True):
            _check_worker(recipe, name, device, parcel.registered)
        return group.train(parcel.members, device, parcel.teachers)


def _registered(members: list[Recipe]) -> dict[tuple[str, str], bytes | Exception]:
    """The networks and datasets of some recipes that only this process may know, as pickled."""
    found: dict[tuple[str, str], bytes | Exception] = {}
    for recipe in (used for member in members for used in keys.family(member)):
        for module, name in ((models, recipe.model), (data, recipe.dataset)):
            made_by = module.registered(name)
            if made_by is not None:
                try:
                    found[module.__name__, name] = pickle.dumps(made_by)
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    found[module.__name__, name] = error
    return found


def _check_worker(
    recipe: Recipe,
    name: str,
    device: torch.device,
    registered: dict[tuple[str, str], bytes | Exception],
) -> None:
    """RuntimeError unless this worker's code, data and networks give the run of that key."""
    if _key_here(recipe, device) == name:
        return
    reason = "kdlib or the data differ there"
    for (module, known_as), pickled in registered.items():
        reason = f"{known_as!r} is not the same there"
        try:
            if isinstance(pickled, Exception):
                raise pickled
            made_by = pickle.loads(pickled)
        except Exception as error:
            raise RuntimeError(
                f"the worker does not have the registered {known_as!r} ({error}): define it in a "
                "file that both can import, or use an executor whose workers are forked"
            ) from error
        (models if module == models.__name__ else data).register(known_as, made_by)
    if _key_here(recipe, device) != name:
        raise RuntimeError(f"the worker would train another network, {reason}: start new workers")


def _key_here(recipe: Recipe, device: torch.device) -> str | None:
    try:
        return keys.key(recipe, device)
    except ValueError:  # a name that is unknown here
        return None


def _keep(recipe: Recipe, name: str, result: group.Trained) -> None:
    """Store what a training gave."""
    record = {
        "recipe": recipe.as_dict(),
        "metrics": result.metrics,
        "curves": result.curves,
        "seconds": result.seconds,
        "provenance": result.provenance,
    }
    store.write(name, record, result.weights)


def _run(
    recipe: Recipe,
    record: dict[str, Any],
    weights: dict[str, Tensor],
    cached: bool,
    device: torch.device,
    threads: int,
) -> Run:
    fields = {name: record[name] for name in ("metrics", "curves", "seconds", "provenance")}
    known = _known_logits(record["weights"], device, threads)
    return Run(
        recipe,
        **fields,
        weights=weights,
        cached=cached,
        device=device,
        threads=threads,
        _logits=known,
    )


@functools.lru_cache(maxsize=32)
def _known_logits(
    weights: str, device: torch.device, threads: int
) -> dict[tuple[str, str], Tensor]:
    """The logits that a network has given in this process, by the digest of its weights."""
    return {}


def _depth(recipe: Recipe) -> int:
    return 1 + max(map(_depth, recipe.teacher), default=-1)
