"""Cost before it is spent: a rehearsal of a notebook that lists its runs and trains none.

While the environment variable KDLIB_PLAN names a file, `train_all` writes each run that it
is asked for to it, as a line of JSON, and gives untrained networks for those not stored.
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlib import beside, group, loop
from kdlib.recipe import Recipe

_TIMED = 30  # steps that an estimate is made from, and the most of a reader's own loop


def ledger() -> Path | None:
    """The file that a rehearsal writes to, or None when trainings are meant."""
    name = os.environ.get("KDLIB_PLAN")
    return Path(name) if name else None


def note(path: Path, recipe: Recipe, key: str, steps: int, seconds: float | None) -> None:
    """Add a run to the ledger: key, model, steps, and its seconds or None where it is stored."""
    line = {"key": key, "model": recipe.model, "steps": steps, "seconds": seconds or 0.0}
    with path.open("a") as file:
        print(json.dumps(line | {"stored": seconds is None}), file=file)


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a ledger, each once, in the order in which they were first asked for."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first: dict[str, dict[str, Any]] = {}
    for line in lines:
        first.setdefault(line["key"], line)
    return list(first.values())


def untrained(
    members: Sequence[Recipe], device: torch.device, helpers: int = 1
) -> tuple[group.Trained, float]:
    """In place of a group's training: a run of a few steps, and the seconds a run would take
    of the time of `helpers` that train side by side."""
    first = members[0]
    fields = ("dataset", "batch_size", "dropout", "max_norm", "jitter", "precision", "validation")
    shape = Recipe(first.model, **{name: getattr(first, name) for name in fields})
    result, pace, report = _a_few_steps(shape, len(members), device, helpers)
    steps = group.steps(first, device)
    epoch = math.ceil(len(group.rows(first, device)) / first.batch_size)
    seconds = steps * pace + report * math.ceil(steps / max(epoch, steps / loop.REPORTS))
    return result, seconds / helpers


@functools.cache
def _a_few_steps(
    shape: Recipe, runs: int, device: torch.device, helpers: int
) -> tuple[group.Trained, float, float]:
    """A run of a stack of some shape, its share of the seconds of a step and of a report."""
    with beside.threads(helpers):
        _, short, long = (
            group.train([shape.replace(steps=n, seed=run) for run in range(runs)], device, {})[0]
            for n in (2, 2, _TIMED)  # the first takes what only the first takes
        )
    pace = max(0.0, long.seconds - short.seconds) / (_TIMED - 2)
    return long, pace, max(0.0, short.seconds - 2 * pace)


def fit(model: nn.Module, data: Sequence[Any], loss: loop.Loss, **settings: Any) -> loop.Curves:
    """`loop.fit` in a rehearsal: the same call, but a few steps long where it is long."""
    steps = min(settings.get("steps") or _TIMED, _TIMED)
    return loop.fit(model, data, loss, **settings | {"steps": steps})
