"""Run, train and train_all: recipes become calls of the loop, each made once."""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdlib import data, loop, losses, models, store
from kdlib.recipe import Recipe

CHECKPOINT_SECONDS = 30.0
_SHAPE = (
    "model", "dataset", "dropout", "batch_size", "schedule", "max_norm", "precision", "validation",
)  # fmt: skip


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

    def model(self) -> nn.Module:
        """The network, in eval mode, on the device that `train` was given."""
        network = build(self.recipe)
        if self.recipe.precision == "fp64":
            network.double()
        network.load_state_dict(self.weights)
        return network.to(self.device).eval()

    @functools.cache  # noqa: B019 -- a few megabytes, gone with the run
    def logits(self, split: str = "test") -> Tensor:
        """The logits (N, classes), float32, of a split: train, validation, full or test."""
        splits = ("train", "validation", "full", "test")
        if split not in splits:
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(splits)}")
        part: data.Split = getattr(data.load(self.recipe.dataset, self.device), split)
        with loop.settings(self.recipe.precision, self.device):
            return loop.predict(self.model(), part.images).float()


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
) -> list[Run]:
    """The runs of many recipes, in their order; those of equal shape are trained as a stack.

    See `train`. Interrupted, the same call goes on where it was.
    """
    where = data.resolve_device(device)
    wanted = dict.fromkeys(recipes)
    made: dict[Recipe, Run] = {}
    for level in _levels(wanted):
        made |= _make(level, where, made)
    runs = [made[recipe] for recipe in recipes]
    if log_dir is not None:
        for run in runs:
            _log(run, Path(log_dir))
    return runs


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe, its weights drawn by the recipe's seed."""
    options: dict[str, Any] = {"dropout": recipe.dropout} if any(recipe.dropout) else {}
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        return models.build(recipe.model, **options)


def key(recipe: Recipe, device: torch.device) -> str:
    """What a run is stored under: recipe, data, device type and training code."""
    parts = [recipe.key, device.type, code_digest()]
    for used in _family(recipe):
        parts.append(data.load(used.dataset, device).digest)
        factory = models.registered(used.model)
        if factory is not None:
            parts.append(_source_digest(factory, models.build(used.model)))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


@functools.cache
def code_digest() -> str:
    """A digest of the code that decides a run, without its comments and docstrings."""
    modules = (data, losses, models, loop, sys.modules[__name__])
    return hashlib.sha256("".join(map(_code, modules)).encode()).hexdigest()


def _code(item: Any) -> str:
    """An item's source without comments and docstrings."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(item)))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def _source_digest(factory: Callable[..., nn.Module], network: nn.Module) -> str:
    """A digest of a registered network: its factory and its own layers' classes."""
    kinds = {type(layer) for layer in network.modules()}
    own = sorted((k for k in kinds if not k.__module__.startswith("torch.")), key=repr)
    try:
        return repr(network) + "".join(_code(item) for item in (factory, *own))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"the source of the registered {factory!r} cannot be read ({error}): define it "
            "with def or class in a file or a notebook cell, so that a change is noticed"
        ) from error


