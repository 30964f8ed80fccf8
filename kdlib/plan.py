"""Cost before it is spent: a rehearsal of a notebook that lists its runs and trains none.

While the environment variable KDLIB_PLAN names a file, `train_all` writes each run that it
is asked for to it, as a line of JSON, and gives untrained networks for those not stored.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlib import group, loop
from kdlib.recipe import Recipe

_TIMED = (20, 80)  # steps of the two trainings that an estimate is made from


def ledger() -> Path | None:
    """The file that a rehearsal writes to, or None when trainings are meant."""
    name = os.environ.get("KDLIB_PLAN")
    return Path(name) if name else None


def note(path: Path, recipe: Recipe, key: str, device: torch.device, stored: bool) -> None:
    """Add a run to the ledger: its key, model, steps, and the seconds that it would take."""
    steps = group.steps(recipe, device)
    seconds = 0.0 if stored else estimate(recipe, steps, device)
    line = {"key": key, "model": recipe.model, "steps": steps, "seconds": seconds}
    with path.open("a") as file:
        print(json.dumps(line | {"stored": stored}), file=file)


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a ledger, each once, in the order in which they were first asked for."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first: dict[str, dict[str, Any]] = {}
    for line in lines:
        first.setdefault(line["key"], line)
    return list(first.values())


def estimate(recipe: Recipe, steps: int, device: torch.device) -> float:
    """Seconds for so many steps and for the counting of errors that comes with them."""
    few, many = (part.seconds for part in _a_few_steps(_shape(recipe), device))
    short, long = _TIMED  # a busy machine may take longer for the short one
    each = (many - few) / (long - short) if many > few else many / long
    epoch = len(group.training(recipe, device)) / recipe.batch_size
    reports = min(20, max(1, steps / epoch))
    return steps * each + reports * max(0.0, few - short * each)


def untrained(recipe: Recipe, device: torch.device) -> group.Trained:
    """In place of a training: a few steps of the same shape, which also tell the time."""
    return _a_few_steps(_shape(recipe), device)[0]


def _shape(recipe: Recipe) -> Recipe:
    fields = ("dataset", "batch_size", "dropout", "max_norm", "jitter", "precision", "validation")
    return Recipe(recipe.model, **{name: getattr(recipe, name) for name in fields})


@functools.cache
def _a_few_steps(shape: Recipe, device: torch.device) -> list[group.Trained]:
    group.train([shape.replace(steps=2)], device, {})  # what only the first steps take
    return [group.train([shape.replace(steps=steps)], device, {})[0] for steps in _TIMED]


def fit(model: nn.Module, data: Sequence[Any], loss: loop.Loss, **settings: Any) -> loop.Curves:
    """`loop.fit` in a rehearsal: the same call, one step long."""
    return loop.fit(model, data, loss, **settings | {"steps": 1, "report_every": 1})
