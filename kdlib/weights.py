"""Trained networks that come with kdlib, for readers without a GPU: rounded to 16 bits."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib import data, files, loop
from kdlib.recipe import Recipe
from kdlib.runs import Run

FOLDER = Path(__file__).parent / "pretrained_weights"


def names(folder: Path = FOLDER) -> list[str]:
    """The names that `pretrained` knows."""
    return sorted(path.stem for path in folder.glob("*.json"))


def pretrained(name: str, device: str | torch.device = "auto", *, folder: Path = FOLDER) -> Run:
    """A trained network of the paper's MNIST experiment, as the run that made it.

    name: one of `names()`, such as "mnist-teacher". The run has its recipe, its metrics
    (counted with the rounded weights), its provenance and its weights, float32 from float16;
    its curves are left out. The store has no part in it.
    Raises ValueError for an unknown name, or a file that is not as it was recorded.
    """
    from safetensors.torch import load

    if name not in names(folder):
        raise ValueError(f"no pretrained {name!r}: expected one of {', '.join(names(folder))}")
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.safetensors"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{path} is not the file that was recorded: install kdlib anew")
    return Run(
        Recipe.from_dict(record["recipe"]),
        record["metrics"],
        {},
        record["seconds"],
        record["provenance"],
        {key: value.float() for key, value in load(content).items()},
        True,
        data.resolve_device(device),
    )


def keep(name: str, run: Run, folder: Path = FOLDER) -> Path:
    """Write a run's network where `pretrained` finds it: weights, and a record beside them."""
    from safetensors.torch import save

    rounded = {key: value.half() for key, value in run.weights.items()}
    content = save(rounded)
    record = {
        "recipe": run.recipe.as_dict(),
        "metrics": run.metrics | _errors(run, rounded),
        "metrics_before_rounding": run.metrics,
        "seconds": run.seconds,
        "provenance": run.provenance,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    files.put(folder / f"{name}.safetensors", content)
    text = json.dumps(record, indent=1, sort_keys=True)
    files.put(folder / f"{name}.json", f"{text}\n".encode())
    return folder / f"{name}.safetensors"


def _errors(run: Run, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The test errors of a run's network with other weights."""
    test = data.load(run.recipe.dataset, run.device).test
    network = replace(run, weights=weights).model()
    errors = loop.count_errors(network, test.images, test.labels)
    return {"test_errors": errors, "test_accuracy": 1 - errors / len(test)}
