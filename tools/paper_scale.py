"""The paper's experiments at its scale, a few seeds at a time.

    python tools/paper_scale.py EXPERIMENT [--only ROW …] [--seeds N] [--together N] [--minutes M]

tried      settings that may beat the recorded 67.5 and 77.6, judged on held-out digits
beyond     the best of them (--only "NAME: *"), trained on all digits and tested
averaged   students with weights averaged over the end of training, judged on held-out digits
rates      learning rates for the factorial, judged on held-out digits
gentler    other settings for the student of a teacher without translations, judged likewise
factorial  chapter 7a's targets × translations, with chapter 7's numbers of epochs
lengths    chapter 7's three networks, trained for 20, 40, 80, 160 and 320 epochs
threes     students that see no 3, for each temperature, hard weight and number of epochs

factorial, lengths and threes are part of their chapter's reference run, in book/reference; each
of the others has a record in book/reference/EXPERIMENT. A call trains what the record lacks and
records each seed once it is complete (with --together N, each N seeds). So an experiment can be
spread over several short calls, and only the record has to travel from machine to machine.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kdlib
from kdlib import Recipe, Run, data, evaluate, files, group, loop, losses, store
from kdlib.book import reference
from kdlib.paper import PAPER

TEACHER = PAPER["modern"]["teacher"]
PLAIN = PAPER["modern"]["student"]  # of 20 epochs; chapter 7 trains it for as long as the next
DISTILLED = PAPER["modern"]["distilled"]
Rows = dict[str, Recipe]  # row of a record -> recipe


def throughout(recipe: Recipe, length: float = 1.0, **changes: object) -> Recipe:
    """A recipe and its teachers with the same changes, and a share of their epochs."""
    teachers = tuple(throughout(teacher, length, **changes) for teacher in recipe.teacher)
    return recipe.replace(epochs=recipe.epochs * length, teacher=teachers, **changes)


def on_held_out(row: str, run: Run) -> reference.Recorded:
    """A run of which no test error is known to whoever chooses a setting."""
    metrics = {name: value for name, value in run.metrics.items() if not name.startswith("test_")}
    return reference.Recorded(run.recipe, metrics, run.seconds, run.provenance)


# --- settings that may beat the recorded ones ------------------------------------------------

SMALL_BATCHES: dict[str, object] = {"batch_size": 100, "learning_rate": 0.05}
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
    # Smaller batches need a lower learning rate.
    "student: batches of 100": {"distilled": SMALL_BATCHES},
    "student: batches of 100, no labels": {"distilled": SMALL_BATCHES | {"hard_weight": 0.0}},
    "student: batches of 100, 160 epochs": {"distilled": SMALL_BATCHES | {"epochs": 160}},
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
    """The students of all candidates, and each different teacher once."""
    rows = {}
    for name, changes in CANDIDATES.items():
        networks = pair(name, seed)
        if "distilled" in changes:  # its teacher is the recorded one
            del networks["teacher"]
        rows |= {f"{name}: {network}": recipe for network, recipe in networks.items()}
    return rows


def tried(seed: int) -> Rows:
    """The same networks, trained on five sixths of the training digits."""
    return {row: throughout(recipe, validation=True) for row, recipe in beyond(seed).items()}


# row -> schedule, learning rate, and the share of the steps after which averaging begins. A
# constant rate of 0.05 diverges.
AVERAGED = {
    "last tenth": ("one-cycle", DISTILLED.learning_rate, 0.9),
    "constant rate, last half": ("constant", 0.02, 0.5),
}


def averaged(seed: int) -> Rows:
    """The recorded student, with each schedule. `with_average` trains it again to average."""
    recipe = throughout(pair("as recorded", seed)["distilled"], validation=True)
    return {
        row: recipe.replace(schedule=schedule, learning_rate=rate)
        for row, (schedule, rate, _) in AVERAGED.items()
    }


def average(recipe: Recipe, begin: float, soft_targets: Tensor) -> nn.Module:
    """Train a student; return the mean of its weights, taken at every 50th step.

    begin: the share of the steps after which weights count.
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


def with_average(row: str, run: Run) -> reference.Recorded:
    """A run with the validation errors of the mean of its weights, averaged_errors."""
    line = on_held_out(row, run)
    if run.metrics["status"] != "ok":
        return line
    soft_targets = kdlib.train(run.recipe.teacher[0], run.device).logits("train")
    mean = average(run.recipe, AVERAGED[row][2], soft_targets)
    held_out = data.load(run.recipe.dataset, run.device).validation
    errors = loop.count_errors(mean, held_out.images, held_out.labels)
    return replace(line, metrics=line.metrics | {"averaged_errors": errors})


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


