"""The chapters: which there are, what parameters they take, which pages have been made."""

import ast
import contextlib
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kdlib import check, data, files

Parameters = dict[str, Any]
FALLBACK = "mnist-5k"
# In place of a default that only running the cell would give.
UNKNOWN = ...


class BookError(RuntimeError):
    """A chapter, a parameter or a page is not as it must be; the message tells how."""


class Parameter(NamedTuple):
    """A line of a parameters cell: the value, as the cell writes it, and its comment."""

    default: Any
    text: str
    help: str


@dataclass(frozen=True)
class Job:
    """One chapter to execute: its name, its profile and the parameters that are injected."""

    chapter: str
    profile: str
    parameters: Parameters
    fallback: bool = False

    @property
    def source(self) -> Path:
        """The clean notebook."""
        return root() / "book" / f"{self.chapter}.ipynb"

    @property
    def page(self) -> Path:
        """The executed notebook."""
        return root() / "_build" / "executed" / self.profile / f"{self.chapter}.ipynb"

    @property
    def dataset(self) -> Any:
        """The dataset that the chapter is to run on; None where it takes none."""
        return self.parameters.get("dataset", defaults(self.chapter).get("dataset"))


def root() -> Path:
    """The clone that the working directory is in. Raises BookError outside of one."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "_toc.yml").is_file() and (folder / "book").is_dir():
            return folder
    raise BookError(f"{here} is not in a clone of the book: change into one (_toc.yml, book/)")


def chapters() -> list[str]:
    """The chapters that are notebooks, in the order of _toc.yml."""
    contents = (root() / "_toc.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^\s*- file: book/(\S+)", contents, re.MULTILINE)
    return [name for name in listed if (root() / "book" / f"{name}.ipynb").is_file()]


def choose(names: Sequence[str]) -> list[str]:
    """Chapters by name or number, in the book's order; all of them if none is named."""
    known = chapters()
    numbers = {name.split("_")[0].lstrip("0"): name for name in known}
    # A shell completes to the file's name.
    stems = [Path(name).stem for name in names]
    wanted = {numbers.get(stem.lstrip("0"), stem) for stem in stems}
    for name in sorted(wanted - set(known)):
        raise BookError(f"unknown chapter {name!r}{_nearest(name, known)}")
    return [name for name in known if name in wanted or not wanted]


def read_notebook(path: Path) -> Any:
    """A notebook as nbformat has it."""
    import nbformat

    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def write_notebook(notebook: Any, path: Path) -> None:
    """Write a notebook in nbformat's form."""
    import nbformat

    path.write_text(nbformat.writes(notebook), encoding="utf-8")  # type: ignore[no-untyped-call]


def assignments(source: str) -> dict[str, Parameter]:
    """What a cell assigns by plain lines, `name = value  # comment`, with or without a type.

    Raises SyntaxError. `papermill.inspect_notebook` goes by regular expressions: it loses a
    line with a second "=" and takes a line of magic, or an import, for a part of the value
    above it.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    # A line of magic becomes a function call, which ast can read.
    code: str = TransformerManager().transform_cell(source)  # type: ignore[no-untyped-call]
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            # ast counts columns in bytes.
            last = code.encode().splitlines()[(node.end_lineno or 1) - 1]
            comment = last[node.end_col_offset :].decode().partition("#")[2].strip()
            text = ast.unparse(node.value)
            if isinstance(target, ast.Name):
                found[target.id] = Parameter(_literal(text, UNKNOWN), text, comment)
    return found


def _literal(text: str, otherwise: Any) -> Any:
    """The value that some text is as Python, if it is a plain one."""
    # The last two for what is nested too deep.
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.literal_eval(text)
    return otherwise


def parameters(chapter: str) -> dict[str, Parameter]:
    """A chapter's parameters. Raises BookError, with the chapter's name, if it cannot be read."""
    try:
        cells = read_notebook(root() / "book" / f"{chapter}.ipynb").cells
        tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        return assignments(tagged[0])
    except IndexError as error:
        raise BookError(f"{chapter} has no cell tagged 'parameters': tag one") from error
    except (ValueError, AttributeError, SyntaxError) as error:
        raise BookError(f"{chapter} cannot be read: {error}") from error


def defaults(chapter: str) -> Parameters:
    """A chapter's parameters and their defaults."""
    return {name: parameter.default for name, parameter in parameters(chapter).items()}


def scale(chapter: str, profile: str) -> Parameters | None:
    """What a profile sets in a chapter; None if there is no such profile.

    quick is the notebooks' own. Raises BookError for a chapter that the book does not have.
    """
    import yaml

    path = root() / "book" / "profiles" / f"{profile}.yml"
    if not path.is_file():
        return {} if profile == "quick" else None
    scales = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name in sorted(set(scales) - set(chapters())):
        raise BookError(f"{path} has an unknown chapter {name!r}{_nearest(name, chapters())}")
    return scales.get(chapter) or {}


