"""Nonsense as parameters: refused in one line, before anything starts."""

import contextlib
import functools
import io
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT
from helpers import blobs

import kdlib
from kdlib import data, losses
from kdlib.book import chapters, cli, execute
from torture import ordeal
from torture.damage import replaced
from torture.ordeal import Lost, Tally, Wrong

NESTED: Any = functools.reduce(lambda inner, _: [inner], range(5000), [])
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


class Unspeakable:
    """A value that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no words for it")


# No number, no name, no list of numbers, whatever is expected.
VALUES = [
    None, math.nan, math.inf, -math.inf, 10**30000, -1, -0.5, 1j, b"\xff", "", " ", "ü", "1\n2",
    "\u202e1", "🎲" * 3000, "\ud800", "\x00", {}, {"a": 1}, set(), [], [[]], [[1, [2]], 3], NESTED,
    CYCLE, [math.nan], [None], ["x", 1], [1, math.inf], [-1], [True], object(), len, int,
    Unspeakable(), torch.ones(40, 40), np.ones((40, 40)), np.float64("nan"), slice(3), ...,
]  # fmt: skip
TEXTS = [
    "", " ", "nan", "NaN", "inf", "-inf", "1e999", "-1e999", "None", "...", "{}", "{'a': 1}",
    "[]", "[[]]", "[[1, [2]], 3]", "[nan]", "[None]", "['x', 1]", "[1, 1e999]", "[-1]", "[True]",
    "()", "1j", "b'x'", "-1", "-0.5", "1 2", "1_", "0x", "ü", "1\n2", "\u202e1", "🎲" * 3000,
    "\udcff", "9" * 5000, "0x" + "f" * 5000, "[" * 300, "[" * 90 + "]" * 90, "(" * 50000,
    "+" * 50000 + "1", "lambda: 0", "__import__('os')", "10**10", "{seed}", "%s", "$HOME", "\\",
]  # fmt: skip


def noise(rng: random.Random) -> str:
    """Any characters, but for a null, which no command line can hold."""
    drawn = (chr(rng.choice([rng.randrange(1, 128), rng.randrange(1, 0xD800)])) for _ in range(9))
    return "".join(drawn)


# --- the chapters and the command line


def of_commands(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Arguments of `kdlib`, in this process; a chapter's own check comes after the press's."""
    with in_the_book(folder):
        return ordeal.repeat(a_command, rng, folder / "trials", ordeal.times(650, budget))


