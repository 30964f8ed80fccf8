"""The experiments at the paper's scale: what they train, and that they go on where they stopped."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import scipy.stats
import torch
from helpers import ROOT, a_full_disk, load_tool

import kdlib
from kdlib import data, loop
from kdlib.book import chapters, reference

tool: Any = load_tool("paper_scale")
SHORT = ["--dataset", "mnist-5k", "--length", "0.005"]


CHAPTER_7A = reference.results("07a_what_it_is_made_of") or {}


@pytest.fixture(autouse=True)
def _records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store, and records of the test's own."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(reference, "folder", lambda: tmp_path / "reference")


def run(experiment: str, *more: str, commit: str = "c0ffee") -> dict[str, list[reference.Recorded]]:
    """A trial's record."""
    tool.main([experiment, *SHORT, "--commit", commit, *more])
    return reference.results(tool.EXPERIMENTS[experiment].chapter, f"{experiment}_trial") or {}


def test_each_candidate_changes_what_it_names() -> None:
    known = tool.pair("as recorded", 3)
    assert known["teacher"] == tool.PAPER["modern"]["teacher"].replace(seed=3)
    assert known["distilled"] == tool.PAPER["modern"]["distilled"].replace(
        seed=3, teacher=(known["teacher"],)
    )
    for name, changed in tool.CANDIDATES.items():
        networks = tool.pair(name, 3)
        assert networks["distilled"].teacher == (networks["teacher"],)
        for network, settings in changed.items():
            got = networks[network].as_dict()
            assert got | settings == got != known[network].as_dict()


