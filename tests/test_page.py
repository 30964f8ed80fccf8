"""What notebooks use of the press: anywhere, with or without what renders the book."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT

from kdlib.book import page, plots

GOOD: dict[str, Any] = {"profile": "smoke", "dataset": "mnist-5k", "device": "cpu", "seed": 0}

# Stands for Colab, where none of these are installed; in a folder that holds kdlib uninstalled.
BARE = """
import importlib.metadata, sys
for name in ("myst_nb", "papermill", "jupyter_book", "sphinx", "nbformat", "yaml", "psutil"):
    sys.modules[name] = None
real = importlib.metadata.version
def version(name):
    if name == "kdlib":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from kdlib.book import page, plots, reference
plots.use()
page.check_parameters(profile="quick", dataset="mnist-5k", device="cpu", seed=0)
reference.results("07_mnist_reproduction")["teacher"]
print(page.colophon("quick", "mnist-5k", "cpu").data)
"""


def test_a_notebook_needs_no_book_package_and_no_installed_kdlib(tmp_path: Path) -> None:
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{BARE}"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert told.returncode == 0, told.stderr
    assert "kdlib not installed, PyTorch" in told.stdout


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"profile": "huge"}, "profile is 'huge': expected one of 'smoke', 'quick', 'full'"),
        ({"dataset": "minst"}, "dataset is 'minst': expected one of 'mnist'"),
        ({"seed": -1}, "seed is -1: expected a whole number"),
        ({"seed": True}, "seed is True"),
        ({"positive": {"rate": 0}}, r"rate is 0: expected a number in \(0, 1e\+06\]"),
        ({"positive": {"temperature": 1e30}}, "temperature is 1e\\+30: expected a number in"),
        (
            {"positive": {"rates": [1, -1]}},
            r"rates is \[1, -1\]: expected a list, each a",
        ),
        ({"positive": {"rates": []}}, r"rates is \[\]: expected a list"),
        ({"count": {"steps": 0.5}}, "steps is 0.5: expected a whole number, 1 or more"),
        ({"count": {"steps": "[1, 2]"}}, "steps is .*papermill's -y 'steps: "),
        ({"fraction": {"share": 1.5}}, r"share is 1.5: expected a number in \[0, 1\]"),
        ({"digit": (11, tuple(range(10)))}, "digit is 11: expected one of 0, 1, 2"),
        ({"digit": (True, (0, 1))}, "digit is True"),
        ({"flag": (1, (True, False))}, "flag is 1: expected one of True, False"),
    ],
)
def test_a_bad_parameter_is_named_with_what_was_expected(
    wrong: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"parameter {expected}"):
        page.check_parameters(**GOOD | wrong)


def test_good_parameters_pass_numpys_too() -> None:
    rates = {"rate": 1, "rates": [0.5, np.float32(2)], "more": np.array([1, 2])}
    counts = {"n": np.int64(3), "widths": [30, 300]}
    choices = {"digit": (np.int64(3), (3, 4)), "flag": (False, (True, False))}
    shares = {"share": [0, 1.0]}
    page.check_parameters(**GOOD, positive=rates, count=counts, fraction=shares, **choices)


def test_a_list_may_come_as_text() -> None:
    assert page.listed("[1, 4.5]") == page.listed((1, 4.5)) == [1, 4.5]
    for wrong in ("1", "[1", 4, "(" * 50_000, [1, "x"], [None], [[1]]):
        with pytest.raises(ValueError, match="expected a list such as"):
            page.listed(wrong)


def test_a_readers_own_settings_do_not_reach_the_books_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plots.use()
    book = dict(plt.rcParams)
    for name, value in {"text.usetex": True, "axes.facecolor": "black", "font.size": 3}.items():
        monkeypatch.setitem(plt.rcParams, name, value)
    plots.use()
    assert {name: value for name, value in plt.rcParams.items() if book[name] != value} == {}
