"""The paper's experiments at its scale, one seed after the other.

    python tools/paper_scale.py EXPERIMENT [--only PART] [--seeds N] [--together N] [--minutes M]

tried      settings that may beat the recorded 67.5 and 77.6, judged on held-out digits
averaged   students whose weights are averaged over the end of training, on held-out digits
beyond     the best of these settings (--only NAME), trained on all digits and tested
rates      learning rates for the factorial, judged on held-out digits
factorial  chapter 7a's targets × translations, with chapter 7's numbers of epochs
lengths    chapter 7's three networks, each trained for 20, 40, 80, 160 and 320 epochs
threes     students that see no 3, for each temperature, hard weight and number of epochs

Each experiment has a record in book/reference/EXPERIMENT. A call trains the runs that the record
lacks, and records each seed once it is complete. So a GPU that is free for ten minutes is enough,
and only the record has to travel to the next machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kdlib
from kdlib import Recipe, Run, data, evaluate, group, loop, losses, store
from kdlib.book import reference
from kdlib.paper import PAPER

TEACHER = PAPER["modern"]["teacher"]
PLAIN = PAPER["modern"]["student"]
DISTILLED = PAPER["modern"]["distilled"]
Rows = dict[str, Recipe]  # row of a record -> recipe


def throughout(recipe: Recipe, length: float = 1.0, **changes: object) -> Recipe:
    """A recipe and its teachers with the same changes, and a share of their epochs."""
    teachers = tuple(throughout(teacher, length, **changes) for teacher in recipe.teacher)
    return recipe.replace(epochs=recipe.epochs * length, teacher=teachers, **changes)


# --- settings that may beat the recorded ones ------------------------------------------------

# name -> network -> what it changes
CANDIDATES: dict[str, dict[str, dict[str, object]]] = {
    "as recorded": {},
    "teacher: 320 epochs": {"teacher": {"epochs": 320}},
    # Recorded: the squared length is at most 15, as in Hinton et al. 2012.
    "teacher: max-norm 3": {"teacher": {"max_norm": 3.0}},
    "teacher: no max-norm": {"teacher": {"max_norm": None}},
    "student: 160 epochs": {"distilled": {"epochs": 160}},
    "student: 320 epochs": {"distilled": {"epochs": 320}},
    "student: fp32": {"distilled": {"precision": "fp32"}},
    "student: rate 0.05": {"distilled": {"learning_rate": 0.05}},
    **{
        # Smaller batches need a lower learning rate.
        f"student: batches of 100{more}": {
            "distilled": {"batch_size": 100, "learning_rate": 0.05, **changes}
        }
        for more, changes in {
            "": {},
            ", no labels": {"hard_weight": 0.0},
            ", 160 epochs": {"epochs": 160},
        }.items()
    },
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
    """A candidate's teacher and its student."""
    changes = CANDIDATES[name]
    teacher = TEACHER.replace(seed=seed).replace(**changes.get("teacher", {}))
    student = DISTILLED.replace(seed=seed, teacher=(teacher,))
    return {"teacher": teacher, "distilled": student.replace(**changes.get("distilled", {}))}


def beyond(seed: int) -> Rows:
    """The students of all candidates; the recorded teacher, and those with other settings."""
    rows = {}
    for name, changes in CANDIDATES.items():
        networks = pair(name, seed)
        if "distilled" in changes:
            del networks["teacher"]
        rows |= {f"{name}: {network}": recipe for network, recipe in networks.items()}
    return rows


def tried(seed: int) -> Rows:
    """The same networks, trained on five sixths of the training digits."""
    return {row: throughout(recipe, validation=True) for row, recipe in beyond(seed).items()}


# row -> schedule, learning rate, and the share of the steps after which averaging begins
AVERAGED = {
    "last tenth": ("one-cycle", DISTILLED.learning_rate, 0.9),
    "constant rate, last half": ("constant", 0.02, 0.5),
}


def averaged(seed: int) -> Rows:
    """The recorded student with each schedule; `with_average` repeats the training to average."""
    recipe = throughout(pair("as recorded", seed)["distilled"], validation=True)
    return {
        row: recipe.replace(schedule=schedule, learning_rate=rate)
        for row, (schedule, rate, _) in AVERAGED.items()
    }


