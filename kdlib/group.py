"""Recipes of one shape as one call of the loop: what they learn from, and how many fit."""

import contextlib
import importlib.metadata
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdlib import data, loop, losses, models
from kdlib.recipe import Recipe

_SHAPE = (
    "model", "dataset", "dropout", "batch_size", "schedule", "max_norm", "precision", "validation",
)  # fmt: skip
_AT_WORK = 2**27  # bytes: cuBLAS's workspaces, 32 MiB a stream on an H200, and a teacher


class Teacher(Protocol):
    """Whom a group learns from: a trained network, and its answers, which it remembers."""

    def model(self) -> nn.Module: ...
    def logits(self, split: str, dataset: str) -> Tensor: ...


@dataclass(frozen=True)
class Trained:
    """What a training gives for one recipe: metrics, curves, weights (on the CPU), its share
    of the seconds, and where it was trained."""

    metrics: dict[str, Any]
    curves: loop.Curves
    weights: dict[str, Tensor]
    seconds: float
    provenance: dict[str, Any]


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe, its weights drawn by the recipe's seed."""
    options: dict[str, Any] = {"dropout": recipe.dropout} if any(recipe.dropout) else {}
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(recipe.seed)  # that of the CPU alone
        network = models.build(recipe.model, **options)
    return network.double() if recipe.precision == "fp64" else network


def steps(recipe: Recipe, device: torch.device) -> int:
    """How many steps a recipe trains for."""
    samples = len(rows(recipe, device))
    return recipe.steps or max(1, round(recipe.epochs * samples / recipe.batch_size))


def rows(recipe: Recipe, device: torch.device) -> Tensor:
    """The samples that a recipe trains on: rows of `training(recipe, device)`."""
    labels = training(recipe, device).labels
    return data.subset_rows(labels, recipe.fraction, recipe.omit, recipe.subset_seed)


def training(recipe: Recipe, device: torch.device) -> data.Split:
    """The training samples: without the held-out sixth where the recipe validates."""
    dataset = data.load(recipe.dataset, device)
    return dataset.train if recipe.validation else dataset.full


def cut(
    recipes: Sequence[Recipe], device: torch.device, stack: int | None = None
) -> list[list[Recipe]]:
    """Recipes in groups of one shape, each no larger than the device holds.

    stack: the most runs a group. By default what fits into memory on a GPU, and one on a
    CPU, where a stack is slower than its runs one by one (see the benchmark page). The same
    recipes on the same device are cut in the same way. Raises MemoryError for a recipe that
    does not fit even alone.
    """
    if stack is not None and stack < 1:
        raise ValueError(f"stack is {stack}: expected None or a whole number, 1 or more")
    shapes: dict[Any, list[Recipe]] = {}
    for recipe in recipes:
        shape = [getattr(recipe, field) for field in _SHAPE]
        lesson = (bool(recipe.teacher), bool(recipe.teacher and recipe.jitter))
        shapes.setdefault((*shape, steps(recipe, device), *lesson), []).append(recipe)
    groups = []
    for members in shapes.values():
        most = _capacity(members[0], device)
        size = min(most, stack or (most if device.type == "cuda" else 1))
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def memory(recipe: Recipe, device: torch.device) -> int:
    """Bytes that one more run of a stack takes at most, its data left out."""
    network, samples = build(recipe), training(recipe, device)
    weights = sum(weight.numel() for weight in network.parameters())
    kind = next(network.parameters()).dtype
    inputs = data.to_input(samples.images[:2].cpu()).to(kind)
    outputs = 0

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal outputs
        outputs += output[0].numel()

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    classes = _classes(network, inputs, recipe, device)
    batch = max(recipe.batch_size, 2000)  # training or evaluation, whichever is larger
    drawn = loop.BLOCK * recipe.batch_size * 8 * (3 if recipe.jitter else 1)
    numbers = 6 * weights + 3 * batch * (outputs + inputs[0].numel())
    size: int = kind.itemsize
    return size * numbers + 2 * drawn + len(samples) * classes * 4


def planned(recipe: Recipe, runs: int, device: torch.device) -> int:
    """Bytes that a group takes at most, with its data and what PyTorch keeps for its work."""
    dataset = data.load(recipe.dataset, device)
    images = dataset.full.images.numel() + dataset.test.images.numel()
    return runs * memory(recipe, device) + 2 * images + _AT_WORK


