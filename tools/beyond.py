"""Settings that may beat the recorded 67.5 and 77.6, tried on held-out digits, then recorded.

    python tools/beyond.py try [--seeds 4] [--length 1.0] [--only PART]
    python tools/beyond.py record NAME [--seeds 30]

Each is a change of the modern recipe (`kdlib/paper.py`). `try` trains them on five sixths of the
training digits, prints validation errors, and records them as book/reference/tried; the test
digits decide nothing. `record` trains one of them on all digits, seed by seed, and records it
beside the reference run. Every finished training is in the store, so an interrupted command goes
on when it is given again; only averaged students are trained again. --length shortens all of
them, for a test.
"""

import argparse

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import kdlib
from kdlib import data, evaluate, group, loop, losses
from kdlib.book import reference
from kdlib.paper import PAPER
from kdlib.precision import effective
from kdlib.provenance import provenance
from kdlib.recipe import Recipe

CHAPTER, PROFILE, TRIED = "07_mnist_reproduction", "beyond", "tried"
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

# name -> schedule, learning rate, and the share of the steps after which weights are averaged
AVERAGED = {
    "student: last tenth averaged": ("one-cycle", 0.1, 0.9),
    "student: constant rate, last half averaged": ("constant", 0.05, 0.5),
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


def averaged(name: str, seed: int, length: float, **common: object) -> reference.Recorded:
    """Validation errors of a student whose weights are averaged over the end of its training."""
    schedule, rate, start = AVERAGED[name]
    recipe = pair("as recorded", seed, length, validation=True, **common)["distilled"]
    soft_targets = kdlib.train(recipe.teacher[0]).logits("train")
    network = group.build(recipe).to(soft_targets.device)
    mean = AveragedModel(network)
    digits = data.load(recipe.dataset, soft_targets.device)

    def on_report(state: loop.State) -> None:
        if state.step > start * state.steps:
            mean.update_parameters(state.model)

    def loss(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        weights = {"temperature": recipe.temperature, "hard_weight": recipe.hard_weight}
        return losses.distillation_loss(logits, taught, labels, **weights)

    kdlib.fit(
        network,
        [digits.train.images, digits.train.labels, soft_targets],
        loss,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=rate,
        schedule=schedule,
        precision=recipe.precision,
        seed=seed,
        report_every=50,
        on_report=on_report,
    )
    errors = loop.count_errors(mean.eval(), digits.validation.images, digits.validation.labels)
    origin = provenance(soft_targets.device, effective(recipe.precision, soft_targets.device))
    return reference.value("validation_errors", seed, errors, origin)


def attempt(only: str, seeds: int, length: float, **common: object) -> reference.Rows:
    """Train the candidates whose name has a part, for validation: "name: network" -> results."""
    names = [name for name in CANDIDATES if only in name]
    wanted = {
        f"{name}: {network}": [
            pair(name, seed, length, validation=True, **common)[network] for seed in range(seeds)
        ]
        for name in names
        for network in NETWORKS
    }
    # All in one call, so that they are trained together.
    kdlib.train_all([recipe for recipes in wanted.values() for recipe in recipes])
    rows: dict[str, list] = {name: kdlib.train_all(recipes) for name, recipes in wanted.items()}
    for name in [name for name in AVERAGED if only in name]:
        rows[name] = [averaged(name, seed, length, **common) for seed in range(seeds)]
    return rows


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
    settings = {"seeds": given.seeds or 4, "length": given.length, "dataset": given.dataset}
    rows = attempt(given.only, **settings)
    for name, results in rows.items():
        print(f"{name:46} {evaluate.spread(results, 'validation_errors')}")
    reference.keep(CHAPTER, TRIED, rows, parameters={"only": given.only, **settings})
    print(reference.record(CHAPTER, TRIED, given.commit))


if __name__ == "__main__":
    main()
