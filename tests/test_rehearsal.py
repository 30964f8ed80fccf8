"""A rehearsal lists the runs that would be trained, and trains none."""

from pathlib import Path

import pytest
import torch

import kdlib
from kdlib import group, losses, store
from kdlib.book import rehearsal as plan


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return tmp_path / "ledger.jsonl"


def test_a_rehearsal_lists_each_run_once_and_stores_none(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = kdlib.Recipe("mlp-9", dataset="mnist-5k", steps=7, batch_size=32)
    student = teacher.replace(model="mlp-8").distil(teacher, temperature=4)
    kdlib.train(teacher, "cpu")
    monkeypatch.setenv("KDLIB_PLAN", str(ledger))
    runs = kdlib.train_all([student, student.replace(epochs=5, steps=None)], "cpu")
    kdlib.train(student, "cpu")
    lines = plan.read(ledger)
    assert [(line["model"], line["stored"]) for line in lines] == [
        ("mlp-9", True),
        ("mlp-8", False),
        ("mlp-8", False),
    ]
    assert [line["steps"] for line in lines] == [7, 7, 5 * 4000 // 32]
    assert lines[0]["seconds"] == 0
    assert 0 < lines[1]["seconds"] < lines[2]["seconds"]
    assert runs[0].recipe == student
    assert len(store.stored()) == 1


def test_a_loop_of_the_reader_rehearses_a_few_steps() -> None:
    model = torch.nn.Linear(3, 2)
    inputs, labels = torch.randn(64, 3), torch.zeros(64, dtype=torch.int64)
    curves = plan.fit(model, (inputs, labels), losses.cross_entropy, epochs=9, batch_size=8)
    assert curves["step"][-1] == plan._TIMED
    curves = plan.fit(model, (inputs, labels), losses.cross_entropy, steps=5, batch_size=8)
    assert curves["step"] == [5]  # what is short is done: a chapter may check what it gives


def test_an_estimate_is_that_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's time alone, reports by their own number: not 30 steps and a report, scaled."""
    seconds = {2: 3.0 + 2 * 0.01, plan._TIMED: 3.0 + plan._TIMED * 0.01}
    asked: list[tuple[int, int | None]] = []

    def train(members: list[kdlib.Recipe], *_: object) -> list[group.Trained]:
        asked.append((len(members), members[0].steps))
        return [group.Trained({}, {}, {}, seconds[members[0].steps or 0], {})] * len(members)

    monkeypatch.setattr(group, "train", train)
    recipe = kdlib.Recipe("mlp-7", dataset="mnist-5k", epochs=5, batch_size=40)
    members = [recipe.replace(seed=seed) for seed in range(4)]
    _, told = plan.untrained(members, torch.device("cpu"))
    assert told == pytest.approx(500 * 0.01 + 5 * 3.0)
    assert asked == [(4, 2), (4, 2), (4, plan._TIMED)]  # a stack is timed as a stack
