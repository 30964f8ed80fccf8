"""The project's own files agree with one another, and its tools do what they say."""

import ast
import copy
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml
from helpers import load_tool
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import kdlib
from kdlib.book import reference

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTEBOOKS = sorted((ROOT / "book").glob("[0-9][0-9]*.ipynb"))


normalise, fill, classic = map(load_tool, ("normalise", "fill", "classic"))


# --- what the files say of each other ----------------------------------------------------


def requirements():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    everything = [Requirement(line) for group in groups for line in group]
    return [r for r in everything if r.name != PROJECT["name"]]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def tracked_files():
    """The files that git tracks or would, so that a new one is checked before its commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8")
    return [path for name in listing.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_runtime_dependencies_have_lower_bounds_only():
    for line in PROJECT["dependencies"]:
        assert [s.operator for s in Requirement(line).specifier] == [">="], line


def test_every_dependency_has_one_tested_version_within_its_bounds():
    tested = pins()
    for requirement in requirements():
        pin = tested[canonicalize_name(requirement.name)]
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        assert requirement.specifier.contains(exact.version), (requirement, pin)


def test_pins_are_names_and_public_versions():
    for pin in pins().values():
        (exact,) = pin.specifier
        assert pin.url is None
        assert Version(exact.version).local is None, pin


def test_conda_takes_everything_but_python_from_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip = conda.pop()["pip"]
    assert conda == [f"python{PROJECT['requires-python']},<3.14", "pip"]
    assert pip == ["--constraint constraints.txt", "--editable .[book]"]
    assert "book" in PROJECT["optional-dependencies"]


def test_citation_and_package_name_the_same_version_and_repository():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"] == version("kdlib")
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


def test_no_file_names_a_registry_or_a_place_on_one_machine():
    hosts = r"https?://[\w.-]*(pypi|pythonhosted|npmjs|anaconda)\."
    places = r"(?<![\w.])/(home|Users|root)/\w"
    for path in tracked_files():
        found = re.search(f"{hosts}|{places}", path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path}: {found[0]}"


def test_the_table_of_contents_lists_every_chapter():
    listed = [
        line.split()[-1]
        for line in (ROOT / "_toc.yml").read_text(encoding="utf-8").splitlines()
        if line
    ]
    chapters = [name for name in listed if re.match(r"book/\d\d", name)]
    assert chapters == [f"book/{path.stem}" for path in NOTEBOOKS]


def test_readme_links_every_chapter():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((book/\d\d\w+\.ipynb)\)", readme)
    assert sorted(set(linked)) == [f"book/{path.name}" for path in NOTEBOOKS]


def test_the_readmes_lines_train_what_they_show(tmp_path, monkeypatch):
    """As they stand, but on the sample: every run learns, none diverges."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    (lines,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    found = {}
    exec(lines.replace("epochs=", 'dataset="mnist-5k", epochs='), found)
    made = kdlib.train_all([found["teacher"], found["student"], found["distilled"]])
    assert [run.metrics["status"] for run in made] == ["ok"] * 3
    assert all(run.cached and run.metrics["test_accuracy"] > 0.85 for run in made)


def test_the_text_has_the_numbers_that_are_recorded_and_no_others(tmp_path, monkeypatch, capsys):
    assert fill.main(["--check"]) == 0, capsys.readouterr().out
    (tmp_path / "book").mkdir()
    for name in ("README.md", "book/intro.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "67.5 ± 4.2 (30)<!-- ref" in text
        text = text.replace("67.5 ± 4.2 (30)<", "66.5 ± 4.2 (30)<")
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    assert fill.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert "README.md: numbers are not what is recorded" in told
    assert "intro.md: numbers are not what is recorded" in told


def test_the_classic_trio_is_recorded_apart_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(reference, "folder", lambda: tmp_path / "reference")
    few = ["--passes", "0.1", "--seeds", "2", "--dataset", "mnist-5k", "--device", "cpu"]
    few += ["--precision", "bf16"]
    trial = "classic_trial"
    assert classic.main([*few, "--commit", "c0ffee"]).parent == tmp_path / "reference" / trial
    rows = reference.results(classic.CHAPTER, trial)
    assert reference.results(classic.CHAPTER) is None
    assert [len(row) for row in rows.values()] == [2, 2, 2]
    for kind, name in zip(("distilled", "student", "teacher"), sorted(rows), strict=True):
        short = {"dataset": "mnist-5k", "epochs": 0.1, "precision": "bf16"}
        asked = classic.PAPER["classic"][kind].replace(**short)
        got = [run.recipe.replace(seed=0, teacher=asked.teacher) for run in rows[name]]
        assert got == [asked, asked]
    pairs = zip(rows["distilled student"], rows["teacher"], strict=True)
    assert all(student.recipe.teacher == (teacher.recipe,) for student, teacher in pairs)
    seconds = [run.seconds for run in rows["teacher"]]
    classic.main([*few, "--commit", "c0ffee"])
    again = reference.results(classic.CHAPTER, trial)["teacher"]
    for smaller in (["--seeds", "1"], ["--passes", "0.05"]):
        with pytest.raises(SystemExit, match=r"has 2 seeds of 0.1 epochs.*move that file away"):
            classic.main([*few, *smaller, "--commit", "c0ffee"])
    assert [run.seconds for run in again] == seconds


def test_links_between_the_projects_files_lead_somewhere():
    for page in ["README.md", "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")))
