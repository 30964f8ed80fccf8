"""What runs are judged by: errors with intervals and spread, comparison, calibration, bias."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdlib import check
from kdlib.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

# A comparison of fewer pairs, or of fewer runs in a row, decides nothing.
FEWEST = 5
# The chance of calling a difference where there is none.
LEVEL = 0.05


class Result(Protocol):
    """A run, or what a record keeps of one."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def metrics(self) -> dict[str, Any]: ...


AnyResult = TypeVar("AnyResult", bound=Result)
Row = Sequence[Result] | Sequence[float] | Mapping[Any, float]


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


def spread(runs: Row, metric: str = "test_errors") -> Spread:
    """A metric over the runs of several seeds; diverged ones are counted, never averaged.

    runs: as for `compare`. Raises KeyError for a metric that the runs lack.
    """
    values = _values(runs, metric)
    good = values[np.isfinite(values)]
    mean = float(good.mean()) if len(good) else math.nan
    deviation = float(good.std(ddof=1)) if len(good) > 1 else math.nan
    return Spread(mean, deviation, len(good), len(values) - len(good))


def table(groups: Mapping[str, Row], metric: str = "test_errors") -> "pd.DataFrame":
    """One row per group: mean, standard deviation, number of seeds, diverged runs."""
    # Imported only here: a machine that only trains can do without it.
    import pandas as pd

    cells = [astuple(spread(runs, metric)) for runs in groups.values()]
    return pd.DataFrame(cells, list(groups), ["mean", "± sd", "seeds", "diverged"])


def best(runs: Sequence[AnyResult], metric: str = "validation_errors") -> AnyResult:
    """Of the runs that did not diverge, the one with the fewest errors; the first of equals.

    Raises ValueError if all of them diverged.
    """
    good = [run for run in runs if run.metrics["status"] == "ok"]
    if not good:
        raise ValueError(f"all {len(runs)} runs diverged: try smaller learning rates")
    return min(good, key=lambda run: run.metrics[metric])


def steadiest(
    groups: Sequence[Sequence[AnyResult]], metric: str = "validation_errors"
) -> AnyResult:
    """The worst run of the group whose worst run is best, as `best` compares them.

    groups: for each setting, the runs of several seeds or draws. A setting at the edge of
    stability may win with one seed and fail with the next. Raises ValueError if every group
    has a run that diverged.
    """
    worst = [
        max(runs, key=lambda run: (run.metrics["status"] != "ok", run.metrics[metric]))
        for runs in groups
    ]
    return best(worst, metric)


