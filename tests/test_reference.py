"""Recorded results: written by a program, noticed when changed, found again by training again."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

import kdlib
from kdlib import data, files
from kdlib.book import chapters, reference
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


def keep(profile: str, rows: reference.Rows, **more: reference.Measures) -> Path:
    """What a chapter keeps that ran with a profile's parameters."""
    ran = chapters.defaults(CHAPTER) | (chapters.scale(CHAPTER, profile) or {})
    return reference.keep(CHAPTER, profile, rows, parameters=ran, **more)


def rows() -> dict[str, list[kdlib.Run]]:
    """A plain and a distilled student of two seeds, student i taught by teacher i."""
    plain = [PLAIN.replace(seed=seed) for seed in range(2)]
    taught = [
        student.distil(student.replace(jitter=1), temperature=4).replace(learning_rate=0.02)
        for student in plain
    ]
    runs = kdlib.train_all([*plain, *taught], device="cpu")
    return {"plain": runs[:2], "distilled": runs[2:]}


def test_a_recorded_row_trained_again_gives_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows()
    keep("smoke", made, measures={"plain": {"errors_after": [3, 4]}})
    reference.record(CHAPTER, "smoke", commit="c0ffee")
    recorded = reference.results(CHAPTER, "smoke")
    assert recorded is not None
    assert reference.results(CHAPTER) is None  # the reference run is the full one
    assert [len(row) for row in recorded.values()] == [2, 2]
    assert [run.metrics["errors_after"] for run in recorded["plain"]] == [3, 4]
    labels = data.load(PLAIN.dataset).test.labels.tolist()
    for run, known in zip(made["distilled"], recorded["distilled"], strict=True):
        answers = run.logits("test").argmax(1).tolist()
        assert known.wrong == [n for n, label in enumerate(labels) if answers[n] != label]
    monkeypatch.setenv("KDLIB_HOME", str(store / "another"))
    again = kdlib.train_all([run.recipe for run in recorded["distilled"]], device="cpu")
    for old, new in zip(recorded["distilled"], again, strict=True):
        assert not new.cached
        assert new.metrics == old.metrics
        assert old.provenance["torch"] == new.provenance["torch"]
        assert old.seconds > 0


@pytest.mark.usefixtures("real_data")
def test_a_row_of_the_book_trained_again_agrees() -> None:
    """The cheapest row that was recorded, whatever the device: within five deviations."""
    found = [
        runs
        for profile in ("full", "quick")
        for chapter in (page.stem for page in reference.folder().parent.glob("*.ipynb"))
        for runs in (reference.results(chapter, profile) or {}).values()
        if (recipe := runs[0].recipe) and not recipe.teacher and len(runs) > 2
        if _work(recipe) < SMALL
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
    keep("smoke", made)
    path = reference.record(CHAPTER, "smoke", commit="c0ffee")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"]["plain"][0]["metrics"]["test_errors"] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged or was changed by hand"):
        reference.results(CHAPTER, "smoke")
    for damaged in (path.read_text()[:-9], "", "null", "[]"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged or was changed by hand"):
            reference.results(CHAPTER, "smoke")


def test_a_programs_record_comes_from_no_draft(store: Path) -> None:
    """Where no draft can be kept, a record was made of one of another time."""
    runs = kdlib.train_all([PLAIN], device="cpu")
    files.home().mkdir(parents=True, exist_ok=True)
    (files.home() / "reference").write_text("no folder")
    reference.write(CHAPTER, "smoke", {"plain": runs}, {"seeds": 1}, commit="c0ffee")
    recorded = reference.results(CHAPTER, "smoke") or {}
    assert [line.metrics for line in recorded["plain"]] == [run.metrics for run in runs]


def test_three_sources_side_by_side(store: Path) -> None:
    made = {"plain": kdlib.train_all([PLAIN], device="cpu")}
    errors = made["plain"][0].metrics["test_errors"]
    before = reference.beside(CHAPTER, made, {"plain": 146})
    assert before.loc["plain"].tolist() == [f"{errors:.1f} (1)", "–", "146"]
    assert reference.results(CHAPTER) is None
    keep("full", made)
    reference.record(CHAPTER, "full", commit="c0ffee" * 4)
    after = reference.beside(CHAPTER, made, {})
    assert after.loc["plain"].tolist() == [f"{errors:.1f} (1)", f"{errors:.1f} (1)", "–"]


def test_what_cannot_be_recorded_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="kdlib run 07_mnist_reproduction --profile full"):
        reference.record(CHAPTER)
    made = {"plain": kdlib.train_all([PLAIN], device="cpu")}
    with pytest.raises(ValueError, match="one per run"):
        keep("full", made, measures={"plain": {"shift": []}})
    with pytest.raises(ValueError, match="no name of a chapter"):
        reference.keep("../07", "full", made, parameters={})
    keep("full", made)
    with pytest.raises(ValueError, match="no commit is known"):
        reference.record(CHAPTER)
    monkeypatch.setattr(reference, "code_digest", lambda: "other")
    with pytest.raises(ValueError, match="has changed"):
        reference.record(CHAPTER, commit="c0ffee")
    with pytest.raises(ValueError, match="outside of a notebook"):
        reference.keep(CHAPTER, "full", made)
    assert list(store.glob("clone/**/*.json")) == []


