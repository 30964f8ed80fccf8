"""Results that are recorded in the book: written by a program, read beside a page's own."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from kdlib import data, files
from kdlib.book import chapters
from kdlib.evaluate import spread
from kdlib.keys import code_digest
from kdlib.recipe import Recipe
from kdlib.runs import Run

Measures = Mapping[str, Mapping[str, Sequence[float]]]  # row -> metric -> one value per run
# Parameters that decide no result.
APART = {"device", "profile"}


@dataclass(frozen=True)
class Recorded:
    """A run as the book records it: all but its weights and its curves; or a plain value.

    wrong: the indices of the test images that the network gets wrong, in ascending order;
    None in older records, for runs that diverged and for plain values. seed: a plain value's.
    """

    recipe: Recipe | None
    metrics: dict[str, Any]
    seconds: float
    provenance: dict[str, Any]
    wrong: list[int] | None = None
    seed: int | None = None


def value(name: str, seed: int, measured: float, provenance: dict[str, Any]) -> Recorded:
    """A result that is no run's, for a row of `keep`: under metrics[name].

    provenance: as `kdlib.provenance.provenance` gives it.
    """
    return Recorded(None, {"status": "ok", name: measured}, 0.0, provenance, seed=seed)


Rows = Mapping[str, Sequence[Run | Recorded]]
Parameters = Mapping[str, Any]


def folder() -> Path:
    """Where results are recorded: book/reference of the clone that kdlib is imported from,
    or its copy in an installed kdlib. Raises FileNotFoundError if there is neither."""
    package = Path(__file__).resolve().parent
    places = [package.parents[1] / "book" / "reference", package / "records"]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"the book's records are neither in {places[0]} (a clone) nor in {places[1]} (an "
        "installed kdlib): install kdlib again, or restore the folder with git"
    )


def path(chapter: str, profile: str = "full") -> Path:
    """The file of a chapter's recorded results; those of other profiles lie in a folder each."""
    return folder() / ("" if profile == "full" else profile) / f"{chapter}.json"


def draft(chapter: str, profile: str) -> Path:
    """The file of what a chapter has kept: in `files.home()`, for `record`."""
    for value in (chapter, profile):
        if not re.fullmatch(r"\w+", value):
            raise ValueError(f"{value!r} is no name of a chapter or profile: letters, digits, _")
    return files.home() / "reference" / profile / f"{chapter}.json"


def keep(
    chapter: str,
    profile: str,
    rows: Rows,
    measures: Measures | None = None,
    parameters: Parameters | None = None,
) -> Path:
    """Put a chapter's results where `record` finds them; that file.

    rows: name -> runs or plain values, one per seed. measures: what a chapter measures
    besides the runs' own metrics, such as errors after a bias shift: row -> name -> one value
    per run. parameters: what the chapter ran with; a notebook's are known.
    A store that cannot be written gets nothing, and a line on stderr tells so.
    Raises ValueError when a measure has not one value per run, or outside of a notebook
    without parameters.
    """
    place = draft(chapter, profile)
    ran = _of_this_notebook() if parameters is None else parameters
    content = _content(chapter, profile, rows, measures or {}, ran)
    try:
        _write(place, content)
    # A full store on a read-only disk is enough for a reader.
    except OSError as error:
        print(f"kdlib: no results are kept for a record: {error.strerror}", file=sys.stderr)
    return place


def write(
    chapter: str, profile: str, rows: Rows, parameters: Parameters, commit: str | None = None
) -> Path:
    """Record what a program has trained, at `path(chapter, profile)`; rows as for `keep`.

    commit: of the code that ran, as for `record`. Raises ValueError when none is known, and
    OSError when the file cannot be written; the one before stays as it is.
    """
    content = _content(chapter, profile, rows, {}, parameters)
    return _write(path(chapter, profile), content | {"commit": commit or current_commit()})


def _content(
    chapter: str, profile: str, rows: Rows, measures: Measures, parameters: Parameters
) -> dict[str, Any]:
    lines = {}
    for name, results in rows.items():
        lines[name] = [_line(result) for result in results]
        for measure, values in measures.get(name, {}).items():
            if len(values) != len(results):
                raise ValueError(f"{measure} of {name!r} has {len(values)} values: one per run")
            for line, given in zip(lines[name], values, strict=True):
                line["metrics"] = line["metrics"] | {measure: given}
    content = {"chapter": chapter, "profile": profile, "code": code_digest(), "rows": lines}
    return content | {"parameters": dict(parameters)}


def _line(result: Run | Recorded) -> dict[str, Any]:
    if isinstance(result, Recorded):
        # Rows of an earlier record may be kept with new ones, recipes and provenance and all.
        return vars(result) | {"recipe": result.recipe and result.recipe.as_dict()}
    line: dict[str, Any] = {"recipe": result.recipe.as_dict(), "metrics": result.metrics}
    line |= {"seconds": result.seconds, "provenance": result.provenance}
    # A run that diverged may get all of them wrong, and such a list tells nothing.
    if result.metrics["status"] == "ok":
        labels = data.load(result.recipe.dataset, result.device).test.labels
        answers = result.logits("test").argmax(1)
        line["wrong"] = (answers != labels).nonzero().flatten().tolist()
    return line