def provenance(device: torch.device, precision: str = "fp32") -> dict[str, Any]:
    """Where a run comes from: device, versions, threads, date. No part of its key."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdlib": importlib.metadata.version("kdlib"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _family(recipe: Recipe) -> Iterator[Recipe]:
    yield recipe
    for teacher in recipe.teacher:
        yield from _family(teacher)


def _depth(recipe: Recipe) -> int:
    return 1 + max(map(_depth, recipe.teacher), default=-1)


def _levels(recipes: dict[Recipe, None]) -> list[list[Recipe]]:
    """All recipes and their teachers, teachers before their students."""
    family = dict.fromkeys(member for recipe in recipes for member in _family(recipe))
    depths = sorted({_depth(member) for member in family})
    return [[member for member in family if _depth(member) == depth] for depth in depths]


def _make(
    recipes: list[Recipe], device: torch.device, made: dict[Recipe, Run]
) -> dict[Recipe, Run]:
    """The runs of recipes whose teachers are made: read from the store or trained."""
    keys = {recipe: key(recipe, device) for recipe in recipes}
    runs = {recipe: _stored(recipe, keys[recipe], device) for recipe in recipes}
    missing = [recipe for recipe in recipes if runs[recipe] is None]
    for group in _groups(missing, device, keys):
        with store.locked([keys[recipe] for recipe in group]):
            for recipe in group:  # another process may have made them meanwhile
                runs[recipe] = _stored(recipe, keys[recipe], device)
            if any(runs[recipe] is None for recipe in group):
                runs |= _train_group(group, device, made, [keys[recipe] for recipe in group])
    return {recipe: run for recipe, run in runs.items() if run is not None}


def _stored(recipe: Recipe, name: str, device: torch.device) -> Run | None:
    found = store.read(name)
    if found is None:
        return None
    record, weights = found
    parts = (record["metrics"], record["curves"], record["seconds"], record["provenance"])
    return Run(recipe, *parts, weights, True, device)


def _steps(recipe: Recipe, samples: int) -> int:
    return recipe.steps or max(1, round(recipe.epochs * samples / recipe.batch_size))


def _rows(recipe: Recipe, device: torch.device) -> Tensor:
    return data.subset_rows(
        _training(recipe, device).labels, recipe.fraction, recipe.omit, recipe.subset_seed
    )


def _training(recipe: Recipe, device: torch.device) -> data.Split:
    dataset = data.load(recipe.dataset, device)
    return dataset.train if recipe.validation else dataset.full


def _groups(
    recipes: list[Recipe], device: torch.device, keys: dict[Recipe, str]
) -> list[list[Recipe]]:
    """Recipes that can be trained as one stack, cut to what the device holds."""
    groups: dict[Any, list[Recipe]] = {}
    for recipe in recipes:
        steps = _steps(recipe, len(_rows(recipe, device)))
        shape = tuple(getattr(recipe, field) for field in _SHAPE)
        groups.setdefault((shape, steps, bool(recipe.teacher)), []).append(recipe)
    size = 1 if device.type == "cpu" else 64
    return [
        group[start : start + size]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def _train_group(
    group: list[Recipe], device: torch.device, made: dict[Recipe, Run], keys: list[str]
) -> dict[Recipe, Run]:
    """Train recipes of one shape together, and store their runs."""
    first = group[0]
    dataset, training = data.load(first.dataset, device), _training(first, device)
    held_out = "validation" if first.validation else "test"
    watched: data.Split = getattr(dataset, held_out)
    rows = [_rows(recipe, device) for recipe in group]
    precision = _effective(first.precision, device)
    networks = [build(recipe).to(device) for recipe in group]
    model = networks[0] if len(group) == 1 else loop.Stack(networks)
    parts, teacher, loss = _lesson(group, device, made, training)
    resume = store.load_checkpoint(keys)
    started = time.monotonic() - (resume or {}).get("seconds", 0.0)
    with _progress(group) as on_step:
        saved = time.monotonic()

        def on_report(state: loop.State) -> None:
            nonlocal saved
            on_step(state)
            if time.monotonic() - saved > CHECKPOINT_SECONDS and state.step < state.steps:
                seconds = {"seconds": time.monotonic() - started}
                store.save_checkpoint(keys, state.snapshot() | seconds)
                saved = time.monotonic()

        curves = loop.fit(
            model,
            [training.images, training.labels, *parts],
            loss,
            steps=_steps(first, len(rows[0])),
            batch_size=first.batch_size,
            learning_rate=_field(group, "learning_rate"),
            momentum=_field(group, "momentum"),
            schedule=first.schedule,
            max_norm=first.max_norm,
            jitter=_field(group, "jitter"),
            rows=rows[0] if len(group) == 1 else rows,
            teacher=teacher,
            precision=precision,
            seed=_field(group, "seed"),
            evaluate={held_out: (watched.images, watched.labels)},
            on_report=on_report,
            resume=resume,
        )
    share = (time.monotonic() - started) / len(group)
    states = model.unstack() if isinstance(model, loop.Stack) else [model.state_dict()]
    runs = {}
    for number, (recipe, weights) in enumerate(zip(group, states, strict=True)):
        own = curves if len(group) == 1 else _own(curves, number)
        run = Run(recipe, {}, own, share, provenance(device, precision), weights, False, device)
        run.metrics.update(_metrics(run, dataset, rows[number]))
        record = {
            "recipe": recipe.as_dict(),
            "metrics": run.metrics,
            "curves": run.curves,
            "seconds": run.seconds,
            "provenance": run.provenance,
        }
        store.write(keys[number], record, weights)
        runs[recipe] = run
    store.drop_checkpoint(keys)
    return runs


class _Committee(nn.Module):
    """Several teachers as one: the mean of their logits, a geometric mean of probabilities."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([member(inputs) for member in self.members]).mean(0)