def _classes(network: nn.Module, inputs: Tensor, recipe: Recipe, device: torch.device) -> int:
    """How many logits a network gives; ValueError where it cannot take or answer the data."""
    needed, size = data.load(recipe.dataset, device).classes, tuple(inputs.shape[-2:])
    problem = f"the model {recipe.model!r} does not fit the dataset {recipe.dataset!r}"
    try:
        classes: int = network(inputs).shape[-1]
    except RuntimeError as error:
        raise ValueError(f"{problem}: it does not take images of {size} ({error})") from error
    if classes < needed:
        raise ValueError(
            f"{problem}: it gives {classes} logits, expected one for each of {needed} classes"
        )
    return classes


def _capacity(recipe: Recipe, device: torch.device) -> int:
    """How many runs of a recipe's shape the device holds, leaving a third of it free."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows does not say
        total = 8 * 2**30
    needed = memory(recipe, device)
    most = int((total * 2 / 3 - planned(recipe, 0, device)) // needed)
    if most < 1:
        raise MemoryError(
            f"one run of {recipe.model!r} at batch_size={recipe.batch_size} needs about "
            f"{needed / 2**30:.1f} GiB, more than {device} can give "
            f"({total / 2**30:.1f} GiB): use a smaller batch_size or model"
        )
    return most


def train(
    group: Sequence[Recipe],
    device: torch.device,
    teachers: Mapping[Recipe, Teacher],
    resume: dict[str, Any] | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
) -> list[Trained]:
    """Train recipes of one shape together; on_state gets what `resume` takes, report by report."""
    first = group[0]
    dataset, samples = data.load(first.dataset, device), training(first, device)
    held_out = "validation" if first.validation else "test"
    watched: data.Split = getattr(dataset, held_out)
    chosen = [rows(recipe, device) for recipe in group]
    networks = [build(recipe).to(device) for recipe in group]
    model = networks[0] if len(group) == 1 else loop.Stack(networks)
    taught, teacher, loss = _lesson(group, device, teachers)
    precision = loop.effective(first.precision, device)
    started = time.monotonic() - (resume or {}).get("seconds", 0.0)
    length = steps(first, device)
    with _progress(group, length * first.batch_size / len(chosen[0])) as show:

        def on_report(state: loop.State) -> None:
            show(state)
            if on_state is not None and state.step < state.steps:
                on_state(state.snapshot() | {"seconds": time.monotonic() - started})

        curves = loop.fit(
            model,
            [samples.images, samples.labels, *taught],
            loss,
            steps=length,
            batch_size=first.batch_size,
            learning_rate=_field(group, "learning_rate"),
            momentum=_field(group, "momentum"),
            schedule=first.schedule,
            max_norm=first.max_norm,
            jitter=_field(group, "jitter"),
            rows=_one(chosen),
            teacher=teacher,
            precision=precision,
            seed=_field(group, "seed"),
            evaluate={held_out: (watched.images, watched.labels)},
            on_report=on_report,
            resume=resume,
        )
    share = (time.monotonic() - started) / len(group)
    states = model.unstack() if isinstance(model, loop.Stack) else [model.state_dict()]
    results = []
    origin = provenance(device, precision)
    for number, (recipe, network, weights) in enumerate(zip(group, networks, states, strict=True)):
        network.load_state_dict(weights)
        own = _own(curves, number) if isinstance(model, loop.Stack) else curves
        with loop.settings("fp32", device):
            metrics = _metrics(network.eval(), recipe, dataset, samples[chosen[number]], own)
        weights = {name: weight.cpu() for name, weight in weights.items()}
        results.append(Trained(metrics, own, weights, share, origin))
    return results


class _Committee(nn.Module):
    """Several teachers as one: the mean of their logits, a geometric mean of probabilities."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([member(inputs) for member in self.members]).mean(0)


