"""What chapters need of a page: checked parameters, figures in the text, a colophon."""

import ast
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from IPython.display import Markdown

from kdlib import data

Check = tuple[Any, Callable[[Any], bool], str]  # value, what must hold of it, in words


def check_parameters(*, dataset: str, device: str, **checks: Check) -> None:
    """Refuse a wrong parameter before anything is trained.

    Each check is name=(value, holds, "what was expected"); a TypeError inside `holds` counts
    as not holding. Raises ValueError that names the parameter, its value, what was expected.
    """
    if dataset not in data.names():
        raise ValueError(f"dataset is {dataset!r}: expected one of {', '.join(data.names())}")
    data.resolve_device(device)
    for name, (value, holds, expected) in checks.items():
        try:
            good = bool(holds(value))
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"{name} is {value!r}: expected {expected}")


def listed(value: Any) -> list[Any]:
    """A parameter that is a list; `papermill -p NAME '[1, 4]'` gives it as text.

    Raises ValueError for text that is no list.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, list | tuple):
        raise ValueError(f"got {value!r}: expected a list such as [1, 4, 20]")
    return list(found)


def glue(name: str, value: Any) -> None:
    """Keep a figure for the text of any page; without MyST-NB (on Colab) nothing."""
    try:
        from myst_nb import glue as keep
    except ImportError:
        return
    keep(name, value, display=False)


def colophon(*, profile: str, dataset: str, device: str, seeds: Any) -> Markdown:
    """What the page ran on: profile, dataset, device, versions, date, seeds.

    seeds: a list of them, or what should be said of them.
    """
    where = data.resolve_device(device)
    cuda = where.type == "cuda"
    name = torch.cuda.get_device_name(where) if cuda else f"CPU ({platform.machine()})"
    if not isinstance(seeds, str):
        seeds = ", ".join(map(str, seeds))
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "torchvision", "kdlib"))
    rows = {
        "Profile": profile,
        "Dataset": dataset,
        "Device": f"{name}, {torch.get_num_threads()} threads",
        "Versions": f"Python {platform.python_version()}, {packages}",
        "Date": datetime.now(UTC).date().isoformat(),
        "Seeds": seeds,
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return Markdown("\n".join(["| This page ran with | |", "|---|---|", *lines]))
