"""A rehearsal lists the runs that would be trained, and trains none."""

from pathlib import Path

import pytest
import torch

import kdlib
from kdlib import losses, plan, store


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


def test_a_loop_of_the_reader_rehearses_one_step() -> None:
    model = torch.nn.Linear(3, 2)
    inputs, labels = torch.randn(64, 3), torch.zeros(64, dtype=torch.int64)
    curves = plan.fit(model, (inputs, labels), losses.cross_entropy, epochs=9, batch_size=8)
    assert curves["step"] == [1]
