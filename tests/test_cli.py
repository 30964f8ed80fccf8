"""The command line on a book of two tiny chapters: what it refuses, makes, keeps and prints."""

import json
import os
import pkgutil
import re
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from helpers import KDLIB, PARAMETERS, alive, notebook, tiny_book

import kdlib
from kdlib import data, store
from kdlib.book import chapters, cli, execute

FIRST = 'rate = 0.5  # a rate\nwidths = [30, 300]  # of the layers\nname = "a"  # text'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny book, as working directory."""
    folder = tmp_path / "a [clone] of #1, 50% {done}"  # a name that some tool reads as a pattern
    tiny_book(folder, {"02_second": ["print('seed', seed)"], "01_first": []})
    write(folder, "01_first", "print('seed', seed, 'rate', rate)", more=FIRST)
    (folder / "book/profiles/smoke.yml").write_text("01_first: {seed: 5}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return folder


def write(root: Path, chapter: str, *cells: str, more: str = "", figure: bool = False) -> None:
    made = notebook(*cells, parameters="\n".join(part for part in (PARAMETERS, more) if part))
    if figure:
        made.cells[-1].metadata["mystnb"] = {"figure": {"name": "it", "caption": "A figure."}}
    nbformat.write(made, root / "book" / f"{chapter}.ipynb")


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
        assert said.err.count("\n") == 1
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("01_frist", "unknown chapter '01_frist': did you mean '01_first'?"),
        ("-p sede 3", "no chosen chapter has a parameter 'sede': did you mean 'seed'?"),
        ("02 -p rate 1", "no chosen chapter has a parameter 'rate'"),
        ("-p profile full", "--profile NAME, not with -p"),
        ("--jobs 0", "--jobs is 0: expected a whole number, 1 or more"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(
    arguments: str, expected: str, refused: Told
) -> None:
    assert expected in refused("run", *arguments.split())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", "three", "a number, such as 0"),
        ("seed", "True", "a number, such as 0"),
        ("rate", "None", "a number, such as 0.5"),
        ("rate", "inf", "a number, such as 0.5"),
        ("widths", "30", "a list, each a number, such as [30, 300]"),
        ("widths", "[30, 'wide']", "a list, each a number, such as [30, 300]"),
    ],
)
def test_a_wrong_type_is_refused(name: str, value: str, expected: str, refused: Told) -> None:
    assert re.search(
        rf"0\d_\w+: parameter {name} is .*: expected {re.escape(expected)}",
        refused("run", "-p", name, value),
    )


@pytest.mark.parametrize("name", ["profile", "seed", "two\nlines"])
def test_a_value_of_two_lines_is_refused_in_one(name: str, refused: Told) -> None:
    refused("run", "-p", name, "two\nlines")


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ("03_third: {seed: 1}", "unknown chapter '03_third'"),
        ("01_first: {sede: 1}", "did you mean 'seed'?"),
        ("02_second: {seed: many}", "02_second: parameter seed is 'many'"),
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


@pytest.mark.parametrize("package", ["psutil", "yaml", "nbformat"])
def test_without_the_books_tools_one_line_names_what_to_install(
    package: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        f"import sys\nsys.modules[{package!r}] = None\n"
    )
    path = f"{tmp_path / 'hidden'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [*KDLIB, "run"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 1
    assert "in a clone, pip install '.[book]'" in result.stderr
    assert package in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [[], ["run"], ["build"], ["data"], ["runs"], ["reference"], ["reference", "record"]]
)
def test_help_is_the_manual(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['kdlib', *command])}")


def test_parameters_are_read_whatever_stands_around_them(root: Path) -> None:
    more = (
        "width: int = 3  # how wide = how much\n%matplotlib inline\nlr = 1 / 8\n"
        "text = 'a # b'\nimport math\nsizes = [\n    1,  # small\n    2,\n]  # both"
    )
    write(root, "01_first", more=more)
    found = chapters.parameters("01_first")
    assert [*found] == ["profile", "dataset", "seed", "width", "lr", "text", "sizes"]
    assert found["width"] == (3, "3", "how wide = how much")
    assert found["lr"] == (chapters.UNKNOWN, "1 / 8", "")
    assert found["text"].default == "a # b"
    assert found["sizes"] == ([1, 2], "[1, 2]", "both")
    jobs, _ = chapters.jobs(["01_first"], "quick", {"lr": "0.5", "width": "3"})
    assert jobs[0].parameters == {"lr": 0.5}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"parameters"\n', "02_second has no cell tagged 'parameters'"),
        ("seed = 0", "02_second cannot be read: invalid syntax"),
        ('"nbformat_minor"', "02_second cannot be read: Notebook does not appear to be JSON"),
    ],
)
def test_a_chapter_that_cannot_be_read_is_named(
    source: str, expected: str, refused: Told, root: Path
) -> None:
    path = root / "book/02_second.ipynb"
    before = path.read_text(encoding="utf-8")
    changed = {'"parameters"\n': '"other"\n', "seed = 0": "seed = = 0"}.get(source, "{")
    assert source in before
    path.write_text(before.replace(source, changed), encoding="utf-8")
    assert expected in refused("run")


# --- what is made ------------------------------------------------------------------------


@pytest.mark.chain
def test_the_chain_in_the_books_order_then_nothing_left_to_do(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "book")
    assert cli.main(["run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sorted(line.split(":")[0] for line in said) == ["01_first", "02_second"]
    assert all(re.fullmatch(r"\w+: \d+ s", line) for line in said)
    assert text(root, "01_first") == "seed 0 rate 0.5\n"
    before = {p: (root / "_build" / p).read_bytes() for p in pages(root)}
    assert list(before) == ["executed/quick/01_first.ipynb", "executed/quick/02_second.ipynb"]

    assert cli.main(["run"]) == 0
    assert capsys.readouterr().out.splitlines() == ["02_second: up to date", "01_first: up to date"]
    assert {p: (root / "_build" / p).read_bytes() for p in pages(root)} == before

    write(root, "02_second", "print('changed')")
    assert cli.main(["run"]) == 0
    done = sorted(capsys.readouterr().out.splitlines())
    assert done[0] == "01_first: up to date"
    assert re.fullmatch(r"02_second: \d+ s", done[1])
    assert text(root, "02_second") == "changed\n"


@pytest.mark.chain
def test_parameters_reach_the_chapters_that_have_them(root: Path) -> None:
    given = [
        "--jobs",
        "1",
        "-p",
        "seed",
        "3",
        "-p",
        "rate",
        "1e-3",
        "-p",
        "widths",
        "[1, 2]",
        "-p",
        "name",
        "7",
    ]
    write(root, "01_first", "print([seed, rate, widths, name])", more=FIRST)
    assert cli.main(["run", *given]) == 0
    assert text(root, "01_first") == "[3, 0.001, [1, 2], '7']\n"
    assert text(root, "02_second") == "seed 3\n"


@pytest.mark.chain
def test_a_chapter_edited_while_it_runs_is_out_of_date(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "book/01_first.ipynb"
    edit = f"import pathlib\npath = pathlib.Path({str(path)!r})\n"
    edit += "path.write_text(path.read_text().replace('# A chapter', '# Another'))"
    write(root, "01_first", edit)
    told = []
    for _ in range(3):
        assert cli.main(["run", "01_first"]) == 0
        told.append("up to date" in capsys.readouterr().out)
    assert told == [False, False, True]


@pytest.mark.chain
def test_a_page_tells_how_it_was_made_but_not_where(root: Path) -> None:
    assert cli.main(["run", "--profile", "smoke"]) == 0
    path = root / "_build/executed/smoke/01_first.ipynb"
    page = nbformat.read(path, as_version=4)
    about = page.metadata["kdlib"]
    assert (about["profile"], about["dataset"], about["fallback"]) == ("smoke", "mnist-5k", False)
    assert about["parameters"] == {"profile": "smoke", "seed": 5}
    assert about["seconds"] > 0
    assert about.keys() >= {"date", "digest"}
    assert [cell.id for cell in page.cells][2] == "injected-parameters"
    assert "hide-input" in page.cells[2].metadata.tags
    assert "papermill" not in path.read_text(encoding="utf-8")
    assert root.name not in path.read_text(encoding="utf-8")


FAILED = [
    (("fine = 1", "\n1 / 0"), "ZeroDivisionError: division by zero"),
    (("fine = 1", "raise SystemExit(0)"), "SystemExit: 0"),
    (("fine = 1", "import os\nos._exit(3)"), "the kernel died"),
    (("fine = 1", "print('no figure')"), "it made no figure"),
]


@pytest.mark.chain
@pytest.mark.parametrize(("cells", "reason"), FAILED)
def test_a_failed_cell_stops_the_chain_and_keeps_the_last_page(
    cells: tuple[str, ...], reason: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = root / "_build/executed/quick/02_second.ipynb"
    old.parent.mkdir(parents=True)
    nbformat.write(notebook("print('old')"), old)
    before = old.read_bytes()
    write(root, "02_second", *cells, figure=reason == "it made no figure")
    assert cli.main(["run", "--jobs", "1"]) == 1
    said = capsys.readouterr()
    first = cells[1].split("\n")[0] or "1 / 0"
    assert f"02_second failed in cell 4 (id code-1, {first!r}): {reason}\n" in said.err
    failed = root / "_build/failed/02_second.ipynb"
    assert str(failed) in said.err
    assert failed.is_file()
    assert "01_first" not in said.out
    assert old.read_bytes() == before
    assert pages(root) == ["executed/quick/02_second.ipynb", "failed/02_second.ipynb"]


@pytest.mark.chain
def test_figures_are_the_same_whatever_the_users_settings(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "02_second", "import matplotlib.pyplot as plt", "plt.plot([1, 2]);", figure=True)

    def picture() -> str:
        assert cli.main(["run", "2", "--force"]) == 0
        page = nbformat.read(root / "_build/executed/quick/02_second.ipynb", as_version=4)
        return str(page.cells[-1].outputs[-1].data["image/png"])

    plain = picture()
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/matplotlibrc").write_text("text.usetex: True\nlines.linewidth: 9\n")
    config = tmp_path / "ipython/profile_default/ipython_kernel_config.py"
    config.parent.mkdir(parents=True)
    config.write_text("c.InlineBackend.figure_formats = {'svg'}\n")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "settings"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "settings"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    assert picture() == plain


MEETING = """\
import os, pathlib, time
there = pathlib.Path(os.environ["TOLD"])
(there / "NAME").write_text(os.environ["KDLIB_SLOTS"])
while len(list(there.iterdir())) < 2:
    time.sleep(0.05)