@dataclass(frozen=True)
class Comparison:
    """The difference between the means of a metric in two rows of runs, and the verdict.

    low, high: its 95 % t interval. p: two-sided; `holm` replaces it by the adjusted one, which
    decides the verdict, while the interval stays. runs: the number compared in each row.
    dropped: pairs, or runs, left out because a run diverged. margin: the largest difference
    that counts as none, declared beforehand.
    Printed, it reads "−10.1 [−12.3, −7.9], 30 pairs, fewer".
    """

    difference: float
    low: float
    high: float
    p: float
    runs: tuple[int, int]
    dropped: int
    paired: bool
    margin: float | None = None

    @property
    def count(self) -> int:
        """The number of pairs; of rows that are not paired, the runs of the smaller one."""
        return min(self.runs)

    @property
    def verdict(self) -> str:
        """One of: fewer, more, alike, too close to call."""
        if self.count >= FEWEST:
            # First, because differences inside the margin were declared negligible.
            if self.margin is not None and -self.margin < self.low and self.high < self.margin:
                return "alike"
            if self.p < LEVEL:
                return "fewer" if self.difference < 0 else "more"
        return "too close to call"

    def as_row(self) -> dict[str, str]:
        """Its parts as texts, for a table with one comparison per row."""
        width = self.high - self.low
        # One decimal suits counts of errors; narrower intervals get two significant digits.
        places = max(1, 1 - math.floor(math.log10(width))) if width > 0 else 1
        numbers = (f"{x:.{places}f}" for x in (self.difference, self.low, self.high))
        mean, low, high = (number.replace("-", "−") for number in numbers)
        over = f"{self.count} pairs" if self.paired else "{} and {} runs".format(*self.runs)
        return {
            "difference": mean,
            "95 % interval": f"[{low}, {high}]",
            "over": f"{over}, {self.dropped} dropped" if self.dropped else over,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        difference, interval, *rest = self.as_row().values()
        return ", ".join([f"{difference} {interval}", *rest])


def compare(
    a: Row,
    b: Row,
    *,
    paired: bool = False,
    margin: float | None = None,
    metric: str = "test_errors",
) -> Comparison:
    """The metric's mean in row a minus that in row b, and whether it differs.

    a, b: runs, recorded results, plain values, or a mapping from seeds to values.
    paired: whether the rows share seeds, draws or teachers, pair by pair; otherwise the interval
    is Welch's. margin: the rows are "alike" if the interval lies inside ± margin. Both are
    declared before the results are known. Diverged runs (plain values: nan or None) are dropped,
    with their partners if paired. Fewer than five pairs, or runs in a row, decide nothing.
    Several comparisons in one figure are adjusted by `holm`.
    Raises ValueError for rows that cannot be paired, KeyError for a metric that runs lack.
    Student 1908; Welch 1947.
    """
    check.value("margin", margin, check.optional(check.POSITIVE))
    first, second = _values(a, metric), _values(b, metric)
    if paired:
        _check_pairs(_seeds(a), _seeds(b))
    samples = [first - second] if paired else [first, -second]
    # A diverged run is nan, and so is the difference of a pair that has one.
    good = [sample[np.isfinite(sample)] for sample in samples]
    dropped = sum(map(len, samples)) - sum(map(len, good))
    runs = len(good[0]), len(good[-1])
    return Comparison(*_t_interval(good), runs, dropped, paired, margin)


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one figure, each p adjusted for their number; their intervals stay.

    Comparisons that decide nothing because of too few pairs are not counted. Holm 1979.
    """
    adjusted, highest = list(comparisons), 0.0
    decisive = [at for at, one in enumerate(comparisons) if one.count >= FEWEST]
    # From the smallest p on: none may end below a smaller one's.
    for rank, at in enumerate(sorted(decisive, key=lambda at: comparisons[at].p)):
        highest = max(highest, min(1.0, (len(decisive) - rank) * comparisons[at].p))
        adjusted[at] = replace(comparisons[at], p=highest)
    return adjusted


def _seeds(row: Any) -> list[Any]:
    """The seeds of a row's values, in its order; None where a seed is unknown."""
    if isinstance(row, Mapping):
        return sorted(row)
    # A recorded value that is no run's has no recipe, but a seed of its own.
    return [getattr(getattr(item, "recipe", None) or item, "seed", None) for item in row]


def _values(row: Any, metric: str) -> np.ndarray:
    """The values of a row, in the order of `_seeds`; nan for a diverged run."""
    if isinstance(row, Mapping):
        row = [row[seed] for seed in sorted(row)]
    found = [getattr(item, "metrics", {"status": "ok", metric: item}) for item in row]
    items = [its[metric] if its["status"] == "ok" else math.nan for its in found]
    return np.array(items, dtype=np.float64)


def _check_pairs(seeds: list[Any], others: list[Any]) -> None:
    if len(seeds) != len(others):
        raise ValueError(f"rows have {len(seeds)} and {len(others)} values: expected pairs")
    for place, (seed, other) in enumerate(zip(seeds, others, strict=True)):
        if None not in (seed, other) and seed != other:
            raise ValueError(
                f"pair {place} has the seeds {seed!r} and {other!r}: expected equal seeds; "
                "sort both rows by seed, or compare them unpaired"
            )


def _t_interval(samples: Sequence[np.ndarray]) -> tuple[float, float, float, float]:
    """The sum of the samples' means, its 95 % interval, and the p of a sum of 0.

    Welch's interval; of a single sample it is Student's.
    """
    # Imported only here: a machine that only trains can do without it.
    from scipy.special import stdtr, stdtrit

    fewest = min(map(len, samples))
    mean = float(sum(sample.mean() for sample in samples)) if fewest else math.nan
    if fewest < 2:
        return mean, math.nan, math.nan, math.nan
    squares = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    error = math.sqrt(squares.sum())
    # Values that never vary leave no doubt, and no degrees of freedom to compute.
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    # Welch and Satterthwaite's degrees of freedom: of a single sample, its size less one.
    sizes = np.array([len(sample) for sample in samples])
    freedom = squares.sum() ** 2 / (squares**2 / (sizes - 1)).sum()
    half = stdtrit(freedom, 1 - LEVEL / 2) * error
    p = 2 * stdtr(freedom, -abs(mean) / error)
    return mean, float(mean - half), float(mean + half), float(p)


def wilson_interval(errors: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of an error count, in errors; z is 1.96 for 95 %.

    Raises ValueError unless 0 <= errors <= total and total > 0. Wilson 1927.
    """
    if not 0 <= errors <= total or total == 0:
        raise ValueError(f"errors={errors} of total={total}: expected 0 <= errors <= total > 0")
    share, part = errors / total, z * z / total
    centre = (share + part / 2) / (1 + part)
    half = z * math.sqrt(share * (1 - share) / total + part / (4 * total)) / (1 + part)
    return max(0.0, centre - half) * total, min(1.0, centre + half) * total


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts (classes, classes): a row per true class, a column per answer."""
    classes = logits.shape[-1]
    # One number for each pair of class and answer, so that one call counts them all.
    pairs = labels * classes + logits.argmax(-1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in bits of probabilities (..., classes); 0 log 0 is 0. Returns (...)."""
    return -torch.xlogy(probabilities, probabilities).sum(-1) / math.log(2)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy, in equal bins.

    probabilities: (N, classes), labels: (N,). Between 0 and 1. Guo et al. 2017.
    """
    confidence, answer = probabilities.max(-1)
    right = (answer == labels).double()
    # A confidence of exactly 1 belongs to the last bin.
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.bincount(place, right - confidence.double(), minlength=bins)
    return (gaps.abs().sum() / len(labels)).item()


def bias_shift(logits: Tensor, classes: Sequence[int], answers: Tensor, grid: Tensor) -> float:
    """The shift of some classes' biases that agrees best with given answers.

    The shift s in grid for which the argmax of (logits + s on the classes) differs from the
    answer in the fewest rows; the middle one if several do. logits: (N, classes); answers:
    int64 (N,), a teacher's on held-out samples, so that no label is needed; grid: (shifts,),
    ascending. Raises ValueError for shapes that do not fit or an empty grid.
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
    # Any shift on the plateau of the fewest is as good; its middle is the farthest from worse ones.
    # PyTorch's median of an even number is the lower of the middle two, so one of the grid.
    return grid[(wrong == wrong.min()).cpu()].median().item()
