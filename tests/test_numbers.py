"""Numbers in prose: filled from the record, by name."""

import statistics

import numpy as np
import pytest
import scipy.stats

from kdlib import Recipe
from kdlib.book import numbers, reference

ROWS = {"big": [60, 70, 77, 64, 69, 71], "small one": [75, 78, 90, 74, 81, 70], "lost": [9, 11]}
# Closes the whole gap in half of the pairs and nothing in the others.
ROWS["middling"] = [*ROWS["big"][:3], *ROWS["small one"][3:]]
HERE = "07a_a_chapter"


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of plain values, as a chapter records them; the last run of "lost" diverged."""
    rows = {
        name: [
            reference.Recorded(None, {"status": "ok", "test_errors": v, "share": v / 1e4}, 0, {})
            for v in values
        ]
        for name, values in ROWS.items()
    }
    rows["lost"].append(reference.Recorded(None, {"status": "diverged"}, 0, {}))
    recorded = {(HERE, "full"): rows, (HERE, "quick"): {"big": rows["lost"]}}
    monkeypatch.setattr(reference, "results", lambda *asked: recorded.get(asked))
    numbers._rows.cache_clear()


def difference(paired: bool) -> tuple[float, float, float]:
    """By scipy: the mean of "small one" less that of "big", and its 95 % interval."""
    one, other = ROWS["small one"], ROWS["big"]
    found = scipy.stats.ttest_rel(one, other) if paired else None
    found = found or scipy.stats.ttest_ind(one, other, equal_var=False)
    low, high = found.confidence_interval()
    return statistics.mean(one) - statistics.mean(other), low, high


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("big/mean", "68.5"),
        ("big/sd", f"{statistics.stdev(ROWS['big']):.1f}"),
        ("big/count", "6"),
        ("big/min", "60"),
        ("big/max", "77"),
        ("big/median", "69.5"),
        ("big/spread", f"68.5 ± {statistics.stdev(ROWS['big']):.1f} (6)"),
        ("lost/count", "2"),
        ("lost/max", "11"),
        ("big/share/mean:.2%", "0.69%"),
        (f"{HERE}@quick/big/mean:.0f", "10"),
        ("small one - big/difference", f"{difference(False)[0]:.1f}"),
        ("small one - big/low", f"{difference(False)[1]:.1f}"),
        ("small one - big/paired low", f"{difference(True)[1]:.1f}"),
        ("small one - big/paired high", f"{difference(True)[2]:.1f}"),
        ("small one - big/half:.2f", f"{difference(False)[2] - difference(False)[0]:.2f}"),
        ("big - small one/paired difference", f"−{difference(True)[0]:.1f}"),
        ("small one - big/paired more", "5"),
        ("small one - big/paired fewer", "1"),
        ("lost/diverged", "1"),
        ("small one ÷ big/mean:.3f", f"{78 / 68.5:.3f}"),
        ("small one ÷ big/share/median:.2f", f"{76.5 / 69.5:.2f}"),
        ("big ÷ small one/fewer:.0%", "12%"),
        ("middling - small one - big/paired share:.0%", "50%"),
    ],
)  # fmt: skip
def test_a_name_stands_for_a_recorded_number(name: str, expected: str) -> None:
    assert numbers.value(name, HERE) == expected
    if not name.startswith(HERE):
        assert numbers.value(f"{HERE}/{name}") == expected


@pytest.mark.parametrize("old", ["?", "1", "−1,234.5", "+3", "1 ± 2", "66.0 ± 4.2 (30)", "12%"])
def test_a_number_is_filled_in_and_all_around_it_stays(old: str) -> None:
    text = "In 2–{}<!-- ref: big/mean --> of {}<!-- ref: big/spread -->, 7<!-- no ref -->"
    filled = numbers.fill(text.format(old, old), HERE)
    assert filled == text.format("68.5", numbers.value("big/spread", HERE))
    assert numbers.fill(filled, HERE) == filled


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a few<!-- ref: big/mean -->", "'<!-- ref: big/mean -->' has no number before it"),
        ("1<!-- ref: bigger/mean -->", "'bigger' is not known.*with a row of: big; small one"),
        ("1<!-- ref: big/average -->", "'average' is not known.*a statistic of: mean, sd"),
        ("1<!-- ref: big/errs/mean -->", "'errs' is not known"),
        ("1<!-- ref: big - small one/more -->", "'more' is not known.*paired more"),
        ("1<!-- ref: big ÷ small one/sd -->", "'sd' is not known.*a statistic of: mean, median"),
        ("1<!-- ref: big - small one - big/mean -->", "'mean' is not known.*: paired share$"),
        ("1<!-- ref: 01_why/big/mean -->", "nothing is recorded of '01_why'"),
        ("1<!-- ref: mean -->", "expected .chapter/.row"),
    ],
)
def test_what_cannot_be_filled_is_named(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){expected}"):
        numbers.fill(text, HERE)


def test_values_of_unlike_seeds_are_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(first: int) -> list[reference.Recorded]:
        return [reference.value("test_errors", first + n, 60 + n, {}) for n in range(6)]

    rows = {"one": row(0), "like": row(0), "unlike": row(1)}
    monkeypatch.setattr(reference, "results", lambda *_: rows)
    assert numbers.value("one - like/paired difference", HERE) == "0.0"
    with pytest.raises(ValueError, match="expected equal seeds"):
        numbers.value("one - unlike/paired difference", HERE)
    with pytest.raises(ValueError, match="expected equal seeds"):
        numbers.value("one - unlike/paired fewer", HERE)
    with pytest.raises(ValueError, match="expected equal seeds"):
        numbers.value("one - like - unlike/paired share", HERE)


def test_a_recipes_numbers_are_named_like_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("lenet", learning_rate=0.05)
    run = reference.Recorded(recipe, {"status": "ok", "test_errors": 60}, 0, {})
    monkeypatch.setattr(reference, "results", lambda *_: {"slow": [run, run]})
    assert numbers.value("slow/learning_rate/mean:g", HERE) == "0.05"
    with pytest.raises(ValueError, match="'model' is not known"):
        numbers.value("slow/model/mean", HERE)


def test_a_seed_without_a_gap_has_no_share_of_it() -> None:
    share = numbers.OF_A_GAP["paired share"]
    assert share(np.array([1.0, 2.0]), np.array([2.0, 0.0])) == 0.5