def test_all_that_was_kept_is_recorded(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no chapter has kept full results: `kdlib run"):
        reference.kept("full")
    for chapter in ("02_b", "01_a"):
        reference.keep(chapter, "full", {}, parameters={})
    assert reference.kept("full") == ["01_a", "02_b"]


def test_a_plain_value_is_recorded_beside_runs(store: Path) -> None:
    measured = [
        reference.value("milliseconds", seed, 2.5 + seed, {"date": "2026-01-01", "device": "CPU"})
        for seed in range(2)
    ]
    keep("full", {"plain": kdlib.train_all([PLAIN], device="cpu"), "forward": measured})
    reference.record(CHAPTER, commit="c0ffee" * 4)
    recorded = reference.results(CHAPTER)
    assert recorded is not None
    # Each line names the commit of the code that made it.
    commit = {"commit": "c0ffee" * 4}
    assert recorded["forward"] == [
        replace(line, provenance=commit | line.provenance) for line in measured
    ]
    assert str(spread(recorded["forward"], "milliseconds")) == "3.0 ± 0.7 (2)"  # type: ignore[arg-type]


def test_rows_of_an_earlier_record_can_be_kept_with_new_ones(store: Path) -> None:
    keep("full", {"plain": kdlib.train_all([PLAIN], device="cpu")})
    reference.record(CHAPTER, commit="c0ffee" * 4)
    earlier = reference.results(CHAPTER)
    assert earlier is not None
    keep("full", earlier | {"again": kdlib.train_all([PLAIN], device="cpu")})
    reference.record(CHAPTER, commit="decaf" * 4)
    recorded = reference.results(CHAPTER)
    assert recorded is not None
    assert recorded["plain"] == earlier["plain"]
    assert recorded["again"][0].recipe == PLAIN


def test_a_store_that_cannot_be_written_stops_no_chapter(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "home").mkdir()
    (store / "home/reference").write_text("a file, where a folder is to be")
    keep("full", {})
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("kdlib: no results are kept for a record: ")


@pytest.mark.chain
def test_other_parameters_than_the_profiles_are_not_recorded(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """papermill with the profile's name and smaller values: not the reference run."""
    clone = store / "book of one"
    (clone / "book/profiles").mkdir(parents=True)
    (clone / "_toc.yml").write_text("root: book/intro\nchapters:\n  - file: book/01_one\n")
    (clone / "book/profiles/full.yml").write_text("01_one: {seeds: 5, rates: [1, 2]}\n")
    page = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    parameters = 'profile = "quick"\nseeds: int = 2  # = few\nrates = [3, 1]\ndevice = "cpu"'
    changed = "rates = sorted(rates)\nfrom kdlib.book import reference"
    for source in (parameters, changed, "reference.keep('01_one', profile, {})"):
        page.cells.append(nbformat.v4.new_code_cell(source))
    page.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(page, clone / "book/01_one.ipynb")
    monkeypatch.chdir(clone)

    def papermill(**parameters: str) -> None:
        given = [part for name, text in parameters.items() for part in ("-y", f"{name}: {text}")]
        command = [sys.executable, "-m", "papermill", "book/01_one.ipynb", "out.ipynb"]
        subprocess.run([*command, *given, "-k", "python3", "--log-level", "ERROR"], check=True)

    papermill(profile="full", rates="[2, 1]", seeds="5")
    with pytest.raises(ValueError, match=r"ran with rates = \[2, 1\], not .* full .*\[1, 2\]"):
        reference.record("01_one", commit="c0ffee")
    papermill(profile="full", rates="[1, 2]")
    with pytest.raises(ValueError, match="ran with seeds = 2, not with the full profile's 5"):
        reference.record("01_one", commit="c0ffee")
    papermill(profile="full", rates="[1, 2]", seeds="5", device="auto")
    path = reference.record("01_one", commit="c0ffee")
    ran = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    assert ran == {"profile": "full", "seeds": 5, "rates": [1, 2], "device": "auto"}
    papermill()
    reference.record("01_one", "quick", commit="c0ffee")


def test_an_installed_kdlib_has_the_books_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", built, str(tmp_path)]
    wheel = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / wheel.stdout.split()[-1]) as archive:
        archive.extractall(tmp_path / "site")
    asked = (
        "from kdlib.book import reference\n"
        f"print(reference.folder(), len(reference.results({CHAPTER!r})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    folder, rows = found.stdout.split()
    assert folder == str(tmp_path / "site/kdlib/book/records")
    assert int(rows) == len(reference.results(CHAPTER) or ())
    monkeypatch.setattr(reference, "__file__", str(tmp_path / "kdlib/book/reference.py"))
    with pytest.raises(FileNotFoundError) as missing:
        reference.folder()
    assert str(tmp_path / "book/reference") in str(missing.value)
    assert str(tmp_path / "kdlib/book/records") in str(missing.value)


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
    keep("full", {"plain": kdlib.train_all([PLAIN], device="cpu")})
    assert json.loads(reference.record(CHAPTER).read_text())["commit"] == git("rev-parse", "HEAD")
    code.write_text("one = 2\n")
    with pytest.raises(ValueError, match="not committed"):
        reference.record(CHAPTER)
