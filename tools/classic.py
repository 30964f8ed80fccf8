"""The paper's three networks under the classic recipe, recorded in book/reference/classic.

The recipe's 3,000 passes are 1.8 million steps a network: many hours on a CPU. Fewer have the
same schedule, compressed. An interrupted run goes on with the same command.

    python tools/classic.py [--passes 3000] [--seeds 1] [--precision fp32] [--commit SHA]
"""

import argparse
import sys
from pathlib import Path

import kdlib
from kdlib.book import reference
from kdlib.paper import PAPER
from kdlib.recipe import Recipe

CHAPTER = "07_mnist_reproduction"


def recipes(seeds: int, **changes: object) -> list[Recipe]:
    """The teachers, the plain and the distilled students; student i learns from teacher i."""
    trio = [recipe.replace(**changes) for recipe in PAPER["classic"].values()]
    teacher, plain, distilled = (
        [recipe.replace(seed=seed) for seed in range(seeds)] for recipe in trio
    )
    taught = [pupil.replace(teacher=(t,)) for pupil, t in zip(distilled, teacher, strict=True)]
    return [*teacher, *plain, *taught]


def main(arguments: list[str] | None = None) -> Path:
    """Train what is not in the store, and record it; the file that holds it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", type=float, default=3000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of the code that ran, where this is no clone")
    given = parser.parse_args(arguments)
    # Where no commit is known nothing can be recorded, so nothing should be trained.
    commit = given.commit or reference.current_commit()
    # A trial on other data has a record of its own.
    profile = "classic" if given.dataset == "mnist" else "classic_trial"
    known = (reference.results(CHAPTER, profile) or {}).get("teacher", [])
    longest = max((run.recipe.epochs for run in known if run.recipe), default=0)
    if given.seeds < len(known) or given.passes < longest:
        sys.exit(
            f"classic: {reference.path(CHAPTER, profile)} has {len(known)} seeds of {longest:g} "
            f"epochs, which {given.seeds} of {given.passes:g} would replace: move that file away"
        )
    changes = {"epochs": given.passes, "dataset": given.dataset, "precision": given.precision}
    runs = kdlib.train_all(recipes(given.seeds, **changes), given.device)
    names = "teacher", "plain student", "distilled student"
    rows = {name: runs[i * given.seeds : (i + 1) * given.seeds] for i, name in enumerate(names)}
    return reference.write(CHAPTER, profile, rows, vars(given), commit)


if __name__ == "__main__":
    print(main())