def _lesson(
    group: Sequence[Recipe], device: torch.device, teachers: Mapping[Recipe, Teacher]
) -> tuple[list[Any], nn.Module | None, loop.Loss]:
    """What a group learns from: further targets, a teacher for each batch, the loss."""
    if not group[0].teacher:
        return [], None, losses.cross_entropy
    scale, share = _field(group, "temperature"), _field(group, "hard_weight")
    if len(group) > 1:
        exact = torch.float64 if group[0].precision == "fp64" else torch.float32
        scale, share = (torch.tensor(v, dtype=exact, device=device) for v in (scale, share))

    def loss(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, taught, labels, temperature=scale, hard_weight=share
        )

    if any(recipe.jitter for recipe in group):  # inputs change: ask the teacher each time
        committees = [_Committee([teachers[t].model() for t in r.teacher]) for r in group]
        return [], committees[0] if len(group) == 1 else loop.Stack(committees), loss
    return [_one([answers(recipe, teachers) for recipe in group])], None, loss


def answers(recipe: Recipe, teachers: Mapping[Recipe, Teacher]) -> Tensor:
    """The mean of the logits of a recipe's teachers, for the samples that it trains on."""
    samples = "train" if recipe.validation else "full", recipe.dataset
    return torch.stack([teachers[teacher].logits(*samples) for teacher in recipe.teacher]).mean(0)


def _field(group: Sequence[Recipe], name: str) -> Any:
    return _one([getattr(recipe, name) for recipe in group])


def _one(values: list[Any]) -> Any:
    """The value of one run as it is, those of several as a list."""
    return values[0] if len(values) == 1 else values


def _own(curves: loop.Curves, number: int) -> loop.Curves:
    """The curves of one run of a stack."""
    return {
        name: values if name == "step" else [value[number] for value in values]
        for name, values in curves.items()
    }


def _metrics(
    network: nn.Module,
    recipe: Recipe,
    dataset: data.Dataset,
    samples: data.Split,
    curves: loop.Curves,
) -> dict[str, Any]:
    """Errors on the held-out samples, and whether the training diverged.

    Diverged: a loss or logits that are not finite, or one and the same answer to all of
    the training samples, which have several labels. One dead class is no divergence.
    """
    metrics: dict[str, Any] = {"status": "ok"}
    for name in ("validation", "test") if recipe.validation else ("test",):
        split = getattr(dataset, name)
        errors = loop.count_errors(network, split.images, split.labels)
        metrics[f"{name}_errors"] = errors
        metrics[f"{name}_accuracy"] = 1 - errors / len(split)
    some = samples[:: max(1, len(samples) // 1000)]
    logits = loop.predict(network, some.images)
    constant = len(some.labels.unique()) > 1 and len(logits.argmax(-1).unique()) == 1
    finite = math.isfinite(curves["train_loss"][-1]) and bool(logits.isfinite().all())
    if constant or not finite:
        metrics["status"] = "diverged"
    return metrics


def provenance(device: torch.device, precision: str = "fp32") -> dict[str, Any]:
    """Where a run comes from: device, versions, threads, date. No part of its key."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdlib": _version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("kdlib")
    except importlib.metadata.PackageNotFoundError:  # imported from a clone, as notebooks do
        return "not installed"


def processor() -> str:
    """The processor's name, as the system tells it."""
    path = Path("/proc/cpuinfo")  # Linux; others tell Python
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextlib.contextmanager
def _progress(group: Sequence[Recipe], epochs: float) -> Iterator[Callable[[loop.State], None]]:
    """One bar for a group, in a terminal only: runs x epochs, loss, accuracy, errors so far."""
    from tqdm import tqdm  # a bare machine measures without it

    name = f"{group[0].model}, {len(group)} run{'s'[: len(group) > 1]} x {epochs:.3g} epochs"
    quiet = not sys.stderr.isatty() or multiprocessing.parent_process() is not None
    with tqdm(desc=name, unit="step", disable=quiet, leave=False) as bar:

        def show(state: loop.State) -> None:
            bar.total = state.steps * len(group)
            last = {name: values[-1] for name, values in state.curves.items() if name != "step"}
            mean = {k: sum(v) / len(v) if isinstance(v, list) else v for k, v in last.items()}
            bar.set_postfix({name: f"{value:.4g}" for name, value in mean.items()}, refresh=False)
            bar.update(state.step * len(group) - bar.n)

        yield show
