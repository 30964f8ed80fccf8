"""A rehearsal lists the runs that would be trained, trains none, and kdlib knows nothing of it."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_cli import pages, root, write

import kdlib
from kdlib import group, loop, losses, reasoning, runs, store
from kdlib.book import cli, reference, rehearsal

__all__ = ["root"]  # the tiny book
RECIPE = "import kdlib\nrecipe = kdlib.Recipe('mlp-4', dataset=dataset, steps=50, seed=seed)"


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A rehearsal's file; what `start` replaces in this process is put back."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    for module in (kdlib, runs, loop, reference):
        for name in ("train", "train_all", "fit", "keep"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(reasoning, "fit", reasoning.fit)
    return tmp_path / "ledger.jsonl"


def test_a_rehearsal_lists_each_run_once_and_stores_none(ledger: Path) -> None:
    teacher = kdlib.Recipe("mlp-9", dataset="mnist-5k", steps=7, batch_size=32)
    student = teacher.replace(model="mlp-8").distil(teacher, temperature=4)
    kdlib.train(teacher, "cpu")
    rehearsal.start(str(ledger))
    made = kdlib.train_all([student, student.replace(epochs=5, steps=None)], "cpu")
    kdlib.runs.train(student, device="cpu")
    reference.keep("07", "full", {"plain": made})
    lines = list(rehearsal.read(ledger).values())
    assert [line["model"] for line in lines] == ["mlp-9", "mlp-8", "mlp-8"]
    assert [line["steps"] for line in lines] == [7, 7, 5 * 4000 // 32]
    assert lines[0]["seconds"] is None
    assert 0 < lines[1]["seconds"] < lines[2]["seconds"]
    assert made[0].recipe == student
    assert len(made[0].logits("test")) == 1000
    assert len(store.stored()) == 1
    assert not (store.folder().parent / "reference").exists()


def test_a_loop_of_the_reader_rehearses_a_few_steps(ledger: Path) -> None:
    model = torch.nn.Linear(3, 2)
    digits = torch.randn(64, 3), torch.zeros(64, dtype=torch.int64)
    rehearsal.start(str(ledger))
    curves = kdlib.fit(model, digits, losses.cross_entropy, epochs=9, batch_size=8)
    assert curves["step"][-1] == rehearsal.TIMED
    curves = kdlib.fit(model, digits, losses.cross_entropy, steps=500, batch_size=8)
    assert curves["step"][-1] == rehearsal.TIMED
    curves = kdlib.fit(model, digits, losses.cross_entropy, steps=5, batch_size=8)
    assert curves["step"] == [5]  # what is short is done: a chapter may check what it gives


def test_the_reasoners_rehearse_a_few_steps(ledger: Path) -> None:
    source = reasoning.generator(0)
    network = reasoning.Reasoner(width=8, layers=1, seed=0)
    texts = reasoning.corpus(50, source, 0.5)
    rehearsal.start(str(ledger))
    done = reasoning.fine_tune(network, *texts, source, steps=500, rate=0.004, batch=4)
    assert len(done) == rehearsal.TIMED
    assert "loops of its own, whose time is not estimated" in rehearsal.report("09", {}, "")


def test_an_estimate_is_that_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's time alone, reports by their own number: not 30 steps and a report, scaled."""
    seconds = {2: 3.0 + 2 * 0.01, rehearsal.TIMED: 3.0 + rehearsal.TIMED * 0.01}
    asked: list[tuple[int, int | None]] = []

    def train(members: list[kdlib.Recipe], *_: object) -> list[group.Trained]:
        asked.append((len(members), members[0].steps))
        return [group.Trained({}, {}, {}, seconds[members[0].steps or 0], {})] * len(members)

    monkeypatch.setattr(group, "train", train)
    recipe = kdlib.Recipe("mlp-7", dataset="mnist-5k", epochs=5, batch_size=40)
    members = [recipe.replace(seed=seed) for seed in range(4)]
    _, told = rehearsal.untrained(members, torch.device("cpu"))
    assert told == pytest.approx(500 * 0.01 + 5 * 3.0)
    assert asked == [(4, 2), (4, 2), (4, rehearsal.TIMED)]  # a stack is timed as a stack


@pytest.mark.chain
def test_a_plan_goes_on_where_untrained_networks_fail_a_check(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = "assert kdlib.train(recipe, 'cpu').metrics['test_errors'] < 0, 'too bad'"
    write(root, "02_second", RECIPE, failing, "kdlib.train(recipe.replace(seed=9), 'cpu');")
    assert cli.main(["run", "2", "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("02_second: 2 runs, 0 of them in the store, about ")
    assert said.count("mlp-4") == 2
    assert "a guess from here on, since untrained networks fail in cell 4 (id code-1" in said
    assert "AssertionError: too bad" in said
    assert store.stored() == []
    assert pages(root) == []


@pytest.mark.chain
def test_a_plan_of_a_chapter_that_cannot_start_is_an_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "02_second", "raise RuntimeError(f'no seed {seed}')")
    assert cli.main(["run", "2", "--plan", "-p", "seed", "3"]) == 1
    said = capsys.readouterr().err
    assert "02_second failed in cell 3 (id code-0" in said
    assert "RuntimeError: no seed 3" in said


def test_the_library_knows_nothing_of_the_press() -> None:
    """No import, and no hook under any name; kdlib/__init__ has the old names' aliases."""
    press = re.compile(r"kdlib\.book|\bbook\b|rehears|ledger|KDLIB_PLAN", re.IGNORECASE)
    for path in sorted((ROOT / "kdlib").glob("*.py")):
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
        if path.name == "__init__.py":
            code = code.replace("kdlib.book.{_new}", "")
        assert not press.search(code), path.name


def test_the_press_uses_only_public_names_of_the_library() -> None:
    modules = {path.stem for path in (ROOT / "kdlib").glob("*.py")} | {"kdlib"}
    for path in sorted((ROOT / "kdlib/book").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdlib"):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
                names = [node.attr]
            else:
                continue
            assert not [name for name in names if name.startswith("_")], path.name


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        kind = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if kind and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