END"""


@pytest.mark.chain
def test_chapters_run_side_by_side_and_a_failed_one_lets_the_others_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "told").mkdir()
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    contents = (root / "_toc.yml").read_text()
    (root / "_toc.yml").write_text(f"{contents}      - file: book/03_third\n")
    write(root, "03_third", "print('never')")
    write(root, "02_second", MEETING.replace("NAME", "02").replace("END", "1 / 0"))
    late = "time.sleep(2)\nprint('after')"
    write(root, "01_first", MEETING.replace("NAME", "01").replace("END", late), more=FIRST)
    assert cli.main(["run", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r"01_first: \d+ s\n", said.out)
    assert "02_second failed in cell 3" in said.err
    assert text(root, "01_first") == "after\n"
    assert len({path.read_text() for path in (tmp_path / "told").iterdir()}) == 1
    assert "executed/quick/03_third.ipynb" not in pages(root)


WAITING = """\
import os, pathlib, time
pathlib.Path(os.environ["TOLD"]).write_text(str(os.getpid()))
time.sleep(600)"""


@pytest.mark.chain
@pytest.mark.parametrize("signals", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_the_next_one_goes_on(
    signals: signal.Signals, root: Path, tmp_path: Path
) -> None:
    write(root, "01_first", WAITING, more=FIRST)
    told = tmp_path / "told"
    running = subprocess.Popen(
        [*KDLIB, "run", "--jobs", "1"],
        env={**os.environ, "TOLD": str(told)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        # a job in a script's background ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while running.poll() is None and not (told.is_file() and told.read_text()):
        time.sleep(0.05)
    others = root / "_build" / f".run-{os.getpid()}-another"  # of a process that still runs
    others.mkdir()
    running.send_signal(signals)
    _, said = running.communicate()
    if signals == signal.SIGINT:
        assert running.returncode == 130, said
        assert said.strip().splitlines() == ["kdlib: stopped; the same command goes on from here"]
        assert pages(root) == ["executed/quick/02_second.ipynb"]
    for _ in range(600):  # the kernel goes with its chapter
        if not alive(int(told.read_text())):
            break
        time.sleep(0.05)
    assert not alive(int(told.read_text()))

    write(root, "01_first", "print('done')", more=FIRST)
    result = subprocess.run([*KDLIB, "run"], capture_output=True, encoding="utf-8")
    assert result.returncode == 0
    assert "02_second: up to date" in result.stdout
    assert text(root, "01_first") == "done\n"
    assert list((root / "_build").glob(".run-*")) == [others]


@pytest.mark.chain
def test_no_file_is_read_or_written_in_the_locales_encoding(root: Path) -> None:
    write(root, "02_second", "print('2 × 3 – „sechs“')  # ≈")
    places = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    warned = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "always::EncodingWarning"}
    for command in (["run", "2"], ["run", "2", "--plan"], ["data"], ["runs"]):
        result = subprocess.run(
            [*KDLIB, *command],
            env={**os.environ, **places, **warned},
            capture_output=True,
            encoding="utf-8",
        )
        assert result.returncode == 0, result.stderr
        warnings = [line for line in result.stderr.splitlines() if "EncodingWarning" in line]
        assert not [line for line in warnings if str(Path(kdlib.__file__).parent) in line]
    assert text(root, "02_second") == "2 × 3 – „sechs“\n"


def test_a_page_that_has_changed_is_made_again_and_not_published(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,), _ = chapters.jobs(["01_first"], "quick", {})
    job.page.parent.mkdir(parents=True)
    execute.publish(
        notebook("print('67 errors')"), job, execute.digest_of_sources(job), 1.0, job.page
    )
    assert execute.is_up_to_date(job)
    for change in (lambda text: text.replace("67", "57"), lambda text: text[:-30]):
        whole = job.page.read_text()
        job.page.write_text(change(whole))
        assert not execute.is_up_to_date(job)
        assert cli.main(["build"]) == 1
        assert "01_first.ipynb is damaged: execute the chapter again" in capsys.readouterr().err
        job.page.write_text(whole)


@pytest.mark.parametrize("text", ["(" * 50_000, "+" * 50_000 + "1", "0x" + "f" * 5000])
def test_a_value_that_python_cannot_read_or_show_is_refused(text: str, refused: Told) -> None:
    assert len(refused("run", "-p", "rate", text).splitlines()) == 1


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
    made = {c: chapters.made(p) for c, p in chapters.pages().items()}
    assert made["01_first"]["fallback"] is True
    assert made["01_first"]["dataset"] == "mnist-5k"
    assert made["02_second"]["fallback"] is False


def test_a_dataset_that_was_asked_for_is_never_swapped(no_mnist: Path) -> None:
    jobs, note = chapters.jobs(["01_first"], "quick", {"dataset": "mnist"})
    assert note == ""
    assert jobs[0].parameters.get("dataset", "mnist") == "mnist"
    (no_mnist / "book/profiles/full.yml").write_text("01_first: {dataset: fashion-mnist}\n")
    assert chapters.jobs(["01_first"], "full", {})[1] == ""


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
    assert "dataset is 'minst': expected one of mnist," in capsys.readouterr().err


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
        return execute.digest_of_sources(chapters.jobs(["01_first"], "quick", given)[0][0])

    first = digest()
    assert digest() == first
    assert digest(seed="1") != first
    assert digest(seed="0") == first
    recorded = root / "book/reference/01_first.json"
    recorded.parent.mkdir()
    recorded.write_text("{}")
    assert digest() != first
    recorded.unlink()
    assert digest() == first
    claims = root / "book/claims/01_first.yml"
    claims.parent.mkdir(exist_ok=True)
    claims.write_text("claims: {}")
    assert digest() != first
    claims.unlink()
    # A record that the page shows beside its own.
    other = root / "book/reference/other/02_second.json"
    other.parent.mkdir()
    other.write_text("{}")
    assert digest() == first
    path = root / "book/01_first.ipynb"
    source = json.loads(path.read_text())
    source["cells"].append(nbformat.v4.new_code_cell("reference.results('02_second', 'other')"))
    path.write_text(json.dumps(source))
    showing = digest()
    other.unlink()
    assert digest() not in (first, showing)
    first = digest()
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
    assert chapters.pages()["01_first"].parent.name == "full"
    assert chapters.pages("smoke")["01_first"].parent.name == "smoke"
    assert chapters.pages().keys() == {"01_first"}


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["kdlib"]) is cli.main