def test_workflows_only_call_make_targets_that_exist(path):
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "make").splitlines():
                command, *words = line.split()
                assert command == "make", line
                assert {w for w in words if "=" not in w} <= targets, line


def test_gpu_workflow_never_runs_for_a_pull_request():
    text = (ROOT / ".github/workflows/gpu.yml").read_text(encoding="utf-8")
    triggers = yaml.safe_load(text)[True]  # YAML 1.1 reads the key `on` as true
    assert set(triggers) == {"workflow_dispatch", "push", "schedule"}
    assert set(triggers["push"]) == {"tags"}


# --- the library and the press -----------------------------------------------------------


def imports(path):
    """The modules that a file imports, and the names that it takes from each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "kdlib").glob("*.py")), ids=lambda path: path.stem)
def test_the_library_knows_nothing_of_the_book(path):
    assert [taken for taken in imports(path) if "kdlib.book" in ".".join(taken)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "kdlib/book").glob("*.py")), ids=lambda p: p.stem)
def test_the_press_uses_what_the_library_offers_everyone(path):
    """No private name of the library's, by import or through a module."""
    modules = {name for module, name in imports(path) if module == "kdlib"}
    private = [name for module, name in imports(path) if module[:5] == "kdlib" and name[:1] == "_"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = ast.unparse(node.value)
            private += [f"{owner}.{node.attr}"] * (owner in modules)
    assert private == []


# --- make --------------------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
# Stands for python3 and, through `-m venv`, for the environment's own python.
echo "$@" >> {log}
case "$*" in
  "-c "*) exit {suitable} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *) test ! -e {broken} ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """A project of a Makefile alone, whose python3 writes down what it is asked."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ["Makefile", "pyproject.toml", "constraints.txt"]:
        (root / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")

    def run(*arguments, suitable=True):
        log, broken = tmp_path / "log", tmp_path / "broken"
        log.write_text("", encoding="utf-8")
        for name in ["python3", "python3.11", "python3.12", "python3.13"]:
            fake = tmp_path / name
            code = 0 if suitable else 1
            fake.write_text(
                FAKE_PYTHON.format(log=log, broken=broken, suitable=code), encoding="utf-8"
            )
            fake.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
        result = subprocess.run(
            ["make", *arguments],
            cwd=root,
            env={"PATH": path},
            capture_output=True,
            encoding="utf-8",
        )
        return result, log.read_text(encoding="utf-8")

    run.root, run.broken = root, tmp_path / "broken"
    return run


INSTALL = "-m pip install --constraint constraints.txt --editable .[{}]"


@pytest.mark.parametrize(("target", "extra"), [("site", "book"), ("env", "dev")])
def test_make_installs_what_a_command_needs_once(make, target, extra):
    _, log = make(target)
    assert INSTALL.format(extra) in log
    assert log.count("pip install") == 1
    assert "pip install" not in make(target)[1]


def test_who_has_everything_installed_has_the_book(make):
    make("env")
    assert "pip install" not in make("site")[1]


def test_an_install_of_everything_that_was_cut_short_is_no_book_either(make):
    make("site")
    make.broken.touch()
    assert make("env")[0].returncode != 0
    (make.root / ".venv/half-written").touch()
    make.broken.unlink()
    assert INSTALL.format("book") in make("site")[1]
    assert not (make.root / ".venv/half-written").exists()


def test_make_env_installs_again_when_a_dependency_changed(make):
    make("env")
    changed = make.root / "pyproject.toml"
    stamp = (make.root / ".venv/.installed-dev").stat().st_mtime
    os.utime(changed, (stamp + 5, stamp + 5))
    log = make("env")[1]
    assert INSTALL.format("dev") in log
    assert "-m venv" not in log


def test_make_env_leaves_no_stamp_when_the_install_fails_and_starts_afresh(make):
    make.broken.touch()
    assert make("env")[0].returncode != 0
    assert not (make.root / ".venv/.installed-dev").exists()
    (make.root / ".venv/half-written").touch()
    make.broken.unlink()
    assert make("env")[0].returncode == 0
    assert (make.root / ".venv/.installed-dev").exists()
    assert not (make.root / ".venv/half-written").exists()


def test_make_env_says_which_python_it_needs(make):
    result, _ = make("env", suitable=False)
    assert result.returncode != 0
    assert "Python 3.11 or later" in result.stderr
    assert "PYTHON=" in result.stderr


# --- the notebooks' source form ----------------------------------------------------------


def code(text, *tags, **rest):
    return {
        "cell_type": "code",
        "id": text[:8].strip() or "empty",
        "metadata": {"tags": list(tags)} if tags else {},
        "execution_count": None,
        "outputs": [],
        "source": text,
        **rest,
    }


RESULT = {
    "output_type": "execute_result",
    "execution_count": 7,
    "data": {"text/plain": "2"},
    "metadata": {"when": "now"},
}


@pytest.fixture
def dirty():
    return {
        "cells": [
            {"cell_type": "markdown", "id": "has spaces", "metadata": {}, "source": "# Title\n\n"},
            code("old set-up", "setup", id="setup"),
            code("1 + 1", "nbval-check-output", outputs=[RESULT], execution_count=7, id="same"),
            code("x = 2\n\n", id="same", outputs=[RESULT], execution_count=8),
            code("x", metadata={"collapsed": True, "mystnb": {"image": {"alt": "x"}}}),
            code("  \n"),
        ],
        "metadata": {"kernelspec": {"name": "venv"}, "papermill": {"duration": 3}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def test_a_dirty_notebook_becomes_clean(dirty):
    title, setup, checked, plain, figure = normalise.normalise(dirty, "SETUP")["cells"]
    assert title["source"] == ["# Title"]
    assert setup["source"] == ["SETUP"]
    assert checked["execution_count"] == 1
    assert checked["outputs"] == [RESULT | {"execution_count": 1, "metadata": {}}]
    assert (plain["outputs"], plain["execution_count"]) == ([], None)
    assert plain["source"] == ["x = 2"]
    assert figure["metadata"] == {"mystnb": {"image": {"alt": "x"}}}


@pytest.mark.parametrize("tag", ["hide-cell", "hide-input", "remove-cell", "remove-input", "setup"])
def test_what_is_folded_on_the_page_is_folded_in_jupyterlab_and_on_colab(dirty, tag):
    shown = code("x = 3", id="shown", metadata={"tags": ["other"], "cellView": "form"})
    folded = code("x = 4", tag, id="folded")
    dirty["cells"][1:2] = [shown, folded] if tag == "setup" else [dirty["cells"][1], shown, folded]
    cells = {cell["id"]: cell["metadata"] for cell in normalise.normalise(dirty, "S")["cells"]}
    assert cells["shown"] == {"tags": ["other"]}
    assert cells["folded"]["jupyter"] == {"source_hidden": True}
    assert cells["folded"]["cellView"] == "form"


def test_the_setup_cell_is_folded_and_not_removed(dirty):
    dirty["cells"][1]["metadata"]["tags"] = ["setup", "remove-cell"]
    setup = normalise.normalise(dirty, "S")["cells"][1]
    assert setup["metadata"]["tags"] == ["setup", "hide-cell"]


def test_good_ids_stay_and_the_others_follow_from_the_cell(dirty):
    first = [cell["id"] for cell in normalise.normalise(copy.deepcopy(dirty), "S")["cells"]]
    again = [cell["id"] for cell in normalise.normalise(copy.deepcopy(dirty), "S")["cells"]]
    assert first == again
    assert first[1:3] == ["setup", "same"]
    assert len(set(first)) == len(first)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in first)


def test_equal_cells_without_ids_get_different_ones(dirty):
    twins = [code("same text") for _ in range(3)]
    for twin in twins:
        del twin["id"]
    clean = normalise.normalise({**dirty, "cells": [*dirty["cells"], *twins]}, "S")
    assert len({cell["id"] for cell in clean["cells"]}) == len(clean["cells"])


def test_normalising_twice_changes_nothing(dirty):
    once = normalise.normalise(dirty, "SETUP")
    assert normalise.normalise(copy.deepcopy(once), "SETUP") == once
    assert list(normalise.differences(once, once)) == []


def test_check_names_what_is_wrong_and_writes_nothing(dirty, tmp_path, capsys):
    path = tmp_path / "dirty.ipynb"
    path.write_text(json.dumps(dirty), encoding="utf-8")
    assert normalise.main(["--check", str(path)]) == 1
    said = capsys.readouterr().out
    for word in ["dirty.ipynb", "metadata", "empty cells", "outputs of cell 4", "id of cell 1"]:
        assert word in said
    assert json.loads(path.read_text(encoding="utf-8")) == dirty

    assert normalise.main([str(path)]) == 0
    assert normalise.main(["--check", str(path)]) == 0
    nbformat.validate(nbformat.read(path, as_version=4))
    assert [file.name for file in tmp_path.iterdir()] == ["dirty.ipynb"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda cells: cells.pop(1), "found 0"),
        (lambda cells: cells.append(code("second", "setup")), "found 2"),
        (lambda cells: cells[2]["outputs"][0].update(output_type="error"), "stores an error"),
        (lambda cells: cells[3].pop("source"), "source"),
    ],
)
def test_what_cannot_be_normalised_is_left_and_named(dirty, spoil, reason, tmp_path, capsys):
    spoil(dirty["cells"])
    path = tmp_path / "spoilt.ipynb"
    path.write_text(json.dumps(dirty), encoding="utf-8")
    assert normalise.main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "spoilt.ipynb: cannot be normalised" in said
    assert reason in said
    assert json.loads(path.read_text(encoding="utf-8")) == dirty


# --- the set-up cell, in an environment without kdlib ------------------------------------


def git(*arguments, cwd):
    who = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def bare_python(tmp_path):
    """A Python with everything that is installed here, except kdlib."""
    folder = tmp_path / "bare"
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "kdlib" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run(
        [python, "-c", where], check=True, capture_output=True, encoding="utf-8"
    )
    (Path(answer.stdout.strip()) / "packages.pth").write_text(str(packages), encoding="utf-8")
    return python


@pytest.fixture
def clone(tmp_path):
    """A git repository with what of this project is needed to install kdlib."""
    root = tmp_path / "repository"
    root.mkdir()
    for path in tracked_files():
        name = path.relative_to(ROOT)
        needed = name.parts[0] in ("kdlib", "pyproject.toml", "README.md", "LICENSE")
        if needed or name.parts[:2] in (("book", "reference"), ("book", "claims")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(path.read_bytes())
    git("init", "-q", cwd=root)
    git("add", ".", cwd=root)
    git("commit", "-q", "-m", "all", cwd=root)
    return root


def run_setup_cell(python, folder, url, and_then="", **environment):
    """Run the set-up cell in a folder, without a network; what came of it."""
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [python, "-c", normalise.SETUP.replace("{url}", url) + and_then],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **offline, **environment},
        capture_output=True,
        encoding="utf-8",
    )


def where_kdlib_comes_from(python, folder, url):
    """The places of kdlib and torch after the set-up cell, and torch's version."""
    ask = """
import json
print(json.dumps([find_spec("kdlib").origin, find_spec("torch").origin, version("torch")]))
"""
    result = run_setup_cell(python, folder, url, ask)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_setup_cell_names_the_address_in_pyproject():
    url = PROJECT["urls"]["Repository"]
    assert f'"git+{url}"' in normalise.setup_source()
    assert len(normalise.setup_source().splitlines()) <= 18


