"""Put the results into README.md: a table and a picture, both from what is recorded.

The source is the reference run of chapter 7 (`kdlib reference record`), or until there is one
the run of its quick profile. Nothing between the markers is typed by hand.

    python tools/readme.py [--check]
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, cast

from kdlib import store
from kdlib.book import reference
from kdlib.book.reference import Recorded
from kdlib.evaluate import spread

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = "07_mnist_reproduction"
PICTURE = "book/_static/results.svg"
# row in the record -> words in the table, errors in Hinton et al. 2015 (section 3), colour
NETWORKS = {
    "teacher": ("teacher, 2 × 1200 units, translated digits", 67, "teacher"),
    "plain student": ("student, 2 × 800 units, on labels", 146, "hard"),
    "distilled student": ("the same student, on soft targets", 74, "distilled"),
}
Rows = dict[str, list[Recorded]]


def recorded() -> tuple[str, Rows]:
    """The profile whose results are shown, and its rows."""
    for profile in ("full", "quick"):
        rows = reference.results(CHAPTER, profile)
        if rows is not None:
            return profile, rows
    raise FileNotFoundError(
        f"no results of {CHAPTER} are recorded: `make book`, then `kdlib reference record`"
    )


def table(profile: str, rows: Rows) -> str:
    """The three networks of the paper, as Markdown."""
    lines = [
        "| network | errors of 10,000 test digits (mean ± sd, seeds) | the paper |",
        "|---|---:|---:|",
    ]
    for name, (words, paper, _) in NETWORKS.items():
        lines.append(f"| {words} | {spread(cast(Any, rows[name]))} | {paper} |")
    kind = {"full": "With many passes", "quick": "At a laptop's scale, with few passes"}[profile]
    about = f"{kind}. {reference.describe(CHAPTER, profile)}"
    return "\n".join([*lines, "", about])


def picture(rows: Rows) -> str:
    """Every training as a dot, the paper's value as a triangle, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kdlib.book import plots

    plots.use()
    canvas, axes = plt.subplots(figsize=(7, 2.6))
    for height, (name, (_, paper, colour)) in enumerate(NETWORKS.items()):
        errors = [run.metrics["test_errors"] for run in rows[name]]
        axes.plot(errors, [height] * len(errors), "o", color=plots.COLOURS[colour], alpha=0.6)
        axes.plot(paper, height + 0.3, "v", color="black")
        axes.annotate(f"paper {paper}", (paper, height + 0.42), ha="center")
    axes.set(yticks=range(3), yticklabels=list(NETWORKS), ylim=(-0.4, 2.9))
    axes.set_xlabel("errors on MNIST's 10,000 test digits (a dot a training)")
    axes.margins(x=0.1)
    return plots.svg(canvas)


def filled(readme: str, profile: str, rows: Rows) -> str:
    """The README with its block of results made anew."""
    alt = "Test errors of each training of three networks, with the paper's values as triangles."
    block = f"![{alt}]({PICTURE})\n\n{table(profile, rows)}"
    place = re.compile(r"(<!-- results[^>]*-->\n).*?(<!-- /results -->)", re.DOTALL)
    new, found = place.subn(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", readme)
    if found != 1:
        raise ValueError("README.md has no one block <!-- results --> … <!-- /results -->")
    return new


def main(arguments: list[str] | None = None) -> int:
    """Fill in the README, or with --check say whether it is filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    check = parser.parse_args(arguments).check
    profile, rows = recorded()
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old, profile, rows)
    if check:
        if new != old:
            print("README.md is not what is recorded: python tools/readme.py")
        return int(new != old)
    store.put(path, new.encode())
    store.put(ROOT / PICTURE, picture(rows).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
