"""Run, train and train_all: a recipe's run is made once and kept."""

import ast
import functools
import hashlib
import inspect
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib import beside, data, group, loop, losses, models, store
from kdlib.recipe import Recipe

CHECKPOINT_SECONDS = 30.0
_ONE_AT_A_TIME = threading.Lock()  # PyTorch's generators are a process's, not a thread's
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Run:
    """A trained network with its recipe, its metrics and where it comes from.

    metrics: "status" ("ok" or "diverged"), "test_errors", "test_accuracy" (0 to 1), and with
    recipe.validation "validation_errors", "validation_accuracy". curves: lists over reports:
    "step", "train_loss" (nats), "train_accuracy" and "test_errors" or, with validation,
    "validation_errors". seconds: its share of the training time. cached: it was stored.
    """

    recipe: Recipe
    metrics: dict[str, Any]
    curves: dict[str, list[Any]]
    seconds: float
    provenance: dict[str, Any]
    weights: dict[str, Tensor]
    cached: bool
    device: torch.device
    _logits: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def model(self) -> nn.Module:
        """The network, in eval mode, on the device that `train` was given."""
        network = group.build(self.recipe)
        network.load_state_dict(self.weights)
        return network.to(self.device).eval()

    def logits(self, split: str = "test", dataset: str | None = None) -> Tensor:
        """The logits (N, classes), float32, on a split: train, validation, full or test.

        dataset: its name, by default that of the recipe. Computed once in a process.
        """
        splits = ("train", "validation", "full", "test")
        if split not in splits:
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(splits)}")
        digits = data.load(dataset or self.recipe.dataset, self.device)
        if (digits.digest, split) not in self._logits:
            part: data.Split = getattr(digits, split)
            with loop.settings("fp32", self.device):
                answers = loop.predict(self.model(), part.images).float()
            self._logits[digits.digest, split] = answers
        return self._logits[digits.digest, split]


def train(
    recipe: Recipe, device: str | torch.device = "auto", log_dir: str | Path | None = None
) -> Run:
    """The run of a recipe: from the store where it is there, else trained and stored.

    Teachers are trained first. log_dir: a folder for TensorBoard's scalars.
    Raises what `data.load`, `data.resolve_device` and the store raise.
    """
    return train_all([recipe], device, log_dir)[0]


def train_all(
    recipes: Sequence[Recipe],
    device: str | torch.device = "auto",
    log_dir: str | Path | None = None,
    *,
    stack: int | None = None,
    executor: Executor | None = None,
) -> list[Run]:
    """The runs of many recipes, in their order; those of equal shape are trained as a stack.

    stack: the most runs trained as one (default: see `group.cut`). On a CPU, Linux and
    without CUDA, several groups are trained side by side, with one thread each. executor:
    where groups are trained instead; its workers return runs, this process stores them as
    they arrive. Without one, an interrupted call goes on from its last checkpoint when it is
    made again.
    Raises what `train` raises; RuntimeError when the executor breaks, with the runs kept
    that had arrived.
    """
    where = data.resolve_device(device)
    writer = _writer() if log_dir is not None else None
    made: dict[Recipe, Run] = {}
    for level in levels(recipes):
        keys = {recipe: key(recipe, where) for recipe in level}
        runs = {recipe: _stored(recipe, keys[recipe], where) for recipe in level}
        made |= {recipe: run for recipe, run in runs.items() if run is not None}
        missing = [recipe for recipe in level if recipe not in made]
        several = missing and len(group.cut(level, where, stack)) > 1
        helpers = beside.processes(where) if several else 1
        work = _scatter(executor, stack) if executor else _here(stack, helpers)
        for recipe, run in work(missing, keys, where, made):
            made[recipe] = run
    runs_in_order = [made[recipe] for recipe in recipes]
    if writer is not None and log_dir is not None:
        for run in runs_in_order:
            _log(run, Path(log_dir), writer)
    return runs_in_order


Made = Iterator[tuple[Recipe, Run]]
Work = Callable[[list[Recipe], dict[Recipe, str], torch.device, dict[Recipe, Run]], Made]