def average(recipe: Recipe, begin: float, soft_targets: Tensor) -> nn.Module:
    """Train a student; the mean of its weights at each 50th step after a share of the steps.

    soft_targets: (N, classes), its teacher's logits on the recipe's training digits.
    """
    digits = data.load(recipe.dataset, soft_targets.device)
    network = group.build(recipe).to(soft_targets.device)
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
        momentum=recipe.momentum,
        schedule=recipe.schedule,
        precision=recipe.precision,
        seed=recipe.seed,
        report_every=50,
        on_report=on_report,
    )
    return mean.module.eval()


def with_average(row: str, run: Run) -> Run:
    """A run with the validation errors of the mean of its weights, averaged_errors."""
    if run.metrics["status"] != "ok":
        return run
    soft_targets = kdlib.train(run.recipe.teacher[0], run.device).logits("train")
    mean = average(run.recipe, AVERAGED[row][2], soft_targets)
    held_out = data.load(run.recipe.dataset, run.device).validation
    errors = loop.count_errors(mean, held_out.images, held_out.labels)
    return replace(run, metrics=run.metrics | {"averaged_errors": errors})


# --- what the gain is made of (chapter 7a) ---------------------------------------------------

# target -> the translations of the teacher in pixels; None: no teacher
TARGETS = {
    "labels": None,
    "smoothed labels": None,
    "soft, plain teacher": 0,
    "soft, translated teacher": TEACHER.jitter,
}
INPUTS = {"unmoved": 0, "translated": TEACHER.jitter}
CONDITIONS = [(target, inputs) for target in TARGETS for inputs in INPUTS]


def offered(target: str) -> tuple[float, ...]:
    """The learning rates to choose from, around those of chapter 7."""
    return (0.05, 0.1, 0.2) if target.startswith("soft") else (0.1, 0.2, 0.4)


def student(target: str, inputs: str, rate: float, seed: int) -> Recipe:
    """A student of 2×800 units, trained for as long as the distilled one of chapter 7."""
    changes = {"jitter": INPUTS[inputs], "learning_rate": rate, "epochs": DISTILLED.epochs}
    network = PLAIN.replace(seed=seed, **changes)
    if target == "labels":
        return network
    if target == "smoothed labels":
        return network.replace(label_smoothing=0.1)
    teacher = TEACHER.replace(jitter=TARGETS[target], seed=seed)
    soft = {"temperature": DISTILLED.temperature, "hard_weight": DISTILLED.hard_weight}
    return network.distil(teacher, **soft)


def rate_row(target: str, inputs: str, rate: float) -> str:
    """The row of a learning rate that is tried."""
    return f"{target}, {inputs}, rate {rate:g}"


def rates(seed: int) -> Rows:
    """Each condition with each learning rate, trained on five sixths of the training digits."""
    return {
        rate_row(target, inputs, rate): throughout(
            student(target, inputs, rate, seed), validation=True
        )
        for target, inputs in CONDITIONS
        for rate in offered(target)
    }


def best_rate(known: dict[str, list[reference.Recorded]], target: str, inputs: str) -> float:
    """The rate whose worst seed has the fewest validation errors. known: the record of rates."""
    rows = {rate: rate_row(target, inputs, rate) for rate in offered(target)}
    groups = {rate: known.get(row, []) for rate, row in rows.items()}
    numbers = {len(runs) for runs in groups.values()}
    if len(numbers) > 1 or numbers == {0}:
        raise ValueError(
            f"{target}, {inputs}: the record of rates has {sorted(numbers)} runs of the learning "
            "rates, expected as many of each: run the experiment rates first"
        )
    worst = evaluate.steadiest(list(groups.values()))
    return next(rate for rate, runs in groups.items() if worst in runs)


def factorial(seed: int) -> Rows:
    """Targets × the student's translations, each at its best rate; rows as in chapter 7a.

    Teachers are trained for 160 epochs and students for 80, as in chapter 7. (Chapter 7a's own
    run trains all of them for equally many steps.)
    """
    known = reference.results(CHAPTER_7A, "rates") or {}
    rows = {
        f"{target}, {inputs}": student(target, inputs, best_rate(known, target, inputs), seed)
        for target, inputs in CONDITIONS
    }
    for inputs, jitter in INPUTS.items():
        rows[f"teacher, {inputs}"] = TEACHER.replace(jitter=jitter, seed=seed)
    return rows