def jobs(chosen: list[str], profile: str, given: dict[str, str]) -> tuple[list[Job], str]:
    """The jobs for some chapters, every parameter checked, and a note for the reader.

    given: name -> text, for each chapter that has the parameter. Where MNIST cannot be had
    and no dataset was asked for, the chapters get mnist-5k, and the note tells so.
    Raises BookError for an unknown name, ValueError for a wrong type, DataError for damaged
    data.
    """
    known = {chapter: defaults(chapter) for chapter in chosen}
    everywhere = sorted({name for values in known.values() for name in values})
    if "profile" in given:
        raise BookError("a profile is chosen with --profile NAME, not with -p profile")
    for name in given:
        if name not in everywhere:
            near = _nearest(name, everywhere)
            raise BookError(f"no chosen chapter has a parameter {name!r}{near}")
    listed = []
    for chapter, values in known.items():
        new: Parameters = {"profile": profile} if "profile" in values else {}
        new |= scale(chapter, profile) or {}
        for name in given.keys() & values.keys():
            text = given[name]
            new[name] = text if isinstance(values[name], str) else _literal(text, text)
        for name, value in new.items():
            _check(chapter, name, value, values)
        # What equals its default is not injected, so that the page needs no such cell.
        new = {name: value for name, value in new.items() if value != values[name]}
        listed.append(Job(chapter, profile, new))
    return (listed, "") if "dataset" in given else _with_data(listed)


def _with_data(listed: list[Job]) -> tuple[list[Job], str]:
    """The jobs, those on MNIST moved to the sample if MNIST cannot be had, and a note."""
    wanting = [job for job in listed if job.dataset == "mnist"]
    try:
        if wanting:
            data.load("mnist", "cpu")
    except data.DataError as error:
        # Damaged files are the user's to see: the sample would hide them.
        if "damaged" in str(error):
            raise
        for job in wanting:
            sample = {**job.parameters, "dataset": FALLBACK}
            listed[listed.index(job)] = replace(job, parameters=sample, fallback=True)
        return listed, f"{error}\nkdlib: going on with {FALLBACK}; every page will say so"
    return listed, ""


def _check(chapter: str, name: str, value: Any, values: Parameters) -> None:
    if name not in values:
        raise BookError(f"{chapter} has no parameter {name!r}{_nearest(name, list(values))}")
    rule = _rule(values[name])
    expected = f"{rule.expected}, such as {values[name]!r}"
    check.value(f"{chapter}: parameter {name}", value, check.Rule(expected, rule.read))


def _rule(default: Any) -> check.Rule:
    """What a parameter may be, by its default's type.

    A number may be any number: whether it must be whole, the chapter's own check decides,
    and papermill and JupyterLab go by that check alone.
    """
    # True is an int in Python, so this comes first.
    if isinstance(default, bool):
        return check.boolean()
    if isinstance(default, int | float):
        return check.Rule("a number", check.number().read)
    if isinstance(default, str):
        # A method of str raises TypeError for all else.
        return check.Rule("text", str.strip)
    if isinstance(default, list | tuple) and default:
        items = _rule(default[0])
        return check.each(items, f"a list, each {items.expected}")
    return check.Rule("any value", lambda given: given)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.3)
    return f": did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"


def made(page: Path) -> dict[str, Any]:
    """How an executed page was made: profile, dataset, seconds… Empty without one.

    Raises BookError for a page that has changed since it was put in place.
    """
    if not page.is_file():
        return {}
    try:
        notebook = read_notebook(page)
        about = dict(notebook.metadata.get("kdlib", {}))
        # Pages of before have no digest of what they hold.
        if about.get("content", digest_of(notebook)) == digest_of(notebook):
            return about
    # Whatever nbformat makes of a damaged file.
    except Exception:
        pass
    raise BookError(f"{page} is damaged: execute the chapter again with `kdlib run`")


def digest_of(notebook: Any) -> str:
    """A digest of all that an executed page holds."""
    about = {k: v for k, v in notebook.metadata.get("kdlib", {}).items() if k != "content"}
    return files.digest([notebook.cells, notebook.metadata | {"kdlib": about}])


def pages(profile: str | None = None) -> dict[str, Path]:
    """The executed page of each chapter that has one: that of a profile, else the latest."""
    found: dict[str, Path] = {}
    for chapter in chapters():
        candidates = (root() / "_build" / "executed").glob(f"{profile or '*'}/{chapter}.ipynb")
        latest = max(candidates, key=lambda path: path.stat().st_mtime_ns, default=None)
        if latest:
            found[chapter] = latest
    return found