def _here(stack: int | None, helpers: int) -> Work:
    """Train on this computer, under locks, with checkpoints: in turn, or side by side.

    What is stored already does not count in `helpers`: else a call that goes on where it
    was interrupted would compute with other numbers of threads, and get other bits.
    """

    def work(
        missing: list[Recipe],
        keys: dict[Recipe, str],
        device: torch.device,
        made: dict[Recipe, Run],
    ) -> Made:
        groups = _cut(missing, keys, device, stack) if missing else []

        def make(number: int) -> list[Run]:
            names = [keys[recipe] for recipe in groups[number]]
            with store.locked(names):
                runs = [_stored(recipe, keys[recipe], device) for recipe in groups[number]]
                found = [run for run in runs if run is not None]
                if len(found) == len(names):  # another process made them while this one waited
                    return found
                return _train_here(groups[number], names, device, made)

        def made_before(number: int) -> list[bool]:
            return [run.cached for run in make(number)]

        if helpers == 1:
            for number in range(len(groups)):
                yield from ((run.recipe, run) for run in make(number))
            return
        from tqdm import tqdm  # a bare machine measures without it

        for recipe in missing:
            if recipe.teacher and not recipe.jitter:
                group.answers(recipe, made)  # asked once, before there are several processes
        name, quiet = f"{len(groups)} trainings, {helpers} at a time", not sys.stderr.isatty()
        arrivals = beside.call(made_before, len(groups), helpers)
        with tqdm(arrivals, name, len(groups), leave=False, disable=quiet) as bar:
            for number, cached in bar:
                for run, before in zip(make(number), cached, strict=True):  # out of the store
                    bar.set_postfix(errors=run.metrics["test_errors"], refresh=False)
                    yield run.recipe, replace(run, cached=before)

    return work


def _cut(
    missing: list[Recipe], keys: dict[Recipe, str], device: torch.device, stack: int | None
) -> list[list[Recipe]]:
    """Groups of recipes; those of an interrupted call first, cut as it had cut them."""
    known = {name: recipe for recipe, name in keys.items()}
    groups, rest = [], list(missing)
    for names in store.unfinished():
        members = [known[name] for name in names if name in known]
        if len(members) == len(names) and any(recipe in rest for recipe in members):
            groups.append(members)
            rest = [recipe for recipe in rest if recipe not in members]
        elif {recipe.key for recipe in rest}.issuperset(_asked(names)):
            warnings.warn(
                "an interrupted training of these recipes has left a checkpoint of other "
                "training code, data or device: it is not used, the training starts anew; "
                "`kdlib runs --prune` removes it",
                stacklevel=2,
            )
    return groups + group.cut(rest, device, stack)


def _asked(names: list[str]) -> list[str]:
    """The keys of the recipes whose training a checkpoint has kept."""
    asked: list[str] = (store.load_checkpoint(names) or {}).get("recipes", [""])
    return asked


def _train_here(
    members: Sequence[Recipe], names: list[str], device: torch.device, made: dict[Recipe, Run]
) -> list[Run]:
    """Train a group with checkpoints, and store its runs."""
    saved = time.monotonic()

    def on_state(state: dict[str, Any]) -> None:
        nonlocal saved
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            store.save_checkpoint(names, state | {"recipes": [r.key for r in members]})
            saved = time.monotonic()

    trained = group.train(members, device, made, store.load_checkpoint(names), on_state)
    runs = [_keep(*each, device) for each in zip(members, names, trained, strict=True)]
    store.drop_checkpoint(names)
    return runs


def _scatter(executor: Executor, stack: int | None) -> Work:
    """Hand the groups to an executor's workers, and store their runs as they arrive."""

    def work(
        missing: list[Recipe],
        keys: dict[Recipe, str],
        device: torch.device,
        made: dict[Recipe, Run],
    ) -> Made:
        waiting, arrived = {}, 0
        failure: Exception | None = None
        for members in group.cut(missing, device, stack):
            taught = {
                teacher: replace(made[teacher], _logits={})  # too much to send
                for recipe in members
                for teacher in recipe.teacher
            }
            try:
                waiting[executor.submit(_train_there, members, str(device), taught)] = members
            except RuntimeError as error:  # broken or shut down: no further work
                failure = error
                break
        for future in as_completed(waiting):
            try:
                results = future.result()
            except Exception as error:  # go on: what the others give is kept
                failure = failure or error
                continue
            for recipe, result in zip(waiting[future], results, strict=True):
                with store.locked([keys[recipe]]):
                    run = _keep(recipe, keys[recipe], result, device)
                yield recipe, run
                arrived += 1
        if failure is not None:
            raise RuntimeError(
                f"the executor failed ({type(failure).__name__}: {failure}) after {arrived} of "
                f"{len(missing)} runs: these are stored; the same call with a new executor "
                "trains the others"
            ) from failure

    return work