def lengths(seed: int) -> Rows:
    """Three networks, all of them trained for equally long; rows as in chapter 7a."""
    rows = {}
    for epochs in (20, 40, 80, 160, 320):
        same = {"epochs": epochs, "seed": seed}
        teacher = TEACHER.replace(**same)
        trio = {"teacher": teacher, "plain student": PLAIN.replace(**same)}
        trio["distilled student"] = DISTILLED.replace(**same, teacher=(teacher,))
        # An epoch of MNIST has 240 batches of 250 digits.
        rows |= {f"{name}, {240 * epochs} steps": recipe for name, recipe in trio.items()}
    return rows


# --- a digit that is never shown (chapter 8) -------------------------------------------------

MISSING = 3


def threes(seed: int) -> Rows:
    """Students that see no 3, trained on five sixths of the digits; the rest decides the shift.

    All have the distilled student's learning rate, which chapter 8 chose in all its conditions.
    """
    same = {"validation": True, "seed": seed}
    teacher = TEACHER.replace(**same)
    network = PLAIN.replace(**same, omit=(MISSING,), learning_rate=DISTILLED.learning_rate)
    rows = {}
    for T in (2.0, 4.0, 20.0):
        for weight in (0.0, 0.1, 0.5):
            distilled = network.distil(teacher, temperature=T, hard_weight=weight)
            for epochs in (5, 20, 80):
                row = f"T = {T:g}, hard weight {weight:g}, {epochs} epochs"
                rows[row] = distilled.replace(epochs=epochs)
    return rows


def with_shift(row: str, run: Run) -> Run:
    """A run with its errors before and after a shift of the missing digit's bias, as in chapter 8.

    The shift is the one that agrees best with the teacher's answers on held-out digits.
    """
    teacher = kdlib.train(run.recipe.teacher[0], run.device)
    if "diverged" in (run.metrics["status"], teacher.metrics["status"]):
        return replace(run, metrics=run.metrics | {"status": "diverged"})
    labels = data.load(run.recipe.dataset, run.device).test.labels
    answers = teacher.logits("validation").argmax(1)
    grid = torch.arange(-150, 201, dtype=torch.float64) / 10
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

CHAPTER_7, CHAPTER_7A = "07_mnist_reproduction", "07a_what_it_is_made_of"


@dataclass(frozen=True)
class Experiment:
    """What is trained with a seed, and what is recorded of it.

    measured: a row's run -> the run with the metrics that the record holds.
    shown: the metrics that are printed.
    """

    chapter: str
    seeds: int
    rows: Callable[[int], Rows]
    shown: tuple[str, ...]
    measured: Callable[[str, Run], Run] = lambda row, run: run


HELD_OUT, TEST = "validation_errors", "test_errors"
EXPERIMENTS = {
    "tried": Experiment(CHAPTER_7, 4, tried, (HELD_OUT,)),
    "averaged": Experiment(CHAPTER_7, 4, averaged, (HELD_OUT, "averaged_errors"), with_average),
    "beyond": Experiment(CHAPTER_7, 30, beyond, (TEST,)),
    "rates": Experiment(CHAPTER_7A, 2, rates, (HELD_OUT,)),
    "factorial": Experiment(CHAPTER_7A, 30, factorial, (TEST,)),
    "lengths": Experiment(CHAPTER_7A, 30, lengths, (TEST,)),
    "threes": Experiment(
        "08_missing_digits",
        10,
        threes,
        ("unseen, before", "unseen, teacher's answers", "errors, teacher's answers"),
        with_shift,
    ),
}
Results = dict[str, dict[int, Run | reference.Recorded]]  # row -> seed -> result