def of_chapters(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Parameters as papermill or JupyterLab give them: a chapter's own check alone."""
    with in_the_book(folder):
        return ordeal.repeat(a_chapter, rng, folder / "trials", ordeal.times(350, budget))


@contextlib.contextmanager
def in_the_book(folder: Path) -> Any:
    """The book as working directory, without data, and a press that only checks."""

    def offline(*_: Any) -> None:
        raise data.DataError("mnist is not here and could not be downloaded")

    (folder / "data").mkdir(parents=True)
    os.environ["KDLIB_DATA"] = str(folder / "data")
    once = functools.cache(chapters.parameters)
    with (
        contextlib.chdir(ROOT),
        replaced(chapters, parameters=once),
        replaced(execute, execute=check_only, at_once=lambda count: count),
        replaced(data, fetch=offline),
        replaced(data.files, fetch=offline),
    ):
        yield


class Started(Exception):
    """Nonsense was taken for sense."""


def check_only(jobs: list[chapters.Job], *_: Any, **__: Any) -> None:
    """In the place of the press: the cells that a chapter begins with."""
    for job in jobs:
        try:
            begin(job.chapter, job.parameters)
        except ValueError as error:
            raise chapters.BookError(f"{job.chapter} failed: {error}") from None
    raise Started(jobs)


@functools.cache
def first_cells(chapter: str) -> list[Any]:
    """A chapter's parameters and its check of them, compiled."""
    cells = chapters.read_notebook(chapters.root() / "book" / f"{chapter}.ipynb").cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    tagged = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    check = next(source for source in sources if "check_parameters(" in source)
    return [compile(source, chapter, "exec") for source in (tagged, check)]


def begin(chapter: str, parameters: dict[str, Any]) -> None:
    """Run the first cells of a chapter with some parameters. Raises what its check raises."""
    defaults, check = first_cells(chapter)
    space: dict[str, Any] = {}
    exec(defaults, space)
    # The fastest that there is, and always there.
    exec(check, space | {"dataset": "mnist-5k", "device": "cpu"} | parameters)


def a_command(rng: random.Random, folder: Path) -> None:
    """One command with at least one bad argument."""
    arguments = bad_command(rng)
    said, told = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
            status = cli.main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Started:
        raise Wrong(f"started with {short(arguments)}") from None
    # `\r` and the like are a line's end only for `splitlines`.
    lines = said.getvalue().rstrip("\n").split("\n")
    refused = status == 1 and len(lines) == 1 and lines[0].startswith("kdlib: ")
    # argparse says how a command is used before it says what is wrong.
    refused |= status == 2 and lines[0].startswith("usage: ") and "error: " in lines[-1]
    if not refused:
        raise Lost(f"{short(arguments)} ended with {status} and {len(lines)} lines: {lines[-1]}")


def bad_command(rng: random.Random) -> list[str]:
    known = chapters.chapters()
    some = rng.sample(known, rng.choice([1, 1, 1, 2, len(known)]))
    text = rng.choice(TEXTS) if rng.random() < 0.8 else noise(rng)
    kind = rng.random()
    if kind < 0.75:
        name = rng.choice([*chapters.parameters(some[0])])
        if chapters.defaults(some[0])[name] is False and text == "True":
            text = "1"
        more = ["-p", "seed", "3"] if rng.random() < 0.3 and name != "seed" else []
        return ["run", *some, *more, "-p", name, text]
    return rng.choice(
        [
            ["run", *some, "-p", text, text],
            ["run", text or "x"],
            ["run", *some, "--jobs", text if text != "10**10" else "0"],
            ["run", *some, "--profile", text],
            ["run", *some, "-p", "profile", text],
            ["data", text],
            ["runs", "--prune", text],
            ["build", "--profile", text],
            ["reference", "record", text or "x"],
            ["reference", "record", "--profile", text or "x", some[0]],
            ["", text],
            [text],
        ]
    )


def a_chapter(rng: random.Random, folder: Path) -> None:
    """One to three parameters of a chapter, one of them bad."""
    chapter = rng.choice(chapters.chapters())
    defaults = chapters.defaults(chapter)
    name = rng.choice([*defaults])
    given = {rng.choice([*defaults]): ... for _ in range(rng.randrange(3))}
    given = {other: defaults[other] for other in given} | {name: rng.choice(VALUES)}
    refuses(functools.partial(begin, chapter, given), name, f"{chapter}: {short(given)}")


# --- kdlib's own functions


def of_functions(rng: random.Random, folder: Path, budget: float) -> Tally:
    """Bad calls of fit, Recipe and the losses."""
    data.register("blobs", blobs)
    return ordeal.repeat(a_function, rng, folder, ordeal.times(200, budget))


def a_function(rng: random.Random, folder: Path) -> None:
    """One bad call."""
    rng.choice([a_recipe, a_fit, a_loss])(rng)


def a_recipe(rng: random.Random) -> None:
    """A field of a recipe is nonsense."""
    field = rng.choice([*vars(kdlib.Recipe("mlp-8", dataset="blobs"))])
    value = rng.choice(VALUES)
    # The fields that may be empty.
    if (field in ("steps", "max_norm") and value is None) or (
        field in ("omit", "teacher") and type(value) is list and value in ([],)
    ):
        return
    if field == "omit" and value == [True]:
        return
    given: dict[str, Any] = {"model": "mlp-8", "dataset": "blobs"} | {field: value}
    call = functools.partial(kdlib.Recipe, **given)
    if rng.random() < 0.5 and field != "model":
        call = functools.partial(kdlib.Recipe("mlp-8", dataset="blobs").replace, **{field: value})
    refuses(call, field, f"Recipe, {short({field: value})}")


FIT = [
    "epochs", "steps", "batch_size", "learning_rate", "momentum", "schedule", "max_norm", "jitter",
    "rows", "precision", "seed", "report_every", "data",
]  # fmt: skip


def a_fit(rng: random.Random) -> None:
    """A setting of fit is nonsense: its network stays as it was."""
    images, labels, *_ = blobs()
    network = torch.nn.Sequential(torch.nn.Flatten(-3), torch.nn.Linear(784, 10))
    before = [weight.clone() for weight in network.parameters()]
    field, value = rng.choice(FIT), rng.choice(VALUES)
    if field in ("steps", "max_norm", "report_every", "rows") and value is None:
        return
    given: dict[str, Any] = {"data": [images, labels], "steps": 2, field: value}
    if field == "data":
        cut = rng.choice([[images, labels[:-1]], [images, labels[:0]], [images[:0], labels[:0]]])
        given["data"] = rng.choice([value, cut, [images, value], [value, labels]])
    call = functools.partial(kdlib.fit, network, loss=losses.cross_entropy, **given)
    refuses(call, field, f"fit, {short({field: value})}")
    if not all(map(torch.equal, before, network.parameters())):
        raise Wrong(f"fit has trained with {short({field: value})}")


def a_loss(rng: random.Random) -> None:
    """Logits that do not fit, temperatures and weights that are none."""
    logits = torch.randn(4, 10)
    labels = torch.arange(4)
    other = rng.choice([logits[:, :9], logits[:3], logits[None], logits[0]])
    numbers = [math.nan, math.inf, -math.inf, -1, "4", None, [], 1e7 * 1e9, -1e-300, 1j, NESTED]
    number = rng.choice(numbers)
    weight = rng.choice([math.nan, 1.5, -0.1, "1", None, [0.5], True])
    calls: dict[str, Callable[[], Any]] = {
        "temperature": lambda: losses.soft_loss(logits, logits, number),
        "the temperature": lambda: losses.distillation_loss(
            logits, logits, labels, temperature=number, hard_weight=0.5
        ),
        "hard_weight": lambda: losses.distillation_loss(
            logits, logits, labels, temperature=2, hard_weight=weight
        ),
        "logits": lambda: losses.soft_loss(logits, other, 2),
        "targets": lambda: losses.cross_entropy(logits, labels[:3]),
        "hard_weight ": lambda: losses.distillation_loss(
            logits, logits, None, temperature=2, hard_weight=0.5
        ),
        "mean": lambda: losses.ensemble_soft_targets([logits], 2, mean=weight),
    }
    name = rng.choice([*calls])
    refuses(calls[name], name.split()[-1], f"{name}: {short([number, weight, other.shape])}")


def refuses(call: Callable[[], Any], name: str, what: str) -> None:
    """Wrong unless a call raises a ValueError; Lost unless that is one line with the name."""
    try:
        call()
    # A device that this machine lacks is one that another has.
    except (ValueError, RuntimeError) as error:
        said = str(error)
        if type(error) is RecursionError or (type(error) is RuntimeError and name != "device"):
            raise Lost(f"{what}: {error!r}") from None
    except Exception as error:
        if what.startswith("fit") and "\n" not in str(error):
            return
        raise Lost(f"{what}: {type(error).__name__}: {short(error)}") from None
    else:
        raise Wrong(f"accepted: {what}")
    if "\n" in said:
        raise Lost(f"{what}: not one line: {said[:200]!r}")
    # `page.listed` is not told the name; fit's tensors and sequences are checked by code that is in
    # every run's key, where better words would cost all recorded runs.
    stem = {"student": "model"}.get(name, name.removesuffix("s").split("_")[0])
    if stem not in said and not said.startswith("got ") and not what.startswith("fit"):
        raise Lost(f"{what}: {name} is not named: {said[:200]!r}")


def short(value: Any) -> str:
    """A value for a report."""
    try:
        return repr(value)[:200]
    except Exception:
        return f"a {type(value).__name__} of {type(next(iter(value), None)).__name__}"