def _train_there(
    members: Sequence[Recipe], device: str, taught: dict[Recipe, Run]
) -> list[group.Trained]:
    """In a worker: train a group; nothing is written there."""
    with _ONE_AT_A_TIME:
        return group.train(members, data.resolve_device(device), taught)


def _keep(recipe: Recipe, name: str, result: group.Trained, device: torch.device) -> Run:
    """Store what a training gave."""
    record = {
        "recipe": recipe.as_dict(),
        "metrics": result.metrics,
        "curves": result.curves,
        "seconds": result.seconds,
        "provenance": result.provenance,
    }
    record = store.write(name, record, result.weights)
    return _run(recipe, record, result.weights, False, device)


def stored(recipe: Recipe, device: torch.device) -> Run | None:
    """The run of a recipe, if it is in the store."""
    return _stored(recipe, key(recipe, device), device)


def _stored(recipe: Recipe, name: str, device: torch.device) -> Run | None:
    found = store.read(name)
    return _run(recipe, *found, True, device) if found else None


def _run(
    recipe: Recipe,
    record: dict[str, Any],
    weights: dict[str, Tensor],
    cached: bool,
    device: torch.device,
) -> Run:
    fields = {name: record[name] for name in ("metrics", "curves", "seconds", "provenance")}
    known = _answers(record["weights"], device)
    return Run(recipe, **fields, weights=weights, cached=cached, device=device, _logits=known)


@functools.lru_cache(maxsize=32)
def _answers(weights: str, device: torch.device) -> dict[tuple[str, str], Tensor]:
    """The logits that a network has given in this process, by the digest of its weights."""
    return {}


def key(recipe: Recipe, device: torch.device) -> str:
    """What a run is stored under: recipe, data, device type and training code."""
    parts = [recipe.key, device.type, code_digest()]
    for used in _family(recipe):
        parts.append(data.load(used.dataset, device).digest)
        factory = models.registered(used.model)
        if factory is not None:
            parts.append(_own_code(factory, models.build(used.model)))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


@functools.cache
def code_digest() -> str:
    """A digest of the code that decides a run, without its comments and docstrings."""
    modules = (data, losses, models, loop, group)
    return hashlib.sha256("".join(map(_code, modules)).encode()).hexdigest()


def _code(item: Any) -> str:
    """An item's source without comments and docstrings."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(item)))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def _own_code(factory: Callable[..., nn.Module], network: nn.Module) -> str:
    """The code of a registered network: its factory and the classes of its own layers."""
    kinds = {kind for layer in network.modules() for kind in type(layer).__mro__}
    foreign = ("torch.", "builtins")
    own = sorted((k for k in kinds if not k.__module__.startswith(foreign)), key=repr)
    try:
        return repr(network) + "".join(_code(item) for item in dict.fromkeys([factory, *own]))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"the source of the registered {factory!r} cannot be read ({error}): define it "
            "with def or class in a file or a notebook cell, so that a change is noticed"
        ) from error


def _family(recipe: Recipe) -> Iterator[Recipe]:
    yield recipe
    for teacher in recipe.teacher:
        yield from _family(teacher)


def _depth(recipe: Recipe) -> int:
    return 1 + max(map(_depth, recipe.teacher), default=-1)


def levels(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """All recipes and their teachers, teachers before their students."""
    family = dict.fromkeys(member for recipe in recipes for member in _family(recipe))
    depths = sorted({_depth(member) for member in family})
    return [[member for member in family if _depth(member) == depth] for depth in depths]


def _writer() -> Any:
    """TensorBoard's writer, found before anything is trained."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"log_dir needs TensorBoard ({error}): pip install tensorboard", name="tensorboard"
        ) from error
    return SummaryWriter


def _log(run: Run, folder: Path, writer: Any) -> None:
    """A run's curves as TensorBoard scalars, each under its own tag at its true steps."""
    with writer(str(folder / f"{run.recipe.model}-{run.recipe.key}")) as scalars:
        for tag, values in run.curves.items():
            for step, value in zip(run.curves["step"], values, strict=True):
                if tag != "step":
                    scalars.add_scalar(tag.replace("_", "/", 1), value, step)
