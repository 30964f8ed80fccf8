"""Recipes of one shape as one call of `fit`: their samples, their targets, their results."""

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdlib import data, loop, losses, models, progress
from kdlib.precision import default_dtype, effective, settings
from kdlib.provenance import provenance
from kdlib.recipe import Recipe
from kdlib.stack import Stack


class Teacher(Protocol):
    """A trained network, and its logits, which it computes once."""

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
    """The untrained network of a recipe, on the CPU, its weights drawn by the recipe's seed."""
    options: dict[str, Any] = {"dropout": recipe.dropout} if any(recipe.dropout) else {}
    # Whatever defaults a notebook has set, an fp32 recipe means float32 weights, drawn here.
    with default_dtype(torch.float32), torch.device("cpu"), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(recipe.seed)
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


def classes(network: nn.Module, inputs: Tensor, recipe: Recipe, device: torch.device) -> int:
    """How many logits a network gives. ValueError where it does not fit the recipe's dataset."""
    expected, size = data.load(recipe.dataset, device).classes, tuple(inputs.shape[-2:])
    problem = f"the model {recipe.model!r} does not fit the dataset {recipe.dataset!r}"
    try:
        found: int = network(inputs).shape[-1]
    # PyTorch refuses the images, or what comes has no shape, such as a dictionary.
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{problem}: it gives no logits for images of {size} ({error})") from error
    if found < expected:
        raise ValueError(
            f"{problem}: it gives {found} logits, expected one for each of {expected} classes"
        )
    return found


def train(
    group: Sequence[Recipe],
    device: torch.device,
    teachers: Mapping[Recipe, Teacher],
    resume: dict[str, Any] | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
) -> list[Trained]:
    """Train recipes of one shape together.

    on_state: called after each report but the last with what `resume` takes.
    """
    started = time.monotonic() - (resume or {}).get("seconds", 0.0)
    networks = [build(recipe).to(device) for recipe in group]
    model = networks[0] if len(group) == 1 else Stack(networks)
    with (
        default_dtype(torch.float32),
        # A recipe's run has a status, which tells what the warning would.
        warnings.catch_warnings(action="ignore", category=loop.Diverged),
        progress.of_a_training(group[0].model, len(group)) as show,
    ):

        def on_report(state: loop.State) -> None:
            show(state)
            if on_state is not None and state.step < state.steps:
                on_state(state.snapshot() | {"seconds": time.monotonic() - started})

        settings_of_fit = _settings(group, device, teachers)
        curves = loop.fit(model, **settings_of_fit, on_report=on_report, resume=resume)
    # A run of a stack has no time of its own.
    share = (time.monotonic() - started) / len(group)
    origin = provenance(device, effective(group[0].precision, device))
    states = model.unstack() if isinstance(model, Stack) else [model.state_dict()]
    results = []
    for run, (recipe, network, weights) in enumerate(zip(group, networks, states, strict=True)):
        network.load_state_dict(weights)
        own = _curves_of(run, curves) if isinstance(model, Stack) else curves
        # Networks are judged without bf16 and tf32, whatever they were trained in.
        with settings("fp32", device):
            metrics = _metrics(network.eval(), recipe, device, own)
        weights = {name: weight.cpu() for name, weight in weights.items()}
        results.append(Trained(metrics, own, weights, share, origin))
    return results


def _settings(
    group: Sequence[Recipe], device: torch.device, teachers: Mapping[Recipe, Teacher]
) -> dict[str, Any]:
    """What `fit` is given to train a group, but for the network."""
    first, samples = group[0], training(group[0], device)
    held_out = "validation" if first.validation else "test"
    watched: data.Split = getattr(data.load(first.dataset, device), held_out)
    cached_logits, teacher, loss = _targets(group, device, teachers)
    # Recipes of one shape agree in these fields; in the others each has a value of its own.
    shared = ("batch_size", "schedule", "max_norm", "precision")
    own = ("learning_rate", "momentum", "jitter", "seed")
    return {
        **{name: getattr(first, name) for name in shared},
        **{name: _field(group, name) for name in own},
        "data": [samples.images, samples.labels, *cached_logits],
        "loss": loss,
        "teacher": teacher,
        "steps": steps(first, device),
        "rows": _one([rows(recipe, device) for recipe in group]),
        "evaluate": {held_out: (watched.images, watched.labels)},
    }


