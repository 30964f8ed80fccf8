"""The paper's networks under the classic, the modern and the short recipe."""

import math
from pathlib import Path

import pytest

import kdlib
from kdlib.recipe import PAPER


@pytest.mark.parametrize("kind", PAPER)
def test_the_networks_are_the_papers(kind: str) -> None:
    teacher, student, distilled = (PAPER[kind][n] for n in ("teacher", "student", "distilled"))
    assert (teacher.model, teacher.jitter) == ("mlp-1200x1200", 2)
    assert teacher.max_norm is not None
    assert math.isclose(teacher.max_norm**2, 15)  # the squared length
    for recipe in (student, distilled):
        assert (recipe.model, recipe.jitter, recipe.dropout) == ("mlp-800x800", 0, (0, 0))
        assert recipe.max_norm is None
    assert student.teacher == ()
    assert distilled.teacher == (teacher,)
    assert distilled.temperature == 20
    assert distilled.hard_weight < 0.5
    assert all(recipe.fraction == 1 and recipe.omit == () for recipe in PAPER[kind].values())


def test_the_classic_schedule_is_that_of_2012() -> None:
    assert PAPER["classic"]["teacher"].dropout == (0.2, 0.5)
    for recipe in PAPER["classic"].values():
        assert (recipe.schedule, recipe.batch_size, recipe.epochs) == ("classic", 100, 3000)
        assert recipe.momentum == 0.99


@pytest.mark.parametrize("kind", PAPER)
def test_the_recipes_train(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the recipe's own rates nothing diverges, and the networks learn."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    short = {"dataset": "mnist-5k", "epochs": 6}
    teacher, student, distilled = (
        PAPER[kind][name].replace(**short) for name in ("teacher", "student", "distilled")
    )
    runs = kdlib.train_all([teacher, student, distilled.replace(teacher=(teacher,))], device="cpu")
    assert [run.metrics["status"] for run in runs] == ["ok"] * 3
    # of 1,000, where guessing makes 900; rounding decides how far so few steps lead
    assert max(run.metrics["test_errors"] for run in runs) < 600
