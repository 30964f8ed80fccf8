"""The key of a run: another one for all that decides it, the same one for what does not."""

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import blobs

import kdlib
from kdlib import data, group, keys, loop, models

CPU = torch.device("cpu")
PACKAGE = Path(inspect.getfile(kdlib)).parent
DECIDING = {
    "batches", "data", "fast", "group", "loop", "losses", "models", "precision", "sgd", "stack",
}  # fmt: skip
# Of what trains, the modules that declare that they decide nothing.
DECLARED = {"check", "files", "memory", "progress", "provenance", "recipe"}
FILES = sorted(path.stem for path in PACKAGE.glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_registered", {})
    monkeypatch.setattr(models, "_registered", {})
    data.register("blobs", blobs)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kdlib"


def small(**fields: Any) -> kdlib.Recipe:
    return kdlib.Recipe("mlp-16", dataset="blobs", steps=3, batch_size=20, **fields)


def test_all_that_decides_a_run_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    student = small().distil(small(seed=7), temperature=3.0)
    found = {keys.key(student, CPU), keys.key(student, CPU)}
    assert len(found) == 1
    found |= {keys.key(student.replace(seed=1), CPU), keys.key(student.replace(epochs=3), CPU)}
    found.add(keys.key(small().distil(small(seed=8), temperature=3.0), CPU))
    with monkeypatch.context() as patch:
        patch.setattr(data, "resolve_device", lambda device: CPU)
        found.add(keys.key(student, torch.device("cuda")))
    data.register("blobs", lambda: blobs(noise=61))
    found.add(keys.key(student, CPU))
    monkeypatch.setattr(keys, "code_digest", lambda: "other code")
    found.add(keys.key(student, CPU))
    assert len(found) == 7


class Change(ast.NodeTransformer):
    """One number or operator of a module's code, or all texts of its errors and warnings."""

    def __init__(self, texts: bool) -> None:
        self.texts, self.inside, self.done = texts, False, 0

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self.text(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        named = ast.unparse(node.func) in ("warnings.warn", "check.refuse")
        return self.text(node) if named else self.generic_visit(node)

    def text(self, node: ast.AST) -> ast.AST:
        self.inside = True
        node = self.generic_visit(node)
        self.inside = False
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if self.texts and self.inside and isinstance(node.value, str):
            self.done += 1
            return ast.Constant(node.value + "!")
        if not (self.texts or self.inside or self.done) and isinstance(node.value, int | float):
            self.done += 1
            return ast.Constant(not node.value if isinstance(node.value, bool) else 1 + node.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if not (self.texts or self.inside or self.done):
            self.done += 1
            return ast.UnaryOp(ast.Not(), node)
        return self.generic_visit(node)


def rewrite(path: Path, texts: bool) -> bool:
    change = Change(texts)
    tree = change.visit(ast.parse(path.read_text(encoding="utf-8")))
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
    return change.done > 0


@pytest.mark.parametrize("name", FILES)
def test_changed_code_changes_the_key_of_each_module_that_decides(copy: Path, name: str) -> None:
    before = keys.digest_of(copy)
    assert before == keys.code_digest()
    assert rewrite(copy / f"{name}.py", texts=False)
    assert (keys.digest_of(copy) != before) is (name in DECIDING)


def test_changed_words_change_no_key(copy: Path) -> None:
    before, changed = keys.digest_of(copy), 0
    for path in copy.glob("*.py"):
        changed += rewrite(path, texts=True)  # comments are gone, too
        words = path.read_text(encoding="utf-8").replace('"""', '"""More words. ', 1)
        path.write_text(f"{words}\n\n# A comment.\n", encoding="utf-8")
    assert changed > 5
    assert keys.digest_of(copy) == before


def test_a_docstring_that_is_added_or_removed_changes_no_key(copy: Path) -> None:
    before, path = keys.digest_of(copy), copy / "losses.py"
    source = path.read_text(encoding="utf-8")
    signature = "def _same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:\n"
    assert signature in source
    path.write_text(source.replace(signature, f'{signature}    """Check."""\n'), encoding="utf-8")
    assert keys.digest_of(copy) == before


def test_the_modules_that_decide_nothing_give_a_reason() -> None:
    trees = {
        path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")
    }
    declared = {name for name, tree in trees.items() if keys.reason(tree) is not None}
    assert declared >= DECLARED
    assert not declared & DECIDING
    assert all(len(str(keys.reason(trees[name])).split()) > 3 for name in declared)


def test_all_code_that_runs_in_a_training_decides_or_declares_that_it_does_not() -> None:
    """Seen by Python's profiler, not by reading the sources."""
    teacher = small(seed=7)
    runs = {teacher: kdlib.train(teacher, "cpu")}
    students = [
        small(jitter=jitter, dropout=(0.1, 0.1), max_norm=2.0, schedule=schedule, validation=True)
        for jitter in (0, 1)
        for schedule in loop.SCHEDULES
    ]
    seen: set[str] = set()
    sys.setprofile(lambda frame, *_: seen.add(frame.f_code.co_filename))
    try:
        for student in students:
            taught = student.distil(teacher, temperature=4.0, hard_weight=0.5)
            group.train([taught, taught.replace(seed=1)], CPU, runs)
            group.train([taught], CPU, runs)
    finally:
        sys.setprofile(None)
    executed = {Path(name).stem for name in seen if Path(name).parent == PACKAGE}
    assert executed - DECLARED - {"runs"} == DECIDING


COPIES = """
import os, sys
home, copies = sys.argv[1:]
os.environ["KDLIB_HOME"] = home
for name in ("as-it-is", "comments", "changed", "as-it-is"):
    for module in [name for name in sys.modules if name.split(".")[0] == "kdlib"]:
        del sys.modules[module]
    sys.path.insert(0, os.path.join(copies, name))
    import kdlib
    assert kdlib.__file__.startswith(os.path.join(copies, name)), kdlib.__file__
    recipe = kdlib.Recipe("mlp-8", dataset="mnist-5k", steps=3)
    run = kdlib.train(recipe.distil(recipe, temperature=4).replace(learning_rate=0.01), "cpu")
    print(name, run.cached, float(sum(w.double().abs().sum() for w in run.weights.values())))
"""


def test_changed_code_never_gives_an_old_run(tmp_path: Path) -> None:
    """kdlib itself, in three copies: as it is, with other comments, with another loss."""
    for name in ("as-it-is", "comments", "changed"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, tmp_path / name / "kdlib", ignore=left_out)
    path = tmp_path / "comments" / "kdlib" / "losses.py"
    words = path.read_text(encoding="utf-8")
    assert "Hinton et al. 2015" in words
    path.write_text(words.replace("Hinton et al. 2015", "Hinton and others, 2015"), "utf-8")
    path = tmp_path / "changed" / "kdlib" / "losses.py"
    assert "temperature**2" in words
    path.write_text(words.replace("temperature**2", "temperature**1"), "utf-8")
    command = [sys.executable, "-c", COPIES, str(tmp_path / "home"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["as-it-is", "False"], ["comments", "True"], ["changed", "False"], ["as-it-is", "True"],
    ]  # fmt: skip
    assert lines[0][2] == lines[1][2] == lines[3][2] != lines[2][2]