def gentler(seed: int) -> Rows:
    """The plain teacher's student, with lower rates and temperatures than the factorial offers.

    At T = 20, two of the three rates that are offered there diverge.
    """
    settings = [(20.0, 0.0125), (20.0, 0.025), (20.0, 0.05), (4.0, 0.05), (4.0, 0.1)]
    return {
        f"T = {T:g}, rate {rate:g}": throughout(
            student("soft, plain teacher", "unmoved", rate, seed).replace(temperature=T),
            validation=True,
        )
        for T, rate in settings
    }


def best_rates() -> dict[tuple[str, str], float]:
    """Condition -> the recorded rate whose worst seed has the fewest validation errors."""
    known = reference.results(CHAPTER_7A, "rates") or {}
    wanted = [rates(seed) for seed in range(EXPERIMENTS["rates"].seeds)]
    recipes = {row: [run.recipe for run in runs] for row, runs in known.items()}
    if any(recipes.get(row) != [rows[row] for rows in wanted] for row in wanted[0]):
        raise ValueError(
            f"the record of rates should have {len(wanted)} seeds of each rate and no others: "
            "run the experiment rates first"
        )
    chosen = {}
    for target, inputs in CONDITIONS:
        groups = [known[rate_row(target, inputs, rate)] for rate in offered(target)]
        chosen[target, inputs] = evaluate.steadiest(groups).recipe.learning_rate
    return chosen


def factorial(seed: int) -> Rows:
    """Targets × the student's translations, each at its best rate; rows as in chapter 7a.

    Teachers are trained for 160 epochs and students for 80, as in chapter 7.
    """
    rows = {
        f"{target}, {inputs}": student(target, inputs, rate, seed)
        for (target, inputs), rate in best_rates().items()
    }
    for inputs, jitter in INPUTS.items():
        rows[f"teacher, {inputs}"] = TEACHER.replace(jitter=jitter, seed=seed)
    return rows


def on_moved(row: str, run: Run) -> Run:
    """A run with its errors on test digits moved by two and by three pixels, as in chapter 7a."""
    if run.metrics["status"] != "ok":
        return run
    test = data.load(run.recipe.dataset, run.device).test
    ways = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])
    draw = torch.Generator().manual_seed(0)
    directions = ways[torch.randint(len(ways), (len(test),), generator=draw)].to(run.device)
    found = {}
    for pixels, metric in {2: "moved_errors", 3: "moved_three"}.items():
        inputs = data.to_input(data.translate(test.images, pixels * directions))
        found[metric] = loop.count_errors(run.model(), inputs, test.labels)
    return replace(run, metrics=run.metrics | found)


