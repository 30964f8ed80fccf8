"""Every chapter: its source form, its parameters, and the whole chain at the smoke profile."""

import ast
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from conftest import ROOT, Clone

from kdlib.book import chapters as book

NOTEBOOKS = sorted((ROOT / "book").glob("[0-9][0-9]*.ipynb"))
COMMON = {"profile": "quick", "dataset": "mnist", "device": "auto", "seed": 0}
LONGEST_CELL, MEDIAN_CELL, LONGEST_LINE = 25, 8, 76

chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def tagged(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- the sources -------------------------------------------------------------------------


@chapter
def test_a_chapter_begins_and_ends_as_all_do(path: Path) -> None:
    notebook = read(path)
    title, *rest = notebook.cells
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    setup, parameters, check, *others = [cell for cell in rest if cell.cell_type == "code"]
    assert "setup" in setup.metadata.tags
    assert parameters.metadata.tags == ["parameters"]
    assert len(tagged(notebook, "parameters")) == 1
    assert "check_parameters(" in check.source
    assert "colophon(" in others[-1].source


@chapter
def test_papermill_sees_every_parameter(path: Path) -> None:
    (cell,) = tagged(read(path), "parameters")
    assigned = [line.targets[0].id for line in ast.parse(cell.source).body]  # type: ignore[attr-defined]
    seen = papermill.inspect_notebook(str(path))
    assert list(seen) == assigned
    for name, parameter in seen.items():
        ast.literal_eval(parameter["default"])
        assert parameter["help"], f"{name} has no comment"
    assert {name: ast.literal_eval(seen[name]["default"]) for name in COMMON} == COMMON


@chapter
def test_cells_and_lines_are_short(path: Path) -> None:
    """All of them: what a page folds or removes, JupyterLab and Colab show."""
    lines = {cell.id: cell.source.splitlines() for cell in code(read(path))}
    assert {name: len(cell) for name, cell in lines.items() if len(cell) > LONGEST_CELL} == {}
    assert [line for cell in lines.values() for line in cell if len(line) > LONGEST_LINE] == []


def test_the_books_cells_are_short_in_the_middle() -> None:
    cells = [cell.source.splitlines() for path in NOTEBOOKS for cell in code(read(path))]
    assert statistics.median(sum(map(bool, lines)) for lines in cells) <= MEDIAN_CELL


def hidden(cell: Any) -> str:
    """How a page shows a code cell: "remove" it, "hide" it in a fold, or "" as it is."""
    tags = {tag.split("-")[0] for tag in cell.metadata.get("tags", [])}
    return next((kind for kind in ("remove", "hide") if kind in tags), "")


def names(cell: Any, *contexts: type[ast.expr_context]) -> set[str]:
    tree = ast.walk(ast.parse(cell.source))
    return {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, contexts)}


@chapter
def test_what_a_page_uses_is_visible_on_it(path: Path) -> None:
    cells = code(read(path))
    removed = {n for c in cells if hidden(c) == "remove" for n in names(c, ast.Store)}
    visible = {n for c in cells if hidden(c) != "remove" for n in names(c, ast.Store)}
    used = {n for c in cells if hidden(c) != "remove" for n in names(c, ast.Load)}
    assert used & removed - visible == set()
    lines = Counter({"remove": 0, "hide": 0})
    for cell in cells:
        lines[hidden(cell)] += len(cell.source.splitlines())
    assert lines["remove"] < 0.08 * lines.total()
    assert lines["hide"] < 0.35 * lines.total()


@chapter
def test_a_name_of_a_page_means_one_thing(path: Path) -> None:
    """Names assigned at the top level of two cells; figures and their axes are drawn again."""
    assigned = Counter(
        name
        for cell in code(read(path))
        for name in {
            target.id
            for line in ast.parse(cell.source).body
            if isinstance(line, ast.Assign)
            for part in line.targets
            for target in ast.walk(part)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
        }
    )
    again = {"figure", "axis", "axes", "_"}
    checked = set(papermill.inspect_notebook(str(path)))  # a list may come as text
    assert {n for n, count in assigned.items() if count > 1} - again - checked == set()