@pytest.mark.parametrize("experiment", ["tried", "averaged", "rates", "gentler", "threes"])
def test_what_chooses_trains_without_the_held_out_digits(experiment: str) -> None:
    recipes = tool.EXPERIMENTS[experiment].rows(2).values()
    assert all(
        r.validation and r.seed == 2 for recipe in recipes for r in kdlib.keys.family(recipe)
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The networks and seeds that train_all is asked for."""
    asked: list[tuple[str, int]] = []
    train_all = kdlib.train_all

    def spy(recipes: list[kdlib.Recipe], *more: Any, **named: Any) -> list[kdlib.Run]:
        asked.extend((recipe.model, recipe.seed) for recipe in recipes)
        return train_all(recipes, *more, **named)

    monkeypatch.setattr(kdlib, "train_all", spy)
    return asked


def test_another_machine_goes_on_where_the_record_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[tuple[str, int]]
) -> None:
    run("lengths", "--only", "plain student, 4800 steps", "--seeds", "1", commit="c0ffee")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "other"))
    first = run("lengths", "--only", "*, 4800 steps", "--seeds", "1", commit="f00d")
    assert {name: len(lines) for name, lines in first.items()} == {
        "teacher, 4800 steps": 1,
        "plain student, 4800 steps": 1,
        "distilled student, 4800 steps": 1,
    }
    assert trained == [("mlp-800x800", 0), ("mlp-1200x1200", 0), ("mlp-800x800", 0)]
    trained.clear()
    both = run("lengths", "--only", "*, 4800 steps", "--seeds", "2", commit="decade")
    assert {seed for _, seed in trained} == {1}
    for name, lines in both.items():
        assert lines[0] == first[name][0]
        made = "c0ffee" if name.startswith("plain") else "f00d"
        assert [line.provenance["commit"] for line in lines] == [made, "decade"]
        assert [line.recipe.seed for line in lines if line.recipe] == [0, 1]


def test_no_recorded_run_is_replaced_by_one_of_another_recipe(
    capsys: pytest.CaptureFixture[str], trained: list[tuple[str, int]]
) -> None:
    known = run("lengths", "--only", "plain student, 4800 steps", "--seeds", "1")
    trained.clear()
    with pytest.raises(SystemExit) as refused:
        run("lengths", "--only", "plain student, 4800 steps", "--seeds", "2", "--length", "0.01")
    assert "has seed 0 of 'plain student, 4800 steps' with another recipe" in str(refused.value)
    assert trained == []
    assert run("lengths", "--only", "plain student, 4800 steps", "--seeds", "1") == known


def test_two_processes_add_to_one_record(tmp_path: Path) -> None:
    """Each has read the record before the other one adds to it."""
    records = [
        tool.Record("lengths_trial", tool.CHAPTER_7A, commit, {}) for commit in ("c0ffee", "f00d")
    ]
    rows = {
        seed: {"plain": tool.throughout(tool.PLAIN.replace(seed=seed), 0.01, dataset="mnist-5k")}
        for seed in (0, 1)
    }
    parts = [{seed: rows[seed]} for seed in rows]
    assert [record.missing(part) for record, part in zip(records, parts, strict=True)] == parts
    results = [tool.trained(tool.EXPERIMENTS["lengths"], part) for part in parts]
    for record, found in zip(records, results, strict=True):
        record.add(found)
    [lines] = (reference.results(tool.CHAPTER_7A, "lengths_trial") or {}).values()
    assert [line.recipe.seed for line in lines if line.recipe] == [0, 1]


def test_a_chapters_own_rows_stay_when_an_experiment_adds_to_its_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = [reference.value("angle", seed, 1.0, {"commit": "c0ffee"}) for seed in (0, 0)]
    reference.write(tool.CHAPTER_7A, "full", {"by hand": plain}, {}, "c0ffee")

    def trained(_: Any, wanted: dict[int, dict[str, kdlib.Recipe]]) -> Any:
        return {
            row: {seed: reference.Recorded(recipe, {"status": "ok", "test_errors": 7}, 0.0, {})}
            for seed, rows in wanted.items()
            for row, recipe in rows.items()
        }

    monkeypatch.setattr(tool, "trained", trained)
    row = "plain student, 4800 steps"
    tool.main(["lengths", "--only", row, "--seeds", "2", "--commit", "f00d"])
    found = reference.results(tool.CHAPTER_7A) or {}
    assert found["by hand"] == plain
    assert [line.recipe.seed for line in found[row] if line.recipe] == [0, 1]


def test_nothing_is_trained_if_no_commit_can_be_recorded(
    tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    (tmp_path / "reference").mkdir()
    with pytest.raises(SystemExit, match="no commit is known here"):
        tool.main(["lengths", *SHORT])
    assert trained == []


def test_a_full_disk_leaves_the_record_as_it_is(tmp_path: Path) -> None:
    known = run("lengths", "--only", "plain student, 4800 steps", "--seeds", "1")
    # The new run is stored already, so that only the record cannot be written.
    recipe = tool.throughout(tool.PLAIN.replace(epochs=20, seed=1), 0.005, dataset="mnist-5k")
    kdlib.train(recipe)
    with a_full_disk(), pytest.raises(SystemExit, match="File too large"):
        run("lengths", "--only", "plain student, 4800 steps", "--seeds", "2")
    assert reference.results(tool.CHAPTER_7A, "lengths_trial") == known


def test_no_further_seed_is_begun_when_the_time_is_over(
    capsys: pytest.CaptureFixture[str],
) -> None:
    three = ["--only", "plain student, 4800 steps", "--seeds", "3"]
    rows = run("lengths", *three, "--minutes", "1e-9")
    assert [len(lines) for lines in rows.values()] == [1]
    assert "run the same command again" in capsys.readouterr().out
    rows = run("lengths", *three, "--together", "2")
    assert [len(lines) for lines in rows.values()] == [3]
    assert "run the same command again" not in capsys.readouterr().out


def test_whoever_chooses_sees_no_test_error() -> None:
    [[line]] = run("tried", "--only", "student: fp32: *", "--seeds", "1").values()
    assert line.metrics.keys() == {"status", "validation_errors", "validation_accuracy"}
    assert line.wrong is None
    [[line]] = run("averaged", "--only", "last tenth", "--seeds", "1").values()
    assert "averaged_errors" in line.metrics
    assert "test_errors" not in line.metrics


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["averaged", "--seeds", "0"], "--seeds is 0: expected a positive number"),
        (["averaged", "--together", "-1"], "--together is -1: expected a positive number"),
        (["averaged", "--length", "nan"], "--length is nan: expected a positive number"),
        (["averaged", "--minutes", "-5"], "--minutes is -5.0: expected a positive number"),
        (["averaged", "--only", "sudent"], "expected one or more of the rows last tenth; constant"),
        (["beyond"], "beyond needs --only"),
        (["factorial"], "run the experiment rates first"),
    ],
)
def test_what_cannot_be_done_is_refused(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        run(*given)
    assert said in f"{refused.value}{capsys.readouterr().err}"


def test_the_factorial_takes_the_rates_that_are_best_on_held_out_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of each condition's rates, the middle one has a seed that is worse than the last one's.
    errors = dict(enumerate([[90, 90], [50, 80], [70, 75]] * len(tool.CONDITIONS)))
    rows: dict[str, list[reference.Recorded]] = {}
    for seed in (0, 1):
        for number, (row, recipe) in enumerate(tool.rates(seed).items()):
            metrics = {"status": "ok", "validation_errors": errors[number][seed]}
            rows.setdefault(row, []).append(reference.Recorded(recipe, metrics, 0.0, {}))
    one_seed = {row: runs[:1] for row, runs in rows.items()}
    monkeypatch.setattr(reference, "results", lambda chapter, profile: one_seed)
    with pytest.raises(ValueError, match="run the experiment rates first"):
        tool.factorial(5)
    monkeypatch.setattr(reference, "results", lambda chapter, profile: rows)
    found = tool.factorial(5)
    assert found["labels, translated"].learning_rate == 0.4
    soft = found["soft, plain teacher, unmoved"]
    assert (soft.learning_rate, soft.teacher) == (0.2, (found["teacher, unmoved"],))
    # Two of them are chapter 7's own students, but for their rates.
    for name, network in {"labels": "student", "soft, translated teacher": "distilled"}.items():
        recipe = tool.PAPER["modern"][network].replace(seed=5, epochs=80)
        teacher = tuple(t.replace(seed=5) for t in recipe.teacher)
        rate = found[f"{name}, unmoved"].learning_rate
        assert found[f"{name}, unmoved"] == recipe.replace(teacher=teacher, learning_rate=rate)


def test_chapter_7a_trains_the_same_networks_at_full_scale() -> None:
    """So that its reference run may come from either."""
    cells = {
        cell.id: cell.source
        for cell in nbformat.read(ROOT / "book" / f"{tool.CHAPTER_7A}.ipynb", 4).cells
    }
    scale: dict[str, Any] = chapters.defaults(tool.CHAPTER_7A)
    scale |= chapters.scale(tool.CHAPTER_7A, "full") or {}
    page = scale | {"chosen": tool.PAPER[scale["recipe"]]}
    page["digits"] = SimpleNamespace(full=range(60_000))
    for cell in ("targets", "recipes", "student", "grid", "length-recipes"):
        exec(cells[cell], page)

    def training(recipe: kdlib.Recipe) -> kdlib.Recipe:
        teachers = tuple(map(training, recipe.teacher))
        steps = recipe.steps or round(recipe.epochs * 240)
        return recipe.replace(steps=steps, epochs=1, teacher=teachers)

    assert [page["offered"](target) for target, _ in tool.CONDITIONS] == [
        list(tool.offered(target)) for target, _ in tool.CONDITIONS
    ]
    for target, inputs in tool.CONDITIONS:
        asked = target, inputs, 0.05, 3
        assert training(page["student"](*asked)) == training(tool.student(*asked))
    known = tool.lengths(3)
    for length in scale["lengths"]:
        for kind, recipe in zip(
            ("teacher", "plain student", "distilled student"),
            page["trio"](length, 3),
            strict=True,
        ):
            assert training(recipe) == training(known[f"{kind}, {length} steps"])


def test_a_student_without_threes_is_measured_before_and_after_the_shift() -> None:
    rows = run(
        "threes", "--only", "T = 20, hard weight 0, 80 epochs", "--seeds", "1", "--length", "0.2"
    )
    [[line]] = rows.values()
    assert line.recipe is not None
    run_of = kdlib.train(line.recipe)
    labels = data.load("mnist-5k").test.labels
    assert line.metrics["errors, before"] == line.metrics["test_errors"]
    shift = line.metrics["shift, teacher's answers"]
    bias = shift * torch.eye(10)[3]
    answers = (run_of.logits("test") + bias).argmax(1)
    assert line.metrics["errors, teacher's answers"] == int((answers != labels).sum())
    threes = labels == 3
    assert line.metrics["unseen, teacher's answers"] == int((answers[threes] != 3).sum())
    assert line.metrics["unseen, teacher's answers"] < line.metrics["unseen, before"]
    logits = run_of.logits("test").double()
    best_other = logits.masked_fill(torch.eye(10, dtype=torch.bool)[3], -torch.inf).amax(1)
    margin = logits[:, 3] - best_other
    ranked = scipy.stats.mannwhitneyu(margin[threes], margin[~threes]).statistic
    expected = ranked / (int(threes.sum()) * int((~threes).sum()))
    assert math.isclose(line.metrics["auroc"], expected, abs_tol=1e-6)


def test_weights_are_averaged_over_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    fit = kdlib.fit

    def spy(*given: Any, on_report: Callable[[loop.State], None], **named: Any) -> Any:
        def both(state: loop.State) -> None:
            weights = {k: v.clone() for k, v in state.model.state_dict().items()}
            seen.append((state.step, weights))
            on_report(state)

        return fit(*given, on_report=both, **named)

    monkeypatch.setattr(kdlib, "fit", spy)
    name = "constant rate, last half"
    recipe = tool.throughout(tool.averaged(0)[name], 0.15, dataset="mnist-5k")
    soft_targets = torch.randn(
        len(data.load("mnist-5k").train), 10, generator=torch.Generator().manual_seed(0)
    )
    mean = tool.average(recipe, tool.AVERAGED[name][2], soft_targets)
    steps = seen[-1][0]
    late = [weights for step, weights in seen if step > steps / 2]
    assert 2 <= len(late) < len(seen)
    for key, found in mean.state_dict().items():
        expected = torch.stack([weights[key] for weights in late]).mean(0)
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, late[-1][key])


def test_moved_digits_are_those_of_chapter_7a(real_data: Path) -> None:
    for name in ("teacher", "distilled-student"):
        [known] = CHAPTER_7A[f"full-scale {name.replace('-', ' ')}"]
        measured = tool.on_moved("", kdlib.pretrained(f"mnist-{name}", "cpu"))
        for metric in ("moved_errors", "moved_three"):
            # rounding on another processor may change an answer
            assert abs(measured.metrics[metric] - known.metrics[metric]) <= 2
