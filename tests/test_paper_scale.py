"""The experiments at the paper's scale: what they train, and that they go on where they stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import load_tool

import kdlib
from kdlib import data, loop
from kdlib.book import reference

tool: Any = load_tool("paper_scale")
SHORT = ["--dataset", "mnist-5k", "--length", "0.005"]


@pytest.fixture(autouse=True)
def _records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store, and records of the test's own."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(reference, "folder", lambda: tmp_path / "reference")


def run(experiment: str, *more: str, commit: str = "c0ffee") -> dict[str, list[reference.Recorded]]:
    tool.main([experiment, *SHORT, "--commit", commit, *more])
    return reference.results(tool.EXPERIMENTS[experiment].chapter, experiment) or {}


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


@pytest.mark.parametrize("experiment", ["tried", "averaged", "rates", "threes"])
def test_what_chooses_trains_without_the_held_out_digits(experiment: str) -> None:
    recipes = tool.EXPERIMENTS[experiment].rows(2).values()
    assert all(
        r.validation and r.seed == 2 for recipe in recipes for r in kdlib.keys.family(recipe)
    )


def test_another_machine_goes_on_where_the_record_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--only", "4800 steps"]
    first = run("lengths", *only, "--seeds", "1", commit="c0ffee")
    assert {name: len(lines) for name, lines in first.items()} == {
        "teacher, 4800 steps": 1,
        "plain student, 4800 steps": 1,
        "distilled student, 4800 steps": 1,
    }
    asked: list[int] = []
    train_all = kdlib.train_all

    def spy(recipes: list[kdlib.Recipe], *more: Any, **named: Any) -> list[kdlib.Run]:
        asked.extend(recipe.seed for recipe in recipes)
        return train_all(recipes, *more, **named)

    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(kdlib, "train_all", spy)
    both = run("lengths", *only, "--seeds", "2", commit="decade")
    assert set(asked) == {1}
    for name, lines in both.items():
        assert lines[0].metrics == first[name][0].metrics
        assert lines[0].provenance == {"commit": "c0ffee"} | first[name][0].provenance
        assert [line.recipe.seed for line in lines if line.recipe] == [0, 1]
    asked.clear()
    # What is recorded was trained in another way, so it is no result of this one.
    run("lengths", *only, "--seeds", "1", "--length", "0.01")
    assert set(asked) == {0}


def test_no_seed_is_begun_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("lengths", "--only", "plain student, 4800", "--seeds", "3", "--minutes", "0")
    assert [len(lines) for lines in rows.values()] == [1]
    assert "the same command goes on" in capsys.readouterr().out
    rows = run("lengths", "--only", "plain student, 4800", "--seeds", "3", "--together", "2")
    assert [len(lines) for lines in rows.values()] == [3]
    assert "the same command goes on" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--seeds", "0", "seeds is 0: expected 1 or more"),
        ("--together", "0", "together is 0: expected 1 or more"),
        ("--only", "sudent", "no row of averaged has 'sudent': it has last tenth, constant rate"),
    ],
)
def test_what_cannot_be_done_is_refused(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("averaged", option, value)
    assert said in capsys.readouterr().err


def test_the_factorial_takes_the_rates_that_are_best_on_held_out_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(FileNotFoundError, match="run the experiment rates first"):
        tool.factorial(0)
    # Of each condition's rates, the middle one has a seed that is worse than the last one's.
    errors = [[90, 90], [50, 80], [70, 75]]
    rows = {
        tool.rate_row(*condition, rate): [
            reference.Recorded(
                tool.student(*condition, rate, seed),
                {"status": "ok", "validation_errors": count},
                0.0,
                {},
            )
            for seed, count in enumerate(counts)
        ]
        for condition in tool.CONDITIONS
        for rate, counts in zip(tool.offered(condition[0]), errors, strict=True)
    }
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


def test_a_student_without_threes_is_measured_before_and_after_the_shift() -> None:
    rows = run("threes", "--only", "T = 20, hard weight 0, 80", "--seeds", "1", "--length", "0.2")
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
