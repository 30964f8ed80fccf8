"""The bias shift of chapter 8: the one that agrees best, and blind to the test labels."""

from pathlib import Path

import pytest
import torch

import kdlib
from kdlib.evaluate import bias_shift

GRID = torch.arange(-80, 81, dtype=torch.float64) / 10


def test_shift_undoes_a_known_bias() -> None:
    logits = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = logits.argmax(-1)
    for classes, shift in (((3,), 3.5), ((7, 8), -7.6)):
        biased = logits.clone()
        biased[:, list(classes)] -= shift
        found = bias_shift(biased, classes, answers, GRID)
        assert found == pytest.approx(shift, abs=0.11)
        biased[:, list(classes)] += found
        assert (biased.argmax(-1) == answers).float().mean() > 0.995


def test_of_several_best_shifts_the_middle_one() -> None:
    logits = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
    # class 1 may be raised by anything in (-1, 4) without a change of answers
    assert bias_shift(logits, (1,), logits.argmax(-1), GRID) == pytest.approx(1.5, abs=0.11)


def test_bad_shapes_are_refused() -> None:
    logits, answers = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(3,\) answers"):
        bias_shift(logits, (3,), answers[:3], GRID)
    with pytest.raises(ValueError, match="grid of 0"):
        bias_shift(logits, (3,), answers, GRID[:0])


def _shift(dataset: str) -> float:
    teacher = kdlib.Recipe(
        "mlp-60x60", dataset=dataset, epochs=4, batch_size=50, jitter=1, validation=True
    )
    student = teacher.replace(model="mlp-30x30", omit=(3,), jitter=0)
    taught = student.distil(teacher, temperature=4).replace(learning_rate=0.03)
    taught_run, teacher_run = kdlib.train_all([taught, teacher], device="cpu")
    answers = teacher_run.logits("validation").argmax(-1)
    return bias_shift(taught_run.logits("validation"), (3,), answers, GRID)


def test_shuffled_test_labels_give_the_same_shift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chapter 8's way from the training to the shift never looks at a test label."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))

    def shuffled() -> kdlib.data.Arrays:
        digits = kdlib.data.load("mnist-5k", "cpu")
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
        full, test = digits.full, digits.test
        return full.images, full.labels, test.images, test.labels[order]

    def as_they_are() -> kdlib.data.Arrays:
        digits = kdlib.data.load("mnist-5k", "cpu")
        full, test = digits.full, digits.test
        return full.images, full.labels, test.images, test.labels

    kdlib.data.register("bias-shuffled", shuffled)
    kdlib.data.register("bias-plain", as_they_are)
    plain = _shift("bias-plain")
    assert plain > 0
    assert plain == _shift("bias-shuffled")
