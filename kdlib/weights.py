"""Trained networks that come with kdlib, for readers without a GPU: rounded to 16 bits."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from kdlib import data, files, loop
from kdlib.recipe import Recipe
from kdlib.runs import Run

FOLDER = Path(__file__).parent / "pretrained_weights"


def names(folder: Path = FOLDER) -> list[str]:
    """The names that `pretrained` knows."""
    return sorted(path.stem for path in folder.glob("*.json"))


def pretrained(name: str, device: str | torch.device = "auto", *, folder: Path = FOLDER) -> Run:
    """A trained network of the paper's MNIST experiment, as the run that trained it.

    name: one of `names()`, such as "mnist-teacher". The run has its recipe, its metrics
    (counted with the rounded weights), its provenance and its weights, float32 from float16,
    but no curves. The store is neither read nor written.
    Raises ValueError for an unknown name, or a file that differs from the recorded one.
    """
    from safetensors.torch import load

    if name not in names(folder):
        raise ValueError(f"no pretrained {name!r}: expected one of {', '.join(names(folder))}")
    try:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except ValueError:
        record = {}
    if record.pop("digest", None) != files.digest(record):
        raise ValueError(f"{folder / f'{name}.json'} is damaged: reinstall kdlib")
    path = folder / f"{name}.safetensors"
    # A missing file counts as an empty one, whose digest cannot agree.
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{path} is missing or damaged: reinstall kdlib")
    # Widened again: 16 bits only make the package smaller, and a CPU computes faster in float32.
    return Run(
        recipe=Recipe.from_dict(record["recipe"]),
        curves={},
        weights={key: value.float() for key, value in sorted(load(content).items())},
        cached=True,
        device=data.resolve_device(device),
        **{field: record[field] for field in ("metrics", "seconds", "provenance")},
    )


def keep(name: str, run: Run, folder: Path = FOLDER) -> Path:
    """Write a run's network where `pretrained` finds it: its weights, and a record of the run."""
    from safetensors.torch import save

    rounded = {key: value.half() for key, value in run.weights.items()}
    # Counted again, since the rounded network is the one that readers get.
    test = data.load(run.recipe.dataset, run.device).test
    network = replace(run, weights=rounded).model()
    errors = loop.count_errors(network, test.images, test.labels)
    content = save(rounded)
    record = {
        "recipe": run.recipe.as_dict(),
        "metrics": run.metrics | {"test_errors": errors, "test_accuracy": 1 - errors / len(test)},
        "metrics_before_rounding": run.metrics,
        "seconds": run.seconds,
        "provenance": run.provenance,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    # The record last: a network without one is not listed, and so never read half-written.
    files.put(folder / f"{name}.safetensors", content)
    record["digest"] = files.digest(record)
    text = json.dumps(record, indent=1, sort_keys=True)
    files.put(folder / f"{name}.json", f"{text}\n".encode())
    return folder / f"{name}.safetensors"
