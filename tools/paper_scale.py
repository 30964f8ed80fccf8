"""The paper's experiments at its scale, seed by seed, for a GPU that is at hand for minutes.

    python tools/paper_scale.py EXPERIMENT [--only PART] [--seeds N] [--together N] [--minutes M]

tried      settings that may beat the recorded 67.5 and 77.6, on held-out digits
averaged   the same for weights that are averaged over the end of the training
beyond     one of the settings (--only NAME) on all training digits
rates      learning rates for the factorial, on held-out digits
factorial  the eight students of chapter 7a and their teachers, with the best of these rates
lengths    the three networks of chapter 7, trained for 20 to 320 epochs
threes     students without threes, as in chapter 8: temperature, hard weight and epochs

Every experiment has a record, book/reference/EXPERIMENT. A call trains the seeds that it lacks and
records each of them once it is complete, so only the record has to travel from one machine to
the next. --only: rows whose name has this part. --together: seeds trained at a time, as stacks on
a GPU. --minutes: no seed is begun after them. --length shortens all trainings, for a test.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kdlib
from kdlib import Recipe, Run, data, evaluate, group, loop, losses
from kdlib.book import reference
from kdlib.paper import PAPER

TEACHER, STUDENT, DISTILLED = PAPER["modern"].values()
TEMPERATURE, HARD_WEIGHT = DISTILLED.temperature, DISTILLED.hard_weight
Rows = dict[str, Recipe]  # a row of a record -> what one seed of it is


# --- settings that may beat the recorded ones ------------------------------------------------

# name -> what it changes: of which network, and how.
CANDIDATES: dict[str, dict[str, dict[str, object]]] = {
    "as recorded": {},
    "teacher: 320 epochs": {"teacher": {"epochs": 320}},
    # The recorded one has the squared length 15 of 2012.
    "teacher: max-norm 3": {"teacher": {"max_norm": 3.0}},
    "teacher: no max-norm": {"teacher": {"max_norm": None}},
    "student: 160 epochs": {"distilled": {"epochs": 160}},
    "student: 320 epochs": {"distilled": {"epochs": 320}},
    "student: fp32": {"distilled": {"precision": "fp32"}},
    "student: batches of 100": {"distilled": {"batch_size": 100, "learning_rate": 0.05}},
    "student: no labels": {"distilled": {"hard_weight": 0.0}},
    **{
        f"student: T = {T}, hard weight {weight}": {
            "distilled": {"temperature": float(T), "hard_weight": weight}
        }
        for T in (2, 4, 8)
        for weight in (0.02, 0.1)
    },
}


def pair(name: str, seed: int) -> Rows:
    """A candidate's teacher and student."""
    changes = CANDIDATES[name]
    teacher = TEACHER.replace(seed=seed).replace(**changes.get("teacher", {}))
    student = DISTILLED.replace(seed=seed, teacher=(teacher,))
    return {"teacher": teacher, "distilled": student.replace(**changes.get("distilled", {}))}


def beyond(seed: int) -> Rows:
    """The distilled students of all candidates, and the teachers that differ."""
    rows = {}
    for name, changes in CANDIDATES.items():
        networks = pair(name, seed)
        if changes and "teacher" not in changes:
            del networks["teacher"]
        rows |= {f"{name}: {network}": recipe for network, recipe in networks.items()}
    return rows


def tried(seed: int) -> Rows:
    """All candidates, trained on five sixths of the training digits."""
    return {name: throughout(r, validation=True) for name, r in beyond(seed).items()}


# name -> schedule, learning rate, and the share of the steps after which weights are averaged
AVERAGED = {
    "last tenth": ("one-cycle", DISTILLED.learning_rate, 0.9),
    "constant rate, last half": ("constant", 0.02, 0.5),
}


def averaged(seed: int) -> Rows:
    """Students whose weights are averaged; as they are stored, without that."""
    recipe = tried(seed)["as recorded: distilled"]
    return {
        name: recipe.replace(schedule=schedule, learning_rate=rate)
        for name, (schedule, rate, _) in AVERAGED.items()
    }