def lengths(seed: int) -> Rows:
    """Three networks, the student's teacher too, trained for equally long; rows as in 7a."""
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
    """Students that see no 3. The digits that are held out decide the bias shift.

    All have the learning rate of the distilled student. At its smaller scale, chapter 8 chose it
    in each condition, out of two.
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
    others = [digit for digit in range(10) if digit != MISSING]
    unseen, logits = labels == MISSING, run.logits("test")
    margin = logits[:, MISSING] - logits[:, others].amax(1)
    above = margin[unseen][:, None] > margin[~unseen][None]
    found: dict[str, float] = {"shift, teacher's answers": shift}
    # The chance that a 3 has a higher margin than another digit does not depend on the shift.
    found["auroc"] = above.double().mean().item()
    for way, raised in {"before": 0.0, "teacher's answers": shift}.items():
        shifted = logits.clone()
        shifted[:, MISSING] += raised
        wrong = shifted.argmax(1) != labels
        found[f"errors, {way}"] = int(wrong.sum())
        found[f"unseen, {way}"] = int(wrong[unseen].sum())
    return replace(run, metrics=run.metrics | found)


# --- seed by seed ----------------------------------------------------------------------------

CHAPTER_7, CHAPTER_7A = "07_mnist_reproduction", "07a_what_it_is_made_of"


@dataclass(frozen=True)
class Experiment:
    """What is trained with a seed, and what is recorded of it.

    measured: a row's run -> what the record holds of it. shown: the metrics that are printed.
    profile: of the record; by default the experiment's name.
    """

    chapter: str
    seeds: int
    rows: Callable[[int], Rows]
    shown: tuple[str, ...]
    measured: Callable[[str, Run], Run | reference.Recorded] = lambda row, run: run
    profile: str | None = None


HELD_OUT, TEST = "validation_errors", "test_errors"
EXPERIMENTS = {
    "tried": Experiment(CHAPTER_7, 4, tried, (HELD_OUT,), on_held_out),
    "beyond": Experiment(CHAPTER_7, 30, beyond, (TEST,)),
    "averaged": Experiment(CHAPTER_7, 4, averaged, (HELD_OUT, "averaged_errors"), with_average),
    "rates": Experiment(CHAPTER_7A, 2, rates, (HELD_OUT,), on_held_out),
    "gentler": Experiment(CHAPTER_7A, 2, gentler, (HELD_OUT,), on_held_out),
    "factorial": Experiment(CHAPTER_7A, 30, factorial, (TEST, "moved_errors"), on_moved, "full"),
    "lengths": Experiment(CHAPTER_7A, 30, lengths, (TEST,), profile="full"),
    "threes": Experiment(
        "08_missing_digits",
        10,
        threes,
        ("unseen, before", "unseen, teacher's answers", "auroc"),
        with_shift,
        "full",
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
        """What is recorded."""
        rows = reference.results(self.chapter, self.profile) or {}
        return {
            row: {line.recipe.seed: line for line in lines if line.recipe}
            for row, lines in rows.items()
        }

    def missing(self, wanted: dict[int, Rows]) -> dict[int, Rows]:
        """What is wanted and not recorded. Raises ValueError if a recorded recipe is another."""
        known = self.results()
        for seed, rows in wanted.items():
            for row, recipe in rows.items():
                line = known.get(row, {}).get(seed)
                if line is not None and line.recipe != recipe:
                    raise ValueError(
                        f"{reference.path(self.chapter, self.profile)} has seed {seed} of {row!r} "
                        "with another recipe: run the code that recorded it, or move that file "
                        "away to record all of it again"
                    )
        lacking = {
            seed: {row: rows[row] for row in rows if seed not in known.get(row, {})}
            for seed, rows in wanted.items()
        }
        return {seed: rows for seed, rows in lacking.items() if rows}

    def add(self, results: Results) -> Path:
        """Add results. Other processes may do so at the same time; what is recorded stays."""
        place = reference.path(self.chapter, self.profile)
        place.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place.with_suffix(".lock")):
            known = self.results()
            # A chapter's record has rows of its own too, which stay as they are.
            rows: dict[str, Any] = reference.results(self.chapter, self.profile) or {}
            for row, lines in results.items():
                both = lines | known.get(row, {})
                rows[row] = [both[seed] for seed in sorted(both)]
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
    profile = experiment.profile or given.experiment if whole else f"{given.experiment}_trial"
    # Where no commit is known nothing can be recorded, so nothing should be trained.
    commit = given.commit or reference.current_commit()
    record = Record(profile, experiment.chapter, commit, vars(given))
    seeds = experiment.seeds if given.seeds is None else given.seeds
    wanted = {
        seed: {
            row: throughout(recipe, given.length, dataset=given.dataset)
            for row, recipe in experiment.rows(seed).items()
            if any(fnmatchcase(row, pattern) for pattern in given.only)
        }
        for seed in range(seeds)
    }
    if not wanted[0]:
        rows = "; ".join(experiment.rows(0))
        raise ValueError(f"--only is {given.only}: expected one or more of the rows {rows}")
    missing = list(record.missing(wanted).items())
    for done in range(0, len(missing), given.together):
        if done and time.monotonic() > end:
            print("the time is over: run the same command again to continue")
            break
        part = dict(missing[done : done + given.together])
        print(record.add(trained(experiment, part)), flush=True)
    of_the_experiment = experiment.rows(0)
    for row, lines in record.results().items():
        if row not in of_the_experiment:
            continue
        spreads = [f"{metric}: {evaluate.spread(lines, metric)}" for metric in experiment.shown]
        print(f"{row:46} {', '.join(spreads)}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", default=["*"], help="rows, as patterns with * and ?"
    )
    default = ", ".join(f"{name} {e.seeds}" for name, e in EXPERIMENTS.items())
    parser.add_argument("--seeds", type=int, help=f"how many, starting from 0 (default: {default})")
    parser.add_argument("--together", type=int, default=1, help="seeds trained in one call")
    parser.add_argument("--minutes", type=float, help="start no further seeds after this time")
    parser.add_argument("--length", type=float, default=1.0, help="share of the epochs (a trial)")
    parser.add_argument("--dataset", default="mnist", choices=["mnist", "mnist-5k"])
    parser.add_argument("--commit", help="of the code that runs, if this is not a clone")
    given = parser.parse_args(arguments)
    for name in ("seeds", "together", "minutes", "length"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} is {value}: expected a positive number")
    if given.experiment == "beyond" and given.only == ["*"]:
        parser.error("beyond needs --only: test digits are for the setting that was chosen")
    try:
        run(given)
    except (ValueError, OSError, files.DataError, store.StoreError) as error:
        sys.exit(f"paper_scale: {error}")


if __name__ == "__main__":
    main()