def _of_this_notebook() -> dict[str, Any]:
    """The parameters that the notebook around this call ran with.

    Its variables may have changed since: what counts are the plain assignments of the cells
    that have run, papermill's injected cell among them.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise ValueError("outside of a notebook, keep needs parameters={name: value}")
    found: dict[str, Any] = {}
    for source in shell.user_ns["In"]:
        # A cell that could not run has changed nothing.
        with contextlib.suppress(SyntaxError):
            cell = chapters.assignments(source)
            found |= {n: p.default for n, p in cell.items() if p.default is not chapters.UNKNOWN}
    return found


def kept(profile: str) -> list[str]:
    """The chapters that have kept results at a profile. FileNotFoundError when none has."""
    found = sorted(path.stem for path in draft("x", profile).parent.glob("[!.]*.json"))
    if not found:
        raise FileNotFoundError(
            f"no chapter has kept {profile} results: `kdlib run --profile {profile}`"
        )
    return found


def record(chapter: str, profile: str = "full", commit: str | None = None) -> Path:
    """Write what a chapter has kept into the book, at `path(chapter, profile)`.

    commit: of the code that ran; by default that of the clone, which must have no change in
    kdlib that is not committed. Raises FileNotFoundError when the chapter has not run at
    that profile, ValueError when it ran with other parameters than the profile's or by other
    code, or when no commit is known.
    """
    kept, again = draft(chapter, profile), f"`kdlib run {chapter} --profile {profile}`"
    if not kept.is_file():
        raise FileNotFoundError(f"{chapter} has kept no {profile} results: {again}")
    content = _read(kept)
    if content["code"] != code_digest():
        raise ValueError(f"kdlib's training code has changed since {chapter} ran: {again}")
    scale = chapters.scale(chapter, profile)
    if scale is not None:
        meant, ran = chapters.defaults(chapter) | scale, content["parameters"]
        for name in meant.keys() - APART:
            if ran.get(name, chapters.UNKNOWN) != meant[name]:
                raise ValueError(
                    f"{chapter} ran with {name} = {ran.get(name, 'unknown')!r}, not with the "
                    f"{profile} profile's {meant[name]!r}: {again}"
                )
        content["parameters"] = {name: ran[name] for name in meant.keys() & ran}
    return _write(path(chapter, profile), content | {"commit": commit or current_commit()})


def results(chapter: str, profile: str = "full") -> dict[str, list[Recorded]] | None:
    """A chapter's recorded results by row, or None when none are recorded.

    Raises ValueError when the file is not as `record` wrote it.
    """
    if not path(chapter, profile).is_file():
        return None
    content = _read(path(chapter, profile))
    rows, origin = content["rows"], {"commit": content["commit"]}
    # Older records have no `wrong`, and only runs have a recipe.
    for line in (line for lines in rows.values() for line in lines):
        line["recipe"] = line["recipe"] and Recipe.from_dict(line["recipe"])
        # A line that an earlier record had keeps the commit of that.
        line["provenance"] = origin | line["provenance"]
    return {name: [Recorded(**line) for line in lines] for name, lines in rows.items()}


def beside(
    chapter: str,
    rows: Mapping[str, Sequence[Run]],
    paper: Mapping[str, object],
    metric: str = "test_errors",
) -> pd.DataFrame:
    """A metric from three sources: this run, the reference run ("–" without), the paper."""
    recorded = results(chapter) or {}
    return pd.DataFrame(
        {
            "this run": {name: str(spread(runs, metric)) for name, runs in rows.items()},
            "reference run": {
                name: str(spread(cast(Any, recorded[name]), metric)) if name in recorded else "–"
                for name in rows
            },
            "paper": {name: str(paper.get(name, "–")) for name in rows},
        }
    )


def _write(place: Path, content: dict[str, Any]) -> Path:
    """With a digest of all that is in it, which `_read` checks."""
    text = json.dumps(
        content | {"digest": files.digest(content)}, indent=1, sort_keys=True, ensure_ascii=False
    )
    # A list of numbers takes one line, not one per number.
    text = re.sub(r"\[[\d\s,]+\]", lambda found: " ".join(found[0].split()), text)
    files.put(place, f"{text}\n".encode())
    return place


def _read(place: Path) -> dict[str, Any]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.pop("digest", None) != files.digest(content):
        raise ValueError(
            f"{place} is damaged or was changed by hand: restore it with git, or record it again"
        )
    return content


def current_commit() -> str:
    """The clone's commit. Raises ValueError if git knows none, or if kdlib differs from it."""
    clone = str(folder().parents[1])

    def git(*command: str) -> str:
        call = ["git", "-C", clone, *command]
        return subprocess.run(
            call, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()

    try:
        changed, head = git("status", "--porcelain", "kdlib"), git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        problem = f"no commit is known here ({error})"
        raise ValueError(f"{problem}: name it with commit=… or --commit") from error
    if changed:
        raise ValueError(f"kdlib has changes that are not committed:\n{changed}\ncommit them first")
    return head
