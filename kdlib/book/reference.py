"""Results that are recorded in the book: written by a program, read beside a page's own."""

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from kdlib import data, store
from kdlib.evaluate import spread
from kdlib.recipe import Recipe
from kdlib.runs import Run, code_digest

Rows = Mapping[str, Sequence[Run]]
Measures = Mapping[str, Mapping[str, Sequence[float]]]  # row -> metric -> one value a run


@dataclass(frozen=True)
class Recorded:
    """A run as the book records it: all but its weights and its curves."""

    recipe: Recipe
    metrics: dict[str, Any]
    seconds: float
    provenance: dict[str, Any]


def folder() -> Path:
    """Where results are recorded: book/reference of the clone that kdlib is imported from."""
    return Path(__file__).resolve().parents[2] / "book" / "reference"


def path(chapter: str, profile: str = "full") -> Path:
    """The file of a chapter's recorded results; those of other profiles lie in a folder each."""
    return folder() / ("" if profile == "full" else profile) / f"{chapter}.json"


def keep(chapter: str, profile: str, rows: Rows, measures: Measures | None = None) -> Path:
    """Put a chapter's runs where `record` finds them; its file, in `data.home()`.

    rows: name -> runs, one a seed. measures: what a chapter measures besides the runs' own
    metrics, such as errors after a bias shift: row -> name -> one value a run.
    A rehearsal, whose networks are untrained, keeps nothing.
    Raises ValueError when a measure has not one value a run.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, runs in rows.items():
        more = (measures or {}).get(name, {})
        for measure, values in more.items():
            if len(values) != len(runs):
                raise ValueError(f"{measure} of {name!r} has {len(values)} values: one a run")
        lines[name] = [
            {
                "recipe": run.recipe.as_dict(),
                "metrics": run.metrics | {key: values[at] for key, values in more.items()},
                "seconds": run.seconds,
                "provenance": run.provenance,
            }
            for at, run in enumerate(runs)
        ]
    content = {"chapter": chapter, "profile": profile, "code": code_digest(), "rows": lines}
    return _write(_draft(chapter, profile), content)


def kept(profile: str) -> list[str]:
    """The chapters that have kept results at a profile. FileNotFoundError when none has."""
    found = sorted(path.stem for path in _draft("x", profile).parent.glob("[!.]*.json"))
    if not found:
        raise FileNotFoundError(
            f"no chapter has kept {profile} results: `kdlib run --profile {profile}`"
        )
    return found


def record(chapter: str, profile: str = "full", commit: str | None = None) -> Path:
    """Write what a chapter has kept into the book, at `path(chapter, profile)`.

    commit: of the code that ran; by default that of the clone, which must have no change in
    kdlib that is not committed. Raises FileNotFoundError when the chapter has not run at
    that profile, ValueError when the runs come from other code or no commit is known.
    """
    draft = _draft(chapter, profile)
    if not draft.is_file():
        raise FileNotFoundError(
            f"{chapter} has kept no {profile} results: `kdlib run {chapter} --profile {profile}`"
        )
    content = _read(draft)
    if content["code"] != code_digest():
        raise ValueError(f"kdlib's training code has changed since {chapter} ran: run it again")
    content["commit"] = commit or _commit()
    return _write(path(chapter, profile), content)


def results(chapter: str, profile: str = "full") -> dict[str, list[Recorded]] | None:
    """A chapter's recorded runs by row, or None when none are recorded.

    Raises ValueError when the file is not as `record` wrote it.
    """
    if not path(chapter, profile).is_file():
        return None
    rows = _read(path(chapter, profile))["rows"]
    return {
        name: [Recorded(**line | {"recipe": Recipe.from_dict(line["recipe"])}) for line in lines]
        for name, lines in rows.items()
    }


def beside(
    chapter: str, rows: Rows, paper: Mapping[str, object], metric: str = "test_errors"
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


def describe(chapter: str, profile: str = "full") -> str:
    """One sentence on what the reference run ran on, or that there is none."""
    if not path(chapter, profile).is_file():
        return "No reference run is recorded yet, so its column holds “–”."
    content = _read(path(chapter, profile))
    runs = [line for lines in content["rows"].values() for line in lines]
    last = max(runs, key=lambda line: str(line["provenance"]["date"]))["provenance"]
    seconds = sum(line["seconds"] for line in runs)
    time = f"{seconds / 60:,.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    name = "reference" if profile == "full" else profile
    return (
        f"The {name} run, of which {len(runs)} trainings of {time} in all are recorded: "
        f"on {runs[0]['recipe']['dataset']}, {last['device']}, PyTorch {last['torch']}, "
        f"{last['date'][:10]}, commit {content['commit'][:10]}."
    )


def _draft(chapter: str, profile: str) -> Path:
    for value in (chapter, profile):
        if not re.fullmatch(r"\w+", value):
            raise ValueError(f"{value!r} is no name of a chapter or profile: letters, digits, _")
    return data.home() / "reference" / profile / f"{chapter}.json"


def _write(place: Path, content: dict[str, Any]) -> Path:
    """With a digest of all that is in it, which `_read` checks."""
    content = {key: value for key, value in content.items() if key != "digest"}
    content["digest"] = _digest(content)
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    store.put(place, f"{text}\n".encode())
    return place


def _read(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if content.get("digest") != _digest({k: v for k, v in content.items() if k != "digest"}):
        raise ValueError(
            f"{place} was changed by hand: record it anew with `kdlib reference record`"
        )
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _commit() -> str:
    """The clone's commit. ValueError where git knows none, or kdlib differs from it."""
    git = ["git", "-C", str(folder().parents[1])]
    try:
        changed = subprocess.run(
            [*git, "status", "--porcelain", "kdlib"], capture_output=True, text=True, check=True
        ).stdout
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"no commit is known here ({error}): name it with commit=…") from error
    if changed:
        raise ValueError(f"kdlib has changes that are not committed:\n{changed}commit them first")
    return head.strip()
