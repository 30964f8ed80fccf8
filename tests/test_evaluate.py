"""What runs are judged by, against SciPy and NumPy."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import kdlib
from kdlib import evaluate

calm = settings(deadline=None, max_examples=60, derandomize=True)


def made(errors: float, status: str = "ok", **metrics: Any) -> kdlib.Run:
    """A run of which only the metrics matter."""
    known = {"status": status, "test_errors": errors, **metrics}
    return kdlib.Run(kdlib.Recipe("lenet"), known, {}, 0.0, {}, {}, False, torch.device("cpu"))


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    total = draw(st.integers(1, 20_000))
    return draw(st.integers(0, total)), total


@calm
@given(counts())
def test_the_wilson_interval_is_scipys(given: tuple[int, int]) -> None:
    errors, total = given
    low, high = evaluate.wilson_interval(errors, total)
    known = stats.binomtest(errors, total).proportion_ci(method="wilson")
    assert low == pytest.approx(known.low * total, rel=1e-5, abs=1e-6 * total)
    assert high == pytest.approx(known.high * total, rel=1e-5, abs=1e-6 * total)
    assert 0 <= low <= errors + 1e-9
    assert errors - 1e-9 <= high <= total


def test_the_wilson_interval_widens_with_z() -> None:
    low, high = evaluate.wilson_interval(146, 10_000, z=2.575829)
    known = stats.binomtest(146, 10_000).proportion_ci(0.99, method="wilson")
    assert (low / 1e4, high / 1e4) == pytest.approx((known.low, known.high), rel=1e-6)


@pytest.mark.parametrize(("errors", "total"), [(-1, 10), (11, 10), (0, 0), (0, -1)])
def test_counts_that_cannot_be_are_refused(errors: int, total: int) -> None:
    with pytest.raises(ValueError, match=rf"errors={errors} of total={total}: expected"):
        evaluate.wilson_interval(errors, total)


@calm
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=9))
def test_the_spread_is_the_sample_deviation(errors: list[int]) -> None:
    found = evaluate.spread([made(count) for count in errors])
    assert found.mean == pytest.approx(np.mean(errors))
    assert found.deviation == pytest.approx(np.std(errors, ddof=1), abs=1e-9)
    assert (found.count, found.diverged) == (len(errors), 0)


def test_diverged_runs_are_counted_and_never_averaged() -> None:
    runs = [made(100), made(9000, "diverged"), made(110), made(math.nan, "diverged")]
    found = evaluate.spread(runs)
    assert (found.mean, found.count, found.diverged) == (105, 2, 2)
    assert str(found) == "105.0 ± 7.1 (2, 2 diverged)"
    assert np.mean([run.metrics["test_errors"] for run in runs[:3]]) > 3000
    alone = evaluate.spread([made(146)])
    assert str(alone) == "146.0 (1)"
    assert math.isnan(alone.deviation)
    none = evaluate.spread([made(1, "diverged")])
    assert math.isnan(none.mean)
    assert (none.count, none.diverged) == (0, 1)
    assert evaluate.spread([made(5, other=1.5), made(5, other=2.5)], "other").mean == 2
    with pytest.raises(KeyError, match="validation_errors"):
        evaluate.spread([made(5)], "validation_errors")


def test_a_table_has_a_row_a_group() -> None:
    table = evaluate.table(
        {"hard": [made(150), made(140)], "soft": [made(9, "diverged"), made(80)]}
    )
    assert table.columns.tolist() == ["mean", "± sd", "seeds", "diverged"]
    assert table.index.tolist() == ["hard", "soft"]
    assert table.loc["hard"].tolist() == pytest.approx([145, 50**0.5, 2, 0])
    assert table.loc["soft", ["mean", "seeds", "diverged"]].tolist() == [80, 1, 1]


def test_bug_a_best_that_is_never_updated() -> None:
    """The best is found wherever it stands, on validation errors, among runs that trained."""
    several = [
        made(10, validation_errors=9),
        made(90, validation_errors=3),
        made(1, validation_errors=5),
        made(20, validation_errors=3),
        made(0, "diverged", validation_errors=0),
    ]
    for order in (several, several[::-1]):
        chosen = evaluate.best(order)
        assert chosen.metrics["validation_errors"] == 3
        assert chosen is next(run for run in order if run.metrics["validation_errors"] == 3)
    assert evaluate.best(several, "test_errors") is several[2]
    with pytest.raises(ValueError, match="all 2 runs diverged: try smaller learning rates"):
        evaluate.best([made(1, "diverged")] * 2)
    with pytest.raises(KeyError):  # never the test errors in place of validation errors
        evaluate.best([made(1), made(2)])


def test_the_gentlest_of_equals_has_the_smallest_rate() -> None:
    def at(rate: float, errors: int, status: str = "ok") -> kdlib.Run:
        run = made(0, status, validation_errors=errors)
        return replace(run, recipe=run.recipe.replace(learning_rate=rate))

    runs = [at(0.4, 100), at(0.2, 110), at(0.2, 105), at(0.1, 111), at(0.05, 100, "diverged")]
    assert evaluate.gentlest(runs) is runs[2]  # 110 is within 10 of the fewest, 111 is not
    assert evaluate.gentlest([*runs, at(0.3, 90)]).recipe.learning_rate == 0.3
    with pytest.raises(ValueError, match="all 1 runs diverged: try smaller"):
        evaluate.gentlest(runs[-1:])


def test_the_steadiest_setting_is_judged_by_its_worst_run() -> None:
    edge = [made(1), made(9, "diverged"), made(1)]
    lucky, steady = [made(2), made(8)], [made(6), made(7)]
    assert evaluate.steadiest([edge, lucky, steady], "test_errors") is steady[1]
    assert evaluate.steadiest([edge, lucky], "test_errors") is lucky[1]
    with pytest.raises(ValueError, match="all 1 runs diverged: try smaller"):
        evaluate.steadiest([edge], "test_errors")


@calm
@given(hnp.arrays(np.int64, (20, 2), elements=st.integers(0, 4)))
def test_confusion_counts_pairs(pairs: np.ndarray) -> None:
    labels, guesses = pairs.T
    logits = torch.nn.functional.one_hot(torch.from_numpy(guesses.copy()), 5).double()
    expected = np.zeros((5, 5), dtype=int)
    for label, guess in pairs:
        expected[label, guess] += 1
    found = evaluate.confusion(logits, torch.from_numpy(labels.copy()), classes=5)
    np.testing.assert_array_equal(found, expected)
    assert evaluate.confusion(logits, torch.from_numpy(labels.copy())).shape == (10, 10)


@calm
@given(hnp.arrays(np.float64, (4, 6), elements=st.floats(-30, 30)))
def test_entropy_is_scipys_in_bits(logits: np.ndarray) -> None:
    shares = torch.from_numpy(logits).softmax(-1)
    expected = stats.entropy(shares.numpy(), base=2, axis=1)
    np.testing.assert_allclose(evaluate.entropy(shares), expected, rtol=1e-9, atol=1e-12)


def test_entropy_of_what_is_certain_and_of_what_is_not() -> None:
    certain = torch.eye(4, dtype=torch.float64)
    assert evaluate.entropy(certain).tolist() == [0] * 4
    assert evaluate.entropy(torch.full((8,), 1 / 8)).item() == pytest.approx(3)


@calm
@given(
    hnp.arrays(np.float64, (30, 4), elements=st.floats(-8, 8)),
    hnp.arrays(np.int64, 30, elements=st.integers(0, 3)),
    st.integers(1, 20),
)
def test_the_calibration_error_is_binned(logits: np.ndarray, labels: np.ndarray, bins: int) -> None:
    shares = torch.from_numpy(logits).softmax(-1)
    confidence, right = shares.numpy().max(1), shares.numpy().argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        (place == number).mean() * abs((right - confidence)[place == number].mean())
        for number in set(place)
    ]
    found = evaluate.calibration_error(shares, torch.from_numpy(labels), bins)
    assert found == pytest.approx(sum(gaps), abs=1e-9)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    shares = torch.eye(4, dtype=torch.float64)
    assert evaluate.calibration_error(shares, torch.arange(4)) == 0
    assert evaluate.calibration_error(shares, (torch.arange(4) + 1) % 4) == 1
