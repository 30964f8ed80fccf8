"""Cost before it is spent: a rehearsal of a notebook that lists its runs and trains none.

The press puts a first cell into the notebook, and `start` then replaces what trains in that
kernel: kdlib itself knows nothing of rehearsals.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kdlib
from kdlib import data, fast, group, keys, loop, memory, reasoning, runs, slots, tensorboard
from kdlib.book import reference
from kdlib.recipe import Recipe

# Steps that an estimate is made from, and the most of a loop of the notebook's own.
TIMED = 30


def first_cell(ledger: Path) -> str:
    """The code that starts a rehearsal in the kernel; kdlib is the one that runs here."""
    folder = Path(__file__).parents[2]
    return (
        f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
        f"from kdlib.book import rehearsal\nrehearsal.start({str(ledger)!r})"
    )


def start(ledger: str) -> None:
    """From here on this process trains nothing: see `train_all`; and it keeps no results."""
    # What trains inside `group.train` is this very function, a few steps long as well.
    real = loop.fit

    def fit(*given: Any, **settings: Any) -> loop.Curves:
        steps = min(settings.get("steps") or TIMED, TIMED)
        return real(*given, **settings | {"steps": steps})

    replaced = {
        "train_all": functools.partial(train_all, ledger),
        "train": lambda recipe, *where, **rest: train_all(ledger, [recipe], *where, **rest)[0],
        "fit": fit,
        "keep": lambda chapter, profile, *_, **__: reference.draft(chapter, profile),
    }
    # kdlib names the same functions in several modules.
    for name, function in replaced.items():
        for module in (kdlib, runs, loop, reference):
            if hasattr(module, name):
                setattr(module, name, function)
    fit_reasoner = reasoning.fit
    reasoning.fit = lambda *given, steps, **rest: fit_reasoner(
        *given, steps=min(steps, TIMED), **rest
    )


def train_all(
    ledger: str, recipes: Sequence[Recipe], device: str | torch.device = "auto",
    log_dir: str | Path | None = None, *, stack: int | None = None, executor: object = None,
    threads: int = 1,
) -> list[runs.Run]:  # fmt: skip
    """In place of `kdlib.train_all`: untrained networks for the runs that are not stored.

    Each run goes into the ledger, a file.
    """
    where = data.resolve_device(device)
    made: dict[Recipe, runs.Run] = {}
    for level in runs.levels(recipes):
        for run in filter(None, (runs.stored(recipe, where) for recipe in level)):
            made[run.recipe] = run
            _note(ledger, run.recipe, where, None)
        groups = memory.cut([recipe for recipe in level if recipe not in made], where, stack)
        # Groups are trained side by side on the cores of a CPU, and in turn on a GPU.
        side_by_side = min(slots.cores() // threads, len(groups)) if where.type == "cpu" else 1
        for members in groups:
            result, seconds = untrained(members, where, threads)
            for recipe in members:
                _note(ledger, recipe, where, seconds / max(1, side_by_side))
                made[recipe] = runs.Run(recipe, **vars(result), cached=False, device=where)
    found = [made[recipe] for recipe in recipes]
    if log_dir is not None:
        tensorboard.log(found, Path(log_dir))
    return found


def untrained(
    members: Sequence[Recipe], device: torch.device, threads: int = 1
) -> tuple[group.Trained, float]:
    """In place of a group's training: a run of a few steps, and the seconds of a run."""
    first = members[0]
    # Seeds, rates and teachers' logits change the time of a step by nothing worth timing.
    fields = ("dataset", "batch_size", "dropout", "max_norm", "jitter", "precision", "validation")
    shape = Recipe(first.model, **{name: getattr(first, name) for name in fields})
    result, pace, report = _a_few_steps(shape, len(members), device, threads)
    steps = group.steps(first, device)
    epoch = math.ceil(len(group.rows(first, device)) / first.batch_size)
    return result, steps * pace + report * math.ceil(steps / max(epoch, steps / loop.REPORTS))


@functools.cache
def _a_few_steps(
    shape: Recipe, count: int, device: torch.device, threads: int
) -> tuple[group.Trained, float, float]:
    """A run of a stack of some shape, its share of the seconds of a step and of a report."""
    with fast.threads(threads):
        _, short, long = (
            group.train([shape.replace(steps=n, seed=run) for run in range(count)], device, {})[0]
            # The first training also loads the data and starts the device: not counted.
            for n in (2, 2, TIMED)
        )
    pace = max(0.0, long.seconds - short.seconds) / (TIMED - 2)
    return long, pace, max(0.0, short.seconds - 2 * pace)


def _note(ledger: str, recipe: Recipe, device: torch.device, seconds: float | None) -> None:
    """Add a run to the ledger, once; its seconds are None if it is stored."""
    noted, key = read(Path(ledger)), keys.key(recipe, device)
    line = {"model": recipe.model, "steps": group.steps(recipe, device), "seconds": seconds}
    noted.setdefault(key, line)
    Path(ledger).write_text(json.dumps(noted), encoding="utf-8")


def read(ledger: Path) -> dict[str, dict[str, Any]]:
    """The runs of a ledger, by their keys, in the order in which they were first asked for."""
    return json.loads(ledger.read_text(encoding="utf-8")) if ledger.is_file() else {}


def report(chapter: str, noted: dict[str, dict[str, Any]], stopped: str) -> str:
    """A ledger in words; stopped: the first cell that failed, and how."""
    new = [line["seconds"] for line in noted.values() if line["seconds"] is not None]
    lines = [
        f"{chapter}: {len(noted)} runs, {len(noted) - len(new)} of them in the store, "
        f"about {sum(new):.0f} s for the others"
    ]
    if stopped:
        lines.append(f"  a guess from here on, since untrained networks fail {stopped}")
    if not noted:
        lines.append("  it trains in loops of its own, whose time is not estimated")
    for key, line in noted.items():
        time = "stored" if line["seconds"] is None else f"{line['seconds']:6.1f} s"
        lines.append(f"  {key}  {line['model']:16} {line['steps']:7} steps  {time}")
    return "\n".join(lines)
