"""Settings that may beat the recorded 67.5 and 77.6, tried on held-out digits, then recorded.

    python tools/beyond.py try [--seeds 4] [--length 1.0] [--only PART]
    python tools/beyond.py record NAME [--seeds 30]

Each is a change of the modern recipe (`kdlib/paper.py`). `try` trains them on five sixths of the
training digits and prints validation errors; the test digits are not looked at. `record` trains
one of them on all digits, seed by seed, and records it beside the reference run. Every finished
training is in the store, so an interrupted command goes on when it is given again. --length
shortens all of them, for a test.
"""

import argparse

import kdlib
from kdlib import evaluate
from kdlib.book import reference
from kdlib.paper import PAPER
from kdlib.recipe import Recipe

CHAPTER, PROFILE = "07_mnist_reproduction", "beyond"
NETWORKS = ("teacher", "distilled")
# name -> what it changes: of which network, and how.
CANDIDATES: dict[str, dict[str, dict[str, object]]] = {
    "as recorded": {},
    "teacher: 320 epochs": {"teacher": {"epochs": 320}},
    # The recorded one has the squared length 15 of 2012.
    "teacher: max-norm 3": {"teacher": {"max_norm": 3.0}},
    "teacher: no max-norm": {"teacher": {"max_norm": None}},
    "student: 160 epochs": {"distilled": {"epochs": 160}},
    "student: 320 epochs": {"distilled": {"epochs": 320}},
    "student: fp32": {"distilled": {"precision": "fp32"}},
    "student: batches of 100": {"distilled": {"batch_size": 100, "learning_rate": 0.05}},
    "student: no labels": {"distilled": {"hard_weight": 0.0}},
    **{
        f"student: T = {T}, hard weight {weight}": {
            "distilled": {"temperature": float(T), "hard_weight": weight}
        }
        for T in (2, 4, 8)
        for weight in (0.02, 0.1)
    },
}


def pair(name: str, seed: int, length: float = 1.0, **common: object) -> dict[str, Recipe]:
    """A candidate's teacher and student with one seed; length: the share of their epochs."""
    made = {}
    for network in NETWORKS:
        recipe = PAPER["modern"][network].replace(teacher=(), hard_weight=1.0, temperature=1.0)
        if network == "distilled":
            recipe = recipe.distil(made["teacher"], temperature=20, hard_weight=0.1)
        changed = {"seed": seed, **common, **CANDIDATES[name].get(network, {})}
        recipe = recipe.replace(**changed)
        made[network] = recipe.replace(epochs=recipe.epochs * length)
    return made


def attempt(names: list[str], seeds: int, length: float, **common: object) -> dict[str, dict]:
    """Validation errors of each candidate: name -> network -> their spread."""
    wanted = {
        name: [pair(name, seed, length, validation=True, **common) for seed in range(seeds)]
        for name in names
    }
    kdlib.train_all([r for pairs in wanted.values() for one in pairs for r in one.values()])
    return {
        name: {
            network: evaluate.spread(
                kdlib.train_all([one[network] for one in pairs]), "validation_errors"
            )
            for network in NETWORKS
        }
        for name, pairs in wanted.items()
    }


def write(
    name: str, seeds: int, length: float, commit: str | None = None, **common: object
) -> None:
    """Train a candidate on all digits and record what it gives."""
    # One seed whole after the other: what is cut off loses at most the last of them.
    runs = [kdlib.train_all([*pair(name, s, length, **common).values()]) for s in range(seeds)]
    rows = {f"{name}: {n}": [run[i] for run in runs] for i, n in enumerate(NETWORKS)}
    settings = {"name": name, "seeds": seeds, "length": length, **common}
    reference.keep(CHAPTER, PROFILE, rows, parameters=settings)
    print(reference.record(CHAPTER, PROFILE, commit))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["try", "record"])
    parser.add_argument("name", nargs="?", choices=[*CANDIDATES], help="of what is recorded")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--length", type=float, default=1.0)
    parser.add_argument("--only", default="", help="candidates whose name has this part")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--commit", help="of the code that ran, where this is no clone")
    given = parser.parse_args(arguments)
    if given.command == "record":
        if not given.name:
            parser.error("record needs the name of a candidate")
        seeds = given.seeds or 30
        write(given.name, seeds, given.length, given.commit, dataset=given.dataset)
        return
    names = [name for name in CANDIDATES if given.only in name]
    found = attempt(names, given.seeds or 4, given.length, dataset=given.dataset)
    for name, networks in found.items():
        print(f"{name:32}", *(f"{network} {spread}" for network, spread in networks.items()))


if __name__ == "__main__":
    main()
