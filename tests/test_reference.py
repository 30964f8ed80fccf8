"""Recorded results: written by a program, noticed when changed, found again when trained anew."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

import kdlib
from kdlib.book import reference
from kdlib.evaluate import spread

CHAPTER = "07_mnist_reproduction"
PLAIN = kdlib.Recipe("mlp-30x30", dataset="mnist-5k", epochs=2, batch_size=50)
SMALL = 2.0e10  # multiplications and additions of a training that a test may spend


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and an empty clone for what is recorded."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(reference, "folder", lambda: tmp_path / "clone/book/reference")
    return tmp_path


def rows() -> dict[str, list[kdlib.Run]]:
    """A plain and a distilled student of two seeds, student i taught by teacher i."""
    plain = [PLAIN.replace(seed=seed) for seed in range(2)]
    taught = [
        student.distil(student.replace(jitter=1), temperature=4).replace(learning_rate=0.02)
        for student in plain
    ]
    runs = kdlib.train_all([*plain, *taught], device="cpu")
    return {"plain": runs[:2], "distilled": runs[2:]}


def test_a_recorded_row_trained_anew_gives_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows()
    reference.keep(CHAPTER, "smoke", made, {"plain": {"errors_after": [3, 4]}})
    reference.record(CHAPTER, "smoke", commit="c0ffee")
    recorded = reference.results(CHAPTER, "smoke")
    assert recorded is not None
    assert reference.results(CHAPTER) is None  # the reference run is the full one
    assert [len(row) for row in recorded.values()] == [2, 2]
    assert [run.metrics["errors_after"] for run in recorded["plain"]] == [3, 4]
    monkeypatch.setenv("KDLIB_HOME", str(store / "another"))
    again = kdlib.train_all([run.recipe for run in recorded["distilled"]], device="cpu")
    for old, new in zip(recorded["distilled"], again, strict=True):
        assert not new.cached
        assert new.metrics == old.metrics
        assert old.provenance["torch"] == new.provenance["torch"]
        assert old.seconds > 0


def test_a_row_of_the_book_trained_anew_agrees() -> None:
    """The cheapest row that was recorded, whatever the device: within five deviations."""
    found = [
        runs
        for profile in ("full", "quick")
        for chapter in (page.stem for page in reference.folder().parent.glob("*.ipynb"))
        for runs in (reference.results(chapter, profile) or {}).values()
        if not runs[0].recipe.teacher and len(runs) > 2 and _work(runs[0].recipe) < SMALL
    ]
    if not found:
        pytest.skip("no small row is recorded: `kdlib reference record`")
    cheapest = min(found, key=lambda runs: _work(runs[0].recipe))
    new = kdlib.train(cheapest[0].recipe)
    known = spread(cheapest)  # type: ignore[arg-type]
    assert abs(new.metrics["test_errors"] - known.mean) <= 5 * max(known.deviation, 2)


def _work(recipe: kdlib.Recipe) -> float:
    weights = sum(weight.numel() for weight in kdlib.models.build(recipe.model).parameters())
    return weights * recipe.epochs * 60_000 if recipe.steps is None else float("inf")


def test_a_result_typed_by_hand_is_noticed(store: Path) -> None:
    made = {"plain": kdlib.train_all([PLAIN], device="cpu")}
    reference.keep(CHAPTER, "smoke", made)
    path = reference.record(CHAPTER, "smoke", commit="c0ffee")
    content = json.loads(path.read_text())
    content["rows"]["plain"][0]["metrics"]["test_errors"] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="changed by hand"):
        reference.results(CHAPTER, "smoke")


def test_three_sources_side_by_side(store: Path) -> None:
    made = {"plain": kdlib.train_all([PLAIN], device="cpu")}
    errors = made["plain"][0].metrics["test_errors"]
    before = reference.beside(CHAPTER, made, {"plain": 146})
    assert before.loc["plain"].tolist() == [f"{errors:.1f} (1)", "–", "146"]
    assert reference.results(CHAPTER) is None
    assert "No reference run" in reference.describe(CHAPTER)
    reference.keep(CHAPTER, "full", made)
    reference.record(CHAPTER, "full", commit="c0ffee" * 4)
    after = reference.beside(CHAPTER, made, {})
    assert after.loc["plain"].tolist() == [f"{errors:.1f} (1)", f"{errors:.1f} (1)", "–"]
    said = reference.describe(CHAPTER)
    assert "c0ffeec0ff" in said
    assert f"1 trainings of {made['plain'][0].seconds:.0f} seconds in all" in said
    assert f"on {PLAIN.dataset}," in said
    slow = [dataclasses.replace(run, seconds=60_000.0) for run in made["plain"]]
    reference.keep(CHAPTER, "full", {"plain": slow})
    reference.record(CHAPTER, "full", commit="c0ffee" * 4)
    assert "1 trainings of 1,000 minutes in all" in reference.describe(CHAPTER)


def test_what_cannot_be_recorded_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="kdlib run 07_mnist_reproduction --profile full"):
        reference.record(CHAPTER)
    made = {"plain": kdlib.train_all([PLAIN], device="cpu")}
    with pytest.raises(ValueError, match="one a run"):
        reference.keep(CHAPTER, "full", made, {"plain": {"shift": []}})
    with pytest.raises(ValueError, match="no name of a chapter"):
        reference.keep("../07", "full", made)
    reference.keep(CHAPTER, "full", made)
    with pytest.raises(ValueError, match="no commit is known"):
        reference.record(CHAPTER)
    monkeypatch.setattr(reference, "code_digest", lambda: "other")
    with pytest.raises(ValueError, match="has changed"):
        reference.record(CHAPTER, commit="c0ffee")
    assert list(store.glob("clone/**/*.json")) == []


def test_all_that_was_kept_is_recorded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no chapter has kept full results: `kdlib run"):
        reference.kept("full")
    for chapter in ("02_b", "01_a"):
        reference.keep(chapter, "full", {})
    assert reference.kept("full") == ["01_a", "02_b"]


def test_a_rehearsal_keeps_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDLIB_PLAN", str(store / "ledger"))
    reference.keep(CHAPTER, "full", {"plain": kdlib.train_all([PLAIN], device="cpu")})
    with pytest.raises(FileNotFoundError):
        reference.record(CHAPTER)


def test_the_commit_is_that_of_the_code_that_ran(store: Path) -> None:
    clone = store / "clone"
    (clone / "kdlib").mkdir(parents=True)
    code = clone / "kdlib/code.py"
    code.write_text("one = 1\n")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(clone), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", "kdlib")
    git("commit", "--quiet", "--message", "code")
    reference.keep(CHAPTER, "full", {"plain": kdlib.train_all([PLAIN], device="cpu")})
    assert json.loads(reference.record(CHAPTER).read_text())["commit"] == git("rev-parse", "HEAD")
    code.write_text("one = 2\n")
    with pytest.raises(ValueError, match="not committed"):
        reference.record(CHAPTER)
