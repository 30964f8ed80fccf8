"""What runs are judged by, against SciPy and NumPy."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
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


# --- comparisons


values = st.lists(st.integers(0, 300), min_size=2, max_size=12)
pairs = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=2, max_size=12)


def varied(*rows: Any) -> bool:
    """SciPy's tests know no rows that never vary; of nearly equal floats they lose the digits."""
    return all(np.ptp(row) > 0 for row in rows)


@calm
@given(values, values)
def test_rows_that_share_nothing_are_compared_as_scipys_welch(a: list[int], b: list[int]) -> None:
    assume(varied(a, b))
    found = evaluate.compare(a, b)
    known = stats.ttest_ind(a, b, equal_var=False)
    interval = known.confidence_interval()
    expected = (np.mean(a) - np.mean(b), interval.low, interval.high, known.pvalue)
    got = (found.difference, found.low, found.high, found.p)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (found.runs, found.dropped, found.paired) == ((len(a), len(b)), 0, False)


@calm
@given(pairs)
def test_pairs_are_compared_as_by_scipy(given: list[tuple[int, int]]) -> None:
    a, b = np.array(given).T
    assume(varied(a - b))
    found = evaluate.compare(a, b, paired=True)
    known = stats.ttest_rel(a, b)
    interval = known.confidence_interval()
    expected = ((a - b).mean(), interval.low, interval.high, known.pvalue)
    got = (found.difference, found.low, found.high, found.p)
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (found.count, found.dropped, found.paired) == (len(a), 0, True)


@calm
@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_pairs_decides_nothing(
    given: list[tuple[int, int]], order: random.Random
) -> None:
    by_seed = dict(enumerate(given))
    shuffled = list(by_seed.items())
    order.shuffle(shuffled)
    expected = evaluate.compare(*np.array(given).T, paired=True)
    a, b = ({seed: pair[side] for seed, pair in shuffled} for side in (0, 1))
    forwards = dict(enumerate(np.array(given).T[1].tolist()))
    assert evaluate.compare(a, b, paired=True) == expected
    assert evaluate.compare(a, forwards, paired=True) == expected
    turned = evaluate.compare(b, a, paired=True)
    assert (turned.difference, turned.low, turned.high) == pytest.approx(
        (-expected.difference, -expected.high, -expected.low)
    )


FEW = [142.0, 150, 139, 145, 148]
LESS = [70.0, 76, 74, 69, 75]


def test_the_verdicts() -> None:
    def verdict(a: list[float], b: list[float], **rule: Any) -> str:
        return evaluate.compare(a, b, **rule).verdict

    for paired in (False, True):
        assert verdict(LESS, FEW, paired=paired) == "fewer"
        assert verdict(FEW, LESS, paired=paired) == "more"
        assert (
            verdict(FEW[:4], LESS[:4], paired=paired) == "too close to call"
        )  # four decide nothing
        assert verdict(FEW, FEW[::-1], paired=paired) == "too close to call"
        assert verdict(FEW, FEW[::-1], paired=paired, margin=20) == "alike"
        assert verdict(FEW, FEW[::-1], paired=paired, margin=1) == "too close to call"
        assert verdict(LESS, FEW, paired=paired, margin=70) == "fewer"
        assert verdict(FEW, LESS, paired=paired, margin=70) == "more"
        assert verdict(LESS, FEW, paired=paired, margin=90) == "alike"  # as declared
    assert verdict(FEW, LESS[:4]) == "too close to call"  # the smaller row counts
    assert verdict([5] * 5, [5] * 5, margin=1) == "alike"
    assert verdict([5] * 5, [6] * 5) == "fewer"
    with pytest.raises(ValueError, match="margin is 0: expected None or a finite number above 0"):
        evaluate.compare(FEW, LESS, margin=0)


