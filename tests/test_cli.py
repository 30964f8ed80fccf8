"""The command line on a book of two tiny chapters: what it refuses, makes, keeps and says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import KDLIB, ROOT

import kdlib
from kdlib import data, store
from kdlib.book import chapters as book
from kdlib.book import cli
from kdlib.book import execute as chain

TOC = """\
format: jb-book
root: book/intro
parts:
  - caption: Both
    chapters:
      - file: book/02_second
      - file: book/01_first
"""
PARAMETERS = """\
profile = "quick"  # the scale
dataset = "mnist-5k"  # where the digits come from
seed = 0  # of everything"""
FIRST = 'rate = 0.5  # a rate\nwidths = [30, 300]  # of the layers\nname = "a"  # text'


def notebook(*cells: str, parameters: str = PARAMETERS) -> Any:
    """A chapter: a title, a parameters cell, some code."""
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {
        "name": "python3",
        "language": "python",
        "display_name": "Python",
    }
    made.cells = [nbformat.v4.new_markdown_cell("# A chapter", id="title")]
    made.cells.append(nbformat.v4.new_code_cell(parameters, id="parameters"))
    made.cells[1].metadata["tags"] = ["parameters"]
    made.cells += [nbformat.v4.new_code_cell(c, id=f"code-{i}") for i, c in enumerate(cells)]
    return made


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny book, as working directory."""
    folder = tmp_path / "clone"
    (folder / "book" / "profiles").mkdir(parents=True)
    (folder / "_toc.yml").write_text(TOC)
    (folder / "book" / "intro.md").write_text("# Intro\n")
    write(folder, "01_first", "print('seed', seed, 'rate', rate)", more=FIRST)
    write(folder, "02_second", "print('seed', seed)")
    (folder / "book/profiles/smoke.yml").write_text("01_first: {seed: 5}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return folder


def write(root: Path, chapter: str, *cells: str, more: str = "") -> None:
    parameters = "\n".join(part for part in (PARAMETERS, more) if part)
    nbformat.write(notebook(*cells, parameters=parameters), root / "book" / f"{chapter}.ipynb")


Told = Callable[..., str]


@pytest.fixture
def refused(root: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """Run a command that must be refused before anything starts; what it said."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 1
        said = capsys.readouterr()
        assert not (root / "_build").exists()
        assert said.out == ""
        assert said.err.startswith("kdlib: ")
        return said.err

    return run


def text(root: Path, chapter: str, profile: str = "quick") -> str:
    """What an executed page printed."""
    page = nbformat.read(root / "_build/executed" / profile / f"{chapter}.ipynb", as_version=4)
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def pages(root: Path) -> list[str]:
    """All files that a run left behind."""
    return sorted(
        str(p.relative_to(root / "_build")) for p in (root / "_build").rglob("*") if p.is_file()
    )


# --- refusals, before anything starts ----------------------------------------------------


def test_an_unknown_chapter_is_refused_with_the_nearest_name(refused: Told) -> None:
    assert "unknown chapter '01_frist': did you mean '01_first'?" in refused("run", "01_frist")


def test_an_unknown_parameter_is_refused_with_the_nearest_name(refused: Told) -> None:
    said = refused("run", "-p", "sede", "3")
    assert "'sede'" in said
    assert "did you mean 'seed'?" in said


def test_a_parameter_of_another_chapter_is_refused(refused: Told) -> None:
    assert "no chosen chapter has a parameter 'rate'" in refused("run", "02", "-p", "rate", "1")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", "three", "int"),
        ("seed", "0.5", "int"),
        ("seed", "True", "int"),
        ("rate", "high", "float"),
        ("rate", "None", "float"),
        ("widths", "30", "list"),
        ("widths", "[30, wide]", "list"),
        ("widths", "[30, 'wide']", "list"),
    ],
)
def test_a_wrong_type_is_refused(name: str, value: str, expected: str, refused: Told) -> None:
    said = refused("run", "-p", name, value)
    assert f"01_first: parameter {name} is" in said or f"parameter {name} is" in said
    assert f"expected {expected}, such as" in said