@chapter
def test_people_write_the_sentences_of_a_page(path: Path) -> None:
    notebook = read(path)
    assert [c.id for c in code(notebook) if "Markdown(" in c.source] == []
    assert [
        c.id for c in notebook.cells if c.cell_type == "markdown" and "{glue:" in c.source
    ] == []


@pytest.mark.parametrize("profile", ["smoke", "full"])
def test_profiles_name_every_chapter_and_fit_it(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    jobs, _ = book.jobs(book.chapters(), profile, {"dataset": "mnist-5k"})
    assert [job.chapter for job in jobs] == [path.stem for path in NOTEBOOKS]
    for job in jobs:
        assert job.parameters.keys() > {"profile", "dataset"}, f"{profile}.yml lacks {job.chapter}"


# --- the chain at the smoke profile ------------------------------------------------------


@pytest.mark.chain
def test_the_whole_chain_runs_at_smoke(chain: Clone) -> None:
    assert chain.chapters == [path.stem for path in NOTEBOOKS]
    log = (chain.root / "run.log").read_text(encoding="utf-8").splitlines()
    # Chapters run side by side, and are named as they end.
    assert sorted(line.split(":")[0] for line in log) == sorted(chain.chapters)
    for name in chain.chapters:
        about = chain.page(name).metadata["kdlib"]
        assert about["profile"] == "smoke"
        assert about["dataset"] == "mnist-5k"
        assert about["fallback"] is False


@pytest.mark.chain
@chapter
def test_a_page_prints_no_warning_and_names_no_place(path: Path, chain: Clone) -> None:
    for cell in chain.page(path.stem).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"
            shown = str({k: v for k, v in output.get("data", output).items() if "image" not in k})
            for place in (str(ROOT), str(chain.root), str(Path.home())):
                assert place not in shown, cell.id
            # A call as a cell's last line shows what it returns, such as hundreds of runs.
            data = output.get("data", {})
            plain = "" if "text/html" in data else data.get("text/plain", "")
            assert len(output.get("text", plain)) < 5000, cell.id


@pytest.mark.chain
@chapter
def test_every_picture_has_a_text_and_a_caption(path: Path, chain: Clone) -> None:
    pictures = 0
    for cell in chain.page(path.stem).cells:
        source = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
        if cell.cell_type == "markdown":
            assert not re.search(r"!\[\s*\]\(", source), f"{cell.id}: a picture without a text"
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        for data in shown:
            tags = re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", "")))
            assert all(re.search(r'alt="[^"]+"', tag) for tag in tags), cell.id
        if any(key.startswith("image/") for data in shown for key in data):
            pictures += 1
            about = cell.metadata.get("mystnb", {})
            assert about.get("image", {}).get("alt"), f"{cell.id} has no text for its picture"
            assert about.get("figure", {}).get("caption"), f"{cell.id} has no caption"
    assert pictures > 0


@pytest.mark.chain
def test_nbval_runs_every_chapter_with_the_smoke_parameters(
    chain: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder outside of any clone, each with what the store of the chain holds."""
    monkeypatch.chdir(ROOT)
    jobs, _ = book.jobs(book.chapters(), "smoke", {"dataset": "mnist-5k"})
    for job in jobs:
        output = tmp_path / f"{job.chapter}.ipynb"
        papermill.execute_notebook(
            str(job.source), str(output), job.parameters, prepare_only=True, kernel_name="python3"
        )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=600", "-q"),
            *("-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", "."),
            *(f"{job.chapter}.ipynb" for job in jobs),
        ],
        cwd=tmp_path,
        env={**os.environ, **chain.environment},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    cells = sum(len(code(read(job.source))) for job in jobs)
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed
    assert int(passed[1]) > cells


def test_the_forty_lines_are_chapter_1s() -> None:
    cells = [cell.source for cell in code(read(ROOT / "book/01_why_distil.ipynb"))]
    first, last = (
        next(at for at, source in enumerate(cells) if source.startswith(start))
        for start in ("train_set =", "errors = ")
    )
    script = (ROOT / "book/_static/forty_lines.py").read_text(encoding="utf-8")
    # All of the code from the data to the errors; the script adds its settings and a print.
    shown = [line for source in cells[first : last + 1] for line in source.split("\n") if line]
    copied = script[script.index("train_set =") : script.index("\nprint(")]
    assert [line for line in copied.split("\n") if line] == shown
    assert len(shown) <= 40