class _Committee(nn.Module):
    """Several teachers as one: the mean of their logits, a geometric mean of probabilities."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([member(inputs) for member in self.members]).mean(0)


def _targets(
    group: Sequence[Recipe], device: torch.device, teachers: Mapping[Recipe, Teacher]
) -> tuple[list[Any], nn.Module | None, loop.Loss]:
    """What a group is trained on: cached logits, or a teacher for each batch; and the loss."""
    # In a group either all recipes have a teacher or none has; so with smoothed labels.
    if group[0].label_smoothing:
        smoothing = _numbers(group, "label_smoothing", device)
        return [], None, functools.partial(losses.cross_entropy, label_smoothing=smoothing)
    if not group[0].teacher:
        return [], None, losses.cross_entropy
    temperature = _numbers(group, "temperature", device)
    hard_weight = _numbers(group, "hard_weight", device)

    def loss(logits: Tensor, labels: Tensor, soft_targets: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, soft_targets, labels, temperature=temperature, hard_weight=hard_weight
        )

    # Where the inputs change, the teacher has to see each batch.
    if any(recipe.jitter for recipe in group):
        committees = [_Committee([teachers[t].model() for t in r.teacher]) for r in group]
        return [], committees[0] if len(group) == 1 else Stack(committees), loss
    return [_one([answers(recipe, teachers) for recipe in group])], None, loss


def answers(recipe: Recipe, teachers: Mapping[Recipe, Teacher]) -> Tensor:
    """The mean of the logits of a recipe's teachers, for the samples that it trains on."""
    samples = "train" if recipe.validation else "full", recipe.dataset
    return torch.stack([teachers[teacher].logits(*samples) for teacher in recipe.teacher]).mean(0)


def _numbers(group: Sequence[Recipe], name: str, device: torch.device) -> float | Tensor:
    """A field for the loss: one number, or for a stack a tensor of one per run."""
    values = _field(group, name)
    if len(group) == 1:
        return float(values)
    # On a GPU the loss cannot look at the temperatures, so their dtype has to decide.
    exact = group[0].precision == "fp64" or max(values) > losses.HIGHEST_IN_FLOAT32
    return torch.tensor(values, dtype=torch.float64 if exact else torch.float32, device=device)


def _field(group: Sequence[Recipe], name: str) -> Any:
    return _one([getattr(recipe, name) for recipe in group])


def _one(values: list[Any]) -> Any:
    """The value of one run as it is, those of several as a list."""
    return values[0] if len(values) == 1 else values


def _curves_of(run: int, curves: loop.Curves) -> loop.Curves:
    """The curves of one run of a stack."""
    return {
        name: values if name == "step" else [value[run] for value in values]
        for name, values in curves.items()
    }


def _metrics(
    network: nn.Module, recipe: Recipe, device: torch.device, curves: loop.Curves
) -> dict[str, Any]:
    """Errors on the held-out samples, and whether the training diverged.

    Diverged: a loss or logits that are not finite, or one and the same answer to all of
    the training samples, which have several labels. One dead class is no divergence.
    """
    dataset = data.load(recipe.dataset, device)
    metrics: dict[str, Any] = {"status": "ok"}
    for name in ("validation", "test") if recipe.validation else ("test",):
        split = getattr(dataset, name)
        errors = loop.count_errors(network, split.images, split.labels)
        metrics[f"{name}_errors"] = errors
        metrics[f"{name}_accuracy"] = 1 - errors / len(split)
    samples = training(recipe, device)[rows(recipe, device)]
    # A thousand of them are enough to see whether all answers are the same.
    some = samples[:: max(1, len(samples) // 1000)]
    logits = loop.predict(network, some.images)
    constant = len(some.labels.unique()) > 1 and len(logits.argmax(-1).unique()) == 1
    finite = math.isfinite(curves["train_loss"][-1]) and bool(logits.isfinite().all())
    if constant or not finite:
        metrics["status"] = "diverged"
    return metrics