@dataclass(frozen=True)
class Record:
    """An experiment's record: book/reference/<profile>/<chapter>.json.

    commit: of the code that runs. parameters: those of the call.
    """

    profile: str
    chapter: str
    commit: str
    parameters: dict[str, object]

    def results(self) -> Results:
        """What is recorded, each with the commit of the code that made it."""
        rows = reference.results(self.chapter, self.profile)
        if rows is None:
            return {}
        text = reference.path(self.chapter, self.profile).read_text(encoding="utf-8")
        origin = {"commit": json.loads(text)["commit"]}
        return {
            row: {
                line.recipe.seed: replace(line, provenance=origin | line.provenance)
                for line in lines
                if line.recipe
            }
            for row, lines in rows.items()
        }

    def missing(self, wanted: dict[int, Rows]) -> dict[int, Rows]:
        """What is wanted and not recorded. ValueError if another recipe is recorded for it."""
        known = self.results()
        for seed, rows in wanted.items():
            for row, recipe in rows.items():
                line = known.get(row, {}).get(seed)
                if line is not None and line.recipe != recipe:
                    raise ValueError(
                        f"{reference.path(self.chapter, self.profile)} has seed {seed} of {row!r} "
                        "with another recipe: move the file away to begin a new record"
                    )
        lacking = {
            seed: {row: rows[row] for row in rows if seed not in known.get(row, {})}
            for seed, rows in wanted.items()
        }
        return {seed: rows for seed, rows in lacking.items() if rows}

    def add(self, results: Results) -> Path:
        """Add results; other processes may add some at the same time."""
        place = reference.path(self.chapter, self.profile)
        place.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place.with_suffix(".lock")):
            known = self.results()
            for row, lines in results.items():
                known[row] = known.get(row, {}) | lines
            rows = {row: [lines[seed] for seed in sorted(lines)] for row, lines in known.items()}
            return reference.write(self.chapter, self.profile, rows, self.parameters, self.commit)


def trained(experiment: Experiment, wanted: dict[int, Rows]) -> Results:
    """The results of some seeds, all trained in one call."""
    lines = [(row, seed) for seed, rows in wanted.items() for row in rows]
    runs = kdlib.train_all([wanted[seed][row] for row, seed in lines])
    results: Results = {}
    for (row, seed), run in zip(lines, runs, strict=True):
        results.setdefault(row, {})[seed] = experiment.measured(row, run)
    return results


def run(given: argparse.Namespace) -> None:
    """Train what the record lacks, as far as the time allows, and print what it holds."""
    end = time.monotonic() + 60 * given.minutes if given.minutes is not None else float("inf")
    experiment = EXPERIMENTS[given.experiment]
    # A trial has a record of its own.
    whole = (given.length, given.dataset) == (1.0, "mnist")
    profile = given.experiment if whole else f"{given.experiment}_trial"
    # Where no commit is known nothing can be recorded, so nothing should be trained.
    commit = given.commit or reference.current_commit()
    record = Record(profile, experiment.chapter, commit, vars(given))
    seeds = experiment.seeds if given.seeds is None else given.seeds
    wanted = {
        seed: {
            row: throughout(recipe, given.length, dataset=given.dataset)
            for row, recipe in experiment.rows(seed).items()
            if given.only in row
        }
        for seed in range(seeds)
    }
    if not wanted[0]:
        names = ", ".join(experiment.rows(0))
        raise ValueError(f"--only is {given.only!r}: expected a part of one of {names}")
    missing = list(record.missing(wanted).items())
    for first in range(0, len(missing), given.together):
        if first and time.monotonic() > end:
            print("no time for further seeds: the same command goes on")
            break
        part = dict(missing[first : first + given.together])
        print(record.add(trained(experiment, part)), flush=True)
    for row, lines in record.results().items():
        spreads = [f"{metric}: {evaluate.spread(lines, metric)}" for metric in experiment.shown]
        print(f"{row:46} {', '.join(spreads)}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on")
    parser.add_argument("--together", type=int, default=1, help="seeds trained in one call")
    parser.add_argument("--minutes", type=float, help="after which no further seeds are begun")
    parser.add_argument("--length", type=float, default=1.0, help="share of the epochs (a trial)")
    parser.add_argument("--dataset", default="mnist", choices=["mnist", "mnist-5k"])
    parser.add_argument("--commit", help="of the code that runs, if this is no clone")
    given = parser.parse_args(arguments)
    for name in ("seeds", "together", "minutes", "length"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} is {value}: expected a positive number")
    if given.experiment == "beyond" and not given.only:
        parser.error("beyond needs --only NAME: test digits are for the setting that was chosen")
    try:
        run(given)
    except (ValueError, OSError, store.StoreError) as error:
        sys.exit(f"paper_scale: {error}")


if __name__ == "__main__":
    main()
