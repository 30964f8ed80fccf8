"""What runs are judged by: errors with intervals and spread, confusion, calibration, bias."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdlib.runs import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Spread:
    """The mean and sample standard deviation (n - 1) of a metric over seeds.

    count: the runs in it. diverged: the runs left out of it. deviation: nan for one run.
    """

    mean: float
    deviation: float
    count: int
    diverged: int = 0

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.1f}"
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return f"{self.mean:.1f}{spread} ({self.count}{lost})"


def spread(runs: Sequence[Run], metric: str = "test_errors") -> Spread:
    """A metric over the runs of several seeds; diverged ones are counted, never averaged.

    Raises KeyError for a metric that the runs lack.
    """
    good = [float(run.metrics[metric]) for run in runs if run.metrics["status"] == "ok"]
    values = torch.tensor(good, dtype=torch.float64)
    mean = values.mean().item() if good else math.nan
    deviation = values.std().item() if len(good) > 1 else math.nan
    return Spread(mean, deviation, len(good), len(runs) - len(good))


def table(groups: Mapping[str, Sequence[Run]], metric: str = "test_errors") -> "pd.DataFrame":
    """A row a group: mean, standard deviation, number of seeds, diverged runs."""
    import pandas as pd  # a bare machine trains without it

    rows = {name: spread(runs, metric) for name, runs in groups.items()}
    return pd.DataFrame(
        {
            "mean": {name: row.mean for name, row in rows.items()},
            "± sd": {name: row.deviation for name, row in rows.items()},
            "seeds": {name: row.count for name, row in rows.items()},
            "diverged": {name: row.diverged for name, row in rows.items()},
        }
    )


def best(runs: Sequence[Run], metric: str = "validation_errors") -> Run:
    """The run with the fewest validation errors that did not diverge; the first of equals.

    Raises ValueError when all of them diverged.
    """
    good = [run for run in runs if run.metrics["status"] == "ok"]
    if not good:
        raise ValueError(f"all {len(runs)} runs diverged: try smaller learning rates")
    return min(good, key=lambda run: run.metrics[metric])


def gentlest(runs: Sequence[Run], metric: str = "validation_errors") -> Run:
    """The run of the smallest learning rate whose errors are within chance of the fewest.

    Chance: the square root of the fewest, about the standard error of such a count. Of
    equal rates the run with the fewer errors. Raises ValueError when all diverged.
    """
    fewest = best(runs, metric).metrics[metric]
    close = [
        run
        for run in runs
        if run.metrics["status"] == "ok" and run.metrics[metric] <= fewest + math.sqrt(fewest)
    ]
    return min(close, key=lambda run: (run.recipe.learning_rate, run.metrics[metric]))


def steadiest(groups: Sequence[Sequence[Run]], metric: str = "validation_errors") -> Run:
    """The worst run of the group whose worst run is best, as `best` compares them.

    groups: runs of several seeds or draws, a group a setting. A setting at the edge of
    stability may win by one seed and fail with the next. Raises ValueError when each has
    a run that diverged.
    """

    def place(run: Run) -> tuple[bool, float]:
        return run.metrics["status"] != "ok", run.metrics[metric]

    return best([max(runs, key=place) for runs in groups], metric)


def wilson_interval(errors: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of an error count, in errors; z = 1.96 for 95 %.

    Raises ValueError unless 0 <= errors <= total and total > 0. Wilson 1927.
    """
    if not 0 <= errors <= total or total == 0:
        raise ValueError(f"errors={errors} of total={total}: expected 0 <= errors <= total > 0")
    share, part = errors / total, z * z / total
    centre = (share + part / 2) / (1 + part)
    half = z * math.sqrt(share * (1 - share) / total + part / (4 * total)) / (1 + part)
    return max(0.0, centre - half) * total, min(1.0, centre + half) * total


def confusion(logits: Tensor, labels: Tensor, classes: int = 10) -> Tensor:
    """Counts (classes, classes): row the true class, column the answer."""
    pairs = labels * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in bits of probabilities (..., classes); 0 log 0 is 0. Returns (...)."""
    return -torch.xlogy(probabilities, probabilities).sum(-1) / math.log(2)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the mean gap of confidence and accuracy over equal bins.

    probabilities: (N, classes), labels: (N,). Between 0 and 1. Guo et al. 2017.
    """
    confidence, answer = probabilities.max(-1)
    right = (answer == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=labels.device)
    gaps.index_add_(0, place, right - confidence.double())
    return (gaps.abs().sum() / len(labels)).item()


def bias_shift(logits: Tensor, classes: Sequence[int], answers: Tensor, grid: Tensor) -> float:
    """The shift of some classes' biases that agrees best with given answers.

    argmin over s in grid of the rows whose argmax of (logits + s on the classes) is not the
    answer; of several best shifts, the middle one. logits: (N, classes); answers: int64 (N,),
    a teacher's on held-out samples, so that no label is needed; grid: (shifts,), ascending.
    Raises ValueError for shapes that do not fit or an empty grid.
    Hinton et al. 2015, section 3; introduced in chapter 8.
    """
    if answers.shape != logits.shape[:1] or grid.numel() == 0:
        raise ValueError(
            f"{tuple(logits.shape)} logits, {tuple(answers.shape)} answers and a grid of "
            f"{grid.numel()} shifts: expected (N, classes), (N,) and one shift or more"
        )
    raised = torch.zeros_like(logits[0])
    raised[list(classes)] = 1
    wrong = torch.stack([((logits + s * raised).argmax(-1) != answers).sum() for s in grid])
    best = (wrong == wrong.min()).nonzero().squeeze(1).tolist()
    return grid[best[(len(best) - 1) // 2]].item()