def test_a_pair_with_a_diverged_run_is_dropped_and_shown() -> None:
    a = [made(errors) for errors in (67, 70, 66, 64, 69)] + [made(9000, "diverged"), made(68)]
    b = [made(errors) for errors in (76, 80, 78, 77, 79, 75)] + [made(math.nan, "diverged")]
    found = evaluate.compare(a, b, paired=True)
    whole = evaluate.compare([67, 70, 66, 64, 69], [76, 80, 78, 77, 79], paired=True)
    assert found == replace(whole, dropped=2)
    assert str(found) == "−10.8 [−12.8, −8.8], 5 pairs, 2 dropped, fewer"
    apart = evaluate.compare(a, b)
    assert (apart.runs, apart.dropped) == ((6, 6), 2)
    assert apart.difference == pytest.approx(np.mean([67, 70, 66, 64, 69, 68]) - 77.5)
    assert evaluate.compare([1, None, 3], [1, math.nan, 2], paired=True).dropped == 1
    nothing = evaluate.compare([made(1, "diverged")], [made(2)], paired=True)
    assert (nothing.count, nothing.dropped, nothing.verdict) == (0, 1, "too close to call")


def test_runs_records_and_values_are_compared_alike() -> None:
    def seeded(errors: list[float]) -> list[Any]:
        recipe = kdlib.Recipe("lenet")
        return [replace(made(e), recipe=recipe.replace(seed=s)) for s, e in enumerate(errors)]

    runs, others = seeded(FEW), seeded(LESS)
    recorded = [SimpleNamespace(recipe=run.recipe, metrics=run.metrics) for run in others]
    expected = evaluate.compare(FEW, LESS, paired=True)
    assert evaluate.compare(runs, recorded, paired=True) == expected
    assert evaluate.compare(runs, dict(enumerate(LESS)), paired=True) == expected
    assert evaluate.compare(runs, LESS, paired=True) == expected
    assert evaluate.spread(dict(enumerate(LESS))) == evaluate.spread(others)
    with pytest.raises(ValueError, match="pair 0 has the seeds 0 and 4: expected equal seeds"):
        evaluate.compare(runs, recorded[::-1], paired=True)
    with pytest.raises(ValueError, match="rows have 5 and 4 values: expected pairs"):
        evaluate.compare(runs, LESS[1:], paired=True)
    assert evaluate.compare(runs, recorded[::-1]).verdict == "more"
    with pytest.raises(KeyError, match="validation_errors"):
        evaluate.compare(runs, recorded, metric="validation_errors")


def with_p(p: float, count: int = 5, margin: float | None = None) -> evaluate.Comparison:
    return evaluate.Comparison(-1, -2, 0, p, (count, count), 0, True, margin)


@calm
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_adjusts_as_by_hand(ps: list[float]) -> None:
    found = [one.p for one in evaluate.holm([with_p(p) for p in ps])]
    # One at a time: each p times the number of those not below it, never below a smaller one's.
    order = np.argsort(ps, kind="stable")
    expected = np.zeros(len(ps))
    for rank, at in enumerate(order):
        steps = [(len(ps) - earlier) * ps[order[earlier]] for earlier in range(rank + 1)]
        expected[at] = min(1, max(steps))
    assert found == pytest.approx(expected.tolist())


def test_holm_decides_the_verdicts_of_a_figure() -> None:
    figure = [with_p(0.01), with_p(0.04), with_p(0.03), with_p(math.nan, count=1)]
    assert [one.verdict for one in figure[:3]] == ["fewer"] * 3
    adjusted = evaluate.holm(figure)
    assert [one.p for one in adjusted[:3]] == pytest.approx([0.03, 0.06, 0.06])
    assert [one.verdict for one in adjusted] == ["fewer", *["too close to call"] * 3]
    assert (adjusted[1].low, adjusted[1].high) == (-2, 0)
    assert evaluate.holm([with_p(0.9, margin=3), with_p(0.9)])[0].verdict == "alike"


def test_a_comparison_reads_well_in_a_table() -> None:
    rows = {"student": evaluate.compare(FEW, LESS), "itself": evaluate.compare(FEW, FEW, margin=9)}
    table = pd.DataFrame({name: one.as_row() for name, one in rows.items()}).T
    assert table.columns.tolist() == ["difference", "95 % interval", "over", "verdict"]
    assert table.loc["student"].tolist() == ["72.0", "[66.3, 77.7]", "5 and 5 runs", "more"]
    assert table.loc["itself", "verdict"] == "alike"
    small = evaluate.compare([0.012, 0.014, 0.011, 0.013, 0.012], [0.02, 0.022, 0.021, 0.02, 0.019])
    assert str(small) == "−0.0080 [−0.0097, −0.0063], 5 and 5 runs, fewer"


# --- the other measures


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
    found = evaluate.confusion(logits, torch.from_numpy(labels.copy()))
    np.testing.assert_array_equal(found, expected)


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