def test_a_profile_is_no_parameter(refused: Told) -> None:
    assert "--profile full" in refused("run", "-p", "profile", "full")


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ("03_third: {seed: 1}", "unknown chapter '03_third'"),
        ("01_first: {sede: 1}", "did you mean 'seed'?"),
        ("02_second: {seed: many}", "parameter seed is 'many'"),
    ],
)
def test_a_wrong_profile_file_is_refused(scale: str, said: str, refused: Told, root: Path) -> None:
    (root / "book/profiles/smoke.yml").write_text(scale)
    assert said in refused("run", "--profile", "smoke")


def test_outside_a_clone_the_commands_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("run", "build"):
        assert cli.main([command]) == 1
        assert f"kdlib: {tmp_path} is not in a clone" in capsys.readouterr().err


def test_chapters_to_record_may_come_after_the_profile_and_by_number(refused: Told) -> None:
    said = refused("reference", "record", "--profile", "smoke", "2")
    assert "02_second has kept no smoke results" in said


@pytest.mark.parametrize("package", ["papermill", "yaml", "nbformat"])
def test_without_the_books_tools_one_line_names_what_to_install(
    package: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        f"import sys\nsys.modules[{package!r}] = None\n"
    )
    result = subprocess.run(
        [*KDLIB, "run"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "hidden")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "pip install 'kdlib[book]'" in result.stderr
    assert package in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [[], ["run"], ["build"], ["data"], ["runs"], ["reference"], ["reference", "record"]]
)
def test_help_is_the_manual(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(['kdlib', *command])}")
    if not command:
        assert all(name in said for name in ("run", "build", "data", "runs", "KDLIB_HOME"))


# --- what is made ------------------------------------------------------------------------


