"""What a chapter needs of its page: checked parameters, a colophon.

Importing it needs nothing of what renders the book, so that chapters run on Colab too.
"""

import ast
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from numbers import Real
from typing import Any

import numpy as np
import torch
from IPython.display import Markdown

from kdlib import check, data, losses
from kdlib.provenance import processor, version

PROFILES = ("smoke", "quick", "full")
Values = Mapping[str, Any]
# A rate or factor above is a slip, and a temperature above is refused by the soft loss.
_POSITIVE = check.number(0, losses.HIGHEST_IN_FLOAT64, ends="(]")


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

    positive: name -> a number above 0, up to a million; count: a whole number from 1;
    fraction: a number from 0 to 1; in each, a list is checked item by item and must not be empty.
    Further keywords: name = (value, the values that are allowed).
    """
    named = {"profile": (profile, PROFILES), "dataset": (dataset, data.names()), **choices}
    # One list, so that all of them are refused in one way.
    rules = [
        *((name, given, _choice(allowed)) for name, (given, allowed) in named.items()),
        ("device", device, check.Rule("text, such as 'auto' or 'cpu'", str.strip)),
        ("seed", seed, check.whole()),
        *((name, given, _POSITIVE) for name, given in (positive or {}).items()),
        *((name, given, check.COUNT) for name, given in (count or {}).items()),
        *((name, given, check.number(0, 1)) for name, given in (fraction or {}).items()),
    ]
    for name, given, rule in rules:
        _check(name, given, rule)
    data.resolve_device(device)


def _choice(allowed: Sequence[Any]) -> check.Rule:
    def read(given: Any) -> Any:
        # 1 and True are equal, but not the same choice.
        if given not in allowed or isinstance(given, bool) != isinstance(allowed[0], bool):
            raise ValueError
        return given

    return check.Rule(f"one of {', '.join(map(repr, allowed))}", read)


def _check(name: str, given: Any, rule: check.Rule) -> None:
    """Raise ValueError unless a parameter, or each item of a list, is as the rule has it."""
    if isinstance(given, list | tuple | np.ndarray):
        expected = f"a list, each {rule.expected}"
        if not len(given):
            check.refuse(f"parameter {name}", given, expected)
        rule = check.each(rule, expected)
    elif isinstance(given, str) and given.startswith("["):
        # papermill's -p gives a list as text, which only some chapters read as one.
        hint = f"{rule.expected}; a list is given with papermill's -y '{name}: {given}'"
        rule = check.Rule(hint, rule.read)
    check.value(f"parameter {name}", given, rule)


def listed(value: Any) -> list[Any]:
    """A parameter that is a list; `papermill -p NAME '[1, 4]'` gives it as text.

    Raises ValueError for what is no list of numbers.
    """
    # Not eval: a parameter is data, whoever gives it.
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = None
    # Numbers, since a chapter may sort them before it checks them.
    if not isinstance(found, list | tuple) or not all(isinstance(item, Real) for item in found):
        raise ValueError(f"got {check.shown(value)}: expected a list such as [1, 4, 20]")
    return list(found)


def colophon(profile: str, dataset: str, device: str = "auto", seeds: Any = 0) -> Markdown:
    """What this page ran on, as a table: profile, dataset, device, versions, seeds, date."""
    # How many images there are differs between MNIST and the sample that may stand for it.
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
        "versions": f"kdlib {version()}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    text = "\n".join(["| what | this page ran on |", "|---|---|", *lines])
    return Markdown(text)  # type: ignore[no-untyped-call]
