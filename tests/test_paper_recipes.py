"""The paper's networks under the classic, the modern and the short recipe."""

import math
from pathlib import Path

import pytest

import kdlib
from kdlib.paper import PAPER

NAMES = ("teacher", "student", "distilled")


@pytest.mark.parametrize("kind", PAPER)
def test_the_networks_are_the_papers(kind: str) -> None:
    teacher, student, distilled = (PAPER[kind][n] for n in NAMES)
    assert (teacher.model, teacher.jitter) == ("mlp-1200x1200", 2)
    assert teacher.max_norm is not None
    assert math.isclose(teacher.max_norm**2, 15)  # the squared length
    for small in (student, distilled):
        assert (small.model, small.jitter, small.dropout) == ("mlp-800x800", 0, (0, 0))
        assert small.max_norm is None
    assert student.teacher == ()
    assert distilled.teacher == (teacher,)
    assert distilled.temperature == 20
    assert distilled.hard_weight < 0.5
    assert all(used.fraction == 1 and used.omit == () for used in PAPER[kind].values())


KEYS = {  # of the recipes under which results are recorded
    "classic": ["304336bd354fab12", "417dc2d57bb88747", "4d507ffeacb74442"],
    "modern": ["9de880ba503fc00f", "f4d6f35de7827472", "59f01355e7b923da"],
    "short": ["dcae812caa4e273b", "631a6c5565126861", "50e5213f62a8ff24"],
}


def test_the_recipes_keep_their_keys() -> None:
    assert {kind: [trio[n].key for n in NAMES] for kind, trio in PAPER.items()} == KEYS


def test_the_classic_schedule_is_that_of_2012() -> None:
    assert PAPER["classic"]["teacher"].dropout == (0.2, 0.5)
    for used in PAPER["classic"].values():
        assert (used.schedule, used.batch_size, used.epochs) == ("classic", 100, 3000)
        assert used.momentum == 0.99


@pytest.mark.parametrize("kind", PAPER)
def test_the_recipes_train(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the recipe's own rates nothing diverges, and the networks learn."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    short = {"dataset": "mnist-5k", "epochs": 6}
    teacher, student, distilled = (PAPER[kind][name].replace(**short) for name in NAMES)
    runs = kdlib.train_all([teacher, student, distilled.replace(teacher=(teacher,))], device="cpu")
    assert [run.metrics["status"] for run in runs] == ["ok"] * 3
    # of 1,000, where guessing makes 900; rounding decides how far so few steps lead
    assert max(run.metrics["test_errors"] for run in runs) < 600