def test_setup_cell_installs_from_the_repository_and_keeps_torch(bare_python, clone, tmp_path):
    folder = tmp_path / "elsewhere"
    (folder / "kdlib").mkdir(parents=True)  # a folder of that name is not the library
    library, torch, torch_version = where_kdlib_comes_from(bare_python, folder, clone.as_uri())
    assert Path(library).is_relative_to(bare_python.parents[1])
    assert not Path(torch).is_relative_to(bare_python.parents[1])
    assert torch_version == version("torch")


def test_setup_cell_never_replaces_torch(bare_python, clone, tmp_path):
    """A newer torch is at hand and kdlib asks for it: an error, not another torch."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "torch-99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", "")
        about = "Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n"
        wheel.writestr("torch-99.0.dist-info/METADATA", about)
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("torch-99.0.dist-info/WHEEL", tag)
        wheel.writestr("torch-99.0.dist-info/RECORD", "")
    project = clone / "pyproject.toml"
    project.write_text(
        project.read_text(encoding="utf-8").replace("torch>=2.10", "torch>=99"), encoding="utf-8"
    )
    git("commit", "-q", "-a", "-m", "a newer torch", cwd=clone)
    result = run_setup_cell(bare_python, tmp_path, clone.as_uri(), PIP_FIND_LINKS=str(wheels))
    assert result.returncode != 0
    assert f"torch=={version('torch')}" in result.stderr
    assert not list(bare_python.parents[1].glob("lib/python*/site-packages/torch*"))


@pytest.mark.parametrize("inside", [".", "book", "book/deeper"])
def test_setup_cell_uses_the_clone_around_the_notebook(bare_python, clone, inside):
    folder = clone / inside
    folder.mkdir(parents=True, exist_ok=True)
    library, *_ = where_kdlib_comes_from(bare_python, folder, "file:///no/such/repository")
    assert Path(library) == clone / "kdlib/__init__.py"
