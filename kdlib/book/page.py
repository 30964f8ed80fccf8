"""What a chapter needs of its page: figures for the text, checked parameters, a colophon."""

import ast
import math
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from IPython.display import Markdown

from kdlib import data
from kdlib.provenance import processor

PROFILES = ("smoke", "quick", "full")
Values = Mapping[str, Any]


def glue(name: str, value: Any) -> None:
    """Keep a value under a name, for `{glue:text}` in the text of this or another page.

    Does nothing where myst-nb is not installed, such as on Colab.
    """
    if find_spec("myst_nb") is not None:
        from myst_nb import glue as keep

        plain = value.item() if hasattr(value, "item") else value  # a page formats numbers
        keep(name, plain, display=False)


def check_parameters(
    *,
    profile: str,
    dataset: str,
    device: str,
    seed: int,
    positive: Values | None = None,
    count: Values | None = None,
    fraction: Values | None = None,
    **choices: tuple[Any, tuple[Any, ...]],
) -> None:
    """Raise ValueError for the first bad parameter: its name, its value, what was expected.

    positive: name -> a number above 0; count: a whole number from 1; fraction: a number
    from 0 to 1; in each, a list is checked item by item and must not be empty.
    Further keywords: name = (value, the values that are allowed).
    """
    _one_of("profile", profile, PROFILES)
    _one_of("dataset", dataset, tuple(data.names()))
    _each("seed", seed, "a whole number from 0", lambda x: _whole(x) and x >= 0)
    for name, value in (positive or {}).items():
        _each(name, value, "a number above 0", lambda x: _number(x) and x > 0)
    for name, value in (count or {}).items():
        _each(name, value, "a whole number from 1", lambda x: _whole(x) and x >= 1)
    for name, value in (fraction or {}).items():
        _each(name, value, "a number from 0 to 1", lambda x: _number(x) and 0 <= x <= 1)
    for name, (value, allowed) in choices.items():
        _one_of(name, value, allowed)
    data.resolve_device(device)


def listed(value: Any) -> list[Any]:
    """A parameter that is a list; `papermill -p NAME '[1, 4]'` gives it as text.

    Raises ValueError for what is no list.
    """
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        found = None
    if not isinstance(found, list | tuple):
        raise ValueError(f"got {value!r}: expected a list such as [1, 4, 20]")
    return list(found)


def colophon(profile: str, dataset: str, device: str = "auto", seeds: Any = 0) -> Markdown:
    """What this page ran on, as a table: profile, dataset, device, versions, seeds, date."""
    used = data.load(dataset, device)
    where = data.resolve_device(device)
    threads = torch.get_num_threads()
    plain = f"{where.type.upper()} ({processor()}, {threads} thread{'s'[: threads > 1]})"
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else plain
    rows = {
        "profile": profile,
        "dataset": f"{used.name}: {len(used.full):,} training and {len(used.test):,} test images",
        "device": name,
        "seeds": ", ".join(map(str, seeds)) if isinstance(seeds, list | tuple | range) else seeds,
        "versions": f"kdlib {version('kdlib')}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    text = "\n".join(["| what | this page ran on |", "|---|---|", *lines])
    return Markdown(text)  # type: ignore[no-untyped-call]


def _each(name: str, value: Any, expected: str, holds: Callable[[Any], bool]) -> None:
    items = value if isinstance(value, list | tuple) else [value]
    if items and all(holds(item) for item in items):
        return
    kind = f"a list, each {expected}" if isinstance(value, list | tuple) else expected
    hint = ""
    if isinstance(value, str) and value.startswith("["):  # papermill's -p gives lists as text
        hint = f"; a list is given with papermill's -y '{name}: {value}'"
    raise ValueError(f"parameter {name} is {value!r}: expected {kind}{hint}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"parameter {name} is {value!r}: expected one of {names}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _whole(value)
