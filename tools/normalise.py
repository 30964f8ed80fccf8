"""Put notebooks into the book's one source form, or say what keeps them from it.

The form: no outputs, save on cells tagged `nbval-check-output`, which keep theirs with an
execution count of 1; ids that are valid, unique and stay; only the metadata that the book
uses; what is folded on the page is folded in JupyterLab and on Colab; no empty cells or
trailing blanks; one cell tagged `setup`, folded, with the source below.

    python tools/normalise.py [--check] [NOTEBOOK …]        # all of book/ when none is named
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbformat.validator import iter_validate

ROOT = Path(__file__).resolve().parent.parent
CHECKED = "nbval-check-output"
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
VALID_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SETUP = """\
# Finds kdlib: installed, in a clone around this notebook, or online.
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

if not getattr(find_spec("kdlib"), "origin", None):
    folders = [Path.cwd(), *Path.cwd().parents]
    clones = [f for f in folders if (f / "kdlib/__init__.py").exists()]
    if clones:
        sys.path.insert(0, str(clones[0]))
    else:  # what is installed of torch stays as it is
        url = "git+{url}"
        torches = [n for n in ("torch", "torchvision") if find_spec(n)]
        keep = [f"{name}=={version(name)}" for name in torches]
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, url, *keep], check=True)"""

Json = dict[str, Any]


def setup_source() -> str:
    """The set-up cell, with the repository's address from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return SETUP.replace("{url}", project["urls"]["Repository"])


def tags(cell: Json) -> list[str]:
    """The cell's tags."""
    found: list[str] = cell.get("metadata", {}).get("tags", [])
    return found


def source(cell: Json) -> str:
    """The cell's text without trailing blanks, however the file splits it."""
    return "".join(cell["source"]).rstrip()


def normalise_cell(cell: Json, setup: str) -> Json:
    """The cell in its source form, with the id that it came with."""
    text = setup if "setup" in tags(cell) else source(cell)
    clean = {
        "id": cell.get("id"),
        "cell_type": cell["cell_type"],
        "metadata": normalise_metadata(cell),
        "source": text.splitlines(keepends=True),
    }
    if cell["cell_type"] == "code":
        outputs = cell["outputs"] if CHECKED in tags(cell) else []
        if any(output["output_type"] == "error" for output in outputs):
            raise ValueError(f"a cell tagged {CHECKED} stores an error: {source(cell)[:60]!r}")
        clean["execution_count"] = 1 if outputs else None
        clean["outputs"] = [normalise_output(output) for output in outputs]
    elif "attachments" in cell:
        clean["attachments"] = cell["attachments"]
    return clean


def normalise_metadata(cell: Json) -> Json:
    """The tags, what the page needs, and for each reader of notebooks how it folds a cell."""
    found = {k: v for k, v in cell["metadata"].items() if k in ("tags", "mystnb") and v}
    if "setup" in tags(cell):
        found["tags"] = ["setup", "hide-cell"]
    if FOLDED & set(found.get("tags", [])):
        # JupyterLab's key, and Colab's.
        found |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
    return found


def normalise_output(output: Json) -> Json:
    """The output, with nothing in it that says when or where it was made."""
    fixed: Json = {"execution_count": 1, "metadata": {}}
    return {key: fixed.get(key, value) for key, value in output.items()}


def name_cells(cells: list[Json]) -> None:
    """Give every cell a valid id of its own: its first good one, else one from its source."""
    taken: set[str] = set()
    for cell in cells:
        good = isinstance(cell["id"], str) and VALID_ID.fullmatch(cell["id"])
        cell["id"] = cell["id"] if good and cell["id"] not in taken else None
        taken.add(cell["id"])
    for cell in cells:
        digest = hashlib.sha256(source(cell).encode()).hexdigest()
        names = (digest[start : start + 8] for start in range(57))
        cell["id"] = cell["id"] or next(name for name in names if name not in taken)
        taken.add(cell["id"])


def normalise(notebook: Json, setup: str) -> Json:
    """The notebook in its source form. ValueError where no form can be given."""
    cells = [normalise_cell(cell, setup) for cell in written(notebook)]
    if (found := sum("setup" in tags(cell) for cell in cells)) != 1:
        raise ValueError(f"one code cell must have the tag setup, found {found}")
    name_cells(cells)
    clean = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    for fault in iter_validate(clean, version=4, version_minor=5):
        raise ValueError(fault.message)
    return clean


def written(notebook: Json) -> list[Json]:
    """The cells that are not empty."""
    return [cell for cell in notebook["cells"] if source(cell)]


def differences(old: Json, new: Json) -> Iterator[str]:
    """What of the notebook is not in its source form, in words."""
    for key in sorted(old.keys() | new.keys()):
        if key != "cells" and old.get(key) != new.get(key):
            yield key
    if len(old["cells"]) != len(new["cells"]):
        yield "empty cells"
    for number, (before, after) in enumerate(zip(written(old), new["cells"], strict=True), 1):
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                yield f"{key} of cell {number} ({after['id']})"


def main(arguments: list[str] | None = None) -> int:
    """Normalise or check the notebooks named; 1 where one is, or stays, out of form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if unclean")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    options = parser.parse_args(arguments)
    setup = setup_source()
    failed = False
    for path in options.notebooks or sorted((ROOT / "book").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        try:
            old = json.loads(text)
            new = normalise(old, setup)
        except (ValueError, KeyError) as error:
            print(f"{path}: cannot be normalised: {error}")
            failed = True
            continue
        form = json.dumps(new, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if form == text:
            continue
        print(f"{path}: {', '.join(differences(old, new)) or 'layout of the file'}")
        if options.check:
            failed = True
        else:
            beside = path.with_name(f".{path.name}.new")
            beside.write_text(form, encoding="utf-8")
            os.replace(beside, path)
    if failed and options.check:
        print("To mend what can be mended: python tools/normalise.py")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
