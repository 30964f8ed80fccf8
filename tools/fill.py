"""Fill the book's text from what is recorded: the numbers in prose, and the README's picture.

Numbers are marked as `kdlib.book.numbers` describes, in chapters, pages and the README.

    python tools/fill.py [--check]
"""

import argparse
import sys
from pathlib import Path

from kdlib import files
from kdlib.book import numbers, reference

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = "07_mnist_reproduction"
PICTURE = ROOT / "book" / "_static" / "results.svg"
# Row in the record -> errors in Hinton et al. 2015 (section 3), colour.
NETWORKS = {
    "teacher": (67, "teacher"),
    "plain student": (146, "hard"),
    "distilled student": (74, "distilled"),
}


def picture() -> str:
    """Every training as a dot, the paper's value as a triangle, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kdlib.book import plots

    plots.use()
    rows = reference.results(CHAPTER) or {}
    canvas, axes = plt.subplots(figsize=(7, 2.6))
    for height, (name, (paper, colour)) in enumerate(NETWORKS.items()):
        errors = [run.metrics["test_errors"] for run in rows[name]]
        axes.plot(errors, [height] * len(errors), "o", color=plots.COLOURS[colour], alpha=0.6)
        axes.plot(paper, height + 0.3, "v", color="black")
        axes.annotate(f"paper {paper}", (paper, height + 0.42), ha="center")
    axes.set(yticks=range(3), yticklabels=list(NETWORKS), ylim=(-0.4, 2.9))
    axes.set_xlabel("errors on MNIST's 10,000 test digits (one dot per training run)")
    axes.margins(x=0.1)
    return plots.svg(canvas)


def main(arguments: list[str] | None = None) -> int:
    """Fill what is outdated, or with --check name it; 1 where something is, or cannot be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    check = parser.parse_args(arguments).check
    failed = False
    book = ROOT / "book"
    for path in [ROOT / "README.md", *sorted(book.glob("*.md")), *sorted(book.glob("*.ipynb"))]:
        # A notebook's text too: JSON leaves the numbers and their markers as they are.
        old = path.read_text(encoding="utf-8")
        try:
            new = numbers.fill(old, path.stem)
        except ValueError as error:
            print(f"{path}: {error}")
            failed = True
            continue
        if new != old:
            print(f"{path}: numbers are not what is recorded")
            failed |= check
            if not check:
                files.put(path, new.encode())
    if not check:
        files.put(PICTURE, picture().encode())
    elif failed:
        print("To fill what can be filled: make format")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