def _lesson(
    group: list[Recipe], device: torch.device, made: dict[Recipe, Run], training: data.Split
) -> tuple[list[Any], nn.Module | None, loop.Loss]:
    """What a group learns from: more targets, a teacher for each batch, the loss."""
    first = group[0]
    if not first.teacher:
        return [], None, lambda logits, labels: losses.cross_entropy(logits, labels)
    scale, share = _field(group, "temperature"), _field(group, "hard_weight")
    if len(group) > 1:
        scale, share = (torch.tensor(value, device=device) for value in (scale, share))

    def loss(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, taught, labels, temperature=scale, hard_weight=share
        )

    if any(recipe.jitter for recipe in group):  # inputs change: ask the teacher each time
        committees = [_Committee([made[t].model() for t in recipe.teacher]) for recipe in group]
        return [], committees[0] if len(group) == 1 else loop.Stack(committees), loss
    known: dict[Recipe, Tensor] = {}
    split = "train" if first.validation else "full"
    for teacher in dict.fromkeys(teacher for recipe in group for teacher in recipe.teacher):
        run = made[teacher]
        same = teacher.dataset == first.dataset
        known[teacher] = (
            run.logits(split) if same else loop.predict(run.model(), training.images).float()
        )
    taught = [torch.stack([known[t] for t in recipe.teacher]).mean(0) for recipe in group]
    return [taught[0] if len(group) == 1 else taught], None, loss


def _field(group: list[Recipe], name: str) -> Any:
    """A field of one recipe as it is, of several as a list."""
    values = [getattr(recipe, name) for recipe in group]
    return values[0] if len(values) == 1 else values


def _own(curves: loop.Curves, number: int) -> loop.Curves:
    """The curves of one run of a stack."""
    return {
        name: values if name == "step" else [value[number] for value in values]
        for name, values in curves.items()
    }


def _metrics(run: Run, dataset: data.Dataset, rows: Tensor) -> dict[str, Any]:
    """Errors on the held-out samples, and whether the training diverged.

    Diverged: a loss or logits that are not finite, or one and the same answer to all of
    the training samples, which have several labels. One dead class is no divergence.
    """
    metrics: dict[str, Any] = {"status": "ok"}
    for split in ("validation", "test") if run.recipe.validation else ("test",):
        labels = getattr(dataset, split).labels
        errors = int((run.logits(split).argmax(-1) != labels).sum())
        metrics[f"{split}_errors"] = errors
        metrics[f"{split}_accuracy"] = 1 - errors / len(labels)
    part = dataset.train if run.recipe.validation else dataset.full
    part = part[rows[:: max(1, len(rows) // 1000)]]
    answers = loop.predict(run.model(), part.images)
    constant = len(part.labels.unique()) > 1 and len(answers.argmax(-1).unique()) == 1
    finite = math.isfinite(run.curves["train_loss"][-1]) and bool(answers.isfinite().all())
    if constant or not finite:
        metrics["status"] = "diverged"
    return metrics


def _effective(precision: str, device: torch.device) -> str:
    """The precision that is used: bf16 on a processor that is slow at it is fp32."""
    if precision == "bf16" and device.type == "cpu":
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return precision


@contextlib.contextmanager
def _progress(group: list[Recipe]) -> Iterator[Callable[[loop.State], None]]:
    """One bar for a group, in a terminal only: steps, loss, accuracy, errors so far."""
    silent = not sys.stderr.isatty()
    name = group[0].model + (f" x {len(group)}" if len(group) > 1 else "")
    with tqdm(total=0, desc=name, unit="step", disable=silent, leave=False) as bar:

        def show(state: loop.State) -> None:
            bar.total = state.steps
            last = {name: values[-1] for name, values in state.curves.items() if name != "step"}
            flat = {k: v if not isinstance(v, list) else sum(v) / len(v) for k, v in last.items()}
            bar.set_postfix({name: f"{value:.4g}" for name, value in flat.items()}, refresh=False)
            bar.update(state.step - bar.n)

        yield show


def _log(run: Run, folder: Path) -> None:
    """A run's curves as TensorBoard scalars, each under its own tag at its true steps."""
    from torch.utils.tensorboard import SummaryWriter

    name = f"{run.recipe.model}-{run.recipe.key}"
    with SummaryWriter(str(folder / name)) as writer:
        for tag, values in run.curves.items():
            for step, value in zip(run.curves["step"], values, strict=True):
                if tag != "step":
                    writer.add_scalar(tag.replace("_", "/", 1), value, step)