@pytest.mark.chain
def test_the_chain_in_the_books_order_then_nothing_left_to_do(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "book")
    assert cli.main(["run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["02_second", "01_first"]
    assert all(re.fullmatch(r"\w+: \d+ s", line) for line in said)
    assert text(root, "01_first") == "seed 0 rate 0.5\n"
    before = {p: (root / "_build" / p).read_bytes() for p in pages(root)}
    assert list(before) == ["executed/quick/01_first.ipynb", "executed/quick/02_second.ipynb"]

    assert cli.main(["run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["02_second: up to date", "01_first: up to date"]
    assert {p: (root / "_build" / p).read_bytes() for p in pages(root)} == before

    write(root, "02_second", "print('changed')")
    assert cli.main(["run"]) == 0
    done = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"02_second: \d+ s", done[0])
    assert done[1] == "01_first: up to date"
    assert text(root, "02_second") == "changed\n"


@pytest.mark.chain
def test_parameters_reach_the_chapters_that_have_them(root: Path) -> None:
    given = ["-p", "seed", "3", "-p", "rate", "1e-3", "-p", "widths", "[1, 2]", "-p", "name", "7"]
    write(root, "01_first", "print([seed, rate, widths, name])", more=FIRST)
    assert cli.main(["run", *given]) == 0
    assert text(root, "01_first") == "[3, 0.001, [1, 2], '7']\n"
    assert text(root, "02_second") == "seed 3\n"


@pytest.mark.chain
def test_a_page_tells_how_it_was_made_but_not_where(root: Path) -> None:
    assert cli.main(["run", "1", "--profile", "smoke"]) == 0
    path = root / "_build/executed/smoke/01_first.ipynb"
    page = nbformat.read(path, as_version=4)
    about = page.metadata["kdlib"]
    assert about["profile"] == "smoke"
    assert about["dataset"] == "mnist-5k"
    assert about["parameters"] == {"profile": "smoke", "seed": 5}
    assert about["seconds"] > 0
    assert about.keys() >= {"date", "digest", "fallback"}
    (injected,) = (c for c in page.cells if "injected-parameters" in c.metadata.get("tags", []))
    assert injected.id == "injected-parameters"
    assert "hide-input" in injected.metadata.tags
    assert "papermill" not in path.read_text()
    assert str(root) not in path.read_text()


@pytest.mark.chain
def test_defaults_inject_nothing(root: Path) -> None:
    assert cli.main(["run", "2"]) == 0
    page = nbformat.read(root / "_build/executed/quick/02_second.ipynb", as_version=4)
    assert [cell.id for cell in page.cells] == ["title", "parameters", "code-0"]


@pytest.mark.chain
@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (("fine = 1", "\n1 / 0"), "ZeroDivisionError: division by zero"),
        (("fine = 1", "raise SystemExit(0)"), ""),
        (("fine = 1", "import os\nos._exit(3)"), "the kernel died"),
    ],
)
def test_a_failed_cell_stops_the_chain_and_keeps_the_last_page(
    cells: tuple[str, ...], reason: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = root / "_build/executed/quick/02_second.ipynb"
    old.parent.mkdir(parents=True)
    nbformat.write(notebook("print('old')"), old)
    before = old.read_bytes()
    write(root, "02_second", *cells)
    assert cli.main(["run"]) == 1
    said = capsys.readouterr()
    assert reason in said.err
    if reason:
        assert "02_second failed in cell 4 (id code-1, " in said.err
        failed = root / "_build/failed/02_second.ipynb"
        assert str(failed) in said.err
        assert failed.is_file()
    assert "01_first" not in said.out
    assert old.read_bytes() == before
    assert [p for p in pages(root) if not p.startswith("failed")] == [
        "executed/quick/02_second.ipynb"
    ]


WAITING = """\
import os, pathlib, time
pathlib.Path(os.environ["TOLD"]).write_text(str(os.getpid()))
time.sleep(600)"""


@pytest.mark.chain
def test_control_c_leaves_a_state_from_which_the_next_run_goes_on(
    root: Path, tmp_path: Path
) -> None:
    write(root, "01_first", WAITING, more=FIRST)
    told = tmp_path / "told"
    running = subprocess.Popen(
        [*KDLIB, "run"],
        env={**os.environ, "TOLD": str(told)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a job in a script's background ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while running.poll() is None and not (told.is_file() and told.read_text()):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130, said
    assert said.strip().splitlines() == ["kdlib: stopped; the same command goes on from here"]
    assert pages(root) == ["executed/quick/02_second.ipynb"]
    for _ in range(600):  # the kernel goes with its chapter
        if not alive(int(told.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(told.read_text()))

    write(root, "01_first", "print('done')", more=FIRST)
    result = subprocess.run([*KDLIB, "run"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "02_second: up to date" in result.stdout
    assert text(root, "01_first") == "done\n"


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


# --- the data ----------------------------------------------------------------------------


@pytest.fixture
def no_mnist(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Chapter 1 wants MNIST; there is none, and no network."""
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "empty"))

    def no_network(*_: object) -> None:
        raise data.DataError("mnist is not here and could not be downloaded")

    monkeypatch.setattr(data, "fetch", no_network)
    path = root / "book/01_first.ipynb"
    path.write_text(
        path.read_text().replace("mnist-5k", "mnist").replace("'rate', rate", "dataset")
    )
    return root


@pytest.mark.chain
def test_without_mnist_the_sample_is_taken_and_named(
    no_mnist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run"]) == 0
    assert "going on with mnist-5k" in capsys.readouterr().out
    assert text(no_mnist, "01_first") == "seed 0 mnist-5k\n"
    made = {c: book.made(p) for c, p in book.pages().items()}
    assert made["01_first"]["fallback"] is True
    assert made["01_first"]["dataset"] == "mnist-5k"
    assert made["02_second"]["fallback"] is False


def test_a_dataset_that_was_asked_for_is_never_swapped(no_mnist: Path) -> None:
    jobs, note = book.jobs(["01_first"], "quick", {"dataset": "mnist"})
    assert note == ""
    assert jobs[0].parameters.get("dataset", "mnist") == "mnist"
    (no_mnist / "book/profiles/full.yml").write_text("01_first: {dataset: fashion-mnist}\n")
    assert book.jobs(["01_first"], "full", {})[1] == ""


def test_damaged_data_is_an_error_and_no_reason_for_the_sample(
    no_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "empty" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"damaged")
    assert cli.main(["run"]) == 1
    assert "mnist is damaged" in capsys.readouterr().err


def test_data_says_what_is_there_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    assert cli.main(["data"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {"mnist", "fashion-mnist", "mnist-5k"}
    assert "missing" in lines["mnist"]
    assert str(tmp_path) in lines["mnist"]
    assert "verified" in lines["mnist-5k"]
    assert cli.main(["data", "mnist-5k"]) == 0
    assert cli.main(["data", "mnist"]) == 1
    assert cli.main(["data", "minst"]) == 1
    assert "unknown dataset 'minst'" in capsys.readouterr().err


def test_data_fetches_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    monkeypatch.setattr(data, "fetch", fetched.append)
    cli.main(["data", "mnist", "mnist-5k", "--fetch"])
    assert fetched == ["mnist"]


# --- the store ---------------------------------------------------------------------------


def test_runs_are_listed_and_pruned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = kdlib.Recipe("mlp-4", dataset="mnist-5k", steps=2)
    kdlib.train_all([recipe, recipe.replace(seed=1)], "cpu")
    keys = [entry.key for entry in store.stored()]
    assert cli.main(["runs"]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in keys)
    assert said.splitlines()[-1].startswith("2 runs, ")
    assert str(store.folder()) in said
    assert cli.main(["runs", "--prune", keys[0]]) == 0
    assert [entry.key for entry in store.stored()] == [keys[1]]
    assert cli.main(["runs", "--prune", "no-such-run"]) == 1
    assert "no stored run 'no-such-run'" in capsys.readouterr().err
    assert cli.main(["runs", "--prune"]) == 0
    assert store.stored() == []


@pytest.mark.chain
def test_a_plan_tells_the_cost_and_trains_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        root,
        "02_second",
        "import kdlib",
        "recipe = kdlib.Recipe('mlp-4', dataset=dataset, steps=50, seed=seed)",
        "kdlib.train_all([recipe, recipe.replace(seed=9)], 'cpu');",
    )
    assert cli.main(["run", "2", "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("02_second: 2 runs, 0 of them in the store, about ")
    assert said.count("mlp-4") == 2
    assert store.stored() == []
    assert "KDLIB_PLAN" not in os.environ
    assert pages(root) == [] if (root / "_build").exists() else True


@pytest.mark.chain
def test_a_plan_goes_on_where_untrained_networks_fail_a_check(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        root,
        "02_second",
        "import kdlib",
        "recipe = kdlib.Recipe('mlp-4', dataset=dataset, steps=50, seed=seed)",
        "assert kdlib.train(recipe, 'cpu').metrics['test_errors'] < 0, 'too bad'",
        "kdlib.train(recipe.replace(seed=9), 'cpu');",
    )
    assert cli.main(["run", "2", "--plan"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("02_second: 2 runs, 0 of them in the store")
    assert "a guess from here on" in said
    assert "cell 5 (id code-2" in said
    assert "AssertionError: too bad" in said


@pytest.mark.chain
def test_a_plan_of_a_chapter_that_cannot_start_is_an_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "02_second", "raise RuntimeError(f'no seed {seed}')")
    assert cli.main(["run", "2", "--plan", "-p", "seed", "3"]) == 1
    assert "02_second failed in cell 3 (id code-0" in (said := capsys.readouterr().err)
    assert "RuntimeError: no seed 3" in said


def test_a_folder_that_cannot_be_written_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "_build").write_text("a file, where a folder is to be")
    assert cli.main(["run", "2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("kdlib: ")
    assert str(root / "_build") in said


# --- what decides a page -----------------------------------------------------------------


def test_a_page_is_outdated_by_its_source_its_parameters_and_the_reference(root: Path) -> None:
    def digest(**given: str) -> str:
        return chain._digest(book.jobs(["01_first"], "quick", given)[0][0])

    first = digest()
    assert digest() == first
    assert digest(seed="1") != first
    assert digest(seed="0") == first
    recorded = root / "book/reference/01_first.json"
    recorded.parent.mkdir()
    recorded.write_text("{}")
    assert digest() != first
    recorded.unlink()
    path = root / "book/01_first.ipynb"
    source = json.loads(path.read_text())
    source["cells"][0]["source"] = "# Another title"
    path.write_text(json.dumps(source))
    assert digest() != first


def test_the_latest_page_of_a_chapter_is_published(root: Path) -> None:
    for age, profile in enumerate(["full", "quick", "smoke"]):
        path = root / "_build/executed" / profile / "01_first.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(notebook(), path)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert book.pages()["01_first"].parent.name == "full"
    assert book.pages("smoke")["01_first"].parent.name == "smoke"
    assert book.pages().keys() == {"01_first"}


def test_the_installed_command_is_the_same(root: Path) -> None:
    command = Path(sys.executable).with_name("kdlib")
    result = subprocess.run([command, "run", "x"], capture_output=True, text=True)
    assert "unknown chapter 'x'" in result.stderr
    assert ROOT not in root.parents