def average(recipe: Recipe, begin: float, soft_targets: Tensor) -> nn.Module:
    """The mean of a student's weights at each 50th step, after a share of the steps.

    soft_targets: its teacher's logits on recipe's digits.
    """
    device = soft_targets.device
    digits = data.load(recipe.dataset, device)
    network = group.build(recipe).to(device)
    mean = AveragedModel(network)

    def on_report(state: loop.State) -> None:
        if state.step > begin * state.steps:
            mean.update_parameters(state.model)

    def loss(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        return losses.distillation_loss(
            logits, taught, labels, temperature=recipe.temperature, hard_weight=recipe.hard_weight
        )

    kdlib.fit(
        network,
        [digits.train.images, digits.train.labels, soft_targets],
        loss,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        schedule=recipe.schedule,
        precision=recipe.precision,
        seed=recipe.seed,
        report_every=50,
        on_report=on_report,
    )
    return mean.module.eval()


def with_average(name: str, run: Run) -> Run:
    """A run with the validation errors of the mean of its weights: averaged_errors."""
    soft_targets = kdlib.train(run.recipe.teacher[0], run.device).logits("train")
    mean = average(run.recipe, AVERAGED[name][2], soft_targets)
    held_out = data.load(run.recipe.dataset, run.device).validation
    errors = loop.count_errors(mean, held_out.images, held_out.labels)
    return replace(run, metrics=run.metrics | {"averaged_errors": errors})


# --- what the gain is made of (chapter 7a) ---------------------------------------------------

# The translations of the teacher in pixels; None: no teacher.
TARGETS = {
    "labels": None,
    "smoothed labels": None,
    "soft, plain teacher": 0,
    "soft, translated teacher": TEACHER.jitter,
}
INPUTS = {"unmoved": 0, "translated": TEACHER.jitter}
CONDITIONS = [(targets, inputs) for targets in TARGETS for inputs in INPUTS]
SMOOTHING = 0.1


def offered(targets: str) -> tuple[float, ...]:
    """The learning rates to choose from: about the best of the recipe's own search."""
    return (0.05, 0.1, 0.2) if targets.startswith("soft") else (0.1, 0.2, 0.4)


def student(targets: str, inputs: str, rate: float, seed: int) -> Recipe:
    """A student of 2×800 units, trained for as long as the distilled one of chapter 7."""
    changes = {"jitter": INPUTS[inputs], "learning_rate": rate, "epochs": DISTILLED.epochs}
    network = STUDENT.replace(seed=seed, **changes)
    if targets == "labels":
        return network
    if targets == "smoothed labels":
        return network.replace(label_smoothing=SMOOTHING)
    teacher = TEACHER.replace(jitter=TARGETS[targets], seed=seed)
    return network.distil(teacher, temperature=TEMPERATURE, hard_weight=HARD_WEIGHT)


def rate_row(targets: str, inputs: str, rate: float) -> str:
    """The row of a learning rate that is tried."""
    return f"{targets}, {inputs}, rate {rate:g}"


def rates(seed: int) -> Rows:
    """Each condition with each learning rate, on five sixths of the training digits."""
    return {
        rate_row(*c, rate): throughout(student(*c, rate, seed), validation=True)
        for c in CONDITIONS
        for rate in offered(c[0])
    }


def best_rate(targets: str, inputs: str) -> float:
    """The rate whose worst seed has the fewest validation errors, of those that are recorded."""
    known = reference.results(EXPERIMENTS["rates"].chapter, "rates") or {}
    names = [rate_row(targets, inputs, rate) for rate in offered(targets)]
    if not set(names) <= known.keys():
        raise FileNotFoundError("no learning rates are recorded: run the experiment rates first")
    chosen = evaluate.steadiest([known[name] for name in names]).recipe
    assert chosen is not None
    return chosen.learning_rate


def factorial(seed: int) -> Rows:
    """Targets × the student's translations, and the two teachers; rows as in chapter 7a."""
    students = {f"{c[0]}, {c[1]}": student(*c, best_rate(*c), seed) for c in CONDITIONS}
    teachers = {
        f"teacher, {inputs}": TEACHER.replace(jitter=jitter, seed=seed)
        for inputs, jitter in INPUTS.items()
    }
    return students | teachers


def lengths(seed: int) -> Rows:
    """Three networks that are trained for equally long; rows as in chapter 7a."""
    rows = {}
    for epochs in (20, 40, 80, 160, 320):
        same = {"epochs": epochs, "seed": seed}
        teacher = TEACHER.replace(**same)
        trio = {"teacher": teacher, "plain student": STUDENT.replace(**same)}
        trio["distilled student"] = DISTILLED.replace(**same, teacher=(teacher,))
        # 240 batches of 250 digits are an epoch.
        rows |= {f"{name}, {240 * epochs} steps": recipe for name, recipe in trio.items()}
    return rows


# --- a digit that is never shown (chapter 8) -------------------------------------------------

MISSING = 3


def threes(seed: int) -> Rows:
    """Students without threes, on five sixths of the digits: the rest decides the bias shift."""
    teacher = TEACHER.replace(validation=True, seed=seed)
    without = STUDENT.replace(omit=(MISSING,), validation=True, seed=seed)
    without = without.replace(learning_rate=DISTILLED.learning_rate)
    return {
        f"T = {T:g}, hard weight {weight:g}, {epochs} epochs": without.replace(
            epochs=epochs
        ).distil(teacher, temperature=T, hard_weight=weight)
        for T in (2.0, 4.0, 20.0)
        for weight in (0.0, 0.1, 0.5)
        for epochs in (5, 20, 80)
    }


def with_shift(name: str, run: Run) -> Run:
    """A run with its errors before and after a shift of the missing digit's bias.

    The shift is that which agrees best with the teacher's answers on held-out digits.
    """
    if run.metrics["status"] != "ok":
        return run
    labels = data.load(run.recipe.dataset, run.device).test.labels
    teacher = kdlib.train(run.recipe.teacher[0], run.device)
    answers = teacher.logits("validation").argmax(1)
    grid = torch.arange(-150, 201) / 10
    shift = evaluate.bias_shift(run.logits("validation"), (MISSING,), answers, grid)
    found: dict[str, float] = {"shift, teacher's answers": shift}
    for way, raised in {"before": 0.0, "teacher's answers": shift}.items():
        logits = run.logits("test").clone()
        logits[:, MISSING] += raised
        wrong = logits.argmax(1) != labels
        found[f"errors, {way}"] = int(wrong.sum())
        found[f"unseen, {way}"] = int(wrong[labels == MISSING].sum())
    return replace(run, metrics=run.metrics | found)


# --- seed by seed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """rows: seed -> recipes. measured: what a record holds of a row's run."""

    chapter: str
    seeds: int
    rows: Callable[[int], Rows]
    measured: Callable[[str, Run], Run] = lambda name, run: run


EXPERIMENTS = {
    "tried": Experiment("07_mnist_reproduction", 4, tried),
    "averaged": Experiment("07_mnist_reproduction", 4, averaged, with_average),
    "beyond": Experiment("07_mnist_reproduction", 30, beyond),
    "rates": Experiment("07a_what_it_is_made_of", 2, rates),
    "factorial": Experiment("07a_what_it_is_made_of", 30, factorial),
    "lengths": Experiment("07a_what_it_is_made_of", 30, lengths),
    "threes": Experiment("08_missing_digits", 10, threes, with_shift),
}


def throughout(recipe: Recipe, length: float = 1.0, **changes: object) -> Recipe:
    """A recipe and its teachers with the same changes, and a share of their epochs."""
    teachers = tuple(throughout(teacher, length, **changes) for teacher in recipe.teacher)
    return recipe.replace(epochs=recipe.epochs * length, teacher=teachers, **changes)


Known = dict[str, dict[int, Run | reference.Recorded]]  # row -> seed -> result


def recorded(name: str) -> Known:
    """What an experiment's record holds, each with the commit of the code that made it."""
    chapter = EXPERIMENTS[name].chapter
    rows = reference.results(chapter, name)
    if rows is None:
        return {}
    commit = json.loads(reference.path(chapter, name).read_text(encoding="utf-8"))["commit"]
    return {
        row: {
            line.recipe.seed: replace(line, provenance={"commit": commit} | line.provenance)
            for line in lines
            if line.recipe
        }
        for row, lines in rows.items()
    }


def missing(name: str, wanted: dict[int, Rows]) -> list[int]:
    """The seeds of which the record lacks a row, or has one of another recipe."""
    known = recorded(name)

    def has(row: str, seed: int) -> bool:
        line = known.get(row, {}).get(seed)
        return line is not None and line.recipe == wanted[seed][row]

    return [seed for seed, rows in wanted.items() if not all(has(row, seed) for row in rows)]


def trained(name: str, wanted: dict[int, Rows]) -> Known:
    """The results of some seeds, trained together."""
    lines = [(row, seed) for seed in wanted for row in wanted[seed]]
    runs = kdlib.train_all([wanted[seed][row] for row, seed in lines])
    found: Known = {}
    for (row, seed), run in zip(lines, runs, strict=True):
        found.setdefault(row, {})[seed] = EXPERIMENTS[name].measured(row, run)
    return found


def add(name: str, found: Known, parameters: dict[str, object], commit: str | None) -> Path:
    """Add results to the record. Another process may add some at the same time."""
    chapter = EXPERIMENTS[name].chapter
    place = reference.draft(chapter, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place.with_suffix(".lock")):
        known = recorded(name)
        for row, lines in found.items():
            known[row] = known.get(row, {}) | lines
        rows = {row: [lines[seed] for seed in sorted(lines)] for row, lines in known.items()}
        reference.keep(chapter, name, rows, parameters=parameters)
        return reference.record(chapter, name, commit)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--length", type=float, default=1.0)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--commit", help="of the code that runs, where this is no clone")
    given = parser.parse_args(arguments)
    name, experiment = given.experiment, EXPERIMENTS[given.experiment]
    seeds = experiment.seeds if given.seeds is None else given.seeds
    for setting, number in {"seeds": seeds, "together": given.together}.items():
        if number < 1:
            parser.error(f"{setting} is {number}: expected 1 or more")
    end = time.monotonic() + 60 * given.minutes
    wanted = {
        seed: {
            row: throughout(recipe, given.length, dataset=given.dataset)
            for row, recipe in experiment.rows(seed).items()
            if given.only in row
        }
        for seed in range(seeds)
    }
    if not wanted[0]:
        parser.error(f"no row of {name} has {given.only!r}: it has {', '.join(experiment.rows(0))}")
    todo = missing(name, wanted)
    for first in range(0, len(todo), given.together):
        if first and time.monotonic() > end:
            print("no time for further seeds: the same command goes on")
            break
        part = {seed: wanted[seed] for seed in todo[first : first + given.together]}
        print(add(name, trained(name, part), vars(given), given.commit), flush=True)
    metric = "validation_errors" if name in ("tried", "averaged", "rates") else "test_errors"
    for row, lines in recorded(name).items():
        print(f"{row:46} {evaluate.spread(list(lines.values()), metric)}")


if __name__ == "__main__":
    main()
